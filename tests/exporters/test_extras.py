"""Exporters whose packages are extras say which one is not installed."""

from __future__ import annotations

import importlib
import sys
import types

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


@pytest.mark.parametrize(
    ("missing", "named"),
    [(("flatbuffers",), "flatbuffers"), (("ai_edge_litert",), "ai-edge-litert")],
)
def test_without_litert_the_tflite_exporter_says_what_to_install(
    missing: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "splitee_exporters.tflite", raising=False)
    for module in [m for m in sys.modules if m.startswith(("ai_edge_litert.", "flatbuffers."))]:
        monkeypatch.delitem(sys.modules, module)
    for module in (*missing, "tensorflow"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingTool, match=rf"^{named} is not installed: pip install 'hetero-spl"):
        importlib.import_module("splitee_exporters.tflite")


def test_where_litert_is_not_there_its_forerunners_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
    tflite = importlib.import_module("splitee_exporters.tflite")
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    monkeypatch.delitem(sys.modules, "ai_edge_litert.interpreter", raising=False)
    runtime, module = types.ModuleType("tflite_runtime"), types.ModuleType("interpreter")
    monkeypatch.setitem(sys.modules, "tflite_runtime", runtime)
    monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", module)
    names = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter")
    assert tflite.first_installed(*names) is module
