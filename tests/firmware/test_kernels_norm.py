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
    epsilon = 1e-5
    shape = (case.n, case.channels, case.area)
    x = guarded(randoms(generator, *shape) + np.float32(case.offset))
    w, b = randoms(generator, case.channels), randoms(generator, case.channels)
    y, mean, rstd = unassigned(*shape), *(unassigned(case.n, case.groups) for _ in range(2))
    sizes = case.channels, case.groups, case.area
    kernels.call("group_norm_forward", y, mean, rstd, x, w, b, *sizes, epsilon, case.n)
    dy, dx = randoms(generator, *shape), randoms(generator, *shape)
    dw, db = randoms(generator, case.channels), randoms(generator, case.channels)
    wx, ww, wb = leaf(x, dx), leaf(w, dw), leaf(b, db)
    kernels.call("group_norm_backward", dx, dw, db, dy, x, w, mean, rstd, *sizes, case.n)

    wy = torch.nn.functional.group_norm(wx, case.groups, ww, wb, epsilon)
    torch.autograd.backward(wy, wide(dy))
    groups = x.astype(np.float64).reshape(case.n, case.groups, -1)
    return {
        "y": (y, narrow(wy)),
        "mean": (mean, groups.mean(-1)),
        "rstd": (rstd, 1 / np.sqrt(groups.var(-1) + epsilon)),
        "dx": (dx, narrow(wx.grad)),
        "dw": (dw, narrow(ww.grad)),
        "db": (db, narrow(wb.grad)),
    }


@pytest.mark.parametrize("tensor", ["y", "mean", "rstd", "dx", "dw", "db"])
@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS.keys())
def test_group_norm_agrees_with_pytorch(kernels: Kernels, case: Norm, tensor: str) -> None:
    assert agrees(group_norm(kernels, case), tensor)


@pytest.mark.parametrize("tensor", ["mean", "rstd"])
def test_statistics_of_very_many_elements_keep_a_millionth(kernels: Kernels, tensor: str) -> None:
    assert relative_error(group_norm(kernels, Norm(16, 1, 8192, offset=10.0, n=1)), tensor) < 1e-6


def test_group_norm_computes_the_same_dw_and_db_where_dx_is_not_wanted(kernels: Kernels) -> None:
    shape = (2, 4, 6)
    x, dy, dx = (randoms(rng(), *shape) for _ in range(3))
    w, mean, rstd = randoms(rng(), 4), randoms(rng(), 2, 2), randoms(rng(), 2, 2)
    dw, db, dw_alone, db_alone = (randoms(rng(), 4) for _ in range(4))
    kernels.call("group_norm_backward", dx, dw, db, dy, x, w, mean, rstd, 4, 2, 6, 2)
    kernels.call("group_norm_backward", None, dw_alone, db_alone, dy, x, w, mean, rstd, 4, 2, 6, 2)
    np.testing.assert_array_equal(dw_alone, dw)
    np.testing.assert_array_equal(db_alone, db)


# ---- batch norm ----

EPSILON = 1e-5


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
    dy, dx, y = randoms(generator, *x.shape), randoms(generator, *x.shape), unassigned(*x.shape)
    running = statistics(generator, channels)
    layer = torch.nn.BatchNorm1d(channels, EPSILON, momentum=0.3, dtype=torch.float64)
    layer.weight.data, layer.bias.data = wide(w), wide(b)
    layer.running_mean, layer.running_var = (wide(values) for values in running)
    layer.train(not frozen)
    layer.weight.grad, layer.bias.grad = wide(dw), wide(db)
    wx = leaf(x, dx)

    batch = unassigned(channels), unassigned(channels)
    kernels.call("batch_norm_measure", *batch, x, *sizes, 0, case.n)
    used = running if frozen else batch
    kernels.call("batch_norm_forward", y, x, w, b, *used, *sizes, EPSILON, case.n)
    kernel = f"batch_norm{'_frozen' if frozen else ''}_backward"
    kernels.call(kernel, dx, dw, db, dy, x, w, *used, *sizes, EPSILON, case.n)
    kernels.call("batch_norm_follow", *running, *batch, channels, case.n * case.area, 0.3)

    wy = layer(wx)
    torch.autograd.backward(wy, wide(dy))
    if frozen:  # PyTorch follows with nothing but another forward
        layer.train()(wide(x))
    everything = wide(x).transpose(0, 1).flatten(1)
    return {
        "y": (y, narrow(wy)),
        "mean": (batch[0], narrow(everything.mean(1))),
        "variance": (batch[1], narrow(everything.var(1, correction=0))),
        "running mean": (running[0], narrow(layer.running_mean)),
        "running variance": (running[1], narrow(layer.running_var)),
        "dx": (dx, narrow(wx.grad)),
        "dw": (dw, narrow(layer.weight.grad)),
        "db": (db, narrow(layer.bias.grad)),
    }


