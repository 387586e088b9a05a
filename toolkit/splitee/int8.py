"""A segment in 8 bits: TensorFlow Lite's arithmetic as data, and its meaning in numpy.

Weights, biases, multipliers and clamps are those that a .tflite file and generated C both have.
Tensors are NHWC here, as in TensorFlow Lite. Arithmetic and conditions on scales: Jacob et al.,
arXiv 1712.05877, and TensorFlow Lite's 8-bit quantisation specification; roundings are those of its
reference kernels, in their usual build with two roundings.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from splitee.ops import Array, Shape

LOW, HIGH = -128, 127
ADD_SHIFT = 20  # bits by which an addition widens its inputs before it scales them
ACTIVATIONS = ("none", "relu", "relu6")


@dataclass(frozen=True)
class Scale:
    """What an integer of a tensor means: scale * (q - zero_point)."""

    scale: float  # a float32 number
    zero_point: int

    def quantize(self, x: Array) -> Array:
        """The nearest int8 of real numbers."""
        return np.clip(np.round(x / self.scale) + self.zero_point, LOW, HIGH).astype(np.int8)

    def dequantize(self, q: Array) -> Array:
        """The real numbers of int8, as float32."""
        return (np.float32(self.scale) * (q.astype(np.float32) - self.zero_point)).astype(
            np.float32
        )

    def place(self, x: float) -> int:
        """Where a real number lies among the integers, whether or not int8 has that one."""
        quotient = np.float32(x) / np.float32(self.scale)
        return self.zero_point + math.floor(float(quotient) + 0.5)


@dataclass(frozen=True)
class Int8Op:
    """One operation; the tensor that it makes carries its name.

    kind: conv2d, linear, group_norm, add, mean (over height and width), avg_pool, max_pool, relu.
    attrs have kernel, stride and padding (pairs) of windows, groups of a convolution or norm, and
    everywhere activation, one of ACTIVATIONS; a relu's is never none.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)  # role -> name in Int8Graph.weights


