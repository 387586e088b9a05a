"""Convolutions in C, plain and in groups, held to PyTorch in float64 tensor by tensor."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from firmware.kernels_harness import (
    Fault,
    Image,
    Kernels,
    Pairs,
    agrees,
    guarded,
    ids,
    leaf,
    narrow,
    notices,
    randoms,
    rng,
    unassigned,
    wide,
)

CONVOLUTIONS = {
    "3x3 padding 1": Image((8, 8), (3, 3), padding=(1, 1)),
    "3x3 padding 0": Image((6, 7), (3, 3)),
    "5x5 padding 2": Image((9, 6), (5, 5), padding=(2, 2)),
    "1x1 image 1x1 kernel": Image((1, 1), (1, 1)),
    "1x1 image 3x3 kernel padding 1": Image((1, 1), (3, 3), padding=(1, 1)),
    "odd sizes stride 2": Image((7, 9), (3, 3), (2, 2), (1, 1)),
    "even sizes stride 2": Image((8, 6), (3, 3), (2, 2), (1, 1)),
    "1x1 kernel stride 2": Image((7, 8), (1, 1), (2, 2)),
    "1x1 kernel stride 3 padding 1": Image((5, 6), (1, 1), (3, 3), (1, 1)),
    "stride larger than kernel": Image((9, 11), (2, 2), (4, 3)),
    "one channel to one": Image((5, 5), (3, 3), padding=(1, 1), channels=1, out=1),
    "one channel to four": Image((5, 5), (3, 3), padding=(1, 1), channels=1, out=4),
    "four channels to eleven": Image((4, 5), (3, 3), padding=(1, 1), channels=4, out=11),
    "window, stride and padding not square": Image((7, 10), (3, 2), (1, 2), (0, 1)),
    "kernel as wide as the image": Image((4, 6), (1, 6)),
    "kernel larger than the image": Image((2, 3), (5, 7), padding=(2, 3)),
    "padding as large as the kernel": Image((3, 4), (2, 2), padding=(2, 2)),
    "padding larger than the kernel": Image((3, 2), (2, 2), (2, 3), (5, 4)),
    "outputs that see only padding": Image((1, 1), (1, 1), (1, 1), (3, 2)),
    "one sample": Image((6, 6), (3, 3), padding=(1, 1), n=1),
    "many channels": Image((4, 4), (3, 3), padding=(1, 1), channels=64, out=32, n=3),
}


GROUPED = {
    "depthwise": Image((7, 8), (3, 3), padding=(1, 1), channels=6, out=6, groups=6),
    "depthwise stride 2": Image((7, 8), (3, 3), (2, 2), (1, 1), channels=5, out=5, groups=5, n=3),
    "depthwise, two outputs a channel": Image((5, 4), (3, 3), channels=3, out=6, groups=3),
    "depthwise 1x1 image": Image((1, 1), (3, 3), padding=(1, 1), channels=4, out=4, groups=4),
    "two groups": Image((6, 5), (3, 3), padding=(1, 1), channels=6, out=10, groups=2),
    "three groups of 1x1 kernels": Image((4, 4), (1, 1), channels=6, out=9, groups=3, n=1),
    "not square": Image((7, 10), (3, 2), (1, 2), (0, 1), channels=4, out=8, groups=4),
    "one group": Image((6, 7), (3, 3)),
}


def conv2d(kernels: Kernels, case: Image, *, grouped: bool = False) -> Pairs:
    generator = rng()
    kernel = "grouped_conv2d" if grouped else "conv2d"
    groups = [case.groups] if grouped else []
    s, n = case.window(case.out), case.n
    x = randoms(generator, n, case.channels, *case.size)
    w = randoms(generator, case.out, case.channels // case.groups, *case.kernel)
    b = randoms(generator, case.out)
    y = unassigned(n, case.out, *case.out_size())
    kernels.call(f"{kernel}_forward", y, x, w, b, s, *groups, n)
    dy, dx = randoms(generator, *y.shape), randoms(generator, *x.shape)
    dw, db = randoms(generator, *w.shape), randoms(generator, *b.shape)
    wx, ww, wb = leaf(x, dx), leaf(w, dw), leaf(b, db)
    kernels.call(f"{kernel}_backward", dx, dw, db, dy, x, w, s, *groups, n)

    wy = torch.nn.functional.conv2d(wx, ww, wb, case.stride, case.padding, 1, case.groups)
    torch.autograd.backward(wy, wide(dy))
    return {
        "y": (y, narrow(wy)),
        "dx": (dx, narrow(wx.grad)),
        "dw": (dw, narrow(ww.grad)),
        "db": (db, narrow(wb.grad)),
    }


@pytest.mark.parametrize("tensor", ["y", "dx", "dw", "db"])
@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_conv2d_agrees_with_pytorch(kernels: Kernels, case: Image, tensor: str) -> None:
    assert agrees(conv2d(kernels, case), tensor)


@pytest.mark.parametrize("tensor", ["y", "dx", "dw", "db"])
@pytest.mark.parametrize("case", GROUPED.values(), ids=GROUPED.keys())
def test_grouped_conv2d_agrees_with_pytorch(kernels: Kernels, case: Image, tensor: str) -> None:
    assert agrees(conv2d(kernels, case, grouped=True), tensor)


# a case, and the argument that only the grouped kernel takes
KINDS: dict[str, tuple[Image, tuple[int, ...]]] = {
    "conv2d": (CONVOLUTIONS["3x3 padding 1"], ()),
    "grouped_conv2d": (GROUPED["two groups"], (2,)),
}


@pytest.mark.parametrize("kernel", KINDS)
def test_a_convolution_without_bias_starts_from_zero(kernels: Kernels, kernel: str) -> None:
    case, groups = KINDS[kernel]
    s, n = case.window(case.out), case.n
    x = randoms(rng(), n, case.channels, *case.size)
    w = randoms(rng(), case.out, case.channels // case.groups, *case.kernel)
    with_zeros, without = (unassigned(n, case.out, *case.out_size()) for _ in range(2))
    zeros = guarded(np.zeros(case.out, np.float32))
    kernels.call(f"{kernel}_forward", with_zeros, x, w, zeros, s, *groups, n)
    kernels.call(f"{kernel}_forward", without, x, w, None, s, *groups, n)
    np.testing.assert_array_equal(without, with_zeros)


@pytest.mark.parametrize("kernel", KINDS)
def test_dw_is_the_same_where_neither_dx_nor_db_is_wanted(kernels: Kernels, kernel: str) -> None:
    case, groups = KINDS[kernel]
    s, n = case.window(case.out), case.n
    x = randoms(rng(), n, case.channels, *case.size)
    w = randoms(rng(), case.out, case.channels // case.groups, *case.kernel)
    dy = randoms(rng(), n, case.out, *case.out_size())
    dx, db = randoms(rng(), *x.shape), randoms(rng(), case.out)
    dw, alone = randoms(rng(), *w.shape), randoms(rng(), *w.shape)
    kernels.call(f"{kernel}_backward", dx, dw, db, dy, x, w, s, *groups, n)
    kernels.call(f"{kernel}_backward", None, alone, None, dy, x, w, s, *groups, n)
    np.testing.assert_array_equal(alone, dw)


_CONV = partial(conv2d, case=CONVOLUTIONS["odd sizes stride 2"])
_GROUPED = partial(conv2d, case=GROUPED["two groups"], grouped=True)

FAULTS = [
    Fault("grouped_conv2d.c", "dx + i * x_size", "dx + group * x_size", _GROUPED, "dx"),
    Fault("grouped_conv2d.c", "dw + group * w_size", "dw", _GROUPED, "dw"),
    Fault("grouped_conv2d.c", "db + group * part.out_channels", "db + group", _GROUPED, "db"),
    Fault("conv2d.c", "dx + image, from, w + weight", "dx + image, from, w + c", _CONV, "dx"),
    Fault("conv2d.c", "dw + weight, from, x + image", "dw + weight, from, x + tap.x", _CONV, "dw"),
    Fault("conv2d.c", "% s->out_channels] += sum", "% s->out_channels] = sum", _CONV, "db"),
    Fault("patch.h", " + w3 * y3[i]", "", _CONV, "dx"),
    Fault("patch.h", "row3 += y3[i] * value", "row3 += y2[i] * value", _CONV, "dw"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=ids(FAULTS))
def test_a_planted_fault_is_noticed(fault: Fault, tmp_path: Path) -> None:
    assert notices(fault, tmp_path)
