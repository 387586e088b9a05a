"""Norms in C, held to PyTorch in float64 tensor by tensor."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from firmware.kernels_harness import (
    Fault,
    Floats,
    Kernels,
    Pairs,
    agrees,
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

EPSILON = 1e-5

# ---- group norm ----


@dataclass(frozen=True)
class Norm:
    """Shapes of one group norm, and how far from zero its input lies."""

    channels: int
    groups: int
    area: int
    offset: float = 0.0
    n: int = 3


NORMS = {
    "8 channels in 2 groups": Norm(8, 2, 20),
    "one group": Norm(6, 1, 9),
    "one channel a group": Norm(5, 5, 7),
    "area of one": Norm(12, 3, 1),
    "one channel, one sample": Norm(1, 1, 65, n=1),
    "4096 elements a group": Norm(8, 2, 1024),
    "4096 elements a group, far from zero": Norm(8, 2, 1024, offset=100.0, n=1),
}


def group_norm(kernels: Kernels, case: Norm) -> Pairs:
    generator = rng()
    shape = (case.n, case.channels, case.area)
    x = guarded(randoms(generator, *shape) + np.float32(case.offset))
    w, b = randoms(generator, case.channels), randoms(generator, case.channels)
    y, mean, rstd = unassigned(*shape), *(unassigned(case.n, case.groups) for _ in range(2))
    sizes = case.channels, case.groups, case.area
    kernels.call("group_norm_forward", y, mean, rstd, x, w, b, *sizes, EPSILON, case.n)
    d, dw, db = randoms(generator, *shape), *(randoms(generator, case.channels) for _ in range(2))
    dy, wx, ww, wb = wide(d), wide(x).requires_grad_(), leaf(w, dw), leaf(b, db)
    kernels.call("group_norm_backward", d, dw, db, x, w, mean, rstd, *sizes, case.n)

    wy = torch.nn.functional.group_norm(wx, case.groups, ww, wb, EPSILON)
    torch.autograd.backward(wy, dy)
    groups = x.astype(np.float64).reshape(case.n, case.groups, -1)
    return {
        "y": (y, narrow(wy)),
        "mean": (mean, groups.mean(-1)),
        "rstd": (rstd, 1 / np.sqrt(groups.var(-1) + EPSILON)),
        "d": (d, narrow(wx.grad)),
        "dw": (dw, narrow(ww.grad)),
        "db": (db, narrow(wb.grad)),
    }


@pytest.mark.parametrize("tensor", ["y", "mean", "rstd", "d", "dw", "db"])
@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS.keys())
def test_group_norm_agrees_with_pytorch(kernels: Kernels, case: Norm, tensor: str) -> None:
    assert agrees(group_norm(kernels, case), tensor)


@pytest.mark.parametrize("tensor", ["mean", "rstd"])
def test_statistics_of_very_many_elements_keep_a_millionth(kernels: Kernels, tensor: str) -> None:
    assert relative_error(group_norm(kernels, Norm(16, 1, 8192, offset=10.0, n=1)), tensor) < 1e-6


def test_group_norm_forward_may_write_over_its_input(kernels: Kernels) -> None:
    x, y = randoms(rng(), 2, 6, 5), unassigned(2, 6, 5)
    w, b = randoms(rng(), 6), randoms(rng(), 6)
    mean, rstd = unassigned(2, 3), unassigned(2, 3)
    kernels.call("group_norm_forward", y, mean, rstd, x, w, b, 6, 3, 5, EPSILON, 2)
    kernels.call("group_norm_forward", x, mean, rstd, x, w, b, 6, 3, 5, EPSILON, 2)
    np.testing.assert_array_equal(x, y)


# ---- batch norm ----


@dataclass(frozen=True)
class Images:
    """Shapes of one batch norm, and how far from zero its input lies."""

    channels: int
    area: int
    n: int
    offset: float = 0.0

    def x(self, generator: np.random.Generator) -> Floats:
        scale = 1 + np.arange(self.channels, dtype=np.float32)[:, None]  # no channel as another
        values = generator.standard_normal((self.n, self.channels, self.area), np.float32)
        return guarded(values * scale + np.float32(self.offset))


BATCHES = {
    "6 channels": Images(6, 20, 5),
    "one channel": Images(1, 9, 3),
    "one sample": Images(4, 65, 1),
    "area of one": Images(5, 1, 8),
    "many elements a channel": Images(3, 1024, 16),
    "many elements a channel, far from zero": Images(2, 1024, 8, offset=100.0),
}


def statistics(generator: np.random.Generator, channels: int) -> tuple[Floats, Floats]:
    """A mean and a variance that are those of nothing else."""
    mean, variance = randoms(generator, channels), randoms(generator, channels)
    variance[...] = 0.2 + variance**2
    return mean, variance


def batch_norm(kernels: Kernels, case: Images, *, frozen: bool = False) -> Pairs:
    """One training step's worth: forward, backward, and running statistics that follow."""
    generator = rng()
    channels = case.channels
    sizes = channels, case.area
    x = case.x(generator)
    w, b, dw, db = (randoms(generator, channels) for _ in range(4))
    d, y = randoms(generator, *x.shape), unassigned(*x.shape)
    running = statistics(generator, channels)
    layer = torch.nn.BatchNorm1d(channels, EPSILON, momentum=0.3, dtype=torch.float64)
    layer.weight.data, layer.bias.data = wide(w), wide(b)
    layer.running_mean, layer.running_var = (wide(values) for values in running)
    layer.train(not frozen)
    layer.weight.grad, layer.bias.grad = wide(dw), wide(db)
    dy, wx = wide(d), wide(x).requires_grad_()

    batch = unassigned(channels), unassigned(channels)
    kernels.call("batch_norm_measure", *batch, x, *sizes, 0, case.n)
    used = running if frozen else batch
    kernels.call("batch_norm_forward", y, x, w, b, *used, *sizes, EPSILON, case.n)
    kernel = f"batch_norm{'_frozen' if frozen else ''}_backward"
    kernels.call(kernel, d, dw, db, x, w, *used, *sizes, EPSILON, case.n)
    kernels.call("batch_norm_follow", *running, *batch, channels, case.n * case.area, 0.3)

    wy = layer(wx)
    torch.autograd.backward(wy, dy)
    if frozen:  # PyTorch follows with nothing but another forward
        layer.train()(wide(x))
    everything = wide(x).transpose(0, 1).flatten(1)
    return {
        "y": (y, narrow(wy)),
        "mean": (batch[0], narrow(everything.mean(1))),
        "variance": (batch[1], narrow(everything.var(1, correction=0))),
        "running mean": (running[0], narrow(layer.running_mean)),
        "running variance": (running[1], narrow(layer.running_var)),
        "d": (d, narrow(wx.grad)),
        "dw": (dw, narrow(layer.weight.grad)),
        "db": (db, narrow(layer.bias.grad)),
    }


