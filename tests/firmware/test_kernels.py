"""The plain C kernels, held to PyTorch in float64 tensor by tensor."""

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
    build_faulty,
    guarded,
    ids,
    leaf,
    narrow,
    notices,
    randoms,
    relative_error,
    rng,
    unassigned,
    wide,
)

# ---- pools ----

POOLS = {
    "2x2 stride 2": Image((8, 6), (2, 2), (2, 2)),
    "2x2 stride 2 odd sizes": Image((7, 5), (2, 2), (2, 2)),
    "3x3 stride 2 padding 1": Image((7, 8), (3, 3), (2, 2), (1, 1)),
    "3x3 stride 1 padding 1": Image((5, 4), (3, 3), (1, 1), (1, 1)),
    "1x1 image": Image((1, 1), (1, 1)),
    "1x1 image 3x3 window padding 1": Image((1, 1), (3, 3), padding=(1, 1)),
    "whole image": Image((6, 7), (6, 7)),
    "window, stride and padding not square": Image((9, 7), (4, 2), (3, 1), (2, 0)),
    "stride larger than window": Image((9, 11), (2, 2), (3, 4)),
    "window of 256": Image((16, 16), (16, 16)),
    "one channel": Image((5, 5), (2, 3), (1, 2), (1, 1), channels=1, n=1),
}


def max_pool(kernels: Kernels, case: Image) -> Pairs:
    generator = rng()
    s, n = case.window(case.channels), case.n
    x = randoms(generator, n, case.channels, *case.size)
    y = unassigned(n, case.channels, *case.out_size())
    winner = guarded(np.full(y.shape, 0xAA, np.uint8))
    kernels.call("max_pool_forward", y, winner, x, s, n)
    dy, dx = randoms(generator, *y.shape), randoms(generator, *x.shape)
    wx = leaf(x, dx)
    kernels.call("max_pool_backward", dx, dy, winner, s, n)

    wy, places = torch.nn.functional.max_pool2d_with_indices(
        wx, case.kernel, case.stride, case.padding
    )
    torch.autograd.backward(wy, wide(dy))
    # A place in the image, as PyTorch counts it, from the place in the window.
    oy, ox = np.indices(case.out_size())
    iy = oy * case.stride[0] + winner // case.kernel[1] - case.padding[0]
    ix = ox * case.stride[1] + winner % case.kernel[1] - case.padding[1]
    return {
        "y": (y, narrow(wy)),
        "winner": (iy * case.size[1] + ix, narrow(places)),
        "dx": (dx, narrow(wx.grad)),
    }


@pytest.mark.parametrize("tensor", ["y", "winner", "dx"])
@pytest.mark.parametrize("case", POOLS.values(), ids=POOLS.keys())
def test_max_pool_agrees_with_pytorch(kernels: Kernels, case: Image, tensor: str) -> None:
    assert agrees(max_pool(kernels, case), tensor)


def test_the_first_of_equal_maxima_wins(kernels: Kernels) -> None:
    image = [[3, 3, 1, 5], [3, 3, 5, 5], [-2, -7, 0, 0], [-2, -2, 0, 4]]
    x = guarded(np.array(image, np.float32))
    y, winner = unassigned(2, 2), guarded(np.zeros((2, 2), np.uint8))
    s = Image((4, 4), (2, 2), (2, 2), channels=1).window(1)
    kernels.call("max_pool_forward", y, winner, x, s, 1)
    np.testing.assert_array_equal(y, [[3, 5], [-2, 4]])
    np.testing.assert_array_equal(winner, [[0, 1], [0, 3]])