@dataclass(frozen=True)
class Int8Graph:
    """A segment with the exit at its cut, or any other graph with one output beside its cut.

    Convolutions' weights are (out, height, width, in), or (1, height, width, channels) where each
    channel is a group; linear ones (out, in), their columns in the order of the input's (height,
    width, channels). Biases are int32, in units of the input's scale times the weight's.
    """

    input: str
    input_shape: Shape  # of one sample: (height, width, channels)
    table: Array  # int8 (channels, 256): what each byte of an image is as input
    ops: tuple[Int8Op, ...]
    weights: Mapping[str, Array]  # int8 weights and int32 biases, in the order of their operations
    weight_scales: Mapping[str, Array]  # float32, one an output channel; of linear: one
    scales: Mapping[str, Scale]  # of every tensor
    cut: str  # the tensor that is sent
    logits: str
    classes: int

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """The shape of one sample of every tensor: (height, width, channels) or (features,)."""
        shapes: dict[str, Shape] = {self.input: self.input_shape}
        for op in self.ops:
            shape = shapes[op.inputs[0]]
            match op.kind:
                case "conv2d":
                    shape = (*_window(op, shape), self.weights[op.weights["bias"]].size)
                case "max_pool" | "avg_pool":
                    shape = (*_window(op, shape), shape[-1])
                case "mean":
                    shape = (1, 1, shape[-1])
                case "linear":
                    shape = (self.weights[op.weights["bias"]].size,)
            shapes[op.name] = shape
        return shapes

    def elements(self, tensor: str) -> int:
        """Values, and so bytes, per sample of a tensor."""
        return math.prod(self.shapes[tensor])

    def depthwise(self, op: Int8Op) -> bool:
        """Whether it is a convolution that makes each channel of one channel."""
        if op.kind != "conv2d":
            return False
        channels = self.shapes[op.inputs[0]][-1]
        return bool(op.attrs["groups"] == channels == self.shapes[op.name][-1] > 1)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one sample, of convolutions and linear layers."""
        total = 0
        for op in self.ops:
            if "weight" in op.weights:
                out = self.shapes[op.name]
                weight = self.weights[op.weights["weight"]]
                total += math.prod(out[:-1]) * weight.size
        return total

    def requant(self, op: Int8Op) -> tuple[Array, Array]:
        """int32 (multipliers, shifts) that bring an operation's sums to its output's scale.

        A convolution has one for each output channel; linear, mean and relu have one; an addition
        three, of its inputs and of their sum; pools have none. A group norm has one of its means,
        one of its squares, and one for each output channel. ``multiply`` is what they mean.
        """
        out = float(self.scales[op.name].scale)
        scales = [float(self.scales[name].scale) for name in op.inputs]
        real: list[float] = []
        match op.kind:
            case "conv2d" | "linear":
                weights = self.weight_scales[op.weights["weight"]].astype(np.float64)
                real = list(scales[0] * weights / out)
            case "relu":
                real = [scales[0] / out]
            case "mean":
                return _mean_requant(
                    scales[0] / out, self.elements(op.inputs[0]) // self.shapes[op.name][-1]
                )
            case "group_norm":
                count = self.count(op)
                means, shift = _mean_requant(1 / self.scales[of_means(op.name)].scale, count)
                squares = scales[0] * self.square_scale(op) / self.scales[of_squares(op.name)].scale
                weights = self.weight_scales[op.weights["factor"]].astype(np.float64)
                rest = _pairs([squares, *(scales[0] * weights / out)])
                return np.concatenate([means, rest[0]]), np.concatenate([shift, rest[1]])
            case "add":
                widest = 2 * max(scales)
                real = [*(scale / widest for scale in scales), widest / (out * (1 << ADD_SHIFT))]
        return _pairs(real)

    def clamp(self, op: Int8Op) -> tuple[int, int]:
        """The least and the largest int8 that an operation may answer, by its activation."""
        if op.attrs["activation"] == "none":
            return LOW, HIGH
        scale = self.scales[op.name]
        top = scale.place(6.0) if op.attrs["activation"] == "relu6" else HIGH
        return max(LOW, scale.place(0.0)), min(HIGH, top)

    def image(self, x: Array) -> Array:
        """The int8 input (n, height, width, channels) of images: uint8, channels first."""
        channels = np.arange(len(self.table))[:, None, None]
        return np.ascontiguousarray(self.table[channels, x].transpose(0, 2, 3, 1))

    def run(self, x: Array) -> dict[str, Array]:
        """Every tensor for an int8 batch x (n, height, width, channels)."""
        values: dict[str, Array] = {self.input: x}
        for op in self.ops:
            inputs = [values[name].astype(np.int32) for name in op.inputs]
            y = getattr(self, f"_{op.kind}")(op, *inputs)
            values[op.name] = np.clip(y, *self.clamp(op)).astype(np.int8)
        return values

    def dequantize(self, tensor: str, q: Array) -> Array:
        """The real numbers of a tensor; images channels first, as everywhere else."""
        real = self.scales[tensor].dequantize(q)
        return real.transpose(0, 3, 1, 2) if real.ndim == 4 else real

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of all that an answer depends on: structure, scales and values."""
        structure = [
            self.input_shape,
            [[o.kind, o.name, o.inputs, dict(o.attrs), dict(o.weights)] for o in self.ops],
            [[name, asdict(scale)] for name, scale in self.scales.items()],
            [[n, w.shape, zlib.crc32(w.tobytes())] for n, w in self.weights.items()],
            [[n, zlib.crc32(s.tobytes())] for n, s in self.weight_scales.items()],
            [zlib.crc32(self.table.tobytes()), self.cut, self.logits, self.classes],
        ]
        return zlib.crc32(json.dumps(structure, sort_keys=True).encode())

    def _rescale(self, op: Int8Op, sums: Array) -> Array:
        return multiply(sums, *self.requant(op)) + self.scales[op.name].zero_point

    def _conv2d(self, op: Int8Op, x: Array) -> Array:
        zero_point = self.scales[op.inputs[0]].zero_point
        patches = _patches(x - zero_point, op.attrs, 0)
        weight = self.weights[op.weights["weight"]]
        if self.depthwise(op):  # as any other convolution in groups
            weight = weight.transpose(3, 1, 2, 0)
        groups = op.attrs["groups"]
        n, h, w, c, kh, kw = patches.shape
        patches = patches.reshape(n, h, w, groups, c // groups, kh, kw)
        weight = weight.reshape(groups, -1, *weight.shape[1:])
        # float64 adds integers exactly below 2^53, and much faster
        sums = np.einsum(
            "nhwgcij,goijc->nhwgo",
            patches.astype(np.float64),
            weight.astype(np.float64),
            optimize=True,
        )
        sums = sums.reshape(n, h, w, -1).astype(np.int64) + self.weights[op.weights["bias"]]
        return self._rescale(op, sums)

    def _linear(self, op: Int8Op, x: Array) -> Array:
        rows = (x - self.scales[op.inputs[0]].zero_point).reshape(len(x), -1)
        weight = self.weights[op.weights["weight"]]
        sums = rows.astype(np.float64) @ weight.T.astype(np.float64)
        return self._rescale(op, sums.astype(np.int64) + self.weights[op.weights["bias"]])

    def count(self, op: Int8Op) -> int:
        """How many values a group of a group norm has."""
        return self.elements(op.name) // int(op.attrs["groups"])

    def square_scale(self, op: Int8Op) -> float:
        """The scale, float32, of a group norm's input as the filter of itself."""
        return float(np.float32(1 / (self.scales[op.inputs[0]].scale * self.count(op))))

    def norm_weights(self, op: Int8Op, x: Array) -> tuple[Array, Array]:
        """The weights and biases, int32 (n, channels), that a group norm makes for samples x.

        Its input is x: int32 (n, height, width, channels), its zero point 0. Means of groups and
        sums of a channel's squares are brought to 8 bits; what is made of them is float32, in steps
        of x, each operation rounded by itself. Of the constants, epsilon is added to the sums;
        floor is the least variance; factor over the deviation is the weight; shift is the bias for
        no mean.
        """
        multipliers, shifts = self.requant(op)
        n, channels, groups = len(x), x.shape[-1], op.attrs["groups"]
        size = channels // groups
        constants = {role: self.weights[name] for role, name in op.weights.items()}
        totals = x.sum((1, 2), dtype=np.int64).reshape(n, groups, size).sum(2)
        sums = (x.astype(np.int64) ** 2).sum((1, 2)) + constants["epsilon"]
        means, squares = self.scales[of_means(op.name)], self.scales[of_squares(op.name)]
        mean = means.dequantize(np.clip(multiply(totals, multipliers[0], shifts[0]), LOW, HIGH))
        parts = multiply(sums, multipliers[1], shifts[1]) + squares.zero_point
        parts = squares.dequantize(np.clip(parts, LOW, HIGH)).reshape(n, groups, size)
        # one after another, as kernels add
        square = np.add.accumulate(parts, axis=2)[:, :, -1]
        variance = np.maximum(square - mean * mean, constants["floor"])
        weight = (1 / np.sqrt(variance)).repeat(size, 1) * constants["factor"]
        bias = constants["shift"] - mean.repeat(size, 1) * weight
        halves = np.copysign(0.5, weight.astype(np.float64))
        rounded = np.clip(np.trunc(weight + halves), LOW, HIGH)
        return rounded.astype(np.int32), bias.astype(np.int32)

    def _group_norm(self, op: Int8Op, x: Array) -> Array:
        weight, bias = (made[:, None, None] for made in self.norm_weights(op, x))
        multipliers, shifts = (made[2:] for made in self.requant(op))
        zero_point = self.scales[op.name].zero_point
        return multiply(x * weight + bias, multipliers, shifts) + zero_point

    def _add(self, op: Int8Op, *inputs: Array) -> Array:
        multipliers, shifts = self.requant(op)
        total = np.zeros(inputs[0].shape, np.int64)
        for i, x in enumerate(inputs):
            wide = (x.astype(np.int64) - self.scales[op.inputs[i]].zero_point) << ADD_SHIFT
            total += multiply(wide, multipliers[i], shifts[i])
        return multiply(total, multipliers[2], shifts[2]) + self.scales[op.name].zero_point

    def _mean(self, op: Int8Op, x: Array) -> Array:
        count = x.shape[1] * x.shape[2]
        sums = x.sum((1, 2), dtype=np.int64, keepdims=True)
        return self._rescale(op, sums - count * self.scales[op.inputs[0]].zero_point)

    def _avg_pool(self, op: Int8Op, x: Array) -> Array:
        """Padding counts as zeros; the mean is rounded to the nearest, halves away from zero."""
        patches = _patches(x, op.attrs, self.scales[op.inputs[0]].zero_point)
        count = math.prod(op.attrs["kernel"])
        sums = patches.sum((-2, -1), dtype=np.int64)
        mean: Array = np.sign(sums) * ((np.abs(sums) + count // 2) // count)
        return mean

    def _max_pool(self, op: Int8Op, x: Array) -> Array:
        found: Array = _patches(x, op.attrs, LOW).max((-2, -1))
        return found

    def _relu(self, op: Int8Op, x: Array) -> Array:
        return self._rescale(op, x.astype(np.int64) - self.scales[op.inputs[0]].zero_point)


def quantize_multiplier(real: float) -> tuple[int, int]:
    """A positive real number as int32 (multiplier, shift): multiplier / 2^31 * 2^shift.

    The multiplier has all of its 31 bits; (0, 0) for what is so small that no int32 is left of one.
    """
    fraction, shift = math.frexp(real)
    multiplier = math.floor(fraction * (1 << 31) + 0.5)
    if multiplier == 1 << 31:
        multiplier, shift = 1 << 30, shift + 1
    return (multiplier, shift) if shift >= -31 else (0, 0)


def of_means(norm: str) -> str:
    """The name of a group norm's means, in steps of its input."""
    return f"{norm}.means"


def of_squares(norm: str) -> str:
    """The name of what each channel adds to its group's mean square, in squared steps."""
    return f"{norm}.squares"


def _pairs(real: Iterable[float]) -> tuple[Array, Array]:
    pairs = [quantize_multiplier(number) for number in real]
    return np.array([m for m, _ in pairs], np.int32), np.array([s for _, s in pairs], np.int32)


def multiply(x: Array, multiplier: Array, shift: Array) -> Array:
    """Integers times multiplier / 2^31 * 2^shift, rounded twice as TensorFlow Lite does; int64.

    First the upper half of the product, halves up in magnitude only where positive; then the shift
    to the right, halves away from zero.
    """
    wide = np.left_shift(x.astype(np.int64), np.maximum(shift, 0)) * multiplier.astype(np.int64)
    nudged = wide + np.where(wide >= 0, 1 << 30, 1 - (1 << 30))
    high = np.where(nudged >= 0, nudged >> 31, -(-nudged >> 31))
    right = np.maximum(-shift, 0).astype(np.int64)
    mask = np.left_shift(np.int64(1), right) - 1
    up = (high & mask) > (mask >> 1) + (high < 0)
    found: Array = (high >> right) + up
    return found


def _mean_requant(real: float, count: int) -> tuple[Array, Array]:
    """The multiplier of a sum of that many, which divides by their number, too."""
    multiplier, shift = quantize_multiplier(real)
    more = min(count.bit_length() - 1, 32, 31 + shift)
    multiplier = (multiplier << more) // count
    return np.array([multiplier], np.int32), np.array([shift - more], np.int32)


def _window(op: Int8Op, shape: Shape) -> Shape:
    """Output height and width of a sliding window."""
    attrs = op.attrs
    sizes = zip(shape[:2], attrs["kernel"], attrs["stride"], attrs["padding"], strict=True)
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)


def _patches(x: Array, attrs: Mapping[str, Any], fill: int) -> Array:
    """Every window of x (n, h, w, c): an array (n, out_h, out_w, c, kernel_h, kernel_w)."""
    (ph, pw), (sh, sw) = attrs["padding"], attrs["stride"]
    x = np.pad(x, ((0, 0), (ph, ph), (pw, pw), (0, 0)), constant_values=fill)
    windows: Array = np.lib.stride_tricks.sliding_window_view(
        x, tuple(attrs["kernel"]), axis=(1, 2)
    )
    return windows[:, ::sh, ::sw]
