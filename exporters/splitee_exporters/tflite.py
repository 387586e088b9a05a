"""Int8Graph -> TFLite: a client's segment with its exit in 8 bits, for LiteRT and TFLite Micro.

Written operator by operator, with our own memory plan: TFLite Micro takes each tensor's place from
the metadata "OfflineMemoryAllocation". Images come in as int8, channels last, by the table that the
graph has for bytes. Outputs are ``activations``, what crosses the cut, and ``logits`` of the exit
at the cut, both int8. One sample at a time.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from splitee import arena
from splitee.errors import ExportError, FitError, MissingTool, ModelError
from splitee.int8 import LOW, Int8Graph, Int8Op, Scale
from splitee.ops import Array, Shape
from splitee.place import Build, kib
from splitee.quantize import quantize
from splitee.steps import Place, Schedule, Step, Variant
from splitee_exporters.manifest import File, Verified, made_by
from splitee_exporters.tflite_norm import norm_weights


def first_installed(*modules: str) -> Any:
    """The first of these modules that there is; raises MissingTool where there is none."""
    for module in modules:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError:
            continue
    package = modules[0].split(".")[0].replace("_", "-")
    raise MissingTool(f"{package} is not installed: pip install 'hetero-splitee[tflite]'")


flatbuffers = first_installed("flatbuffers")
schema = first_installed(
    "ai_edge_litert.schema_py_generated", "tensorflow.lite.python.schema_py_generated"
)

IMAGES, ACTIVATIONS, LOGITS = "images", "activations", "logits"
SCHEMA_VERSION = 3
IDENTIFIER = b"TFL3"
ALIGNMENT = 16  # bytes: what TFLite Micro reads buffers in place by
INPUT = "input"  # what a schedule calls the buffer that is filled before it begins
OFFLINE = "OfflineMemoryAllocation"
KINDS = ("conv2d", "linear", "group_norm", "add", "mean", "avg_pool", "max_pool", "relu")

# the version from which an operator takes int8
VERSIONS = {
    "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "ADD": 2, "MEAN": 2, "PAD": 2, "PADV2": 2,
    "AVERAGE_POOL_2D": 2, "MAX_POOL_2D": 2, "RELU": 2, "RELU6": 2, "RESHAPE": 1,
    "DEQUANTIZE": 2,
}  # fmt: skip
GROUPED = 6  # and of a convolution in groups
# the tables of options of operators that group norms are made of
OPTIONS = {
    "CAST": "Cast", "DEPTHWISE_CONV_2D": "DepthwiseConv2D", "DEQUANTIZE": "Dequantize",
    "MAXIMUM": "MaximumMinimum", "MEAN": "Reducer", "MUL": "Mul", "QUANTIZE": "Quantize",
    "RESHAPE": "Reshape", "SUB": "Sub", "SUM": "Reducer",
}  # fmt: skip
TYPES = {
    "int8": schema.TensorType.INT8,
    "int32": schema.TensorType.INT32,
    "float32": schema.TensorType.FLOAT32,
}


@dataclass(frozen=True)
class Arena:
    """What TFLite Micro took of its arena, in bytes, as it records it on this machine.

    The head has the tensors and scratch, and is the same everywhere; the tail has structures whose
    pointers are of 64 bits here, so that a microcontroller needs less.
    """

    head: int
    tail: int
    total: int
    lower_bound: int  # of the head: most bytes alive at once

    def check(self, name: str, board: str, ram: int) -> None:
        """Raises FitError where the file called name needs more than the RAM there is, in bytes."""
        if self.total > ram:
            raise FitError(
                f"{name}.tflite needs an arena of {kib(self.total)} (tensors: {kib(self.head)}), "
                f"{board} has {kib(ram)} of RAM: cut earlier, or take a narrower network"
            )


@dataclass(frozen=True)
class Exported:
    """A segment as the bytes of a .tflite file, and the plan that is in it."""

    name: str  # of the file, without its suffix
    cut: str
    graph: Int8Graph
    data: bytes
    schedule: Schedule
    plan: arena.Plan

    @property
    def outputs(self) -> dict[str, str]:
        """The names of its outputs, and which of the graph's tensors they are."""
        return {ACTIVATIONS: self.graph.cut, LOGITS: self.graph.logits}

    @cached_property
    def operators(self) -> dict[str, int]:
        """How many of each TFLite operator it has."""
        model = read(self.data)
        names = _names(schema.BuiltinOperator)
        codes = [names[code.builtinCode] for code in model.operatorCodes]
        found = Counter(codes[operator.opcodeIndex] for operator in model.subgraphs[0].operators)
        return dict(sorted(found.items()))

    def file(self, build: Build, verified: Verified, taken: Arena | None) -> File:
        """What a manifest says of it; only what is verified has that.

        build: what was quantised. taken: None where TFLite Micro has not run to record it.
        """
        outputs = [self._described(name, tensor) for name, tensor in self.outputs.items()]
        interface = {
            "input": {
                **self._described(IMAGES, self.graph.input),
                # real number = byte * scale + shift, of each channel
                "bytes": {"scale": build.scale, "shift": build.shift},
            },
            "outputs": outputs,
            "operators": self.operators,
            "arena": asdict(taken) if taken else None,
            "planned_head": self.plan.size,
        }
        source = build.graph.at(self.cut, upto=False)
        return File(f"{self.name}.tflite", self.data, source, interface, verified)

    def _described(self, name: str, tensor: str) -> dict[str, Any]:
        shape, scale = self.graph.shapes[tensor], self.graph.scales[tensor]
        return {"name": name, "type": "int8", "shape": [1, *shape], **asdict(scale)}


