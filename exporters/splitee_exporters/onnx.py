"""Graph -> ONNX: a client's segment with its exit, or the server's half, for inference.

Written node by node from the graph, so that the file has our names: a node is called as its
operation, an initialiser as its weight in the network's state dict. Outputs are ``activations``,
what crosses the cut before any codec, and ``logits`` of the exit at the cut; the server's half has
``logits`` only. The batch is free.

Opset 21: the first whose GroupNormalization scales each channel, as everybody else's does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np

from splitee.edge import ACTIVATIONS, IMAGES, LABELS, LOGITS
from splitee.errors import ExportError, MissingTool, ModelError
from splitee.graph import Graph, Op
from splitee.ops import Array
from splitee.place import Build
from splitee_exporters.manifest import LARGEST, TOLERANCE, File, Verified, error_of, hold, made_by

try:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
except ModuleNotFoundError as error:
    raise MissingTool(
        f"{error.name} is not installed: pip install 'hetero-splitee[onnx]'"
    ) from error

OPSET = 21
IR_VERSION = 10  # the one that came with that opset
KINDS = (
    "conv2d", "linear", "group_norm", "batch_norm", "relu", "relu6", "add", "max_pool", "avg_pool",
    "conv_transpose2d", "branch",
)  # fmt: skip
INPUT = "images.input"  # what the first nodes make of images


@dataclass(frozen=True)
class Exported:
    """An ONNX file, not yet written, and what it was made from."""

    name: str  # of the file, without its suffix
    graph: Graph
    data: bytes
    scale: tuple[float, ...] = ()  # per channel: input = byte * scale + shift; (): no images
    shift: tuple[float, ...] = ()

    @property
    def input(self) -> str:
        """The name of its input: images (uint8), or activations (float32)."""
        return IMAGES if self.scale else ACTIVATIONS

    @property
    def outputs(self) -> dict[str, str]:
        """The names of its outputs, and which of the graph's tensors they are."""
        activations = {ACTIVATIONS: self.graph.cut} if self.scale else {}
        return {**activations, LOGITS: self.graph.logits}

    @property
    def nodes(self) -> dict[str, int]:
        """How many nodes of each ONNX operator it has."""
        return dict(sorted(Counter(str(node.op_type) for node in read(self).graph.node).items()))

    def file(self, verified: Verified) -> File:
        """What a manifest says of it; only what is verified has that."""
        images = {"scale": self.scale, "shift": self.shift} if self.scale else {}
        interface = {
            "opset": OPSET,
            "input": {
                "name": self.input,
                "type": "uint8" if self.scale else "float32",
                "shape": ["batch", *self.graph.input_shape],
                **images,
            },
            "outputs": [
                {"name": name, "type": "float32", "shape": ["batch", *self.graph.shapes[tensor]]}
                for name, tensor in self.outputs.items()
            ],
            "nodes": self.nodes,
        }
        return File(f"{self.name}.onnx", self.data, self.graph, interface, verified)


class Nodes:
    """Nodes that are written from a graph, and the constants that they take."""

    def __init__(self, graph: Graph, outputs: Mapping[str, str], input: str) -> None:
        """outputs: their names, and which of the graph's tensors they are. input: its name.

        Raises ModelError, naming the operation, for a kind that has no node.
        """
        for op in graph.ops:
            if op.kind not in KINDS:
                raise ModelError(
                    f"{op.name}: the ONNX exporter has no {op.kind}; it has {', '.join(KINDS)}"
                )
        self.graph = graph
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        # the ONNX name of every tensor; with a point in them, ours never meet those of outputs
        self.names = {graph.input: input, **{op.name: f"{op.name}.out" for op in graph.ops}}
        self.names |= {tensor: name for name, tensor in outputs.items() if tensor in self.names}
        for op in graph.ops:
            if op.kind == "branch":  # only training knows of it: an exit reads the trunk's tensor
                self.names[op.name] = self.names[op.inputs[0]]

    def node(
        self, kind: str, name: str, inputs: Sequence[str], *outputs: str, **attrs: Any
    ) -> None:
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, **attrs))

    def constant(self, name: str, value: Array) -> str:
        self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def value(self, kind: str, output: str, *inputs: str, **attrs: Any) -> str:
        """A node with one output, which is called as it is."""
        self.node(kind, output, inputs, output, **attrs)
        return output

    def number(self, value: float) -> str:
        """A float32, once for all that take it."""
        return self.constant(f"the number {value!r}", np.array(value, np.float32))

    def integers(self, *values: int) -> str:
        """A vector of int64: a shape, or axes."""
        return self.constant(f"the integers {list(values)}", np.array(values, np.int64))

    def channels(self, vector: str, output: str) -> str:
        """A value a channel, in a form that goes with images: (channels, 1, 1)."""
        return self.value("Reshape", output, vector, self.integers(-1, 1, 1))

    def count(self) -> str:
        """The int64 number of samples, by their labels."""
        return self.once("Size", "samples.count", LABELS)

    def samples(self) -> str:
        """The float32 number of samples, by their labels."""
        return self.once("Cast", "samples.float", self.count(), to=TensorProto.FLOAT)

    def once(self, kind: str, output: str, *inputs: str, **attrs: Any) -> str:
        """The same as ``value``, unless it is there."""
        if not any(output in node.output for node in self.nodes):
            self.value(kind, output, *inputs, **attrs)
        return output

    def window(self, op: Op) -> dict[str, Any]:
        (top, left), kernel, strides = (op.attrs[a] for a in ("padding", "kernel", "stride"))
        return {"kernel_shape": kernel, "strides": strides, "pads": [top, left, top, left]}

    def weights(self, op: Op, *roles: str) -> list[str]:
        return [op.weights[role] for role in roles if role in op.weights]


