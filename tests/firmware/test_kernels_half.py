"""Halves in C, held to numpy's float16 bit by bit; a board's instructions for them, to that C."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from firmware.kernels_harness import Floats, Kernels, build_faulty, guarded, unassigned
from firmware.test_fast_on_boards import BOARDS, BuildCheck, check, run

__all__ = ["check"]  # a fixture

PROGRAM = Path(__file__).parent / "half_check.c"
HALVES = np.arange(1 << 16, dtype=np.uint16)


def neighbours(values: Floats) -> Floats:
    """What lies from two floats below to two above each."""
    bits = values.view(np.uint32)[:, None] + np.arange(-2, 3).astype(np.uint32)
    return bits.astype(np.uint32).view(np.float32).ravel()


def floats() -> Floats:
    """Every half, every tie between two of them, what lies beside those, and many others."""
    halves = HALVES.view(np.float16).astype(np.float32)
    finite = np.unique(halves[np.isfinite(halves)])
    ties = (finite[1:] + finite[:-1]) / 2  # exact: a float has room for the extra bit
    borders = np.array([0, 2**-25, 65504, 65520, 65536, np.inf, np.nan], np.float32)
    anything = np.random.default_rng(20251209).integers(0, 1 << 32, 1_000_000, np.uint32)
    parts = [neighbours(np.concatenate([halves, ties, borders, -borders])), anything.view("f4")]
    return guarded(np.concatenate(parts))


def pack(kernels: Kernels, x: Floats) -> NDArray[np.uint16]:
    h = guarded(np.full(x.size, 0xAAAA, np.uint16))
    kernels.call("half_pack", h, x, x.size)
    return h


def unpack(kernels: Kernels, h: NDArray[np.uint16]) -> Floats:
    x = unassigned(h.size)
    kernels.call("half_unpack", x, guarded(h), h.size)
    return x


def wrong_halves(kernels: Kernels) -> int:
    x = floats()
    ours = pack(kernels, x)
    with np.errstate(over="ignore", invalid="ignore"):
        theirs = x.astype(np.float16).view(np.uint16)
    # the payload of a NaN is nobody's promise
    both_nan = np.isnan(x) & np.isnan(ours.view(np.float16))
    return int(((ours != theirs) & ~both_nan).sum())


def wrong_floats(kernels: Kernels) -> int:
    ours = unpack(kernels, HALVES)
    theirs = HALVES.view(np.float16).astype(np.float32)
    both_nan = np.isnan(ours) & np.isnan(theirs)
    return int(((ours.view(np.uint32) != theirs.view(np.uint32)) & ~both_nan).sum())


def test_floats_become_the_halves_that_numpy_makes(kernels: Kernels) -> None:
    assert wrong_halves(kernels) == 0


def test_every_half_becomes_the_float_that_numpy_makes(kernels: Kernels) -> None:
    assert wrong_floats(kernels) == 0


def test_every_half_comes_back_and_a_nan_as_a_quiet_one(kernels: Kernels) -> None:
    back = pack(kernels, unpack(kernels, HALVES))
    quiet = np.where(HALVES & 0x7FFF > 0x7C00, HALVES | 0x0200, HALVES)
    np.testing.assert_array_equal(back, quiet)


@pytest.mark.parametrize(
    ("value", "half"),
    [
        (1.0, 0x3C00),
        (-2.0, 0xC000),
        (65504.0, 0x7BFF),
        (65519.996, 0x7BFF),
        (65520.0, 0x7C00),
        (-np.inf, 0xFC00),
        (2.0**-14, 0x0400),
        (2.0**-24, 0x0001),
        (2.0**-25, 0x0000),
        (1.0000001 * 2.0**-25, 0x0001),
        (1.5 * 2.0**-24, 0x0002),
        (1 + 2.0**-11, 0x3C00),
        (1 + 3 * 2.0**-11, 0x3C02),
        (-0.0, 0x8000),
    ],
)
def test_a_number_becomes_its_half(kernels: Kernels, value: float, half: int) -> None:
    assert pack(kernels, guarded(np.array([value], np.float32)))[0] == half


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (" - 1 + odd)", ")"),
        ("126 - exponent", "125 - exponent"),
        ("magnitude >= 0x47800000", "magnitude >= 0x7F800000"),
        ("magnitude < 0x33000000", "magnitude <= 0x33000001"),
        ("magnitude > 0x7F800000", "magnitude > 0x7F800001"),
        ("from[i] >> 16 & 0x8000", "0"),
    ],
)
def test_a_planted_fault_is_noticed_in_halves(old: str, new: str, tmp_path: Path) -> None:
    assert wrong_halves(build_faulty(tmp_path, "half.c", old, new)) > 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("magnitude > 0x7C00", "magnitude > 0x7C01"),
        ("magnitude >= 0x400", "magnitude >= 0x3FF"),
        ("0x1p-24f", "0x1p-25f"),
        ("(uint32_t)(h[i] & 0x8000) << 16", "0"),
    ],
)
def test_a_planted_fault_is_noticed_in_floats(old: str, new: str, tmp_path: Path) -> None:
    assert wrong_floats(build_faulty(tmp_path, "half.c", old, new)) > 0


@pytest.mark.parametrize("board", BOARDS)
def test_the_instructions_of_a_core_make_the_same_bits(check: BuildCheck, board: str) -> None:
    firmware = check(BOARDS[board], "-O3", PROGRAM)
    assert run(BOARDS[board], firmware) == ["unpacked 65536", "packed 983040"]