def avg_pool(kernels: Kernels, case: Image) -> Pairs:
    generator = rng()
    s, n = case.window(case.channels), case.n
    x = randoms(generator, n, case.channels, *case.size)
    y = unassigned(n, case.channels, *case.out_size())
    kernels.call("avg_pool_forward", y, x, s, n)
    dy, dx = randoms(generator, *y.shape), randoms(generator, *x.shape)
    wx = leaf(x, dx)
    kernels.call("avg_pool_backward", dx, dy, s, n)

    wy = torch.nn.functional.avg_pool2d(wx, case.kernel, case.stride, case.padding)
    torch.autograd.backward(wy, wide(dy))
    return {"y": (y, narrow(wy)), "dx": (dx, narrow(wx.grad))}


@pytest.mark.parametrize("tensor", ["y", "dx"])
@pytest.mark.parametrize("case", POOLS.values(), ids=POOLS.keys())
def test_avg_pool_agrees_with_pytorch(kernels: Kernels, case: Image, tensor: str) -> None:
    assert agrees(avg_pool(kernels, case), tensor)


def test_avg_pool_is_zero_where_it_sees_only_padding(kernels: Kernels) -> None:
    x, y = guarded(np.full((1, 1), 8, np.float32)), unassigned(5, 5)
    s = Image((1, 1), (1, 1), padding=(2, 2), channels=1).window(1)
    kernels.call("avg_pool_forward", y, x, s, 1)
    expected = np.zeros((5, 5))
    expected[2, 2] = 8
    np.testing.assert_array_equal(y, expected)


# ---- linear ----

LAYERS = {  # in, out, samples
    "12 to 8": (12, 8, 3),
    "7 to 10, not multiples of four": (7, 10, 5),
    "1 to 1": (1, 1, 1),
    "1 to 4": (1, 4, 2),
    "9 to 3": (9, 3, 1),
    "2048 to 10": (2048, 10, 4),
}


def linear(kernels: Kernels, case: tuple[int, int, int]) -> Pairs:
    generator = rng()
    width, out, n = case
    x, w = randoms(generator, n, width), randoms(generator, out, width)
    b, y = randoms(generator, out), unassigned(n, out)
    kernels.call("linear_forward", y, x, w, b, width, out, n)
    dy, dx = randoms(generator, n, out), randoms(generator, n, width)
    dw, db = randoms(generator, out, width), randoms(generator, out)
    wx, ww, wb = leaf(x, dx), leaf(w, dw), leaf(b, db)
    kernels.call("linear_backward", dx, dw, db, dy, x, w, width, out, n)

    wy = torch.nn.functional.linear(wx, ww, wb)
    torch.autograd.backward(wy, wide(dy))
    return {
        "y": (y, narrow(wy)),
        "dx": (dx, narrow(wx.grad)),
        "dw": (dw, narrow(ww.grad)),
        "db": (db, narrow(wb.grad)),
    }


@pytest.mark.parametrize("tensor", ["y", "dx", "dw", "db"])
@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())
def test_linear_agrees_with_pytorch(
    kernels: Kernels, case: tuple[int, int, int], tensor: str
) -> None:
    assert agrees(linear(kernels, case), tensor)


def test_linear_does_without_bias_and_dx(kernels: Kernels) -> None:
    x, dy = guarded(np.array([[2, 3]], np.float32)), guarded(np.array([[5]], np.float32))
    w, dw = guarded(np.array([[7, 11]], np.float32)), guarded(np.ones((1, 2), np.float32))
    y = unassigned(1, 1)
    kernels.call("linear_forward", y, x, w, None, 2, 1, 1)
    kernels.call("linear_backward", None, dw, None, dy, x, w, 2, 1, 1)
    np.testing.assert_array_equal(y, [[2 * 7 + 3 * 11]])
    np.testing.assert_array_equal(dw, [[1 + 5 * 2, 1 + 5 * 3]])


# ---- elementwise ----


RELUS = ("relu", "relu6")
SIZES = (1, 7, 8, 9, 37, 64)  # a byte has the bits of eight elements


