"""Build -> ONNX graphs that train a client's segment, for plain ONNX Runtime.

Four graphs for each cut that is built in, all with weights as inputs, called as in the network's
state dict, and with a free batch:

- ``infer``: images -> activations and logits, by the running statistics;
- ``forward``: images and labels of a part of a batch -> activations, logits, loss, what batch norms
  measured of the batch so far, and whatever backward needs of the pass;
- ``backward``: that, the server's gradient, and the gradients of the batch so far -> their sums;
- ``step``: the sums, weights and velocities -> new ones, and running statistics.

They are told apart from the rest of a batch by nothing but their inputs, so that a batch may go
through in parts. ``splitee.edge`` has the values' names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from splitee import edge
from splitee.data import Images
from splitee.graph import Graph, Op
from splitee.ops import Array
from splitee.place import Build
from splitee_exporters.manifest import LARGEST, LEARNING_TOLERANCE, Verified, hold, learning_errors
from splitee_exporters.onnx import INPUT, Inference, Nodes, finished, model_of
from splitee_exporters.onnx_backward import Backward

# behind the exporter, which says by name what is not installed
import onnxruntime  # isort: skip
from onnx import TensorProto, helper  # isort: skip

_FLOAT, _INT64 = TensorProto.FLOAT, TensorProto.INT64


def client_files(build: Build) -> dict[str, bytes]:
    """All that a client needs to train a segment where neither torch nor onnx is, by path.

    Raises ModelError, naming the operation, for a kind that has no node.
    """
    graphs = {
        f"{variant.folder}/{name}.onnx": data
        for variant in edge.variants(build)
        for name, data in training_graphs(build, variant).items()
    }
    return edge.files(build) | graphs


def write_client(build: Build, folder: Path) -> list[Path]:
    """Writes ``client_files`` into a folder; returns their paths."""
    written = []
    for path, data in client_files(build).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
        written.append(folder / path)
    return written


def training_graphs(build: Build, variant: edge.Variant) -> dict[str, bytes]:
    """The graphs of a cut, as the bytes of a file, by the name of the pass.

    Raises ModelError, naming the operation, for a kind that has no node.
    """
    graph = variant.graph
    backward = Backward(graph, _outputs(graph), INPUT, distills=build.distills)
    backward.operations()
    return {
        "infer": _infer(build, variant.exit),
        "forward": _forward(build, graph, backward.kept),
        "backward": _model("backward", backward, backward.inputs(), backward.outputs(), graph),
        "step": _step(build, graph),
    }


def _outputs(graph: Graph) -> dict[str, str]:
    return {edge.ACTIVATIONS: graph.cut, edge.LOGITS: graph.logits}


def _batch(name: str, shape: Iterable[int], kind: int = _FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, ["batch", *shape])


def _fixed(name: str, shape: Iterable[int] = (), kind: int = _FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


def _weights(graph: Graph) -> list[Any]:
    return [_fixed(name, value.shape) for name, value in graph.weights.items()]


def _model(name: str, nodes: Nodes, inputs: list[Any], outputs: list[Any], graph: Graph) -> bytes:
    """A file; of the inputs, those that a node takes."""
    taken = {x for node in nodes.nodes for x in node.input}
    inputs = [x for x in inputs if x.name in taken]
    constants = list(nodes.constants.values())
    body = helper.make_graph(nodes.nodes, name, inputs, outputs, constants)
    return finished(model_of(body), graph)


def _infer(build: Build, graph: Graph) -> bytes:
    nodes = Inference(graph, _outputs(graph), INPUT)
    nodes.images(build.scale, build.shift)
    nodes.operations()
    images = _batch(edge.IMAGES, graph.input_shape, TensorProto.UINT8)
    outputs = [_batch(name, graph.shapes[tensor]) for name, tensor in _outputs(graph).items()]
    return _model("infer", nodes, [images, *_weights(graph)], outputs, graph)


def _forward(build: Build, graph: Graph, kept: dict[str, Any]) -> bytes:
    nodes = _Forward(graph, _outputs(graph), INPUT)
    nodes.images(build.scale, build.shift)
    nodes.operations()
    nodes.loss()
    measured = [edge.measured(name) for name in graph.statistics]
    shapes = [value.shape for value in graph.statistics.values()]
    so_far = [_fixed(edge.before(m), s) for m, s in zip(measured, shapes, strict=True)]
    inputs = [
        _batch(edge.IMAGES, graph.input_shape, TensorProto.UINT8),
        _batch(edge.LABELS, (), _INT64),
        _fixed(edge.BATCH),
        _fixed(edge.SEEN),
        *so_far,
        *_weights(graph),
    ]
    outputs = {name: _batch(name, graph.shapes[t]) for name, t in _outputs(graph).items()}
    outputs |= {edge.LOSS: _fixed(edge.LOSS), edge.CORRECT: _fixed(edge.CORRECT, (), _INT64)}
    outputs |= {m: _fixed(m, s) for m, s in zip(measured, shapes, strict=True)}
    return _model("forward", nodes, inputs, list({**outputs, **kept}.values()), graph)


class _Forward(Inference):
    """Every operation as it is in training; what backward needs of it gets a name of its own."""

    def batch_norm(self, op: Op) -> None:
        x = self.names[op.inputs[0]]
        mean, centred, variance = self._moments(op.name, x, (0, 2, 3))
        self._measure(op, mean, variance)
        if op.attrs["frozen"]:
            running, variance = (
                self.channels(op.weights[role], f"{op.name}.{role}.channels")
                for role in ("mean", "variance")
            )
            centred = self.value("Sub", f"{op.name}.distance", x, running)
        self._scale(op, self._normalise(op, centred, variance))

    def group_norm(self, op: Op) -> None:
        grouped = f"{op.name}.grouped"
        shape = self.integers(0, op.attrs["groups"], -1)
        self.value("Reshape", grouped, self.names[op.inputs[0]], shape)
        _, centred, variance = self._moments(op.name, grouped, (2,))
        normalised = self._normalise(op, centred, variance)
        image = self.integers(0, *self.graph.shapes[op.name])
        self._scale(op, self.value("Reshape", f"{op.name}.image", normalised, image))

    def max_pool(self, op: Op) -> None:
        outputs = self.names[op.name], f"{op.name}.winner"
        self.node("MaxPool", op.name, [self.names[op.inputs[0]]], *outputs, **self.window(op))

    def loss(self) -> None:
        """Cross-entropy and hits of the exit at the cut."""
        p = self.value("LogSoftmax", "loss.softmax", edge.LOGITS, axis=1)
        label = self.value("Unsqueeze", "loss.label", edge.LABELS, self.integers(1))
        likelihood = self.value("GatherElements", "loss.likelihood", p, label, axis=1)
        total = self.value("ReduceSum", "loss.total", likelihood, keepdims=0)
        self.value("Div", edge.LOSS, self.value("Neg", "loss.sum", total), edge.BATCH)
        best = self.value("ArgMax", "loss.best", edge.LOGITS, axis=1, keepdims=0)
        hits = self.value("Equal", "loss.hits", best, edge.LABELS)
        counted = self.value("Cast", "loss.counted", hits, to=_INT64)
        self.value("ReduceSum", edge.CORRECT, counted, keepdims=0)

    def _moments(self, name: str, x: str, axes: tuple[int, ...]) -> tuple[str, str, str]:
        """Mean, distances from it, and their mean square."""
        over = self.integers(*axes)
        mean = self.value("ReduceMean", f"{name}.mean", x, over)
        centred = self.value("Sub", f"{name}.centred", x, mean)
        squares = self.value("Mul", f"{name}.squares", centred, centred)
        return mean, centred, self.value("ReduceMean", f"{name}.variance", squares, over)

    def _normalise(self, op: Op, centred: str, variance: str) -> str:
        above = self.value("Add", f"{op.name}.above", variance, self.number(op.attrs["epsilon"]))
        deviation = self.value("Sqrt", f"{op.name}.deviation", above)
        rstd = self.value("Reciprocal", f"{op.name}.rstd", deviation)
        return self.value("Mul", f"{op.name}.normalised", centred, rstd)

    def _scale(self, op: Op, normalised: str) -> None:
        weight, bias = (
            self.channels(op.weights[role], f"{op.name}.{role}.channels")
            for role in ("weight", "bias")
        )
        scaled = self.value("Mul", f"{op.name}.scaled", normalised, weight)
        self.node("Add", op.name, [scaled, bias], self.names[op.name])

    def _measure(self, op: Op, mean: str, variance: str) -> None:
        """Joins a part's mean and variance with those of the parts before it.

        After Chan et al., "Updating formulae and a pairwise algorithm for computing sample
        variances", 1979, as the firmware does: no mean of squares, which would cancel.
        """
        name, fresh, stale = op.name, *self._shares()
        new_mean, new_variance = (
            self.value("Reshape", f"{name}.{role}.new", value, self.integers(-1))
            for role, value in (("mean", mean), ("variance", variance))
        )
        joined_mean, joined_variance = (
            edge.measured(op.weights[role]) for role in ("mean", "variance")
        )
        old_mean, old_variance = edge.before(joined_mean), edge.before(joined_variance)
        distance = self.value("Sub", f"{name}.step", new_mean, old_mean)
        moved = self.value("Mul", f"{name}.moved", distance, fresh)
        self.value("Add", joined_mean, old_mean, moved)
        spread = self.value(
            "Mul", f"{name}.between", moved, self.value("Mul", f"{name}.rest", distance, stale)
        )
        parts = (
            self.value("Mul", f"{name}.variance.fresh", new_variance, fresh),
            self.value("Mul", f"{name}.variance.stale", old_variance, stale),
        )
        self.value("Sum", joined_variance, *parts, spread)

    def _shares(self) -> tuple[str, str]:
        """What share of the samples seen these are, and those before them."""
        whole = self.once("Add", "samples.all", edge.SEEN, self.samples())
        return (
            self.once("Div", "samples.fresh", self.samples(), whole),
            self.once("Div", "samples.stale", edge.SEEN, whole),
        )


def _step(build: Build, graph: Graph) -> bytes:
    nodes = Nodes(graph, {}, INPUT)
    inputs = [*map(_fixed, edge.SETTINGS), _fixed(edge.SEEN), *_weights(graph)]
    outputs: list[Any] = []
    factor = _clip(nodes)
    for name, value in graph.parameters.items():
        shape = value.shape
        inputs.append(_fixed(edge.gradient(name), shape))
        clipped = nodes.value("Mul", f"{name}.clipped", edge.gradient(name), factor)
        decay = nodes.value("Mul", f"{name}.decay", name, "weight_decay")
        change = nodes.value("Add", f"{name}.slope", clipped, decay)
        if build.momentum:
            velocity = edge.momentum(name)
            inputs.append(_fixed(edge.before(velocity), shape))
            outputs.append(_fixed(velocity, shape))
            kept = nodes.value("Mul", f"{name}.kept", edge.before(velocity), "momentum")
            change = nodes.value("Add", velocity, kept, change)
        move = nodes.value("Mul", f"{name}.move", change, "learning_rate")
        outputs.append(_fixed(nodes.value("Sub", edge.after(name), name, move), shape))
    for op in graph.ops:
        if op.kind == "batch_norm":
            _follow(nodes, op)
    for name, value in graph.statistics.items():
        inputs.append(_fixed(edge.measured(name), value.shape))
        outputs.append(_fixed(edge.after(name), value.shape))
    return _model("step", nodes, inputs, outputs, graph)


def _clip(nodes: Nodes) -> str:
    """The factor of all gradients, as ``torch.nn.utils.clip_grad_norm_`` has it; clip 0: 1."""
    squares = [
        nodes.value("ReduceSumSquare", f"{name}.square", edge.gradient(name), keepdims=0)
        for name in nodes.graph.parameters
    ]
    norm = nodes.value("Sqrt", "clip.norm", nodes.value("Sum", "clip.squares", *squares))
    above = nodes.value("Add", "clip.above", norm, nodes.number(1e-6))
    ratio = nodes.value("Div", "clip.ratio", "clip", above)
    capped = nodes.value("Min", "clip.capped", ratio, nodes.number(1))
    clips = nodes.value("Greater", "clip.clips", "clip", nodes.number(0))
    return nodes.value("Where", "clip.factor", clips, capped, nodes.number(1))


def _follow(nodes: Nodes, op: Op) -> None:
    """Running statistics move towards those of the batch, the variance unbiased.

    One element says nothing of a variance: the running one then stays as it is.
    """
    momentum = nodes.number(op.attrs["momentum"])
    area = float(np.prod(nodes.graph.shapes[op.name][1:]))
    size = nodes.value("Mul", f"{op.name}.size", edge.SEEN, nodes.number(area))
    less = nodes.value("Sub", f"{op.name}.less", size, nodes.number(1))
    several = nodes.value("Greater", f"{op.name}.several", less, nodes.number(0))
    divisor = nodes.value("Max", f"{op.name}.divisor", less, nodes.number(1))
    unbiased = nodes.value("Div", f"{op.name}.unbiased", size, divisor)
    wide = nodes.value("Mul", f"{op.name}.wide", edge.measured(op.weights["variance"]), unbiased)
    moves = nodes.value("Where", f"{op.name}.moves", several, momentum, nodes.number(0))
    for role, towards, share in (
        ("mean", edge.measured(op.weights["mean"]), momentum),
        ("variance", wide, moves),
    ):
        running = op.weights[role]
        distance = nodes.value("Sub", f"{running}.distance", towards, running)
        move = nodes.value("Mul", f"{running}.move", distance, share)
        nodes.value("Add", edge.after(running), running, move)


def verify(
    files: Mapping[str, bytes],
    variant: edge.Variant,
    samples: Images,
    learnt: Mapping[str, Array],
    rate: float,
    against: str,
    *,
    distill: float = 0.0,
    tolerance: float = LEARNING_TOLERANCE,
) -> Verified:
    """Takes one step of plain SGD by a cut's graphs in ONNX Runtime, and compares the weights.

    files: a client's. samples: one batch. learnt: the weights after a step at that rate from the
    exits' loss, with that share distilled. against: where these come from, for the manifest. Raises
    ExportError, naming the weight, where one is off by more than the tolerance.
    """
    graph = variant.graph
    values: dict[str, Array] = {
        **graph.weights,
        edge.IMAGES: samples.x,
        edge.LABELS: samples.y.astype(np.int64),
        edge.SERVER_GRADIENT: np.zeros((len(samples), *graph.shapes[graph.cut]), np.float32),
    }
    numbers = {**dict.fromkeys(edge.SETTINGS, 0.0), "learning_rate": rate, "exit_weight": 1.0}
    numbers |= {"distill": distill, edge.BATCH: len(samples), edge.SEEN: 0}
    values |= {name: np.array(number, np.float32) for name, number in numbers.items()}
    for name, value in graph.parameters.items():
        values[edge.before(edge.gradient(name))] = np.zeros_like(value)
        values[edge.before(edge.momentum(name))] = np.zeros_like(value)
    for name, value in graph.statistics.items():
        values[edge.before(edge.measured(name))] = np.zeros_like(value)
    for name in ("forward", "backward", "step"):
        if name == "step":
            values[edge.SEEN] = np.array(len(samples), np.float32)
        passes = files[f"{variant.folder}/{name}.onnx"]
        session = onnxruntime.InferenceSession(passes, providers=["CPUExecutionProvider"])
        feeds = {i.name: values[i.name] for i in session.get_inputs()}
        outputs = [o.name for o in session.get_outputs()]
        values |= dict(zip(outputs, session.run(outputs, feeds), strict=True))
    found = {name: values[edge.after(name)] for name in graph.weights}
    errors = learning_errors(found, learnt)
    for name, error in errors.items():
        hold(f"{variant.folder}/: what {name} learns", error, tolerance, against)
    return Verified(
        runtime=f"ONNX Runtime {onnxruntime.__version__}, one step of training",
        against=against,
        samples=len(samples),
        batches=(len(samples),),
        error=max(errors.values()),
        measure=LARGEST,
        tolerance=tolerance,
        same_class=None,
    )
