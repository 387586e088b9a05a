"""The step in C on its own: what counts as finite, the factor of the clip, and the update."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from firmware.kernels_harness import KERNELS, Floats, Kernels, agrees, build, guarded, narrow, rng
from splitee_exporters.c import to_c
from splitee_host.verify import TOLERANCE
from step_harness import case


class Settings(ctypes.Structure):
    """`struct message_settings` of messages.h."""

    _fields_ = tuple(
        (name, ctypes.c_float)
        for name in (
            *("learning_rate", "momentum", "weight_decay"),
            *("exit_weight", "server_weight", "clip", "distill"),
        )
    )


class Step:
    """step.c as a library, with a segment around it that is not looked at here."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._library = kernels._library
        self._library.step_finite.restype = ctypes.c_size_t
        self._library.step_factor.restype = ctypes.c_float

    def finite(self, values: Floats) -> int:
        """How many values stand before the first that is not finite."""
        start = ctypes.c_void_p(values.ctypes.data)
        return int(self._library.step_finite(start, ctypes.c_size_t(values.size)))

    def factor(self, squares: float, clip: float) -> float:
        """What gradients are multiplied with."""
        found = self._library.step_factor(ctypes.c_float(squares), ctypes.c_float(clip))
        return float(found)

    def update(self, w: Floats, v: Floats | None, g: Floats, factor: float, s: Settings) -> None:
        """Changes w, v and g in place, and nothing around them."""
        self._kernels.call("step_update", w, v, g, factor, s, w.size)


@pytest.fixture(scope="session")
def step(tmp_path_factory: pytest.TempPathFactory) -> Step:
    folder = tmp_path_factory.mktemp("step")
    (folder / "segment.c").write_text(to_c(case("pools").build))
    core = KERNELS.parent / "core" / "step.c"
    sources = [*sorted(KERNELS.glob("**/*.c")), core, folder / "segment.c"]
    return Step(build(folder / "step.so", sources))


BITS = {  # the float, and whether it is finite
    "zero": (0x00000000, True),
    "minus zero": (0x80000000, True),
    "the smallest": (0x00000001, True),
    "one": (0x3F800000, True),
    "the largest": (0x7F7FFFFF, True),
    "the largest below zero": (0xFF7FFFFF, True),
    "infinity": (0x7F800000, False),
    "minus infinity": (0xFF800000, False),
    "a quiet NaN": (0x7FC00000, False),
    "a quiet NaN with a sign": (0xFFC00001, False),
    "a signalling NaN": (0x7F800001, False),
    "a NaN of all ones": (0xFFFFFFFF, False),
}


@pytest.mark.parametrize("title", BITS)
def test_a_value_is_finite_unless_its_exponent_is_all_ones(step: Step, title: str) -> None:
    bits, finite = BITS[title]
    value = guarded(np.array([bits], np.uint32)).view(np.float32)
    assert step.finite(value) == int(finite)
    assert bool(np.isfinite(value[0])) == finite


@given(bits=st.lists(st.integers(0, 2**32 - 1) | st.sampled_from([0x7F800000, 0x7FC00000])))
def test_the_first_value_that_is_not_finite_is_found(step: Step, bits: list[int]) -> None:
    values = guarded(np.array(bits, np.uint32)).view(np.float32)
    bad = np.flatnonzero(~np.isfinite(values))
    assert step.finite(values) == (bad[0] if bad.size else len(bits))


def factor_in_torch(norm: float, clip: float) -> float:
    """What torch multiplies a gradient of that norm with, in float64."""
    one = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    one.grad = torch.full((1,), norm, dtype=torch.float64)
    nn.utils.clip_grad_norm_([one], clip)
    return one.grad.item() / norm


@pytest.mark.parametrize("clip", [1e-6, 0.03, 1.0, 40.0])
@pytest.mark.parametrize("ratio", [1e-3, 0.5, 0.9999, 1.0, 1.0001, 2.0, 1e4])
def test_the_factor_is_torchs(step: Step, clip: float, ratio: float) -> None:
    norm = ratio * clip  # the smallest of these show the epsilon
    expected = factor_in_torch(norm, clip)
    assert step.factor(norm**2, clip) == pytest.approx(expected, rel=TOLERANCE)


def test_gradients_within_the_clip_stay_bit_for_bit(step: Step) -> None:
    assert [step.factor(norm**2, 1.0) for norm in (0.0, 1e-20, 0.5, 0.999)] == [1] * 4


def test_without_a_clip_the_factor_is_one(step: Step) -> None:
    assert [step.factor(squares, 0.0) for squares in (0.0, 1.0, 1e38, np.inf)] == [1] * 4


def test_a_norm_beyond_all_floats_leaves_nothing_of_the_gradients(step: Step) -> None:
    assert step.factor(np.inf, 1.0) == 0


@pytest.mark.parametrize("factor", [0.25, 1.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_part_of_the_vector_is_updated_as_torch_does_and_nothing_around_it(
    step: Step, momentum: float, factor: float
) -> None:
    generator, size = rng(), 29
    w, g, v = (guarded(generator.standard_normal(size, np.float32)) for _ in range(3))
    parameter = nn.Parameter(torch.tensor(w, dtype=torch.float64))
    parameter.grad = factor * torch.tensor(g, dtype=torch.float64)
    optimizer = torch.optim.SGD([parameter], 0.1, momentum, weight_decay=0.01)
    velocity = torch.tensor(v, dtype=torch.float64)
    optimizer.state[parameter]["momentum_buffer"] = velocity
    optimizer.step()
    step.update(w, v if momentum else None, g, factor, Settings(0.1, momentum, 0.01, 1, 0, 0, 0))
    pairs = {"w": (w, narrow(parameter)), "g": (g, narrow(parameter.grad))}
    pairs |= {"v": (v, narrow(velocity))} if momentum else {}
    assert all(agrees(pairs, tensor) for tensor in pairs)
