"""Exporters whose packages are extras say which one is not installed."""

from __future__ import annotations

import importlib
import sys

import pytest

from splitee.errors import MissingTool


@pytest.mark.parametrize("module", ["onnx", "onnx_int8"])
def test_without_onnx_its_exporters_say_what_to_install(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("splitee_exporters.onnx", "splitee_exporters.onnx_int8"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingTool, match=r"^onnx is not installed: pip install 'hetero-spli"):
        importlib.import_module(f"splitee_exporters.{module}")