def relu(
    kernels: Kernels, kernel: str = "relu", size: int = 37, *, bits: bool, over: bool = False
) -> Pairs:
    """Both passes; bits: backward from bits instead of y; over: forward writes over its input."""
    generator = rng()
    x = guarded(4 * generator.standard_normal(size, np.float32))
    x[:3] = [6.0, 0.0, -0.0][:size]
    wx = wide(x).requires_grad_()
    y = x if over else unassigned(size)
    packed = guarded(np.full((size + 7) // 8, 0xFF, np.uint8))
    d = randoms(generator, size)
    dy = wide(d)
    if bits:
        kernels.call(f"{kernel}_forward_bits", y, packed, x, size)
        kernels.call("relu_backward_bits", d, packed, size)
    else:
        kernels.call(f"{kernel}_forward", y, x, size)
        kernels.call(f"{kernel}_backward", d, y, size)

    wy = getattr(torch.nn.functional, kernel)(wx)
    (wd,) = torch.autograd.grad(wy, wx, dy)
    pairs: Pairs = {"y": (y, narrow(wy)), "d": (d, narrow(wd))}
    if bits:
        passes = wd == dy
        pairs["bits"] = packed.astype(int), np.packbits(narrow(passes), bitorder="little")
    return pairs


@pytest.mark.parametrize("over", [False, True], ids=["apart", "in place"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel", RELUS)
@pytest.mark.parametrize(
    ("bits", "tensor"), [(False, "y"), (False, "d"), (True, "y"), (True, "bits"), (True, "d")]
)
def test_relu_agrees_with_pytorch(
    kernels: Kernels, kernel: str, size: int, over: bool, bits: bool, tensor: str
) -> None:
    ours, theirs = relu(kernels, kernel, size, bits=bits, over=over)[tensor]
    np.testing.assert_array_equal(ours, theirs)  # nothing is rounded


@pytest.mark.parametrize("kernel", RELUS)
def test_relu_stops_a_gradient_that_is_not_a_number(kernels: Kernels, kernel: str) -> None:
    d = guarded(np.array([np.nan, -np.inf, 3], np.float32))
    y = guarded(np.array([0, 0, 1], np.float32))
    kernels.call(f"{kernel}_backward", d, y, 3)
    np.testing.assert_array_equal(d, [0, 0, 3])


def test_bits_stop_a_gradient_that_is_not_a_number(kernels: Kernels) -> None:
    d = guarded(np.array([np.nan, -np.inf, 3], np.float32))
    kernels.call("relu_backward_bits", d, guarded(np.array([0b100], np.uint8)), 3)
    np.testing.assert_array_equal(d, [0, 0, 3])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", ["apart", "over a", "over b"])
def test_add_agrees_with_pytorch(kernels: Kernels, place: str, size: int) -> None:
    generator = rng()
    a, b, y = randoms(generator, size), randoms(generator, size), unassigned(size)
    expected = narrow(wide(a) + wide(b))
    y = {"apart": y, "over a": a, "over b": b}[place]
    kernels.call("add_forward", y, a, b, size)
    assert agrees({"y": (y, expected)}, "y")


def test_a_tensor_is_added_to_itself_in_place(kernels: Kernels) -> None:
    x = guarded(np.array([2, -3, 0.5], np.float32))
    kernels.call("add_forward", x, x, x, 3)
    np.testing.assert_array_equal(x, [4, -6, 1])


def gradient_add(kernels: Kernels, size: int = 23) -> Pairs:
    generator = rng()
    to, from_ = randoms(generator, size), randoms(generator, size)
    expected = narrow(wide(to) + wide(from_))
    kernels.call("gradient_add", to, from_, size)
    return {"to": (to, expected)}


@pytest.mark.parametrize("size", SIZES)
def test_gradient_add_adds_to_what_is_there(kernels: Kernels, size: int) -> None:
    assert agrees(gradient_add(kernels, size), "to")


def gradient_weigh(kernels: Kernels) -> Pairs:
    g = randoms(rng(), 11)
    expected = narrow(wide(g) * 0.375)
    kernels.call("gradient_weigh", g, 0.375, 11)
    return {"g": (g, expected)}


def test_gradient_weigh_multiplies_in_place(kernels: Kernels) -> None:
    g = guarded(np.array([4, -8, 0.5], np.float32))
    kernels.call("gradient_weigh", g, 0.25, 3)
    np.testing.assert_array_equal(g, [1, -2, 0.125])


def test_gradient_weigh_of_zero_clears_nan_and_infinity(kernels: Kernels) -> None:
    g = guarded(np.array([np.nan, np.inf, 3], np.float32))
    kernels.call("gradient_weigh", g, 0.0, 3)
    np.testing.assert_array_equal(g, [0, 0, 0])


@pytest.mark.parametrize("shape", [(2, 3, 35), (1, 1, 1), (5, 1, 4), (1, 3, 1024)])
@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "last bytes of y"])
def test_normalize_scales_and_shifts_each_channel(
    kernels: Kernels, shape: tuple[int, int, int], in_place: bool
) -> None:
    generator = rng()
    values = generator.integers(0, 256, shape, np.uint8)
    scale, shift = randoms(generator, shape[1]), randoms(generator, shape[1])
    y = unassigned(*shape)
    images = y.reshape(-1).view(np.uint8)[-values.size :] if in_place else guarded(values.ravel())
    images[...] = values.ravel()
    kernels.call("normalize_forward", y, images, scale, shift, shape[1], shape[2], shape[0])
    expected = values * scale.astype(np.float64)[:, None] + shift.astype(np.float64)[:, None]
    assert agrees({"y": (y, expected)}, "y")


# ---- loss ----

LOGITS = {  # classes, samples, largest logit
    "10 classes": (10, 7, 3.0),
    "2 classes, one sample": (2, 1, 1.0),
    "100 classes": (100, 4, 10.0),
    "256 classes": (256, 3, 5.0),
    "exponentials that overflow": (10, 5, 200.0),
}


def softmax_cross_entropy(kernels: Kernels, case: tuple[int, int, float]) -> Pairs:
    generator = rng()
    classes, n, largest = case
    logits = guarded(generator.uniform(-largest, largest, (n, classes)).astype(np.float32))
    labels = guarded(generator.integers(0, classes, n).astype(np.uint8))
    labels[0] = logits[0].argmax()  # so that one is correct
    scale = 1 / np.float32(n + 3)
    p, dlogits = unassigned(n, classes), randoms(generator, n, classes)
    loss, correct = guarded(np.array([2.5], np.float32)), guarded(np.array([40], np.uint32))
    wlogits, targets = leaf(logits, dlogits), torch.tensor(labels, dtype=torch.int64)
    forward = "softmax_cross_entropy_forward"
    kernels.call(forward, p, loss, correct, logits, labels, float(scale), classes, n)
    kernels.call("softmax_cross_entropy_backward", dlogits, p, labels, float(scale), classes, n)

    wloss = torch.nn.functional.cross_entropy(wlogits, targets, reduction="sum") * float(scale)
    torch.autograd.backward(wloss)
    hits = (wlogits.argmax(1) == targets).sum()
    return {
        "p": (p, narrow(torch.softmax(wlogits, 1))),
        "loss": (loss, narrow(wloss).reshape(1) + 2.5),
        "correct": (correct.astype(np.int64), narrow(hits).reshape(1) + 40),
        "dlogits": (dlogits, narrow(wlogits.grad)),
    }


def softmax_distill(kernels: Kernels, case: tuple[int, int, float], share: float = 0.3) -> Pairs:
    generator = rng()
    classes, n, largest = case
    logits, taught = (
        guarded(generator.uniform(-largest, largest, (n, classes)).astype(np.float32))
        for _ in range(2)
    )
    labels = guarded(generator.integers(0, classes, n).astype(np.uint8))
    share, scale = float(np.float32(share)), 1 / np.float32(n + 3)
    p, teacher, dlogits = (
        unassigned(n, classes),
        unassigned(n, classes),
        randoms(generator, n, classes),
    )
    for to, x in ((p, logits), (teacher, taught)):
        kernels.call("softmax_cross_entropy_forward", to, None, None, x, labels, 1.0, classes, n)
    wlogits, targets = leaf(logits, dlogits), torch.tensor(labels, dtype=torch.int64)
    kernels.call("softmax_distill", p, teacher, labels, share, classes, n)
    kernels.call("softmax_cross_entropy_backward", dlogits, p, labels, float(scale), classes, n)

    own, theirs = wlogits.log_softmax(1), wide(taught).log_softmax(1)
    by_label = torch.nn.functional.nll_loss(own, targets, reduction="sum")
    apart = torch.nn.functional.kl_div(own, theirs, reduction="sum", log_target=True)
    torch.autograd.backward(((1 - share) * by_label + share * apart) * float(scale))
    return {"dlogits": (dlogits, narrow(wlogits.grad))}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", LOGITS.values(), ids=LOGITS.keys())
def test_what_is_distilled_agrees_with_pytorch(
    kernels: Kernels, case: tuple[int, int, float], share: float
) -> None:
    assert agrees(softmax_distill(kernels, case, share), "dlogits")


@pytest.mark.parametrize("tensor", ["p", "loss", "dlogits"])
@pytest.mark.parametrize("case", LOGITS.values(), ids=LOGITS.keys())
def test_softmax_cross_entropy_agrees_with_pytorch(
    kernels: Kernels, case: tuple[int, int, float], tensor: str
) -> None:
    assert agrees(softmax_cross_entropy(kernels, case), tensor)


@pytest.mark.parametrize("case", LOGITS.values(), ids=LOGITS.keys())
def test_correct_samples_are_counted_on(kernels: Kernels, case: tuple[int, int, float]) -> None:
    ours, theirs = softmax_cross_entropy(kernels, case)["correct"]
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("label", "correct"), [(0, 0), (1, 1), (2, 0)])
def test_the_first_of_equal_logits_is_the_answer(
    kernels: Kernels, label: int, correct: int
) -> None:
    logits = guarded(np.array([[1, 4, 4], [5, 0, 0]], np.float32))
    count = guarded(np.zeros(1, np.uint32))
    labels = guarded(np.array([label, 1], np.uint8))
    forward = "softmax_cross_entropy_forward"
    kernels.call(forward, unassigned(2, 3), None, count, logits, labels, 1.0, 3, 2)
    assert count[0] == correct


def test_softmax_does_without_loss_and_count(kernels: Kernels) -> None:
    p, logits = unassigned(1, 2), guarded(np.array([[7, 7]], np.float32))
    labels = guarded(np.zeros(1, np.uint8))
    forward = "softmax_cross_entropy_forward"
    kernels.call(forward, p, None, None, logits, labels, 1.0, 2, 1)
    np.testing.assert_array_equal(p, [[0.5, 0.5]])


# ---- sgd ----

STEPS = {  # rate, momentum, decay
    "momentum and decay": (0.1, 0.9, 0.01),
    "momentum": (0.05, 0.8, 0.0),
    "decay without momentum": (0.1, 0.0, 0.05),
    "plain": (0.2, 0.0, 0.0),
}


def sgd(kernels: Kernels, case: tuple[float, float, float]) -> Pairs:
    generator = rng()
    rate, momentum, decay = (float(np.float32(value)) for value in case)
    w = randoms(generator, 19)
    v = guarded(np.zeros(19, np.float32)) if momentum else None
    parameter = wide(w).requires_grad_()
    optimizer = torch.optim.SGD([parameter], rate, momentum, weight_decay=decay)
    for _ in range(3):
        g = randoms(generator, 19)
        kernels.call("sgd_step", w, v, g, rate, momentum, decay, 19)
        parameter.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    pairs: Pairs = {"w": (w, narrow(parameter))}
    if v is not None:
        pairs["v"] = v, narrow(optimizer.state[parameter]["momentum_buffer"])
    return pairs


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
    kernels: Kernels, case: tuple[float, float, float], tensor: str
) -> None:
    assert agrees(sgd(kernels, case), tensor)