TENSORS = ("y", "mean", "variance", "running mean", "running variance", "d", "dw", "db")


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("frozen", [False, True], ids=["held", "frozen"])
@pytest.mark.parametrize("case", BATCHES.values(), ids=BATCHES.keys())
def test_batch_norm_agrees_with_pytorch(
    kernels: Kernels, case: Images, frozen: bool, tensor: str
) -> None:
    assert agrees(batch_norm(kernels, case, frozen=frozen), tensor)


def test_batch_norm_forward_may_write_over_its_input(kernels: Kernels) -> None:
    x, y = randoms(rng(), 2, 4, 6), unassigned(2, 4, 6)
    used = randoms(rng(), 4), randoms(rng(), 4), *statistics(rng(), 4), 4, 6, EPSILON, 2
    kernels.call("batch_norm_forward", y, x, *used)
    kernels.call("batch_norm_forward", x, x, *used)
    np.testing.assert_array_equal(x, y)


def measured_in_parts(
    kernels: Kernels, parts: tuple[int, ...] = (3, 1, 4), offset: float = 0.0
) -> Pairs:
    """Mean and variance of a batch of several parts, whose means differ."""
    channels, area = 3, 10
    generator = rng()
    batch = unassigned(channels), unassigned(channels)
    passed: list[Floats] = []
    for i, n in enumerate(parts):
        x = Images(channels, area, n, offset + 2 * i).x(generator)
        seen = sum(parts[:i])
        kernels.call("batch_norm_measure", *batch, x, channels, area, seen, n)
        passed.append(x)
    everything = np.concatenate(passed).astype(np.float64).transpose(1, 0, 2).reshape(channels, -1)
    return {
        "mean": (batch[0], everything.mean(1)),
        "variance": (batch[1], everything.var(1)),
    }


