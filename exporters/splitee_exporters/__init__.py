"""Exporters: a client's segment as C, ONNX and TFLite."""
