"""Graph -> Int8Graph: a network's numbers in 8 bits, from images that are run for their ranges.

Weights are symmetric around zero, a convolution's with a scale for each output channel, a linear
layer's with one; activations have a scale and a zero point for each tensor. Batch norms become part
of the convolutions before them, and activations of the operations before them; what group norms
become is in quantize_norm.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from splitee.errors import ModelError
from splitee.fold import fold
from splitee.graph import Graph, Op
from splitee.int8 import HIGH, LOW, Int8Graph, Int8Op, Scale, of_means, of_squares
from splitee.ops import Array, Shape
from splitee.quantize_norm import (
    Centred,
    Moments,
    constants,
    with_centred,
    with_own_convolutions,
)

PIXELS_MAX = 1 << 16  # of a group norm
BATCH = 32  # images that run at once to calibrate
KINDS = (
    "conv2d", "linear", "batch_norm", "group_norm", "relu", "relu6", "add", "max_pool", "avg_pool",
    "branch",
)  # fmt: skip
FUSES = ("conv2d", "linear", "add", "group_norm")  # operations that an activation becomes a part of
RATIO = 256  # an output's scale is no finer than its input's over this, so that int32 is enough
BIAS_MAX = 1 << 30  # leaves a bit for the products that are added to a bias


def quantize(
    graph: Graph, images: Array, scale: Sequence[float], shift: Sequence[float]
) -> Int8Graph:
    """The graph with the exit at its cut, in 8 bits; exits below are left out.

    images: uint8 like those that it will see, (samples, channels, height, width); what is larger
    than any value seen with them is clipped. scale and shift, per channel: input = byte * scale +
    shift. Raises ModelError where there are no images, and, naming the operation, for one that 8
    bits do not have.
    """
    if not len(images):
        raise ModelError("there is nothing to calibrate 8 bits with: give it images")
    _refuse(graph)
    graph = _without_norms(fold(graph.at(list(graph.exits)[-1], upto=False)))
    graph = with_own_convolutions(graph)
    bytes_in = np.arange(256, dtype=np.float32) * np.array(scale, np.float32)[:, None]
    bytes_in = bytes_in + np.array(shift, np.float32)[:, None]
    ranges, inputs = _seen(graph, images, bytes_in)
    ranges[graph.input] = (float(bytes_in.min()), float(bytes_in.max()))
    return _Writer(with_centred(graph, inputs), ranges, inputs, bytes_in).graph8()


def _refuse(graph: Graph) -> None:
    for op in graph.ops:
        if op.kind not in KINDS:
            raise ModelError(f"{op.name}: 8 bits have no {op.kind}; they have {', '.join(KINDS)}")
        if op.kind == "group_norm" and math.prod(graph.shapes[op.name][1:]) > PIXELS_MAX:
            raise ModelError(
                f"{op.name}: a group norm in 8 bits is of at most {PIXELS_MAX} pixels, so that its "
                "sums fit 32 bits: take smaller images, or pool before it"
            )


def _without_norms(graph: Graph) -> Graph:
    """The same with batch norms that follow no convolution as convolutions of each channel."""
    weights = dict(graph.weights)
    ops: list[Op] = []
    for op in graph.ops:
        if op.kind == "batch_norm":
            factor, shift, mean, variance = (
                weights[op.weights[role]].astype(np.float64)
                for role in ("weight", "bias", "mean", "variance")
            )
            factor = factor / np.sqrt(variance + op.attrs["epsilon"])
            weights[op.weights["weight"]] = factor.astype(np.float32)[:, None, None, None]
            weights[op.weights["bias"]] = (shift - mean * factor).astype(np.float32)
            attrs = {"kernel": [1, 1], "stride": [1, 1], "padding": [0, 0], "groups": len(factor)}
            kept = {role: op.weights[role] for role in ("weight", "bias")}
            op = Op("conv2d", op.name, op.inputs, attrs, kept)
        ops.append(op)
    used = [name for op in ops for name in op.weights.values()]
    return replace(
        graph, ops=tuple(ops), parameters={name: weights[name] for name in used}, statistics={}
    )


def _seen(
    graph: Graph, images: Array, bytes_in: Array
) -> tuple[dict[str, tuple[float, float]], dict[str, Centred]]:
    """The least and the largest value of every tensor, and what group norms are to be given."""
    channels = np.arange(len(bytes_in))[:, None, None]
    norms = {op.inputs[0]: op for op in graph.ops if op.kind == "group_norm"}
    found: dict[str, tuple[float, float]] = {}
    moments: dict[str, Moments] = {}
    for start in range(0, len(images), BATCH):
        values = graph.run(bytes_in[channels, images[start : start + BATCH]])
        for name, value in values.items():
            low, high = found.get(name, (0.0, 0.0))
            found[name] = (min(low, float(value.min())), max(high, float(value.max())))
        for name in norms:
            more = Moments.of(values[name])
            moments[name] = moments[name].and_those(more) if name in moments else more
    return found, {name: Centred.of(op, moments[name]) for name, op in norms.items()}


class _Writer:
    """Goes through a graph of floats and writes each operation down in 8 bits."""

    def __init__(
        self,
        graph: Graph,
        ranges: Mapping[str, tuple[float, float]],
        inputs: Mapping[str, Centred],
        bytes_in: Array,
    ) -> None:
        self.graph, self.ranges, self.bytes_in = graph, ranges, bytes_in
        self.inputs = inputs  # of group norms
        self.made = {op.name: op for op in graph.ops}
        readers = Counter(x for op in graph.ops for x in op.inputs)
        readers.update([graph.cut, *graph.exits.values()])
        self.fused = {
            op.inputs[0]: op
            for op in graph.ops
            if op.kind in ("relu", "relu6")
            and op.inputs[0] in self.made
            and self.made[op.inputs[0]].kind in FUSES
            and readers[op.inputs[0]] == 1
        }
        # tensor -> the one that holds it in 8 bits: of a fused pair there is one alone
        self.names = {graph.input: graph.input}
        self.ops: list[Int8Op] = []
        self.weights: dict[str, Array] = {}
        self.weight_scales: dict[str, Array] = {}
        self.scales = {graph.input: _scale(*ranges[graph.input], 0.0)}

    def graph8(self) -> Int8Graph:
        graph, scale = self.graph, self.scales[self.graph.input]
        for op in graph.ops:
            self.operation(op)
        return Int8Graph(
            input=graph.input,
            input_shape=_channels_last(graph.input_shape),
            table=scale.quantize(self.bytes_in),
            ops=tuple(self.ops),
            weights=self.weights,
            weight_scales=self.weight_scales,
            scales=self.scales,
            cut=self.names[graph.cut],
            logits=self.names[graph.logits],
            classes=graph.classes,
        )

    def operation(self, op: Op) -> None:
        x = [self.names[name] for name in op.inputs]
        if op.kind == "branch" or op in self.fused.values() or _changes_nothing(op):
            self.names[op.name] = x[0]
            return
        activation = self.fused.get(op.name)
        name = activation.name if activation else op.name
        self.names[op.name] = self.names[name] = name
        kind, attrs = op.kind, {**op.attrs, "activation": activation.kind if activation else "none"}
        if op.kind in ("relu", "relu6"):
            kind, attrs = "relu", {"activation": op.kind}
        elif op.kind == "avg_pool" and self.is_global(op):
            kind, attrs = "mean", {"activation": "none"}
        weights: dict[str, str] = {}
        finest = max(self.scales[i].scale for i in x) / RATIO
        if kind == "group_norm":
            weights, finest = self.normalised(op, x[0])
        elif op.weights:
            weights, finest = self.weighted(op, x[0])
        # TensorFlow Lite's pools do not scale, and TFLite Micro's RELU6 does not either
        if kind in ("max_pool", "avg_pool") or op.kind == "relu6":
            self.scales[name] = self.scales[x[0]]
        elif name in self.inputs:
            self.scales[name] = Scale(float(np.float32(max(-1 / LOW, finest))), 0)
        else:
            self.scales[name] = _scale(*self.ranges[name], finest)
        self.ops.append(Int8Op(kind, name, tuple(x), attrs, weights))

    def is_global(self, op: Op) -> bool:
        """Whether a pool is one window as large as the image."""
        size = self.graph.shapes[op.inputs[0]][1:]
        return tuple(op.attrs["kernel"]) == size and not any(op.attrs["padding"])

    def weighted(self, op: Op, x: str) -> tuple[dict[str, str], float]:
        """Writes weights and bias of an operation on x down.

        Returns their names by role, and the coarsest unit of its sums: an output scale that is
        finer would show nothing more.
        """
        names = {"weight": op.weights["weight"], "bias": op.weights.get("bias", f"{op.name}.bias")}
        weight = self.graph.weights[names["weight"]].astype(np.float64)
        bias = np.zeros(len(weight))
        if "bias" in op.weights:
            bias = self.graph.weights[names["bias"]].astype(np.float64)
        unit = self.scales[x].scale
        rows = np.abs(weight).reshape(len(weight), -1).max(1) / HIGH
        rows = np.maximum(rows, np.abs(bias) / (unit * BIAS_MAX))
        scales = rows if op.kind == "conv2d" else rows.max(keepdims=True)
        scales = np.where(scales > 0, scales, scales.max() or 1.0).astype(np.float32)
        real = scales.astype(np.float64)
        quotients = weight / real.reshape(-1, *[1] * (weight.ndim - 1))
        quantized = np.clip(np.round(quotients), -HIGH, HIGH).astype(np.int8)
        self.weights[names["weight"]] = np.ascontiguousarray(self.channels_last(op, quantized))
        self.weights[names["bias"]] = np.round(bias / (unit * real)).astype(np.int32)
        self.weight_scales[names["weight"]] = scales
        return names, unit * float(real.max())

    def normalised(self, op: Op, x: str) -> tuple[dict[str, str], float]:
        """The same of a group norm: the names of its constants."""
        step, name = self.scales[x].scale, self.names[op.name]
        made = constants(op, self.inputs[x], step, self.graph)
        names = {role: f"{op.name}.{role}" for role in made.arrays}
        self.weights |= {names[role]: array for role, array in made.arrays.items()}
        self.scales |= {of_means(name): made.mean, of_squares(name): made.squares}
        self.weight_scales[names["factor"]] = made.weight_scales
        return names, step * float(made.weight_scales.max())

    def channels_last(self, op: Op, weight: Array) -> Array:
        """An operation's weight for an input whose channels come last."""
        shape = self.graph.shapes[op.inputs[0]]
        if op.kind == "conv2d":
            each = op.attrs["groups"] == shape[0] == len(weight) > 1
            return weight.transpose((1, 2, 3, 0) if each else (0, 2, 3, 1))
        if len(shape) == 1:
            return weight
        return weight.reshape(-1, *shape).transpose(0, 2, 3, 1).reshape(len(weight), -1)


def _changes_nothing(op: Op) -> bool:
    """Whether it is a pool of single pixels, as an exit has on a small image."""
    if op.kind not in ("max_pool", "avg_pool"):
        return False
    return [*op.attrs["kernel"], *op.attrs["stride"], *op.attrs["padding"]] == [1, 1, 1, 1, 0, 0]


def _channels_last(shape: Shape) -> Shape:
    channels, height, width = shape
    return height, width, channels


def _scale(low: float, high: float, finest: float) -> Scale:
    """The finest scale, but none finer than that, by which int8 has low, high and exactly zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32(max((high - low) / (HIGH - LOW), finest))) or 1.0
    return Scale(scale, int(np.clip(np.round(LOW - low / scale), LOW, HIGH)))
