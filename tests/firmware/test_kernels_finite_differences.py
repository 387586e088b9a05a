"""Every backward kernel, plain and fast, held to differences of its own forward kernel.

The oracle is neither PyTorch nor another kernel: an input is moved, and the forward kernel says
what that does to a random projection of its output. The tables are held to the headers: a backward
kernel that is missing here, or that has a gradient with no planted fault, is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from firmware import test_kernels_fast
from firmware.kernels_cases import CASES, STEP, Case, Inputs, backward_of, values
from firmware.kernels_harness import KERNELS, Floats, Kernels, build_faulty, rng
from firmware.test_kernels_fast import library

__all__ = ["library"]  # a fixture: the plain kernels and the fast ones

# What is measured is 3e-5 at most, and comes from two errors of the differences. The forward kernel
# rounds: by 2^-24 of outputs up to 30, some dozen of which an element moves, over STEP. And norms
# and the loss are curved: differences of fourth order are off by STEP^4 / 30 = 5e-7 times the fifth
# derivative. A wrong term changes a gradient, whose elements are about 1, by 1e-2 and more.
TOLERANCE = 2e-4


def declared() -> dict[str, tuple[str, ...]]:
    """The names of the gradients that each backward kernel makes."""
    text = "".join((KERNELS / file).read_text() for file in ("kernels.h", "fast/fast.h"))
    functions = re.findall(r"void (\w+_backward\w*)\((.*?)\);", text, re.DOTALL)
    gradient = re.compile(r"(?<!const )float \*(d\w*)")
    return {name: tuple(gradient.findall(parameters)) for name, parameters in functions}


DECLARED = declared()


def input_of(gradient: str) -> str:
    return gradient.removeprefix("d") or "x"


def differences(
    kernels: Kernels, case: Case, at: Inputs, name: str, dy: Floats
) -> NDArray[np.float64]:
    """dLoss/d(input), Loss = sum of dy * y, by central differences of fourth order."""
    start = case.forward(kernels, at).astype(np.float64)
    flat = at[name].reshape(-1)
    result = np.zeros(flat.size)
    for i, value in enumerate(flat.tolist()):
        for steps, weight in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
            flat[i] = value + steps * STEP
            moved = case.forward(kernels, at) - start  # elements that do not move add nothing
            result[i] += weight * (dy * moved).sum() / (12 * STEP)
        flat[i] = value
    return result.reshape(at[name].shape)


def error(kernels: Kernels, kernel: str, name: str, gradient: str) -> float:
    """How far the largest element of a gradient is off, against 1 or the largest element."""
    case, generator = CASES[kernel][name], rng()
    at = case.inputs(generator)
    dy = values(generator, *case.forward(kernels, at).shape)
    to = {
        each: values(generator, *at[input_of(each)].shape) for each in DECLARED[backward_of(kernel)]
    }
    before = np.zeros(1) if gradient == "d" else to[gradient].astype(np.float64)
    case.backward(kernels, at, dy, to)
    expected = differences(kernels, case, at, input_of(gradient), dy)
    return float(np.abs(to[gradient] - before - expected).max() / max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("kernel", "name", "gradient"),
    [
        pytest.param(kernel, name, gradient, id=f"{kernel}-{name}-{gradient}")
        for kernel, cases in CASES.items()
        for name in cases
        for gradient in DECLARED[backward_of(kernel)]
    ],
)
def test_a_gradient_is_what_differences_of_the_forward_kernel_say(
    kernels: Kernels, kernel: str, name: str, gradient: str
) -> None:
    assert error(kernels, kernel, name, gradient) < TOLERANCE


def test_no_backward_kernel_is_missing_here() -> None:
    assert {backward_of(kernel) for kernel in CASES} == set(DECLARED)


# ---- the test itself ----


@dataclass(frozen=True)
class Fault:
    """One change of the kernels' text, and the gradient that it makes wrong."""

    kernel: str
    case: str
    gradient: str
    file: str
    old: str
    new: str


_MOVING = "dw[c] += s.products;\n        // Moving"
_STRIDE_2 = "3x3 stride 2 on odd sizes"
_STRIDE_2_1X1 = "1x1 stride 2 on odd sizes"

