"""LiteRT's reference kernels as the oracle of kernels in 8 bits: models of one operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Tensor:
    """Integers and what they mean: scale * (value - zero); of weights, a scale a channel."""

    values: Array
    scale: Any  # float32, or an array of them along axis
    zero: int = 0
    axis: int = 0


@dataclass(frozen=True)
class Operator:
    """One operator of TensorFlow Lite's, by the names of its schema, and its options."""

    name: str
    options: str
    settings: dict[str, Any]
    version: int = 1


def quantize_multiplier(real: float) -> tuple[int, int]:
    """The int32 and the shift that stand for a factor: Jacob et al., arXiv 1712.05877, 2.2."""
    fraction, shift = math.frexp(real)
    multiplier = round(fraction * 2**31)
    return (multiplier // 2, shift + 1) if multiplier == 2**31 else (multiplier, shift)


def _tensor(name: str, t: Tensor, buffer: int) -> Any:
    made = schema.TensorT()
    made.name, made.shape, made.buffer = name, list(t.values.shape), buffer
    made.type = {"int8": schema.TensorType.INT8, "int32": schema.TensorType.INT32}[
        t.values.dtype.name
    ]
    scales = np.atleast_1d(np.asarray(t.scale, np.float32))
    made.quantization = schema.QuantizationParametersT()
    made.quantization.scale = scales
    made.quantization.zeroPoint = np.full(scales.shape, t.zero, np.int64)
    made.quantization.quantizedDimension = t.axis
    return made


def model(
    operator: Operator, inputs: Sequence[Tensor], constants: Sequence[Tensor], output: Tensor
) -> bytes:
    """A .tflite file of one operator; of inputs and output the values are but shapes."""
    buffers = [schema.BufferT()]
    tensors = [_tensor(f"input{i}", t, 0) for i, t in enumerate(inputs)]
    for i, t in enumerate(constants):
        buffers.append(schema.BufferT())
        buffers[-1].data = np.frombuffer(t.values.tobytes(), np.uint8)
        tensors.append(_tensor(f"constant{i}", t, i + 1))
    op = schema.OperatorT()
    op.inputs, op.outputs = list(range(len(tensors))), [len(tensors)]
    op.builtinOptionsType = getattr(schema.BuiltinOptions, operator.options)
    if operator.options != "NONE":
        op.builtinOptions = getattr(schema, f"{operator.options}T")()
    for name, value in operator.settings.items():
        assert hasattr(op.builtinOptions, name)
        setattr(op.builtinOptions, name, value)
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, operator.name)
    code.version = operator.version
    graph = schema.SubGraphT()
    graph.tensors = [*tensors, _tensor("output", output, 0)]
    graph.inputs, graph.outputs = list(range(len(inputs))), [len(tensors)]
    graph.operators = [op]
    whole = schema.ModelT()
    whole.version, whole.buffers = 3, buffers
    whole.operatorCodes, whole.subgraphs = [code], [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(whole.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def run(file: bytes, *inputs: Array) -> Array:
    """What LiteRT's reference kernels make of the inputs."""
    interpreter = Interpreter(
        model_content=file, experimental_op_resolver_type=OpResolverType.BUILTIN_REF
    )
    interpreter.allocate_tensors()
    for detail, values in zip(interpreter.get_input_details(), inputs, strict=True):
        interpreter.set_tensor(detail["index"], values)
    interpreter.invoke()
    (output,) = interpreter.get_output_details()
    found: Array = interpreter.get_tensor(output["index"])
    return found
