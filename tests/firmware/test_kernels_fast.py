"""The fast C kernels, held to PyTorch in float64 tensor by tensor.

What runs here is their portable form; ``test_fast_on_boards.py`` runs those for Arm cores.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from firmware.kernels_harness import (
    KERNELS,
    STRICT,
    Fault,
    Image,
    Kernels,
    Pairs,
    agrees,
    build,
    guarded,
    ids,
    leaf,
    narrow,
    randoms,
    relative_error,
    rng,
    unassigned,
    wide,
)
from firmware.test_kernels import LAYERS, STEPS
from firmware.test_kernels_convolution import CONVOLUTIONS
from splitee.ops import OPS

SIZES = Path(__file__).parent / "fast_sizes.c"


def build_fast(target: Path, kernels: Path, flags: tuple[str, ...] = STRICT) -> Kernels:
    """The fast kernels with the plain ones, to which they hand what they have no fast way for."""
    return build(target, [*sorted(kernels.glob("**/*.c")), SIZES], flags)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return build_fast(tmp_path_factory.mktemp("fast") / "kernels.so", KERNELS)


@pytest.fixture
def kernels(library: Kernels, capfd: pytest.CaptureFixture[str]) -> Iterator[Kernels]:
    """The library; the test fails if the sanitizer had something to say."""
    yield library
    assert "runtime error" not in capfd.readouterr().err


def disagreeing(pairs: Pairs) -> dict[str, float]:
    """The tensors that do not agree, and how far each is off."""
    return {name: relative_error(pairs, name) for name in pairs if not agrees(pairs, name)}


# ---- convolution, of all channels together and of each on its own ----

LARGER = {
    "first layer of an image": Image((32, 32), (3, 3), padding=(1, 1), channels=3, out=16, n=1),
    "rows in two bands": Image((16, 16), (3, 3), padding=(1, 1), channels=4, out=6),
    "channels in several pieces": Image((20, 20), (3, 3), padding=(1, 1), channels=40, out=5, n=1),
    "channels in several pieces stride 2": Image(
        (21, 20), (3, 3), (2, 2), (1, 1), channels=40, out=70, n=1
    ),
    "stride 2": Image((16, 16), (3, 3), (2, 2), (1, 1), channels=16, out=32),
    "stride 2 padding 0": Image((15, 16), (3, 3), (2, 2), channels=6, out=7),
    "stride 2 padding 3": Image((9, 10), (3, 3), (2, 2), (3, 3), channels=6, out=7),
    "as wide as fits": Image((5, 330), (3, 3), padding=(1, 1), channels=2, out=3),
    "too wide": Image((5, 400), (3, 3), padding=(1, 1), channels=2, out=3),
    "wide stride 2": Image((5, 301), (3, 3), (2, 2), (1, 1), channels=2, out=3),
    "one channel, tall": Image((100, 10), (3, 3), padding=(1, 1), channels=1, out=1, n=1),
    "1x1": Image((16, 16), (1, 1), channels=16, out=32),
    "1x1 odd sizes": Image((5, 5), (1, 1), channels=130, out=131),
    "1x1 stride 2": Image((16, 16), (1, 1), (2, 2), channels=16, out=32),
    "1x1 stride 2 odd sizes": Image((9, 9), (1, 1), (2, 2), channels=130, out=7),
    "1x1 stride 2 large": Image((70, 65), (1, 1), (2, 2), channels=5, out=6),
}
IMAGES = CONVOLUTIONS | LARGER
EACH_ALONE = CONVOLUTIONS | {
    "stride 2": Image((16, 16), (3, 3), (2, 2), (1, 1), channels=7),
    "stride 2 padding 3": Image((9, 10), (3, 3), (2, 2), (3, 3), channels=6),
    "rows in two bands": Image((40, 30), (3, 3), padding=(1, 1), channels=2),
    "rows in two bands stride 2": Image((41, 39), (3, 3), (2, 2), (1, 1), channels=2),
    "as wide as fits": Image((5, 330), (3, 3), padding=(1, 1), channels=2),
    "too wide": Image((5, 400), (3, 3), padding=(1, 1), channels=2),
}
TENSORS = ["y", "dx", "dw", "db", "dw alone"]


@cache  # the tests of one case's tensors share it
def convolution(
    kernels: Kernels, case: Image, seed: int = 1, *, name: str = "conv2d", groups: int = 1
) -> Pairs:
    """Both passes; "dw alone" is dw where neither dx nor db is wanted."""
    generator = np.random.default_rng(seed)
    s, n, out = case.window(case.out), case.n, case.out
    x = randoms(generator, n, case.channels, *case.size)
    w = randoms(generator, out, case.channels // groups, *case.kernel)
    b = randoms(generator, out)
    y = unassigned(n, out, *case.out_size())
    size = kernels.size(f"{name}_scratch", s)
    kernels.call(f"fast_{name}_forward", y, x, w, b, s, n, unassigned(size))
    dy, dx = randoms(generator, *y.shape), randoms(generator, *x.shape)
    dw, db = randoms(generator, *w.shape), randoms(generator, *b.shape)
    alone = guarded(dw)
    wx, ww, wb = leaf(x, dx), leaf(w, dw), leaf(b, db)
    backward = f"fast_{name}_backward"
    kernels.call(backward, dx, dw, db, dy, x, w, s, n, unassigned(size))
    kernels.call(backward, None, alone, None, dy, x, w, s, n, unassigned(size))

    wy = torch.nn.functional.conv2d(wx, ww, wb, case.stride, case.padding, groups=groups)
    torch.autograd.backward(wy, wide(dy))
    return {
        "y": (y, narrow(wy)),
        "dx": (dx, narrow(wx.grad)),
        "dw": (dw, narrow(ww.grad)),
        "db": (db, narrow(wb.grad)),
        "dw alone": (alone, narrow(ww.grad)),
    }


def depthwise(kernels: Kernels, case: Image, seed: int = 1) -> Pairs:
    case = replace(case, out=case.channels)
    return convolution(kernels, case, seed, name="depthwise", groups=case.channels)


def random_image(seed: int) -> Image:
    """A window of a kind that the fast kernels compute, three times in four."""
    generator = np.random.default_rng(seed)

    def one_of(*choices: int) -> int:
        return int(generator.choice(choices))

    def below(end: int) -> int:
        return int(generator.integers(end))

    kernel = (one_of(1, 3, 3, 3),) * 2
    stride = (one_of(1, 1, 2, 2, 3),) * 2
    padding = (kernel[0] // 2,) * 2 if below(2) else (below(4), below(4))
    # at least as large as the kernel, whatever the padding
    size = kernel[0] + below(18), kernel[1] + below(18)
    channels, out = 1 + below(19), 1 + below(19)
    return Image(size, kernel, stride, padding, channels, out, n=1 + below(3))


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("case", IMAGES.values(), ids=IMAGES.keys())
def test_convolution_agrees_with_pytorch(kernels: Kernels, case: Image, tensor: str) -> None:
    assert agrees(convolution(kernels, case), tensor)


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("case", EACH_ALONE.values(), ids=EACH_ALONE.keys())
def test_depthwise_convolution_agrees_with_pytorch(
    kernels: Kernels, case: Image, tensor: str
) -> None:
    assert agrees(depthwise(kernels, case), tensor)


@pytest.mark.parametrize("seed", range(60))
def test_convolutions_of_random_windows_agree_with_pytorch(kernels: Kernels, seed: int) -> None:
    case = random_image(seed)
    assert not disagreeing(convolution(kernels, case, seed)), case


@pytest.mark.parametrize("seed", range(30))
def test_depthwise_convolutions_of_random_windows_agree_with_pytorch(
    kernels: Kernels, seed: int
) -> None:
    case = random_image(seed)
    assert not disagreeing(depthwise(kernels, case, seed)), case


@pytest.mark.parametrize(("name", "out"), [("conv2d", 5), ("depthwise", 3)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5)], ids=str)
def test_a_convolution_without_bias_starts_from_zero(
    kernels: Kernels, name: str, out: int, kernel: tuple[int, int]
) -> None:
    case = Image((8, 8), kernel)
    s = case.window(out)
    x, scratch = randoms(rng(), 2, 3, 8, 8), unassigned(kernels.size(f"{name}_scratch", s))
    w = randoms(rng(), out, 3 if name == "conv2d" else 1, *kernel)
    with_zeros, without = (unassigned(2, out, *case.out_size()) for _ in range(2))
    zeros = guarded(np.zeros(out, np.float32))
    kernels.call(f"fast_{name}_forward", with_zeros, x, w, zeros, s, 2, scratch)
    kernels.call(f"fast_{name}_forward", without, x, w, None, s, 2, scratch)
    np.testing.assert_array_equal(without, with_zeros)


SIDES = st.integers(1, 300)
FEW = st.integers(1, 40)
PADDINGS = st.tuples(st.integers(0, 3), st.integers(0, 3))


@settings(deadline=None)
@given(size=st.tuples(SIDES, SIDES), padding=PADDINGS, channels=FEW, out=FEW)
@example(size=(1, 1), padding=(0, 0), channels=1, out=1)
@example(size=(30, 26), padding=(0, 0), channels=1, out=1)  # 1024, the most
@example(size=(29, 26), padding=(0, 0), channels=1, out=1)
def test_the_toolkit_plans_the_scratch_that_the_kernel_uses(
    library: Kernels,
    size: tuple[int, int],
    padding: tuple[int, int],
    channels: int,
    out: int,
) -> None:
    case = Image(size, (1, 1), padding=padding, channels=channels)

    def planned(groups: int, out: int) -> int:
        attrs = {"kernel": (1, 1), "stride": (1, 1), "padding": padding, "groups": groups}
        x, y = (channels, *size), (out, *case.out_size())
        return OPS["conv2d"].scratch(attrs, x, y) // np.float32().nbytes

    assert planned(1, out) == library.size("conv2d_scratch", case.window(out))
    if channels > 1:
        depthwise = library.size("depthwise_scratch", case.window(channels))
        assert planned(channels, channels) == depthwise
        assert planned(channels, 2 * channels) == 0  # the plain kernel's work


# ---- linear ----

MORE_LAYERS = {
    "64 to 10, one sample": (64, 10, 1),
    "13 to 5": (13, 5, 2),
    "8 to 1": (8, 1, 1),
    "5 to 64": (5, 64, 2),
}


def linear(kernels: Kernels, case: tuple[int, int, int]) -> Pairs:
    """Both passes; "dw alone" is dw where neither dx nor db is wanted."""
    generator = rng()
    width, out, n = case
    x, w = randoms(generator, n, width), randoms(generator, out, width)
    b, y = randoms(generator, out), unassigned(n, out)
    kernels.call("fast_linear_forward", y, x, w, b, width, out, n)
    dy, dx = randoms(generator, n, out), randoms(generator, n, width)
    dw, db = randoms(generator, out, width), randoms(generator, out)
    alone = guarded(dw)
    wx, ww, wb = leaf(x, dx), leaf(w, dw), leaf(b, db)
    kernels.call("fast_linear_backward", dx, dw, db, dy, x, w, width, out, n)
    kernels.call("fast_linear_backward", None, alone, None, dy, x, w, width, out, n)

    wy = torch.nn.functional.linear(wx, ww, wb)
    torch.autograd.backward(wy, wide(dy))
    return {
        "y": (y, narrow(wy)),
        "dx": (dx, narrow(wx.grad)),
        "dw": (dw, narrow(ww.grad)),
        "db": (db, narrow(wb.grad)),
        "dw alone": (alone, narrow(ww.grad)),
    }


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("case", (LAYERS | MORE_LAYERS).values(), ids=(LAYERS | MORE_LAYERS).keys())
def test_linear_agrees_with_pytorch(
    kernels: Kernels, case: tuple[int, int, int], tensor: str
) -> None:
    assert agrees(linear(kernels, case), tensor)


def test_linear_without_bias_starts_from_zero(kernels: Kernels) -> None:
    x, w, zeros = randoms(rng(), 2, 13), randoms(rng(), 5, 13), guarded(np.zeros(5, np.float32))
    with_zeros, without = unassigned(2, 5), unassigned(2, 5)
    kernels.call("fast_linear_forward", with_zeros, x, w, zeros, 13, 5, 2)
    kernels.call("fast_linear_forward", without, x, w, None, 13, 5, 2)
    np.testing.assert_array_equal(without, with_zeros)


# ---- sgd ----


def sgd(kernels: Kernels, case: tuple[float, float, float], size: int) -> Pairs:
    """Three steps; v is there with momentum only."""
    generator = rng()
    rate, momentum, decay = (float(np.float32(value)) for value in case)
    w = randoms(generator, size)
    v = guarded(np.zeros(size, np.float32)) if momentum else None
    parameter = wide(w).requires_grad_()
    optimizer = torch.optim.SGD([parameter], rate, momentum, weight_decay=decay)
    for _ in range(3):
        g = randoms(generator, size)
        kernels.call("fast_sgd_step", w, v, g, rate, momentum, decay, size)
        parameter.grad = wide(g)
        optimizer.step()
    pairs: Pairs = {"w": (w, narrow(parameter))}
    if v is not None:
        pairs["v"] = v, narrow(optimizer.state[parameter]["momentum_buffer"])
    return pairs


@pytest.mark.parametrize("size", [1, 8, 19, 40])
@pytest.mark.parametrize(
    ("case", "tensor"),
    [
        pytest.param(case, tensor, id=f"{name}-{tensor}")
        for name, case in STEPS.items()
        for tensor in ("w", "v")
        if tensor == "w" or case[1]
    ],
)
def test_three_steps_agree_with_pytorch(
    kernels: Kernels, case: tuple[float, float, float], tensor: str, size: int
) -> None:
    assert agrees(sgd(kernels, case, size), tensor)


# ---- the tests themselves ----


_CONV = partial(convolution, case=CONVOLUTIONS["3x3 padding 1"])
_CONV_2 = partial(convolution, case=CONVOLUTIONS["odd sizes stride 2"])
_PIXELS = partial(convolution, case=LARGER["1x1 odd sizes"])
_PIXELS_2 = partial(convolution, case=LARGER["1x1 stride 2 odd sizes"])
_DEPTHWISE = partial(depthwise, case=CONVOLUTIONS["3x3 padding 1"])
_LINEAR = partial(linear, case=LAYERS["12 to 8"])
_SGD = partial(sgd, case=STEPS["momentum and decay"], size=8)

FAULTS = [
    Fault("band.c", "span_fill(to, 0, b->channels * b->rows * b->width);", "", _CONV, "y"),
    Fault("conv1.c", "+ channel] += aside", "+ channel] = aside", _PIXELS, "dw"),
    Fault("conv1.c", "from[i * step]", "from[i]", _PIXELS_2, "dw alone"),
    Fault("conv2d.c", "% s->out_channels] += span", "% s->out_channels] = span", _CONV, "db"),
    Fault("conv3.c", "p->spread ? 2 :", "p->spread ? 4 :", _CONV_2, "dx"),
    Fault("depthwise.c", "w[9 * channel + 8 - i]", "w[9 * channel + i]", _DEPTHWISE, "dx"),
    Fault("dot.c", "g##2, x2, x3, x4", "g##1, x2, x3, x4", _CONV, "dw"),
    Fault("linear.c", "BACK8(w1, dy1)", "BACK8(w1, dy0)", _LINEAR, "dx"),
    Fault("mix.c", "TAP(a, g1, p1, q1, r1, s1)", "TAP(a, g1, p1, q1, r1, s0)", _PIXELS, "dw"),
    Fault("sgd.c", "PUT8(v, b)", "PUT8(v, c)", _SGD, "v"),
    Fault("slide.c", "TAP(a, g2, x2, x4, x6, x8)", "TAP(a, g2, x2, x4, x6, x7)", _CONV_2, "y"),
    Fault("tile.c", "*to += *from++", "*to = *from++", _PIXELS_2, "dx"),
    Fault("view.c", "SEEN4(w6, w7, w8)", "SEEN4(w6, w7, w7)", _DEPTHWISE, "dw"),
]


def build_faulty(folder: Path, file: str, old: str, new: str) -> Kernels:
    sources = Path(shutil.copytree(KERNELS, folder / "kernels"))
    path = sources / "fast" / file
    text = path.read_text()
    assert text.count(old) == 1, "the text to change is not there, or not alone"
    path.write_text(text.replace(old, new))
    return build_fast(folder / "faulty.so", sources, ("-O0",))


@pytest.mark.parametrize("fault", FAULTS, ids=ids(FAULTS))
def test_a_planted_fault_is_noticed(fault: Fault, tmp_path: Path) -> None:
    faulty = build_faulty(tmp_path, fault.file, fault.old, fault.new)
    assert not agrees(fault.compare(faulty), fault.tensor)


def test_a_band_that_is_larger_than_the_scratch_is_noticed(tmp_path: Path) -> None:
    most = "most = room / (channels * b.width)"
    faulty = build_faulty(tmp_path, "conv3.c", most, f"{most} + 1")
    with pytest.raises(AssertionError, match="wrote behind the end"):
        convolution(faulty, LARGER["one channel, tall"])