class Inference(Nodes):
    """Every operation forward, as it is outside training."""

    def images(self, scale: Sequence[float], shift: Sequence[float]) -> None:
        """Bytes become the network's input, by the steps that a client takes."""
        per_channel = (1, self.graph.input_shape[0], 1, 1)
        factor, summand = (
            self.constant(name, np.array(values, np.float32).reshape(per_channel))
            for name, values in (("images.scale", scale), ("images.shift", shift))
        )
        self.node("Cast", "images.cast", [IMAGES], "images.float", to=TensorProto.FLOAT)
        self.node("Mul", "images.mul", ["images.float", factor], "images.scaled")
        self.node("Add", "images.add", ["images.scaled", summand], INPUT)

    def between(self, outputs: Mapping[str, str]) -> Iterable[tuple[str, str]]:
        """The tensors that are no output, and their names in the file."""
        for op in self.graph.ops:
            if op.kind != "branch" and self.names[op.name] not in outputs:
                yield op.name, self.names[op.name]

    def operations(self) -> None:
        for op in self.graph.ops:
            getattr(self, op.kind)(op)

    def simple(self, op: Op, kind: str, *more: str, **attrs: Any) -> None:
        """One node that takes the operation's inputs, then more, and has its name and output."""
        inputs = [*(self.names[x] for x in op.inputs), *more]
        self.node(kind, op.name, inputs, self.names[op.name], **attrs)

    def conv2d(self, op: Op) -> None:
        weights = self.weights(op, "weight", "bias")
        self.simple(op, "Conv", *weights, group=op.attrs["groups"], **self.window(op))

    def conv_transpose2d(self, op: Op) -> None:
        """What of the last windows lies outside of its size is padding at the end."""
        rows, columns = (
            n * k - size
            for n, k, size in zip(
                self.graph.shapes[op.inputs[0]][1:], op.attrs["kernel"], op.attrs["size"],
                strict=True,
            )
        )  # fmt: skip
        self.simple(
            op,
            "ConvTranspose",
            *self.weights(op, "weight", "bias"),
            kernel_shape=op.attrs["kernel"],
            strides=op.attrs["stride"],
            pads=[0, 0, rows, columns],
        )

    def linear(self, op: Op) -> None:
        flat = f"{op.name}.flat"
        self.node("Flatten", f"{op.name}.flatten", [self.names[op.inputs[0]]], flat)
        inputs = [flat, *self.weights(op, "weight", "bias")]
        self.node("Gemm", op.name, inputs, self.names[op.name], transB=1)

    def group_norm(self, op: Op) -> None:
        weights = self.weights(op, "weight", "bias")
        attrs = {"num_groups": op.attrs["groups"], "epsilon": op.attrs["epsilon"]}
        self.simple(op, "GroupNormalization", *weights, **attrs)

    def batch_norm(self, op: Op) -> None:
        weights = self.weights(op, "weight", "bias", "mean", "variance")
        self.simple(op, "BatchNormalization", *weights, epsilon=op.attrs["epsilon"])

    def relu(self, op: Op) -> None:
        self.simple(op, "Relu")

    def relu6(self, op: Op) -> None:
        low, high = (
            self.constant(f"{op.name}.{name}", np.array(value, np.float32))
            for name, value in (("min", 0), ("max", 6))
        )
        self.simple(op, "Clip", low, high)

    def add(self, op: Op) -> None:
        self.simple(op, "Add")

    def max_pool(self, op: Op) -> None:
        self.simple(op, "MaxPool", **self.window(op))

    def avg_pool(self, op: Op) -> None:
        self.simple(op, "AveragePool", count_include_pad=1, **self.window(op))

    def branch(self, op: Op) -> None:
        """No node: it is the trunk's tensor."""


def _value(name: str, kind: int, shape: Sequence[int]) -> Any:
    return helper.make_tensor_value_info(name, kind, ["batch", *shape])


