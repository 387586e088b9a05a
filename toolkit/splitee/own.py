"""What users bring along: a class or function of a module of their own, as "module:name"."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def folder_at_hand() -> Iterator[None]:
    """Modules in the current folder are found, as python itself finds them."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def load(spec: str) -> Any:
    """What a "module:name" names. Raises whatever its import raises."""
    module, _, name = spec.partition(":")
    with folder_at_hand():
        return getattr(importlib.import_module(module), name)