# ---- the tests themselves ----

_LINEAR = partial(linear, case=LAYERS["7 to 10, not multiples of four"])
_MAX = partial(max_pool, case=POOLS["3x3 stride 2 padding 1"])
_AVG = partial(avg_pool, case=POOLS["3x3 stride 2 padding 1"])
_LOSS = partial(softmax_cross_entropy, case=LOGITS["10 classes"])
_DISTILL = partial(softmax_distill, case=LOGITS["10 classes"])
_SGD = partial(sgd, case=STEPS["momentum and decay"])
_RELU = partial(relu, bits=False)
_RELU_BITS = partial(relu, bits=True)
_RELU6 = partial(relu, kernel="relu6", bits=False)
_RELU6_BITS = partial(relu, kernel="relu6", bits=True)

FAULTS = [
    Fault("linear.c", "dx + sample * in", "dx", _LINEAR, "dx"),
    Fault("patch.h", "y3[i] += w3 * value", "y3[i] = w3 * value", _LINEAR, "dw"),
    Fault("linear.c", "db[o] += dy[o]", "db[o] -= dy[o]", _LINEAR, "db"),
    Fault("elementwise.c", "to[i] &= relu_mask(from[i])", "", _RELU, "d"),
    Fault("elementwise.c", "(-bits & ~bits) >> 31", "-bits >> 31", _RELU_BITS, "bits"),
    Fault("elementwise.c", "byte >> i & 1", "byte >> (7 - i) & 1", _RELU_BITS, "d"),
    Fault("elementwise.c", "*bits >> i & 1", "1", _RELU_BITS, "d"),
    Fault("elementwise.c", "& (bits - SIX)", "", _RELU6, "d"),
    Fault("elementwise.c", "-bits & (bits", "(bits", _RELU6_BITS, "bits"),
    Fault("elementwise.c", "relu(relu(x) - SIX)", "relu(x - 7)", _RELU6, "y"),
    Fault("elementwise.c", "to[i] += from[i]", "to[i] = from[i]", gradient_add, "to"),
    Fault("elementwise.c", "0 : weight * g[i]", "0 : weight", gradient_weigh, "g"),
    Fault("pool.c", "winner[o] / s->kernel_width", "s->padding_height", _MAX, "dx"),
    Fault("pool.c", "+ ix] += dy[o]", "+ ix] = dy[o]", _MAX, "dx"),
    Fault("pool.c", "part = dy[o] * share", "part = dy[o]", _AVG, "dx"),
    Fault("loss.c", "dlogits[labels[sample]] -= scale", "dlogits[0] -= scale", _LOSS, "dlogits"),
    Fault("loss.c", "share * teacher[i]", "teacher[i]", _DISTILL, "dlogits"),
    Fault("loss.c", "p[labels[sample]] += share", "p[0] += share", _DISTILL, "dlogits"),
    Fault("sgd.c", "v[i] = step;", "v[i] = g[i];", _SGD, "v"),
    Fault("sgd.c", "g[i] + decay * w[i]", "g[i]", _SGD, "w"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=ids(FAULTS))
def test_a_planted_fault_is_noticed(fault: Fault, tmp_path: Path) -> None:
    assert notices(fault, tmp_path)


def test_a_write_behind_an_array_is_noticed(tmp_path: Path) -> None:
    faulty = build_faulty(tmp_path, "elementwise.c", "[i] += from[i]", "[i + 1] += from[i]")
    with pytest.raises(AssertionError, match="wrote behind the end"):
        gradient_add(faulty)


def test_a_read_behind_an_array_is_noticed(tmp_path: Path) -> None:
    faulty = build_faulty(tmp_path, "elementwise.c", "[i] += from[i]", "[i] += from[i + 1]")
    assert np.isnan(relative_error(gradient_add(faulty), "to"))