FAULTS = [
    Fault("conv2d", "3x3", "dx", "conv2d.c", "from, w + weight", "from, w + c"),
    Fault("conv2d", "3x3", "dw", "conv2d.c", "from, x + image", "from, x + tap.x"),
    Fault("conv2d", "1x1", "dw", "patch.h", "row3 += y3[i]", "row3 += y2[i]"),
    Fault("conv2d", "3x3", "db", "conv2d.c", "channels] += sum", "channels] = sum"),
    Fault("grouped_conv2d", "two groups", "dx", "grouped_conv2d.c", "dx + i", "dx + group"),
    Fault("grouped_conv2d", "two groups", "dw", "grouped_conv2d.c", "dw + group", "dw + 0"),
    Fault("grouped_conv2d", "depthwise", "db", "grouped_conv2d.c", "db + group", "db + 0"),
    Fault("linear", "17 to 7", "dx", "linear.c", "dx + sample * in", "dx"),
    Fault("linear", "17 to 7", "dw", "patch.h", "y3[i] += w3 * value", "y3[i] = w3 * value"),
    Fault("linear", "1 to 4", "db", "linear.c", "db[o] += dy[o]", "db[o] = dy[o]"),
    Fault("group_norm", "one group", "d", "group_norm.c", "d[i] - level", "d[i]"),
    Fault("group_norm", "one group", "d", "group_norm.c", "slope *= r * r", "slope = 0"),
    Fault("group_norm", "two groups", "dw", "group_norm.c", "dw[first + c]", "dw[c]"),
    Fault("group_norm", "two groups", "db", "group_norm.c", "+= shift", "+= scale"),
    Fault("batch_norm", "3 channels", "d", "batch_norm.c", "(d[i] - level", "(d[i]"),
    Fault("batch_norm", "3 channels", "d", "batch_norm.c", "* share * rstd", "* share"),
    Fault("batch_norm", "3 channels", "dw", "batch_norm.c", "products * rstd", "products"),
    Fault("batch_norm", "3 channels", "db", "batch_norm.c", _MOVING, _MOVING.replace("dw", "db")),
    Fault("batch_norm_frozen", "3 channels", "d", "batch_norm.c", "*= gain", "*= rstd"),
    Fault(
        "batch_norm_frozen", "3 channels", "dw", "batch_norm.c", "x + i * step, mean", "x + i, mean"
    ),
    Fault(
        "batch_norm_frozen", "3 channels", "db", "batch_norm.c", "total.plain +=", "total.plain ="
    ),
    Fault("relu", "47 elements", "d", "elementwise.c", "to[i] &= relu_mask(from[i])", ""),
    Fault("relu6", "47 elements", "d", "elementwise.c", "& (bits - SIX)", ""),
    Fault("relu_bits", "47 elements", "d", "elementwise.c", "byte >> i & 1", "byte & 1"),
    Fault("relu_bits", "47 elements", "d", "elementwise.c", "*bits >> i & 1", "1"),
    Fault("relu6_bits", "47 elements", "d", "elementwise.c", "& (bits - SIX)", ""),
    Fault(
        "max_pool",
        "3x3 stride 2 padding 1",
        "dx",
        "pool.c",
        "winner[o] / s->kernel_width",
        "s->padding_height",
    ),
    Fault("avg_pool", "3x3 stride 2 padding 1", "dx", "pool.c", "dy[o] * share", "dy[o]"),
    Fault("softmax_cross_entropy", "10 classes", "dlogits", "loss.c", "] -= scale", "] -= 1"),
    Fault(
        "softmax_cross_entropy",
        "10 classes, distilled",
        "dlogits",
        "loss.c",
        "] += share",
        "] += 0",
    ),
    Fault("fast_conv2d", "3x3", "dx", "fast/slide.c", "turned ? g0 : g2", "g2"),
    Fault("fast_conv2d", _STRIDE_2, "dx", "fast/slide.c", "3 += g2 * x1", "3 += g2 * x2"),
    Fault("fast_conv2d", "1x1", "dx", "fast/conv1.c", "from += m.y.channels * m.y", "from += m.y"),
    Fault("fast_conv2d", _STRIDE_2_1X1, "dx", "fast/tile.c", "*to += *f", "*to = *f"),
    Fault("fast_conv2d", "3x3", "dw", "fast/dot.c", "g##2, x2, x3, x4", "g##1, x2, x3, x4"),
    Fault("fast_conv2d", _STRIDE_2, "dw", "fast/dot.c", "(a3, a4, a5, g0,", "(a3, a4, a5, h0,"),
    Fault("fast_conv2d", "1x1", "dw", "fast/mix.c", "TAP(c, *dy2", "TAP(c, *dy1"),
    Fault("fast_conv2d", _STRIDE_2_1X1, "dw", "fast/conv1.c", "from[i * step]", "from[i]"),
    Fault("fast_conv2d", "3x3", "db", "fast/conv2d.c", "channels] += span", "channels] = span"),
    Fault("fast_depthwise", "3x3", "dx", "fast/depthwise.c", "channel + 8 - i]", "channel + i]"),
    Fault("fast_depthwise", "3x3", "dw", "fast/view.c", "SEEN1(w6, w7, w8)", ""),
    Fault("fast_depthwise", "3x3", "db", "fast/depthwise.c", "] += span_sum", "] = span_sum"),
    Fault("fast_linear", "17 to 7", "dx", "fast/linear.c", "BACK8(w1, dy1)", "BACK8(w1, dy0)"),
    Fault("fast_linear", "17 to 7", "dw", "fast/linear.c", "OUTER8(to1, dy1)", ""),
    Fault("fast_linear", "17 to 7", "db", "fast/linear.c", "db[o] += dy[o]", "db[o] = dy[o]"),
]


def test_no_gradient_is_without_a_planted_fault() -> None:
    planted = {(backward_of(fault.kernel), fault.gradient) for fault in FAULTS}
    assert planted == {(name, gradient) for name in DECLARED for gradient in DECLARED[name]}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.kernel}-{f.gradient}: {f.new}")
def test_a_planted_fault_is_noticed(fault: Fault, tmp_path: Path) -> None:
    fast = fault.file.startswith("fast/")
    build = test_kernels_fast.build_faulty if fast else build_faulty
    faulty = build(tmp_path, fault.file.removeprefix("fast/"), fault.old, fault.new)
    # false for NaN too
    assert not error(faulty, fault.kernel, fault.case, fault.gradient) < TOLERANCE
