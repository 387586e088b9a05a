"""Group norms in 8 bits: what they are given, and the constants they have for that.

A group norm divides by what it measures, so that a scale and a shift of a whole group change
nothing but its epsilon. Each therefore gets a convolution of its own in front, which takes every
group's mean over the calibration images away and brings its largest value to that of int8: 8 bits
then serve all groups alike, and the zero point is 0.

The norm is then a depthwise convolution of single pixels whose weights and biases are made for each
image, from its groups' means and mean squares: ``Int8Graph.norm_weights``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from splitee.graph import Graph, Op
from splitee.int8 import HIGH, LOW, Scale
from splitee.ops import Array

LARGEST = -HIGH / LOW  # what a group's largest value becomes
UNITS = HIGH - LOW  # steps of what is never negative
BIAS_MAX = 1 << 22  # float32 has every integer up to there


@dataclass(frozen=True)
class Moments:
    """What a tensor is made of, over images: float64."""

    least: Array  # (channels,)
    largest: Array  # (channels,)
    mean: Array  # of each image: (images, channels)
    square: Array  # the mean of squares of each image: (images, channels)

    @classmethod
    def of(cls, x: Array) -> Moments:
        """x (n, channels, height, width)."""
        values = x.reshape(*x.shape[:2], -1).astype(np.float64)
        low, high = values.min((0, 2)), values.max((0, 2))
        return cls(low, high, values.mean(2), (values**2).mean(2))

    def and_those(self, more: Moments) -> Moments:
        """Those of more images, too."""
        return Moments(
            np.minimum(self.least, more.least),
            np.maximum(self.largest, more.largest),
            np.concatenate([self.mean, more.mean]),
            np.concatenate([self.square, more.square]),
        )


@dataclass(frozen=True)
class Centred:
    """The input of a group norm: (x - shift) * factor, of each group, within -1 ... LARGEST."""

    shift: Array  # (groups,)
    factor: Array  # (groups,)
    moments: Moments  # of x

    @classmethod
    def of(cls, op: Op, moments: Moments) -> Centred:
        """The one for a group norm on what has those moments."""
        groups = op.attrs["groups"]
        shift = moments.mean.reshape(-1, groups, moments.mean.shape[1] // groups).mean((0, 2))
        low = moments.least.reshape(groups, -1).min(1) - shift
        high = moments.largest.reshape(groups, -1).max(1) - shift
        # what is less than the norm's own epsilon is next to nothing in what it makes
        spread = np.maximum(np.maximum(-low, high), np.sqrt(op.attrs["epsilon"]))
        return cls(shift, LARGEST / spread, moments)

    def each(self, of_groups: Array) -> Array:
        """A value of each group as one of each channel."""
        return np.repeat(of_groups, self.moments.mean.shape[1] // len(self.shift))


@dataclass(frozen=True)
class Constants:
    """What a group norm in 8 bits has; float32 but for epsilon. Steps are those of its input."""

    mean: Scale  # of its groups' means, in steps
    squares: Scale  # of what each channel adds to its group's mean square, in squared steps
    epsilon: Array  # int32 (channels,): in squared steps, times the pixels
    floor: Array  # (groups,): the least variance
    factor: Array  # (channels,): over the standard deviation, the weight
    shift: Array  # (channels,): the bias for a mean of 0
    weight_scales: Array  # (channels,)

    @property
    def arrays(self) -> dict[str, Array]:
        """Those that are named as weights, by role."""
        roles = ("epsilon", "floor", "factor", "shift")
        return {role: getattr(self, role) for role in roles}


def with_own_convolutions(graph: Graph) -> Graph:
    """The same function; in front of each group norm a convolution that nothing else reads."""
    made = {op.name: op for op in graph.ops}
    readers = Counter(x for op in graph.ops for x in op.inputs)
    readers.update([graph.cut, *graph.exits.values()])
    parameters = dict(graph.parameters)
    ops: list[Op] = []
    for op in graph.ops:
        if op.kind == "group_norm":
            (x,), name = op.inputs, centred(op)
            if x in made and made[x].kind == "conv2d" and readers[x] == 1:
                place = next(i for i, other in enumerate(ops) if other.name == x)
                ops[place] = replace(made[x], name=name)
            else:
                channels = graph.shapes[x][0]
                attrs = {"kernel": [1, 1], "stride": [1, 1], "padding": [0, 0], "groups": channels}
                parameters[f"{name}.weight"] = np.ones((channels, 1, 1, 1), np.float32)
                ops.append(Op("conv2d", name, (x,), attrs, {"weight": f"{name}.weight"}))
            op = replace(op, inputs=(name,))
        ops.append(op)
    return replace(graph, ops=tuple(ops), parameters=parameters)


def centred(op: Op) -> str:
    """The name of a group norm's input."""
    return f"{op.name}.centred"


