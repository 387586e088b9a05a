"""A group norm's weights in operators of TFLite, which has no such norm: ``norm_weights`` there.

What comes out is the filter and the bias of a depthwise convolution. Operators are of single
values, a group's or a channel's, in floats; only two go over an image, one for means and one for
squares, in which the image is the filter of itself. A tensor that takes another shape keeps its
bytes and its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from splitee.int8 import Int8Graph, Int8Op, of_means, of_squares
from splitee.ops import Array, Shape

VALID = 1  # in the schema, of paddings


class Writer(Protocol):
    """What writes operators and tensors into a file; each method answers its tensor's name."""

    graph: Int8Graph

    def constant(self, name: str, value: Array) -> str:
        """A tensor with values."""

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
        """What an operator makes of its inputs."""

    def reshaped(
        self, x: str, name: str, shape: Shape, scale: Sequence[float] = (), zero: Sequence[int] = ()
    ) -> str:
        """The same bytes in another shape, on other scales, along the last axis."""


def norm_weights(writer: Writer, op: Int8Op, x: str) -> list[str]:
    """The filter and the bias that a group norm makes of x, the file's name of its input."""
    graph = writer.graph
    height, width, channels = graph.shapes[op.name]
    groups = op.attrs["groups"]
    size = channels // groups
    each, whole = (1, 1, groups, size), (1, 1, groups, 1)  # a channel's, a group's
    means, squares = graph.scales[of_means(op.name)], graph.scales[of_squares(op.name)]
    epsilon, floor, factor, shift = (
        graph.weights[op.weights[role]] for role in ("epsilon", "floor", "factor", "shift")
    )

    def name(tensor: str) -> str:
        return f"{op.name}.{tensor}"

    def constant(tensor: str, value: Array) -> str:
        return writer.constant(name(tensor), value)

    def axes(*numbers: int) -> str:
        return constant(f"axes{len(numbers)}", np.array(numbers, np.int32))

    def floats(kind: str, tensor: str, shape: Shape, *inputs: str) -> str:
        return writer.made(kind, name(tensor), shape, inputs)

    in_groups = (1, height * width, groups, size)
    mean = writer.reshaped(x, name("groups"), in_groups, [1.0], [0])  # in steps
    mean = writer.made(
        "MEAN", name("means"), whole, [mean, axes(1, 3)],
        dtype="int8", scale=[means.scale], zero=[means.zero_point], keepDims=True,
    )  # fmt: skip
    mean = floats("DEQUANTIZE", "mean", whole, mean)

    itself = (1, height, width, channels)  # one window as large as the image
    square = writer.reshaped(x, name("itself"), itself, [graph.square_scale(op)], [0])
    scale, zero = [squares.scale], [squares.zero_point]
    square = writer.made(
        "DEPTHWISE_CONV_2D", name("squares"), (1, 1, 1, channels),
        [x, square, constant("epsilon", epsilon)],
        dtype="int8", scale=scale, zero=zero,
        depthMultiplier=1, strideH=1, strideW=1, padding=VALID,
    )  # fmt: skip
    square = writer.reshaped(square, name("parts"), each, scale, zero)
    square = floats("DEQUANTIZE", "part", each, square)
    square = writer.made("SUM", name("square"), whole, [square, axes(3)], keepDims=True)

    variance = floats("MUL", "mean_square", whole, mean, mean)
    variance = floats("SUB", "variance", whole, square, variance)
    least = constant("floor", floor.reshape(whole))
    variance = floats("MAXIMUM", "least_variance", whole, variance, least)
    weight = floats("RSQRT", "inverse", whole, variance)
    weight = floats("MUL", "weight", each, weight, constant("factor", factor.reshape(each)))
    bias = floats("MUL", "moved", each, mean, weight)
    bias = floats("SUB", "bias", each, constant("shift", shift.reshape(each)), bias)

    bias = writer.made("CAST", name("rounded_bias"), each, [bias], dtype="int32")
    weight = writer.made(
        "QUANTIZE", name("rounded_weight"), each, [weight], dtype="int8", scale=[1.0], zero=[0]
    )
    scales = graph.weight_scales[op.weights["factor"]].tolist()
    single = (1, 1, 1, channels)
    return [
        writer.reshaped(weight, name("filter"), single, scales, [0] * channels),
        writer.reshaped(bias, name("biases"), (channels,)),
    ]
