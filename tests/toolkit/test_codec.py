"""Codecs: their bytes by hand, their errors by exact arithmetic."""

from __future__ import annotations

import struct
from fractions import Fraction
from math import ceil, isnan

import numpy as np
import pytest

from splitee.codec import KINDS, PLAIN, Codec, Coding, Kind
from splitee.ops import Array

LOSSY: tuple[Kind, ...] = ("float16", "int8", "int4", "top-k")


def codec(kind: Kind, elements: int, kept: int = 3) -> Codec:
    return Codec(kind, elements, kept if kind == "top-k" else 0)


def row(*values: float) -> Array:
    return np.array([values], np.float32)


def random(seed: int, samples: int, elements: int) -> Array:
    return np.random.default_rng(seed).standard_normal((samples, elements)).astype(np.float32)


# Codes by hand. A scale of 1 is 00 00 80 3f, of 2^-14 00 00 80 38; half floats: 2^14 is 0x7400,
# 2^13 is 0x7000, -3 * 2^12 is 0xf200, 2^15 is 0x7800.
BYTES: dict[str, tuple[Kind, Array, str]] = {
    "floats as they are": ("float32", row(1.0, -2.0), "00 00 80 3f 00 00 00 c0"),
    "halves of 2^-14": ("float16", row(1.0, -0.75, 0.5), "00 00 80 38 00 74 00 f2 00 70"),
    "a half that rounds up to 2^15": ("float16", row(1.99999), "00 00 80 38 00 78"),
    "integers": ("int8", row(127.0, -127.0, 1.0, 0.0), "00 00 80 3f 7f 81 01 00"),
    "ties go to the even integer": (
        "int8",
        row(127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5),
        "00 00 80 3f 7f 00 02 02 00 fe fe",
    ),
    "four bits, the first one low": ("int4", row(7.0, -7.0, 2.0, -1.0), "00 00 80 3f 97 f2"),
    "four bits, an odd number": ("int4", row(-7.0, 3.5, 1.0), "00 00 80 3f 49 01"),
    "the three largest": (
        "top-k",
        row(0.25, -0.75, 0.0, 1.0, 0.5),
        "00 00 80 38 01 00 00 f2 03 00 00 74 04 00 00 70",
    ),
    "of equals the lowest indices": (
        "top-k",
        row(0.5, 1.0, -0.5, 0.5, -1.0),
        "00 00 80 38 00 00 00 70 01 00 00 74 04 00 00 f4",
    ),
    "nothing but zeros": ("int8", row(0.0, -0.0, 0.0), "00 00 00 00 00 00 00"),
    "zeros by top-k": ("top-k", row(0, 0, 0, 0), "00 00 00 00 00 00 00 00 01 00 00 00 02 00 00 00"),
    "too small to matter": ("int8", row(8.2e-25, -1e-38, 1e-45), "00 00 00 00 00 00 00"),
    "no number": ("int8", row(1.0, float("nan"), 2.0), "00 00 c0 7f 00 00 00"),
    "infinite": ("float16", row(1.0, -float("inf")), "00 00 c0 7f 00 00 00 00"),
    "too large for anything": ("int4", row(1.0, 1.8e38), "00 00 c0 7f 00"),
    "infinite by top-k": (
        "top-k",
        row(1.0, 2.0, 3.0, float("inf"), 0.5),
        "00 00 c0 7f 01 00 00 00 02 00 00 00 03 00 00 00",
    ),
}


@pytest.mark.parametrize("title", BYTES)
def test_the_bytes_are_those_made_by_hand(title: str) -> None:
    kind, values, code = BYTES[title]
    found = codec(kind, values.shape[1])
    assert found.encode(values).hex(" ") == code
    assert len(found.encode(values)) == found.size


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_coded_each_for_itself(kind: Kind) -> None:
    values = random(0, 5, 37) * np.float32(10.0) ** np.arange(5)[:, None].astype(np.float32)
    found = codec(kind, 37)
    alone = [found.encode(values[i : i + 1]) for i in range(5)]
    assert found.encode(values) == b"".join(alone)
    np.testing.assert_array_equal(found.decode(b"".join(alone))[3:4], found.decode(alone[3]))


SPREADS = {"usual": 1.0, "large": 1e37, "small": 1e-22}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(("kind", "largest"), [("int8", 127), ("int4", 7)])
def test_an_integer_is_off_by_half_a_scale_at_most(kind: Kind, largest: int, spread: str) -> None:
    values = random(1, 20, 333) * np.float32(SPREADS[spread])
    found = codec(kind, 333)
    # m / 127 has a relative error of 2^-24, and so have 1 / scale and both products
    slack = Fraction(largest * 4, 2**24)
    for x, y in zip(values, found.decode(found.encode(values)), strict=True):
        scale = Fraction(float(np.abs(x).max())) / largest
        worst = max(abs(Fraction(float(a)) - Fraction(float(b))) for a, b in zip(x, y, strict=True))
        assert scale / 4 < worst <= scale * (Fraction(1, 2) + slack)


