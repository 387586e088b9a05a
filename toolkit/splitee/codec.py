"""Codecs: what a sample's activations, or its gradient, are on the wire; ``codec.c`` bit for bit.

A tensor is coded sample by sample, one code behind the other; no scale spans two samples. All
numbers are little endian. Of a sample with n elements:

=========  =======================================  ==================================
codec      bytes                                    bytes a sample
=========  =======================================  ==================================
float32    n x float32                              4 n
float16    scale, n x float16                       4 + 2 n
int8       scale, n x int8                          4 + n
int4       scale, n x int4, the lower half of a     4 + n / 2, rounded up
           byte first, then zero up to a whole one
top-k      scale, k x (index uint16, float16),      4 + 4 k
           the indices rising
=========  =======================================  ==================================

scale is a float32, and a value is its number times scale, rounded once. With m, the largest
magnitude of the sample, scale is m / 127 for int8, m / 7 for int4, and for float16 the power of two
that brings m to 2^14 up to 2^15, so that small gradients do not vanish; all in float32. A number is
x * (1 / scale), each operation rounded to float32, then to the nearest int or float16, of two as
near the even one. So |x - value| <= scale / 2 for integers, and 2^-11 |x| for float16 (2^-25 scale
where that is more), all but for the rounding of float32.

Where m is below 2^-80, scale is 0 and all numbers are. Where it is 2^127 or more, infinite or no
number, scale is a quiet NaN and all numbers are 0: the whole sample is then no number at the other
end. (In between, every scale and its inverse are normal numbers: a core that takes subnormal ones
for zeros computes the same bits, and what is finite stays so.)

top-k keeps the k elements that are largest in magnitude, of equal ones those with the lowest
indices; all others are 0. An element is two bytes of index and two of value: a float32 would cost
half as much again, and the error of a float16 is nothing beside that of what is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from splitee.ops import Array

Kind = Literal["float32", "float16", "int8", "int4", "top-k"]
KINDS: tuple[Kind, ...] = get_args(Kind)

INDICES = 1 << 16  # elements that a uint16 can tell apart

_STEPS = {"int8": 127, "int4": 7}  # number of the largest magnitude
_SMALLEST, _LARGEST = 0x1780_0000, 0x7F00_0000  # the bits of 2^-80 and of 2^127
_EXPONENT = 0x7F80_0000
_ONE = 0x3F80_0000
_NAN = 0x7FC0_0000
_TO_HALF = 14 << 23  # how far the exponent of m is above that of a float16's scale


@dataclass(frozen=True)
class Codec:
    """A codec for samples of one size."""

    kind: Kind
    elements: int  # of a sample
    kept: int = 0  # of them by top-k

    @property
    def size(self) -> int:
        """Bytes of a sample."""
        match self.kind:
            case "float32":
                return 4 * self.elements
            case "float16":
                return 4 + 2 * self.elements
            case "int8":
                return 4 + self.elements
            case "int4":
                return 4 + (self.elements + 1) // 2
        return 4 + 4 * self.kept

    @property
    def fault(self) -> str | None:
        """Why nobody can use it for such samples, or None: firmware decodes in a tensor's place."""
        if self.kind == "top-k" and self.elements > INDICES:
            return f"top-k tells {INDICES:,} elements apart, and a sample has {self.elements:,}"
        if self.size > 4 * self.elements:
            return f"{self.kind} takes {self.size} bytes a sample, and float32 {4 * self.elements}"
        return None

    def encode(self, values: Array) -> bytes:
        """The code of (samples, elements) values."""
        x = np.ascontiguousarray(values, "<f4")
        if self.kind == "float32":
            return x.tobytes()
        scale, inverse = self._scales(x)
        code = np.zeros((len(x), self.size), np.uint8)
        code[:, :4] = scale.view(np.uint8)
        if self.kind == "top-k":
            # a stable sort leaves the lowest index first among equals
            order = np.argsort(-_magnitudes(x).astype(np.int64), axis=1, kind="stable")
            kept = np.sort(order[:, : self.kept], axis=1)
            pairs = np.empty((*kept.shape, 2), "<u2")
            pairs[..., 0] = kept
            pairs[..., 1] = _numbers(np.take_along_axis(x, kept, 1), inverse, "<f2").view("<u2")
            code[:, 4:] = pairs.reshape(len(x), 2 * self.kept).view(np.uint8)
        elif self.kind == "int4":
            numbers = np.zeros((len(x), 2 * (self.size - 4)), np.uint8)
            numbers[:, : self.elements] = _numbers(x, inverse, "i1").view(np.uint8) & 15
            code[:, 4:] = numbers[:, ::2] | numbers[:, 1::2] << 4
        else:
            form = "<f2" if self.kind == "float16" else "i1"
            code[:, 4:] = _numbers(x, inverse, form).view(np.uint8)
        return code.tobytes()

    def decode(self, code: bytes | bytearray | memoryview) -> Array:
        """The values, (samples, elements), of a code; float32's are in its memory if they may be.

        Raises ValueError for a length that is not one of whole samples, and for indices that do
        not rise or are too large.
        """
        if len(code) % self.size:
            raise ValueError(f"{len(code)} bytes are not samples of {self.size} bytes")
        rows = np.frombuffer(code, np.uint8).reshape(-1, self.size)
        if self.kind == "float32":
            return np.require(rows.view("<f4"), np.float32, "W")
        scale, coded = np.ascontiguousarray(rows[:, :4]).view("<f4"), rows[:, 4:]
        coded = np.ascontiguousarray(coded)
        match self.kind:
            case "float16":
                numbers = coded.view("<f2").astype(np.float32)
            case "int8":
                numbers = coded.view("i1").astype(np.float32)
            case "int4":
                both = np.stack([coded << 4, coded & 0xF0], axis=2).view("i1") >> 4
                numbers = both.reshape(len(rows), 2 * coded.shape[1])[:, : self.elements].astype(
                    np.float32
                )
            case _:
                return self._scattered(coded.view("<u2").reshape(len(rows), self.kept, 2), scale)
        return _products(numbers, scale)

    def _scattered(self, pairs: Array, scale: Array) -> Array:
        kept = pairs[..., 0].astype(np.int64)
        if (np.diff(kept, axis=1) <= 0).any() or (kept >= self.elements).any():
            raise ValueError(f"indices do not rise up to {self.elements - 1}")
        values = np.zeros((len(pairs), self.elements), np.float32)
        numbers = np.ascontiguousarray(pairs[..., 1]).view("<f2").astype(np.float32)
        np.put_along_axis(values, kept, _products(numbers, scale), 1)
        return values

    def _scales(self, x: Array) -> tuple[Array, Array]:
        """Scale and 1 / scale of every sample, (samples, 1); of no number, and of 0, 0."""
        largest = _magnitudes(x).max(axis=1, keepdims=True)
        usual = (largest >= _SMALLEST) & (largest < _LARGEST)
        bits = np.where(usual, largest, np.uint32(_ONE))
        if self.kind in _STEPS:
            scale = bits.view(np.float32) / np.float32(_STEPS[self.kind])
        else:
            scale = ((bits & np.uint32(_EXPONENT)) - np.uint32(_TO_HALF)).view(np.float32)
        nan = np.array(_NAN, np.uint32).view(np.float32)
        zero = np.float32(0)
        otherwise = np.where(largest < _SMALLEST, zero, nan)
        return (
            np.where(usual, scale, otherwise).astype("<f4"),
            np.where(usual, np.float32(1) / scale, zero),
        )