@dataclass(frozen=True)
class _Operator:
    """One operator of the file, by names of tensors."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    options: Any
    version: int
    scratch: tuple[int, ...] = ()  # bytes of what TFLite Micro's kernel has for itself


BufferT: Any = schema.BufferT


class _Buffer(BufferT):  # type: ignore[misc]
    """Bytes that begin at a multiple of ALIGNMENT in the file."""

    def Pack(self, builder: Any) -> Any:
        """Writes it; the base class gives the method its name."""
        if self.data is not None:
            builder.Prep(ALIGNMENT, len(self.data))
        return super().Pack(builder)


class _Writer:
    """Collects tensors, buffers and operators."""

    def __init__(self, graph: Int8Graph) -> None:
        for op in graph.ops:
            if op.kind not in KINDS:
                raise ModelError(
                    f"{op.name}: the TFLite exporter has no {op.kind}; it has {', '.join(KINDS)}"
                )
        if graph.cut == graph.input:
            raise ModelError("the TFLite exporter writes a client's segment: this one has no trunk")
        self.graph = graph
        self.buffers = [_buffer(None)]  # the first is that of tensors without values
        self.shared: dict[tuple[str, bytes], str] = {}  # constants that came already
        self.tensors: dict[str, Any] = {}
        self.places: dict[str, str] = {}  # tensor -> another that has the same bytes
        self.operators: list[_Operator] = []
        # the file's name of every tensor; with a point in them, ours never meet those of outputs
        self.names = {op.name: f"{op.name}.out" for op in graph.ops}
        self.names |= {graph.input: IMAGES, graph.cut: ACTIVATIONS}
        self.activation(IMAGES, graph.input_shape, graph.scales[graph.input])
        for op in graph.ops:
            getattr(self, f"_{op.kind}")(op, [self.names[name] for name in op.inputs])
        self.flat(graph.logits, LOGITS)

    def activation(self, name: str, shape: Shape, scale: Scale) -> None:
        """A tensor of one sample that an operator makes."""
        self.tensors[name] = _tensor(
            name, (1, *shape), schema.TensorType.INT8, 0, [scale.scale], [scale.zero_point]
        )

    def constant(
        self,
        name: str,
        value: Array,
        scale: Sequence[float] = (),
        zero: Sequence[int] = (),
        axis: int = 0,
    ) -> str:
        """A tensor with values; one that has come under another name is not written again."""
        data = value.tobytes()
        if not scale:
            first = self.shared.setdefault((f"{value.dtype} {value.shape}", data), name)
            if first in self.tensors:
                return first
        kind = TYPES[value.dtype.name]
        self.buffers.append(_buffer(data))
        place = len(self.buffers) - 1
        self.tensors[name] = _tensor(name, value.shape, kind, place, scale, zero, axis)
        return name

    def simple(
        self,
        kind: str,
        op: Int8Op,
        x: Sequence[str],
        options: Any,
        version: int = 0,
        scratch: tuple[int, ...] = (),
    ) -> None:
        """One operator that takes x and makes the operation's tensor.

        version: 0 for the first that takes int8. scratch: bytes of buffers of its kernel.
        """
        name = self.names[op.name]
        self.activation(name, _whole(self.graph.shapes[op.name]), self.graph.scales[op.name])
        version = version or VERSIONS[kind]
        self.operators.append(_Operator(kind, tuple(x), name, options, version, scratch))

    def weights(self, op: Int8Op, axis: int, window: Shape | None = None) -> list[str]:
        """Weight and bias of an operation, the weight's scales along an axis.

        window: (height, width, channels) that a row of a linear layer's weight is for.
        """
        kernel, bias = op.weights["weight"], op.weights["bias"]
        weight = self.graph.weights[kernel]
        weight = weight.reshape(-1, *window) if window else weight
        scales = self.graph.weight_scales[kernel]
        unit = np.float32(self.graph.scales[op.inputs[0]].scale)
        zeros = [0] * len(scales)
        return [
            self.constant(kernel, weight, scales.tolist(), zeros, axis),
            self.constant(bias, self.graph.weights[bias], (unit * scales).tolist(), zeros),
        ]

    def _conv2d(self, op: Int8Op, x: list[str]) -> None:
        each = self.graph.depthwise(op)
        options = schema.DepthwiseConv2DOptionsT() if each else schema.Conv2DOptionsT()
        if each:
            options.depthMultiplier = 1
        x = self.windowed(op, x, options, None)
        x += self.weights(op, axis=3 if each else 0)
        if each:
            self.simple("DEPTHWISE_CONV_2D", op, x, options)
        else:
            version = GROUPED if op.attrs["groups"] > 1 else 0
            self.simple("CONV_2D", op, x, options, version)

    def _linear(self, op: Int8Op, x: list[str]) -> None:
        """As a convolution of one window.

        LiteRT's reference kernel of FULLY_CONNECTED rounds otherwise than TFLite Micro's; those of
        CONV_2D are the same.
        """
        options = schema.Conv2DOptionsT()
        options.strideH = options.strideW = 1
        options.padding = schema.Padding.VALID
        options.fusedActivationFunction = _activation(op)
        window = _whole(self.graph.shapes[op.inputs[0]])
        self.simple("CONV_2D", op, x + self.weights(op, axis=0, window=window), options)

    def _group_norm(self, op: Int8Op, x: list[str]) -> None:
        """As a depthwise convolution whose weights and biases each image makes."""
        options = schema.DepthwiseConv2DOptionsT()
        options.depthMultiplier = options.strideH = options.strideW = 1
        options.padding = schema.Padding.VALID
        options.fusedActivationFunction = _activation(op)
        self.simple("DEPTHWISE_CONV_2D", op, x + norm_weights(self, op, x[0]), options)

    def _add(self, op: Int8Op, x: list[str]) -> None:
        options = schema.AddOptionsT()
        options.fusedActivationFunction = _activation(op)
        options.potScaleInt16 = False
        self.simple("ADD", op, x, options)

    def _mean(self, op: Int8Op, x: list[str]) -> None:
        options = schema.ReducerOptionsT()
        options.keepDims = True
        axes = self.constant(f"{op.name}.axes", np.array([1, 2], np.int32))
        scratch = _reduction(self.graph.elements(op.name))
        self.simple("MEAN", op, [*x, axes], options, scratch=scratch)

    def _avg_pool(self, op: Int8Op, x: list[str]) -> None:
        options = schema.Pool2DOptionsT()
        x = self.windowed(op, x, options, None)
        self.simple("AVERAGE_POOL_2D", op, x, options)

    def _max_pool(self, op: Int8Op, x: list[str]) -> None:
        options = schema.Pool2DOptionsT()
        x = self.windowed(op, x, options, LOW)
        self.simple("MAX_POOL_2D", op, x, options)

    def _relu(self, op: Int8Op, x: list[str]) -> None:
        self.simple({"relu": "RELU", "relu6": "RELU6"}[op.attrs["activation"]], op, x, None)

    def made(
        self,
        kind: str,
        name: str,
        shape: Shape,
        inputs: Sequence[str],
        *,
        dtype: str = "float32",
        scale: Sequence[float] = (),
        zero: Sequence[int] = (),
        **options: object,
    ) -> str:
        """The name of a tensor (with a first dimension) that an operator makes of its inputs.

        options: those of the operator, by the schema's names.
        """
        table = getattr(schema, f"{OPTIONS[kind]}OptionsT")() if kind in OPTIONS else None
        for option, value in options.items():
            setattr(table, option, value)
        axis = len(shape) - 1
        self.tensors[name] = _tensor(name, shape, TYPES[dtype], 0, scale, zero, axis)
        scratch = _reduction(math.prod(shape)) if kind in ("MEAN", "SUM") else ()
        operator = _Operator(kind, tuple(inputs), name, table, VERSIONS.get(kind, 1), scratch)
        self.operators.append(operator)
        return name

    def reshaped(
        self, x: str, name: str, shape: Shape, scale: Sequence[float] = (), zero: Sequence[int] = ()
    ) -> str:
        """The name of a tensor that is another in that shape, in the same place of the arena."""
        dtype = next(kind for kind, number in TYPES.items() if number == self.tensors[x].type)
        self.places[name] = self.places.get(x, x)
        options = {"newShape": list(shape)}
        return self.made(
            "RESHAPE", name, shape, [x], dtype=dtype, scale=scale, zero=zero, **options
        )

    def flat(self, tensor: str, name: str) -> None:
        """A tensor of the graph, under a name, as one row."""
        size = self.graph.elements(tensor)
        shape = self.constant(f"{name}.shape", np.array([1, size], np.int32))
        options = schema.ReshapeOptionsT()
        options.newShape = [1, size]
        self.activation(name, (size,), self.graph.scales[tensor])
        inputs = (self.names[tensor], shape)
        self.operators.append(_Operator("RESHAPE", inputs, name, options, VERSIONS["RESHAPE"]))

    def windowed(self, op: Int8Op, x: list[str], options: Any, fill: int | None) -> list[str]:
        """Sets the options of a sliding window; returns what it slides over.

        Where TensorFlow Lite's own padding is another, an operator in front of it pads, with fill
        or (None) with zeros.
        """
        options.strideH, options.strideW = op.attrs["stride"]
        if op.kind != "conv2d":
            options.filterHeight, options.filterWidth = op.attrs["kernel"]
        options.fusedActivationFunction = _activation(op)
        options.padding = schema.Padding.VALID
        if not any(op.attrs["padding"]):
            return x
        # its average pool leaves padding out of the mean
        if op.kind != "avg_pool" and self.is_same(op):
            options.padding = schema.Padding.SAME
            return x
        return [self.padded(op, x[0], fill)]

    def is_same(self, op: Int8Op) -> bool:
        """Whether the padding is the one that TensorFlow calls SAME."""
        shapes = self.graph.shapes
        for n, out, k, s, p in zip(
            shapes[op.inputs[0]][:2],
            shapes[op.name][:2],
            op.attrs["kernel"],
            op.attrs["stride"],
            op.attrs["padding"],
            strict=True,
        ):
            total = max((-(-n // s) - 1) * s + k - n, 0)
            if out != -(-n // s) or p != total // 2:
                return False
        return True

    def padded(self, op: Int8Op, x: str, fill: int | None) -> str:
        """An operator that pads x for a window; returns its tensor."""
        height, width, channels = self.graph.shapes[op.inputs[0]]
        rows, columns = op.attrs["padding"]
        scale = self.graph.scales[op.inputs[0]]
        pads = np.array([[0, 0], [rows, rows], [columns, columns], [0, 0]], np.int32)
        inputs = [x, self.constant(f"{op.name}.pads", pads)]
        kind, options = "PAD", schema.PadOptionsT()
        if fill is not None:
            kind, options = "PADV2", schema.PadV2OptionsT()
            value = np.array([fill], np.int8)
            inputs.append(
                self.constant(f"{op.name}.fill", value, [scale.scale], [scale.zero_point])
            )
        name = f"{op.name}.padded"
        self.activation(name, (height + 2 * rows, width + 2 * columns, channels), scale)
        self.operators.append(_Operator(kind, tuple(inputs), name, options, VERSIONS[kind]))
        return name

    def homes(self) -> dict[str, str]:
        """The buffer in which each tensor lies that has no values of its own."""
        made = [name for name, tensor in self.tensors.items() if tensor.buffer == 0]
        return {name: INPUT if name == IMAGES else self.places.get(name, name) for name in made}

    def schedule(self) -> Schedule:
        """Which activations each operator needs; both outputs are read at the end."""
        buffers = self.homes()
        sizes = {buffers[name]: _bytes(self.tensors[name]) for name in buffers}
        place = Place(0, "trunk")
        steps = []
        for operator in self.operators:
            reads = tuple(buffers[x] for x in operator.inputs if x in buffers)
            scratch = {f"{operator.output}:{i}": n for i, n in enumerate(operator.scratch)}
            sizes |= scratch
            writes = (buffers[operator.output], *scratch)
            steps.append(Step("forward", place, reads=reads, writes=writes))
        steps.append(Step("send", place, reads=(ACTIVATIONS, LOGITS)))
        count = len(steps)
        variants = (Variant(0, True),)
        return Schedule(tuple(steps), variants, count, count, count, sizes, (), {})

    def model(self, plan: arena.Plan, description: str) -> bytes:
        numbers = {name: i for i, name in enumerate(self.tensors)}
        codes = list(dict.fromkeys((o.kind, o.version) for o in self.operators))
        subgraph = schema.SubGraphT()
        subgraph.tensors = list(self.tensors.values())
        subgraph.inputs = [numbers[IMAGES]]
        subgraph.outputs = [numbers[ACTIVATIONS], numbers[LOGITS]]
        subgraph.operators = [_operator(o, numbers, codes) for o in self.operators]
        model = schema.ModelT()
        model.version = SCHEMA_VERSION
        model.description = description
        model.operatorCodes = [_code(*code) for code in codes]
        model.subgraphs = [subgraph]
        buffers = self.homes()
        places = [plan.offsets[buffers[n]] if n in buffers else -1 for n in self.tensors]
        offline = np.array([1, 0, len(places), *places], np.int32)  # its version, and of subgraph 0
        metadata = schema.MetadataT()
        metadata.name, metadata.buffer = OFFLINE, len(self.buffers)
        model.metadata = [metadata]
        model.buffers = [*self.buffers, _buffer(offline.tobytes())]
        builder = flatbuffers.Builder()
        builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
        return bytes(builder.Output())


def segment_to_tflite(build: Build, calibration: Array, cut: str | None = None) -> Exported:
    """A client's segment up to a cut (None: its deepest), with the exit there and no other.

    calibration: uint8 images like those that it will see, (samples, channels, height, width).
    Raises ModelError, naming the operation, for a kind that there is none of, and where there is
    nothing to calibrate with.
    """
    cut = cut or build.stages[-1].cut
    graph = build.graph.at(cut, upto=False)
    return to_tflite(quantize(graph, calibration, build.scale, build.shift), cut)


def to_tflite(graph: Int8Graph, cut: str) -> Exported:
    """A segment that is quantised already; cut: what its cut is called.

    Raises ModelError, naming the operation, for a kind that there is none of.
    """
    writer = _Writer(graph)
    schedule = writer.schedule()
    plan = arena.plan(schedule)
    faults = arena.verify(schedule, plan)
    assert not faults, faults
    name, version = made_by()
    description = f"{name} {version}: segment up to {cut}, graph {graph.checksum:08x}"
    data = writer.model(plan, description)
    return Exported("segment-int8", cut, graph, data, schedule, plan)


def read(data: bytes) -> Any:
    """The schema's ModelT of a file.

    Raises ExportError where values lie outside of the flatbuffer: TFLite Micro reads zeros there.
    """
    model = schema.ModelT.InitFromPackedBuf(data)
    for i, buffer in enumerate(model.buffers):
        if buffer.offset > 1:
            raise ExportError(
                f"buffer {i} lies outside of the flatbuffer, where TFLite Micro reads zeros: write "
                "the file with all values inside"
            )
    return model


def _reduction(sums: int) -> tuple[int, ...]:
    """What a reduction has for itself: int32 sums, a number for each dimension, and axes."""
    return (4 * sums, 4 * 4, 4 * 2)


def _bytes(tensor: Any) -> int:
    size: int = math.prod(tensor.shape)
    return size if tensor.type == schema.TensorType.INT8 else 4 * size


def _names(enum: type) -> dict[int, str]:
    return {value: name for name, value in vars(enum).items() if isinstance(value, int)}


def _whole(shape: Shape) -> Shape:
    """A shape as (height, width, channels); features are channels of one pixel."""
    return (1,) * (3 - len(shape)) + shape


def _activation(op: Int8Op) -> int:
    kinds = schema.ActivationFunctionType
    found: int = {"none": kinds.NONE, "relu": kinds.RELU, "relu6": kinds.RELU6}[
        op.attrs["activation"]
    ]
    return found


def _buffer(data: bytes | None) -> Any:
    buffer = _Buffer()
    buffer.data = None if data is None else np.frombuffer(data, np.uint8)
    return buffer


def _tensor(
    name: str,
    shape: Shape,
    kind: int,
    buffer: int,
    scale: Sequence[float],
    zero: Sequence[int],
    axis: int = 0,
) -> Any:
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), kind, buffer
    if scale:
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.scale, tensor.quantization.zeroPoint = list(scale), list(zero)
        tensor.quantization.quantizedDimension = axis
    return tensor


def _operator(operator: _Operator, numbers: dict[str, int], codes: list[tuple[str, int]]) -> Any:
    found = schema.OperatorT()
    found.opcodeIndex = codes.index((operator.kind, operator.version))
    found.inputs = [numbers[name] for name in operator.inputs]
    found.outputs = [numbers[operator.output]]
    if operator.options is not None:
        kind = type(operator.options).__name__.removesuffix("T")
        found.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
        found.builtinOptions = operator.options
    return found


def _code(kind: str, version: int) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, kind)
    code.deprecatedBuiltinCode = code.builtinCode  # all of ours are below 127
    code.version = version
    return code