@pytest.mark.parametrize("spread", SPREADS)
def test_a_float16_is_off_by_a_part_in_2048(spread: str) -> None:
    values = random(2, 20, 333) * np.float32(SPREADS[spread])
    values[:, ::7] *= np.float32(1e-4)
    found = codec("float16", 333)
    error = np.abs(found.decode(found.encode(values)).astype(np.float64) - values)
    largest = np.abs(values).max(axis=1, keepdims=True).astype(np.float64)
    # a normal number has 11 bits; of scale, at most 2^-14 of the largest, one has at least 2^-24
    assert (error <= np.maximum(np.abs(values) * 2.0**-11, largest * 2.0**-39)).all()
    assert error.max() > 0


def test_a_gradient_that_a_plain_float16_cannot_say_comes_through() -> None:
    values = random(3, 4, 64) * np.float32(1e-9)
    found = codec("float16", 64)
    plain = values.astype(np.float16).astype(np.float32)
    assert not plain.any()
    np.testing.assert_allclose(found.decode(found.encode(values)), values, rtol=2**-11)


@pytest.mark.parametrize("kept", [1, 2, 31, 63])
def test_top_k_keeps_what_a_plain_sort_does(kept: int) -> None:
    rng = np.random.default_rng(4)
    values = rng.integers(-4, 5, (30, 64)).astype(np.float32)  # full of ties, exact in float16
    found = codec("top-k", 64, kept)
    for x, y in zip(values, found.decode(found.encode(values)), strict=True):
        order = sorted(range(64), key=lambda i, x=x: (-abs(x[i]), i))  # type: ignore[misc]
        expected = [x[i] if i in order[:kept] else 0 for i in range(64)]
        assert y.tolist() == expected


@pytest.mark.parametrize("kind", LOSSY)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_is_not_finite_is_not_at_the_other_end(kind: Kind, value: float) -> None:
    values = random(5, 3, 20)
    values[1, 13] = value
    found = codec(kind, 20)
    back = found.decode(found.encode(values))
    assert np.isfinite(back[[0, 2]]).all()
    assert isnan(back[1].sum())


@pytest.mark.parametrize("kind", LOSSY)
def test_what_is_finite_stays_so(kind: Kind) -> None:
    bits = np.random.default_rng(6).integers(0, 0x7F00_0000, (400, 5), np.uint32)
    values = bits.view(np.float32)
    assert np.isfinite(codec(kind, 5).decode(codec(kind, 5).encode(values))).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elements", [2, 3, 384, 1025])
def test_a_sample_takes_the_bytes_that_the_table_says(kind: Kind, elements: int) -> None:
    says = {
        "float32": 4 * elements,
        "float16": 4 + 2 * elements,
        "int8": 4 + elements,
        "int4": 4 + ceil(elements / 2),
        "top-k": 8,
    }
    found = codec(kind, elements, 1)
    assert found.fault is None
    assert found.size == says[kind]
    assert len(found.encode(random(7, 3, elements))) == 3 * says[kind]


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (Codec("int8", 1), "int8 takes 5 bytes a sample, and float32 4"),
        (Codec("top-k", 4, 4), "top-k takes 20 bytes a sample, and float32 16"),
        (Codec("top-k", 65537, 9), "top-k tells 65,536 elements apart, and a sample has 65,537"),
        (Codec("top-k", 65536, 9), None),
    ],
)
def test_a_codec_says_where_it_is_of_no_use(found: Codec, fault: str | None) -> None:
    assert found.fault == fault


def test_the_last_of_65536_elements_has_an_index() -> None:
    values = np.zeros((1, 65536), np.float32)
    values[0, 65535] = 1
    found = Codec("top-k", 65536, 1)
    assert found.encode(values)[4:6] == b"\xff\xff"
    np.testing.assert_array_equal(found.decode(found.encode(values)), values)


@pytest.mark.parametrize(
    "indices", [(0, 0, 1), (2, 1, 3), (1, 2, 5), (65535, 65535, 65535)], ids=str
)
def test_refuses_indices_that_do_not_rise_or_are_too_large(indices: tuple[int, ...]) -> None:
    pairs = b"".join(struct.pack("<HH", index, 0x3C00) for index in indices)
    with pytest.raises(ValueError, match="indices do not rise up to 4"):
        Codec("top-k", 5, 3).decode(struct.pack("<f", 1.0) + pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_a_part_of_a_sample(kind: Kind) -> None:
    found = codec(kind, 8)
    with pytest.raises(ValueError, match=f"{found.size - 1} bytes are not samples"):
        found.decode(bytes(found.size - 1))


@pytest.mark.parametrize("kind", KINDS)
def test_no_samples_are_no_bytes(kind: Kind) -> None:
    found = codec(kind, 8)
    assert found.encode(np.zeros((0, 8), np.float32)) == b""
    assert found.decode(b"").shape == (0, 8)


@pytest.mark.parametrize(
    ("share", "elements", "kept"),
    [(0.1, 384, 38), (0.1, 4, 1), (0.29, 100, 29), (0.999, 100, 99), (0.999, 2, 1), (0.5, 3, 2)],
)
def test_a_share_is_so_many_elements(share: float, elements: int, kept: int) -> None:
    coding = Coding("top-k", "top-k", share)
    assert (coding.up(elements).kept, coding.down(elements).kept) == (kept, kept)


def test_a_coding_has_a_codec_each_way() -> None:
    coding = Coding("int8", "float16")
    assert coding.up(9) == Codec("int8", 9)
    assert coding.down(9) == Codec("float16", 9)
    assert PLAIN.up(9) == PLAIN.down(9) == Codec("float32", 9)