def _exported(exported: Exported, title: str, notes: str) -> Exported:
    """The same with its data.

    Raises ModelError, naming the operation, for a kind that has no node.
    """
    graph = exported.graph
    writer = Inference(graph, exported.outputs, INPUT if exported.scale else ACTIVATIONS)
    if exported.scale:
        writer.images(exported.scale, exported.shift)
    writer.operations()
    for name, value in graph.weights.items():
        writer.constant(name, np.ascontiguousarray(value, np.float32))
    kind = TensorProto.UINT8 if exported.scale else TensorProto.FLOAT
    body = helper.make_graph(
        writer.nodes,
        title,
        [_value(exported.input, kind, graph.input_shape)],
        [_value(n, TensorProto.FLOAT, graph.shapes[t]) for n, t in exported.outputs.items()],
        list(writer.constants.values()),
        doc_string=notes,
        # ONNX itself infers no shape behind a group norm
        value_info=[
            _value(name, TensorProto.FLOAT, graph.shapes[tensor])
            for tensor, name in writer.between(exported.outputs)
        ],
    )
    return replace(exported, data=finished(model_of(body), graph))


def model_of(body: Any) -> Any:
    """The ModelProto of a GraphProto."""
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION)


def finished(model: Any, graph: Graph) -> bytes:
    """The bytes of a ModelProto made from a graph: it says who made it, and is checked."""
    model.producer_name, model.producer_version = made_by()
    helper.set_model_props(model, {"graph_checksum": f"{graph.checksum():08x}"})
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def segment_to_onnx(build: Build, cut: str | None = None) -> Exported:
    """A client's segment up to a cut (None: its deepest), with the exit there and no other.

    Its input is uint8 images, (batch, channels, height, width): the build's scale and shift are in
    the file. Raises ModelError, naming the operation, for a kind that has no node.
    """
    cut = cut or build.stages[-1].cut
    graph = build.graph.at(cut, upto=False)
    exported = Exported("segment", graph, b"", build.scale, build.shift)
    notes = (
        "uint8 images in; activations at the cut and logits of the early exit out. The first nodes "
        "are input = byte * scale + shift, per channel."
    )
    return _exported(exported, f"segment up to {cut}", notes)


def tail_to_onnx(graph: Graph, cut: str) -> Exported:
    """The server's half behind a cut; graph is what ``capture_tail`` makes of it.

    Its input is float32 activations. Raises ModelError, naming the operation, for a kind that has
    no node.
    """
    notes = "float32 activations at the cut in; logits of the whole network out."
    return _exported(Exported("tail", graph, b""), f"server's half behind {cut}", notes)


def read(exported: Exported) -> Any:
    """The ModelProto of an export."""
    return onnx.load_model_from_string(exported.data)


def run(exported: Exported, x: Array) -> dict[str, Array]:
    """Its outputs for a batch, from ONNX Runtime on one thread of the CPU."""
    return _run(_session(exported), exported, x)


def _session(exported: Exported) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(exported.data, options, providers=["CPUExecutionProvider"])


def _run(session: Any, exported: Exported, x: Array) -> dict[str, Array]:
    names = list(exported.outputs)
    return dict(zip(names, session.run(names, {exported.input: x}), strict=True))


def verify(
    exported: Exported,
    x: Array,
    expected: Mapping[str, Array],
    against: str,
    *,
    batches: Sequence[int] = (),
    tolerance: float = TOLERANCE,
    measure: str = LARGEST,
) -> Verified:
    """Runs the file on x in ONNX Runtime and compares every output with what is expected.

    against: where expected comes from, for the manifest. batches: positive sizes in which x is
    run, in turn and over again (none: all of it at once). Raises ExportError, naming the output,
    where an error is above the tolerance by that measure, or no number.
    """
    if not len(x):
        raise ExportError(f"{exported.name}: there is nothing to hold it to: give it samples")
    session = _session(exported)
    parts: dict[str, list[Array]] = {name: [] for name in exported.outputs}
    ran: set[int] = set()
    start, sizes = 0, cycle(batches or [len(x)])
    while start < len(x):
        part = x[start : start + next(sizes)]
        for name, value in _run(session, exported, part).items():
            parts[name].append(value)
        start += len(part)
        ran.add(len(part))
    found = {name: np.concatenate(values) for name, values in parts.items()}
    errors = {name: error_of(found[name], expected[name], measure) for name in exported.outputs}
    for name, error in errors.items():
        hold(f"{exported.name}.onnx: {name}", error, tolerance, against, measure)
    same = found[LOGITS].argmax(1) == expected[LOGITS].argmax(1)
    return Verified(
        runtime=f"ONNX Runtime {onnxruntime.__version__}",
        against=against,
        samples=len(x),
        batches=tuple(sorted(ran)),
        error=max(errors.values()),
        measure=measure,
        tolerance=tolerance,
        same_class=float(same.mean()),
    )
