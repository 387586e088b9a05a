"""Our TFLite files beside those of TensorFlow's own converter, from the same network."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from splitee.client import Settings
from splitee.graph import Graph, Op
from splitee.ops import Array
from step_harness import case, local

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
if importlib.util.find_spec("tensorflow") is None:
    pytest.skip(
        "TensorFlow is not installed: pip install 'hetero-splitee[oracle]'", allow_module_level=True
    )

from splitee_exporters.tflite import segment_to_tflite


@pytest.fixture(scope="module")
def tensorflow() -> Any:
    """TensorFlow, whose import takes long, and warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("tensorflow")


def keras_model(tf: Any, graph: Graph) -> Any:
    """The same network in Keras; its outputs are the tensor that is sent, and the logits."""
    layers = tf.keras.layers
    channels, height, width = graph.input_shape
    x = tf.keras.Input((height, width, channels), batch_size=1)
    tensors: dict[str, Any] = {graph.input: x}
    values: list[tuple[Any, list[Array]]] = []

    def layer(op: Op, made: Any, *weights: Array) -> Any:
        tensors[op.name] = made(tensors[op.inputs[0]])
        values.append((made, list(weights)))

    def weights(op: Op, *roles: str) -> list[Array]:
        return [graph.weights[op.weights[role]] for role in roles if role in op.weights]

    for op in graph.ops:
        if op.kind in ("conv2d", "max_pool", "avg_pool"):
            if any(op.attrs["padding"]):
                assert op.kind == "conv2d", "Keras pads with zeros"
                padding = [(p, p) for p in op.attrs["padding"]]
                tensors[op.name] = layers.ZeroPadding2D(padding)(tensors[op.inputs[0]])
                op = Op(op.kind, op.name, (op.name,), op.attrs, op.weights)
            kernel, strides = op.attrs["kernel"], op.attrs["stride"]
        match op.kind:
            case "conv2d" if op.attrs["groups"] > 1:
                kernels, *bias = weights(op, "weight", "bias")
                made = layers.DepthwiseConv2D(kernel, strides, use_bias=bool(bias))
                layer(op, made, kernels.transpose(2, 3, 0, 1), *bias)
            case "conv2d":
                kernels, *bias = weights(op, "weight", "bias")
                made = layers.Conv2D(len(kernels), kernel, strides, use_bias=bool(bias))
                layer(op, made, kernels.transpose(2, 3, 1, 0), *bias)
            case "batch_norm":
                made = layers.BatchNormalization(epsilon=op.attrs["epsilon"])
                layer(op, made, *weights(op, "weight", "bias", "mean", "variance"))
            case "relu":
                layer(op, layers.ReLU())
            case "relu6":
                layer(op, layers.ReLU(6.0))
            case "add":
                tensors[op.name] = layers.Add()([tensors[name] for name in op.inputs])
            case "max_pool":
                layer(op, layers.MaxPooling2D(kernel, strides))
            case "avg_pool":
                layer(op, layers.AveragePooling2D(kernel, strides))
            case "branch":
                tensors[op.name] = tensors[op.inputs[0]]
            case "linear":
                weight, *bias = weights(op, "weight", "bias")
                shape = graph.shapes[op.inputs[0]]
                tensors[op.name] = layers.Flatten()(tensors[op.inputs[0]])
                made = layers.Dense(len(weight))
                columns = weight.reshape(-1, *shape).transpose(2, 3, 1, 0).reshape(-1, len(weight))
                layer(Op(op.kind, op.name, (op.name,)), made, columns, *bias)
            case _:
                raise AssertionError(op.kind)
    model = tf.keras.Model(x, [tensors[graph.cut], tensors[graph.logits]])
    for made, arrays in values:
        made.set_weights(arrays)
    return model


def converted(tf: Any, graph: Graph, samples: Array) -> bytes:
    """What TFLiteConverter makes of it in 8 bits; samples: real, channels first."""

    def dataset() -> Iterator[list[Array]]:
        for sample in samples.transpose(0, 2, 3, 1):
            yield [sample[None]]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converter = tf.lite.TFLiteConverter.from_keras_model(keras_model(tf, graph))
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = dataset
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
        data: bytes = converter.convert()
    return data


@dataclass(frozen=True)
class Answer:
    """An output of a file."""

    real: Array  # channels first
    lsb: float  # its scale


def answers(data: bytes, samples: Array) -> dict[int, Answer]:
    """The outputs of a file for real samples, channels first, by their number of dimensions."""
    module = importlib.import_module("ai_edge_litert.interpreter")
    interpreter = module.Interpreter(
        model_content=data, experimental_op_resolver_type=module.OpResolverType.BUILTIN_REF
    )
    interpreter.allocate_tensors()
    (put,) = interpreter.get_input_details()
    scale, zero_point = put["quantization"]
    whole = np.clip(np.round(samples.transpose(0, 2, 3, 1) / scale) + zero_point, -128, 127)
    found: dict[int, list[Array]] = {}
    scales: dict[int, float] = {}
    for sample in whole.astype(np.int8):
        interpreter.set_tensor(put["index"], sample[None])
        interpreter.invoke()
        for output in interpreter.get_output_details():
            scale, zero_point = output["quantization"]
            value = scale * (interpreter.get_tensor(output["index"]).astype(float) - zero_point)
            real = value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
            found.setdefault(value.ndim, []).append(real)
            scales[value.ndim] = scale
    return {n: Answer(np.concatenate(values), scales[n]) for n, values in found.items()}


@pytest.mark.parametrize("kind", ["resnet8-batch", "resnet20-batch", "mobilenet"])
def test_is_as_near_to_pytorch_as_tensorflows_own_file_and_no_larger(
    kind: str, tensorflow: Any
) -> None:
    the_case = case(kind)
    build, images = the_case.build, the_case.images.x
    graph = build.graph.at(build.stages[-1].cut, upto=False)
    scale, shift = (np.array(v, np.float32)[:, None, None] for v in (build.scale, build.shift))
    samples = images * scale + shift

    activations, logits = (t.numpy() for t in local(the_case, Settings(0.1)).infer(images))
    ours = segment_to_tflite(build, images).data
    theirs = converted(tensorflow, graph, samples)
    own, other = answers(ours, samples), answers(theirs, samples)
    for n, expected in ((4, activations), (2, logits)):
        error, allowed = (np.abs(a[n].real - expected).max() for a in (own, other))
        assert error <= allowed + other[n].lsb
    assert len(ours) <= len(theirs)