def with_centred(graph: Graph, inputs: Mapping[str, Centred]) -> Graph:
    """The graph whose convolutions with those names make what is given."""
    parameters = dict(graph.parameters)
    ops: list[Op] = []
    for op in graph.ops:
        if op.name in inputs:
            given = inputs[op.name]
            factor, shift = given.each(given.factor), given.each(given.shift)
            weight, bias = op.weights["weight"], op.weights.get("bias", f"{op.name}.bias")
            before = parameters[bias] if "bias" in op.weights else 0.0
            parameters[weight] = parameters[weight] * factor[:, None, None, None]
            parameters[bias] = (before - shift) * factor
            op = replace(op, weights={"weight": weight, "bias": bias})
        ops.append(op)
    return replace(graph, ops=tuple(ops), parameters=parameters)


def constants(op: Op, given: Centred, step: float, graph: Graph) -> Constants:
    """Those of a group norm of a graph; step: the scale of its input."""
    weight, bias = (graph.weights[op.weights[role]] for role in ("weight", "bias"))
    pixels = math.prod(graph.shapes[op.name][1:])
    groups, size = len(given.shift), len(weight) // len(given.shift)
    shift, factor = given.each(given.shift), given.each(given.factor / step)
    means = (given.moments.mean - shift) * factor
    squares = given.moments.square - 2 * shift * given.moments.mean + shift**2
    epsilon = op.attrs["epsilon"] * factor**2
    squares = squares * factor**2 + epsilon
    mean = means.reshape(-1, groups, size).mean(2)
    square = squares.reshape(-1, groups, size)
    # what roundings to integers leave of no variance may be nothing, or less
    variance = np.maximum(square.mean(2) - mean**2, square.max() / UNITS**2)
    floor = _floor(variance)
    # the weight at that variance is 127, but where the bias is all that counts
    own = np.abs(weight) / given.each(np.sqrt(floor)) / (step * HIGH)
    own = np.maximum(own, np.abs(bias) / (step * BIAS_MAX))
    own = np.where(own > 0, own, own.max() or 1.0).astype(np.float32)
    sums = step * own.astype(np.float64)
    return Constants(
        mean=Scale(float(np.float32(max(np.abs(mean).max() / HIGH, 2.0**-20))), 0),
        squares=Scale(float(np.float32(square.max() / size / UNITS)), LOW),
        epsilon=np.round(epsilon * pixels).astype(np.int32),
        floor=floor.astype(np.float32),
        factor=(weight / sums).astype(np.float32),
        shift=(bias / sums).astype(np.float32),
        weight_scales=own,
    )


def _floor(variance: Array) -> Array:
    """The variance (images, groups) of each group at which its weights end.

    The one whose weights are nearest to what they should be: a smaller one leaves the usual weights
    fewer steps, a larger one clips those of images with little in them.
    """
    factors = 1 / np.sqrt(variance)
    ends = np.quantile(factors, np.linspace(0.5, 1.0, 65), axis=0)  # (candidates, groups)
    clipped = np.maximum(factors - ends[:, None], 0)
    error = ((clipped**2 + (ends[:, None] / HIGH) ** 2 / 12) / factors**2).mean(1)
    best: Array = np.take_along_axis(ends, error.argmin(0)[None], 0)[0]
    return 1 / best**2
