"""The cases of wire.json, for the tests of both ends; its first lines say what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from splitee_host.wire.frame import Frame

_TABLE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))

MESSAGES: list[dict[str, Any]] = _TABLE["messages"]
CODING: list[dict[str, Any]] = _TABLE["coding"]
STREAMS: list[dict[str, Any]] = _TABLE["streams"]
SEALED: list[dict[str, Any]] = _TABLE["sealed"]
SESSION_KEYS: list[dict[str, Any]] = _TABLE["session_keys"]
WHOLE: list[dict[str, Any]] = MESSAGES + _TABLE["frames"]
"""Every case with a whole frame in it."""


def unhex(text: str | list[Any]) -> bytes:
    """The bytes of a case: a string of hex, or a list of them and of [hex, times]."""
    items = [text] if isinstance(text, str) else text
    return b"".join(
        bytes.fromhex(item) if isinstance(item, str) else bytes.fromhex(item[0]) * item[1]
        for item in items
    )


def frame_of(case: dict[str, Any]) -> Frame:
    """The frame of a case in WHOLE."""
    return Frame(case["code"], case["session"], case["sequence"], unhex(case["body"]))


def bytes_of(case: dict[str, Any]) -> bytes:
    """A case on the wire."""
    return unhex(case["bytes"])


def body_of(case: dict[str, Any]) -> bytes:
    """The body of a case."""
    return unhex(case["body"])


def title(case: dict[str, Any]) -> str:
    """The title of a case, as the name of its test."""
    text: str = case["title"]
    return text


FRAMES = {title(case): frame_of(case) for case in WHOLE}
"""The frames that the streams name."""
