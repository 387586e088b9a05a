"""The messages: their bytes, what is refused, and the C header made from them."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitee_host.wire import header, messages
from splitee_host.wire.messages import ANSWERS, MESSAGES, REQUESTS, U8, U16, Message
from vectors import wire
from vectors.wire import unhex


def message_of(case: dict[str, Any]) -> Message:
    """The message that a case names, built from its fields."""
    values = {
        name: unhex(value) if isinstance(value, (str, list)) else value
        for name, value in case["fields"].items()
    }
    return MESSAGES[case["code"]](**values)


def any_message() -> st.SearchStrategy[Message]:
    """Messages of every kind with any values that fit."""
    values: dict[str, st.SearchStrategy[Any]] = {
        "B": st.integers(0, 2**8 - 1),
        "H": st.integers(0, 2**16 - 1),
        "I": st.integers(0, 2**32 - 1),
        "Q": st.integers(0, 2**64 - 1),
        "f": st.floats(width=32, allow_nan=False),
        "s": st.binary(max_size=600),
    }
    return st.sampled_from(list(MESSAGES.values())).flatmap(
        lambda message: st.builds(
            message, **{name: values[code] for name, code in messages.layout(message)}
        )
    )


@pytest.mark.parametrize("case", wire.MESSAGES, ids=wire.title)
def test_packs_and_unpacks_the_published_bytes(case: dict[str, Any]) -> None:
    message = message_of(case)
    assert type(message).__name__ == case["message"]
    assert message.pack() == unhex(case["body"])
    assert messages.unpack(case["code"], unhex(case["body"])) == message


def test_every_message_has_published_bytes() -> None:
    assert sorted(case["code"] for case in wire.MESSAGES) == sorted(MESSAGES)


@given(message=any_message())
def test_a_message_comes_back_as_it_was_packed(message: Message) -> None:
    assert messages.unpack(message.CODE, message.pack()) == message


def test_a_float_that_is_not_a_number_stays_one() -> None:
    body = messages.Stepped(loss=math.nan, correct=0).pack()
    assert body == bytes.fromhex("00 00 c0 7f 00 00")
    answer = messages.unpack(messages.Stepped.CODE, body)
    assert isinstance(answer, messages.Stepped)
    assert math.isnan(answer.loss)


@pytest.mark.parametrize("message", MESSAGES.values(), ids=lambda message: message.__name__)
def test_refuses_a_body_of_the_wrong_length(message: type[Message]) -> None:
    codes = [code for _, code in messages.layout(message)]
    size = struct.calcsize("<" + "".join(code for code in codes if code != "s"))
    wrong = [size - 1] if size else []
    if "s" not in codes:
        wrong.append(size + 1)
    for length in wrong:
        with pytest.raises(ValueError, match=f"{message.__name__} takes {size} bytes"):
            messages.unpack(message.CODE, bytes(length))


def test_refuses_an_unknown_code() -> None:
    with pytest.raises(ValueError, match="no message has the code 0x7f"):
        messages.unpack(0x7F, b"")


@pytest.mark.parametrize(
    "message",
    [messages.Infer(count=65536), messages.Infer(count=-1), messages.Read(256, 0, 0)],
    ids=["too large", "negative", "too large for a byte"],
)
def test_refuses_to_pack_what_does_not_fit(message: Message) -> None:
    with pytest.raises(struct.error):
        message.pack()


def test_no_two_messages_share_a_code() -> None:
    assert len(MESSAGES) == len(REQUESTS) + len(ANSWERS)


def test_requests_and_answers_are_told_apart_by_the_highest_bit() -> None:
    assert all(request.CODE < 0x80 for request in REQUESTS)
    assert all(0x80 <= answer.CODE <= 0xFF for answer in ANSWERS)


@dataclass(frozen=True)
class Widened(Message):
    """Infer with a field of another width."""

    CODE = messages.Infer.CODE
    count: U8


@dataclass(frozen=True)
class Renamed(Message):
    """Infer with a field of another name."""

    CODE = messages.Infer.CODE
    samples: U16


@pytest.mark.parametrize("changed", [Widened, Renamed], ids=["width", "name"])
def test_the_schema_changes_with_a_field(
    changed: type[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = messages.schema()
    changed.__name__ = "Infer"
    monkeypatch.setitem(MESSAGES, changed.CODE, changed)
    assert messages.schema() != before


def test_the_schema_names_every_field_region_codec_and_error() -> None:
    lines = messages.description().splitlines()
    assert "04 Place samples:H position:H seed:I epoch:I steps:I" in lines
    assert "0a Write region:B offset:I content:s" in lines
    assert "region 5 GRADIENT" in lines
    assert "codec 2 INT8" in lines
    assert "error 4 OUT_OF_RANGE" in lines
    numbers = (messages.Region, messages.Codec, messages.Error)
    assert len(lines) == len(MESSAGES) + sum(map(len, numbers))


def test_regions_are_counted_from_zero_without_a_gap() -> None:
    # The firmware takes every number below REGION_COUNT for a region.
    assert [region.value for region in messages.Region] == list(range(len(messages.Region)))


def test_the_header_of_the_firmware_is_up_to_date() -> None:
    assert not header.is_stale(header.PATH), (
        f"firmware/protocol/messages.h is stale: run `{header.COMMAND}`"
    )


def test_the_header_says_in_its_first_line_what_renews_it() -> None:
    assert header.COMMAND in header.render().splitlines()[0]


def test_a_changed_or_missing_header_is_stale(tmp_path: Path) -> None:
    path = tmp_path / "messages.h"
    assert header.is_stale(path)
    path.write_text(header.render(), encoding="utf-8")
    assert not header.is_stale(path)
    path.write_text(header.render().replace("0x04u", "0x05u"), encoding="utf-8")
    assert header.is_stale(path)


def test_the_command_writes_the_header_and_checks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "messages.h"
    monkeypatch.setattr(header, "PATH", path)
    monkeypatch.setattr("sys.argv", ["header", "--check"])
    with pytest.raises(SystemExit, match=r"messages\.h is stale: run `python -m splitee_host"):
        header.main()
    monkeypatch.setattr("sys.argv", ["header"])
    header.main()
    assert path.read_text(encoding="utf-8") == header.render()
    monkeypatch.setattr("sys.argv", ["header", "--check"])
    header.main()


def test_the_header_declares_every_message_with_its_fixed_fields() -> None:
    text = header.render()
    for message in REQUESTS + ANSWERS:
        name = message.__name__
        assert f"#define MESSAGE_{name.upper()} 0x{message.CODE:02X}u\n" in text
        function = "unpack" if message in REQUESTS else "pack"
        fixed = [f.name for f in fields(message) if f.type != "Bytes"]  # type: ignore[arg-type]
        assert (f" message_{name.lower()}_{function}(" in text) == bool(fixed)
