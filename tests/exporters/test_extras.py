"""Exporters whose packages are extras say which one is not installed."""

from __future__ import annotations

import importlib
import sys

import pytest

from splitee.errors import MissingTool


@pytest.mark.parametrize("module", ["onnx", "onnx_int8", "onnx_backward", "onnx_train"])
def test_without_onnx_its_exporters_say_what_to_install(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnx", "onnx_int8", "onnx_backward", "onnx_train"):
        monkeypatch.delitem(sys.modules, f"splitee_exporters.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingTool, match=r"^onnx is not installed: pip install 'hetero-spli"):
        importlib.import_module(f"splitee_exporters.{module}")


def test_without_onnxruntime_an_edge_client_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "splitee_host.onnx_learner", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingTool, match=r"^onnxruntime is not .* 'hetero-splitee\[edge\]'$"):
        importlib.import_module("splitee_host.onnx_learner")