TENSORS = ("y", "mean", "variance", "running mean", "running variance", "dx", "dw", "db")


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("frozen", [False, True], ids=["held", "frozen"])
@pytest.mark.parametrize("case", BATCHES.values(), ids=BATCHES.keys())
def test_batch_norm_agrees_with_pytorch(
    kernels: Kernels, case: Images, frozen: bool, tensor: str
) -> None:
    assert agrees(batch_norm(kernels, case, frozen=frozen), tensor)


@pytest.mark.parametrize("kernel", ["batch_norm_backward", "batch_norm_frozen_backward"])
def test_batch_norm_computes_the_same_dw_and_db_where_dx_is_not_wanted(
    kernels: Kernels, kernel: str
) -> None:
    x, dy, dx = (randoms(rng(), 2, 4, 6) for _ in range(3))
    w, (mean, variance) = randoms(rng(), 4), statistics(rng(), 4)
    dw, db, dw_alone, db_alone = (randoms(rng(), 4) for _ in range(4))
    used = dy, x, w, mean, variance, 4, 6, EPSILON, 2
    kernels.call(kernel, dx, dw, db, *used)
    kernels.call(kernel, None, dw_alone, db_alone, *used)
    np.testing.assert_array_equal(dw_alone, dw)
    np.testing.assert_array_equal(db_alone, db)


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
_BATCH = partial(batch_norm, case=BATCHES["6 channels"])
_FROZEN = partial(_BATCH, frozen=True)

FAULTS = [
    Fault("batch_norm.c", "dy[i] - level - slope", "dy[i] - slope", _BATCH, "dx"),
    Fault("batch_norm.c", "scale * share * rstd", "scale * share", _BATCH, "dx"),
    Fault("batch_norm.c", "area) * rstd", "area)", _BATCH, "dw"),
    Fault("batch_norm.c", "dw[c] += scale", "dw[c] = scale", _FROZEN, "dw"),
    Fault("batch_norm.c", "db[c] += shift", "db[c] += scale", _BATCH, "db"),
    Fault("batch_norm.c", "moving ? shift * share : 0", "shift * share", _FROZEN, "dx"),
    Fault("batch_norm.c", "moving ? scale * share", "1 ? scale * share", _FROZEN, "dx"),
    Fault("batch_norm.c", "(float)(size - 1)", "(float)size", _BATCH, "running variance"),
    Fault("batch_norm.c", "momentum * (mean[c]", "(mean[c]", _FROZEN, "running mean"),
    Fault("batch_norm.c", "* (1 - fresh) * dis", "* dis", measured_in_parts, "variance"),
    Fault("batch_norm.c", "fresh * distance;", "distance;", measured_in_parts, "mean"),
    Fault("group_norm.c", "dy[i] - level - slope", "dy[i] - slope", _NORM, "dx"),
    Fault("group_norm.c", "slope *= rstd[group] * rstd", "slope *= rstd", _NORM, "dx"),
    Fault("group_norm.c", "dw[first + c] += scale", "dw[c] += scale", _NORM, "dw"),
    Fault("group_norm.c", "db[first + c] += shift", "db[first + c] += scale", _NORM, "db"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=ids(FAULTS))
def test_a_planted_fault_is_noticed(fault: Fault, tmp_path: Path) -> None:
    assert notices(fault, tmp_path)