@pytest.mark.parametrize("tensor", ["mean", "variance"])
@pytest.mark.parametrize("parts", [(8,), (3, 1, 4), (1,) * 8, (7, 1)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_statistics_of_parts_are_those_of_the_batch(
    kernels: Kernels, parts: tuple[int, ...], offset: float, tensor: str
) -> None:
    assert agrees(measured_in_parts(kernels, parts, offset), tensor)


def test_the_variance_of_a_single_element_changes_no_running_variance(kernels: Kernels) -> None:
    mean, variance = (guarded(np.array([value], np.float32)) for value in (8, 0))
    running_mean, running_variance = (guarded(np.array([v], np.float32)) for v in (4, 3))
    following = running_mean, running_variance, mean, variance
    kernels.call("batch_norm_follow", *following, 1, 1, 0.25)
    assert (running_mean[0], running_variance[0]) == (5, 3)


# ---- the tests themselves ----

_NORM = partial(group_norm, case=NORMS["8 channels in 2 groups"])
_ODD = partial(group_norm, case=NORMS["one channel a group"])
_BATCH = partial(batch_norm, case=BATCHES["6 channels"])
_FROZEN = partial(_BATCH, frozen=True)

FAULTS = [
    Fault("batch_norm.c", "(d[i] - level - slope", "(d[i] - slope", _BATCH, "d"),
    Fault("batch_norm.c", "s.products * share * rstd", "s.products * share", _BATCH, "d"),
    Fault("batch_norm.c", "s.products * rstd", "s.products", _BATCH, "dw"),
    Fault("batch_norm.c", "d[i] *= gain", "d[i] *= rstd", _FROZEN, "d"),
    Fault("batch_norm.c", "(float)(size - 1)", "(float)size", _BATCH, "running variance"),
    Fault("batch_norm.c", "momentum * (mean[c]", "(mean[c]", _FROZEN, "running mean"),
    Fault("batch_norm.c", "* (1 - fresh) * dis", "* dis", measured_in_parts, "variance"),
    Fault("batch_norm.c", "fresh * distance;", "distance;", measured_in_parts, "mean"),
    Fault("group_norm.c", "* d[i] - level - slope", "* d[i] - slope", _NORM, "d"),
    Fault("group_norm.c", "slope *= r * r", "slope *= r", _NORM, "d"),
    Fault("group_norm.c", "dw[first + c] += scale", "dw[c] += scale", _NORM, "dw"),
    Fault("group_norm.c", "db[first + c] += shift", "db[first + c] += scale", _NORM, "db"),
    Fault("sum.h", "plain[i] += z[i] - z0", "plain[i] += z[i]", _NORM, "rstd"),
    Fault("sum.h", "plain[0] += *z - z0", "plain[0] = *z - z0", _ODD, "db"),
    Fault("sum.h", "products[0] += (*z", "products[0] -= (*z", _ODD, "dw"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=ids(FAULTS))
def test_a_planted_fault_is_noticed(fault: Fault, tmp_path: Path) -> None:
    assert notices(fault, tmp_path)