def _magnitudes(x: Array) -> Array:
    """The bits without the sign: they order as the magnitudes do, infinity and NaN above all."""
    return x.view("<u4") & np.uint32(0x7FFF_FFFF)


def _numbers(x: Array, inverse: Array, form: str) -> Array:
    """What is sent for each value, as int8 or float16."""
    with np.errstate(all="ignore"):
        products = np.where(inverse == 0, np.float32(0), x * inverse)
        return (products if form == "<f2" else np.rint(products)).astype(form)


def _products(numbers: Array, scale: Array) -> Array:
    with np.errstate(all="ignore"):  # of a code that nobody made, anything may come
        return (numbers * scale).astype(np.float32)


@dataclass(frozen=True)
class Coding:
    """A client's codecs, at whatever cut it is: for its activations, and the server's gradient."""

    activations: Kind = "float32"
    gradient: Kind = "float32"
    share: float = 0.1  # of a sample's elements that top-k keeps

    def up(self, elements: int) -> Codec:
        """The codec of activations."""
        return self._codec(self.activations, elements)

    def down(self, elements: int) -> Codec:
        """The codec of gradients."""
        return self._codec(self.gradient, elements)

    def _codec(self, kind: Kind, elements: int) -> Codec:
        if kind != "top-k":
            return Codec(kind, elements)
        # all of them are no saving
        return Codec(kind, elements, max(1, min(round(self.share * elements), elements - 1)))


PLAIN = Coding()
