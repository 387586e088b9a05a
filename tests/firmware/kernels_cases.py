"""Every backward kernel, plain and fast, on small shapes: what it is called with, both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firmware.kernels_harness import Floats, Image, Kernels, guarded, unassigned
from firmware.test_kernels_norm import EPSILON, Images, Norm

# An input is moved by one and by two of these, to either side. Inputs are multiples of 1/1024 and
# not large, so that float32 holds the moved ones exactly.
STEP = 1 / 16

Inputs = Mapping[str, Floats]
Gradients = dict[str, Floats]


@dataclass(frozen=True)
class Case:
    """One kernel on one shape; the gradient of input "x" is "dx", or "d" where it is in place."""

    inputs: Callable[[np.random.Generator], dict[str, Floats]]
    forward: Callable[[Kernels, Inputs], Floats]
    # The gradients for dLoss/dy; what is added to is there already.
    backward: Callable[[Kernels, Inputs, Floats, Gradients], None]


def values(generator: np.random.Generator, *shape: int) -> Floats:
    return guarded((generator.standard_normal(shape) * 1024).round().astype(np.float32) / 1024)


def backward_of(kernel: str) -> str:
    """The function; relu6 has none of its own for bits."""
    return "relu_backward_bits" if kernel.endswith("_bits") else f"{kernel}_backward"


# ---- convolutions ----


def convolution(kernel: str, case: Image) -> Case:
    s, n = case.window(case.out), case.n
    groups = [case.groups] if kernel == "grouped_conv2d" else []
    fast = kernel.removeprefix("fast_") if kernel.startswith("fast_") else None

    def sizes(kernels: Kernels) -> list[Any]:
        scratch = [unassigned(kernels.size(f"{fast}_scratch", s))] if fast else []
        return [s, *groups, n, *scratch]

    def inputs(generator: np.random.Generator) -> dict[str, Floats]:
        return {
            "x": values(generator, n, case.channels, *case.size),
            "w": values(generator, case.out, case.channels // case.groups, *case.kernel),
            "b": values(generator, case.out),
        }

    def forward(kernels: Kernels, at: Inputs) -> Floats:
        y = unassigned(n, case.out, *case.out_size())
        kernels.call(f"{kernel}_forward", y, at["x"], at["w"], at["b"], *sizes(kernels))
        return y

    def backward(kernels: Kernels, at: Inputs, dy: Floats, to: Gradients) -> None:
        gradients = to["dx"], to["dw"], to["db"]
        kernels.call(f"{kernel}_backward", *gradients, dy, at["x"], at["w"], *sizes(kernels))

    return Case(inputs, forward, backward)


CONVOLUTIONS = {
    "3x3": Image((4, 5), (3, 3), padding=(1, 1), channels=3, out=5),
    "3x3 stride 2 on odd sizes": Image((5, 7), (3, 3), (2, 2), (1, 1), channels=5, out=6),
    "3x3 stride 2 on even sizes": Image((4, 6), (3, 3), (2, 2), (1, 1), channels=2, out=3, n=1),
    "1x1 image": Image((1, 1), (3, 3), padding=(1, 1), channels=5, out=4),
    "1x1 image 1x1 kernel": Image((1, 1), (1, 1), channels=1, out=1, n=1),
    "1x1": Image((3, 5), (1, 1), channels=6, out=7),
    "1x1 stride 2 on odd sizes": Image((3, 9), (1, 1), (2, 2), channels=5, out=9),
    "one channel": Image((5, 4), (3, 3), padding=(1, 1), channels=1, out=1),
    "nine channels": Image((3, 3), (3, 3), padding=(1, 1), channels=9, out=2, n=1),
    "nothing square": Image((5, 6), (3, 2), (1, 2), (0, 1), channels=2, out=5),
    "padding larger than the kernel": Image((3, 2), (2, 2), (2, 3), (5, 4), channels=2, out=2),
}
GROUPED = {
    "two groups": Image((4, 3), (3, 3), padding=(1, 1), channels=4, out=6, groups=2),
    "three groups of 1x1 kernels": Image((3, 3), (1, 1), channels=6, out=9, groups=3),
    "depthwise": Image((4, 5), (3, 3), padding=(1, 1), channels=5, out=5, groups=5),
    "depthwise stride 2 on odd sizes": Image(
        (5, 7), (3, 3), (2, 2), (1, 1), channels=3, out=3, groups=3
    ),
    "depthwise, two outputs a channel": Image((5, 4), (3, 3), channels=3, out=6, groups=3),
    "depthwise 1x1 image": Image((1, 1), (3, 3), padding=(1, 1), channels=4, out=4, groups=4),
}
DEPTHWISE = {
    name: replace(case, out=case.channels, groups=case.channels)
    for name, case in (CONVOLUTIONS | GROUPED).items()
}


# ---- linear ----


def linear(kernel: str, case: tuple[int, int, int]) -> Case:
    width, out, n = case

    def inputs(generator: np.random.Generator) -> dict[str, Floats]:
        return {
            "x": values(generator, n, width),
            "w": values(generator, out, width),
            "b": values(generator, out),
        }

    def forward(kernels: Kernels, at: Inputs) -> Floats:
        y = unassigned(n, out)
        kernels.call(f"{kernel}_forward", y, at["x"], at["w"], at["b"], *case)
        return y

    def backward(kernels: Kernels, at: Inputs, dy: Floats, to: Gradients) -> None:
        gradients = to["dx"], to["dw"], to["db"]
        kernels.call(f"{kernel}_backward", *gradients, dy, at["x"], at["w"], *case)

    return Case(inputs, forward, backward)


LAYERS = {  # in, out, samples
    "12 to 8": (12, 8, 2),
    "17 to 7": (17, 7, 3),
    "1 to 1": (1, 1, 1),
    "1 to 4": (1, 4, 2),
    "9 to 1": (9, 1, 1),
}


# ---- norms ----


def group_norm(case: Norm) -> Case:
    shape = case.n, case.channels, case.area
    sizes = case.channels, case.groups, case.area

    def normalised(kernels: Kernels, at: Inputs) -> tuple[Floats, Floats, Floats]:
        y, mean, rstd = unassigned(*shape), *(unassigned(case.n, case.groups) for _ in range(2))
        arrays = y, mean, rstd, at["x"], at["w"], at["b"]
        kernels.call("group_norm_forward", *arrays, *sizes, EPSILON, case.n)
        return y, mean, rstd

    def backward(kernels: Kernels, at: Inputs, dy: Floats, to: Gradients) -> None:
        _, mean, rstd = normalised(kernels, at)
        to["d"][...] = dy
        arrays = to["d"], to["dw"], to["db"], at["x"], at["w"], mean, rstd
        kernels.call("group_norm_backward", *arrays, *sizes, case.n)

    return Case(norm_inputs(shape), lambda k, at: normalised(k, at)[0], backward)


def norm_inputs(
    shape: tuple[int, int, int],
) -> Callable[[np.random.Generator], dict[str, Floats]]:
    def inputs(generator: np.random.Generator) -> dict[str, Floats]:
        # spread out, so that a step is small beside the distance of two elements
        x = guarded(4 * values(generator, *shape))
        return {"x": x, "w": values(generator, shape[1]), "b": values(generator, shape[1])}

    return inputs


NORMS = {
    "two groups": Norm(6, 2, 6, n=2),
    "one group": Norm(3, 1, 5, n=2),
    "a group a channel": Norm(3, 3, 7, n=2),
    "1x1 images": Norm(8, 2, 1, n=2),
    "one channel, one sample": Norm(1, 1, 67, n=1),
    "1x1 images, a group a channel": Norm(3, 3, 1, n=1),
}


def batch_norm(kernel: str, case: Images) -> Case:
    shape = case.n, case.channels, case.area
    sizes = case.channels, case.area
    constants = guarded(np.linspace(-1, 2, case.channels, dtype=np.float32))
    frozen = kernel == "batch_norm_frozen"

    def statistics(kernels: Kernels, at: Inputs) -> tuple[Floats, Floats]:
        if frozen:
            return constants, guarded(1 + constants**2)
        mean, variance = unassigned(case.channels), unassigned(case.channels)
        kernels.call("batch_norm_measure", mean, variance, at["x"], *sizes, 0, case.n)
        return mean, variance

    def forward(kernels: Kernels, at: Inputs) -> Floats:
        y = unassigned(*shape)
        arrays = y, at["x"], at["w"], at["b"], *statistics(kernels, at)
        kernels.call("batch_norm_forward", *arrays, *sizes, EPSILON, case.n)
        return y

    def backward(kernels: Kernels, at: Inputs, dy: Floats, to: Gradients) -> None:
        to["d"][...] = dy
        arrays = to["d"], to["dw"], to["db"], at["x"], at["w"], *statistics(kernels, at)
        kernels.call(f"{kernel}_backward", *arrays, *sizes, EPSILON, case.n)

    return Case(norm_inputs(shape), forward, backward)


BATCHES = {
    "3 channels": Images(3, 6, 4),
    "one channel": Images(1, 9, 3),
    "one sample": Images(4, 7, 1),
    "1x1 images": Images(5, 1, 8),
}


# ---- elementwise ----


def relu(kernel: str, size: int) -> Case:
    bits = kernel.endswith("_bits")
    forward = f"{kernel.removesuffix('_bits')}_forward{'_bits' if bits else ''}"

    def inputs(generator: np.random.Generator) -> dict[str, Floats]:
        x = 4 * values(generator, size)
        for kink in (0, 6):  # four steps away from it
            x = np.where(np.abs(x - kink) < 4 * STEP, kink + 8 * STEP, x)
        return {"x": guarded(x.astype(np.float32))}

    def run(kernels: Kernels, at: Inputs) -> tuple[Floats, NDArray[np.uint8]]:
        y, packed = unassigned(size), guarded(np.zeros((size + 7) // 8, np.uint8))
        kernels.call(forward, y, *([packed] if bits else []), at["x"], size)
        return y, packed

    def backward(kernels: Kernels, at: Inputs, dy: Floats, to: Gradients) -> None:
        y, packed = run(kernels, at)
        to["d"][...] = dy
        kernels.call(backward_of(kernel), to["d"], packed if bits else y, size)

    return Case(inputs, lambda k, at: run(k, at)[0], backward)


SIZES = {f"{size} elements": size for size in (1, 8, 47)}


# ---- pools ----


def max_pool(case: Image) -> Case:
    s, n = case.window(case.channels), case.n

    def inputs(generator: np.random.Generator) -> dict[str, Floats]:
        shape = n, case.channels, *case.size
        order = generator.permutation(int(np.prod(shape))).reshape(shape)
        return {"x": guarded((order * 8 * STEP).astype(np.float32))}  # no two change places

    def run(kernels: Kernels, at: Inputs) -> tuple[Floats, NDArray[np.uint8]]:
        y = unassigned(n, case.channels, *case.out_size())
        winner = guarded(np.zeros(y.shape, np.uint8))
        kernels.call("max_pool_forward", y, winner, at["x"], s, n)
        return y, winner

    def backward(kernels: Kernels, at: Inputs, dy: Floats, to: Gradients) -> None:
        kernels.call("max_pool_backward", to["dx"], dy, run(kernels, at)[1], s, n)

    return Case(inputs, lambda k, at: run(k, at)[0], backward)


def avg_pool(case: Image) -> Case:
    s, n = case.window(case.channels), case.n

    def inputs(generator: np.random.Generator) -> dict[str, Floats]:
        return {"x": values(generator, n, case.channels, *case.size)}

    def forward(kernels: Kernels, at: Inputs) -> Floats:
        y = unassigned(n, case.channels, *case.out_size())
        kernels.call("avg_pool_forward", y, at["x"], s, n)
        return y

    def backward(kernels: Kernels, at: Inputs, dy: Floats, to: Gradients) -> None:
        kernels.call("avg_pool_backward", to["dx"], dy, s, n)

    return Case(inputs, forward, backward)


POOLS = {
    "2x2 stride 2 on odd sizes": Image((7, 5), (2, 2), (2, 2)),
    "3x3 stride 2 padding 1": Image((5, 6), (3, 3), (2, 2), (1, 1)),
    "3x3 stride 1 padding 1": Image((4, 3), (3, 3), (1, 1), (1, 1)),
    "1x1 image": Image((1, 1), (3, 3), padding=(1, 1)),
    "whole image": Image((4, 5), (4, 5)),
    "one channel, nothing square": Image((7, 6), (4, 2), (3, 1), (2, 0), channels=1, n=1),
    "stride larger than window": Image((5, 7), (2, 2), (3, 4), channels=2),
}


# ---- loss ----


def _loss(kernels: Kernels, logits: Floats, label: int) -> float:
    """Of one sample."""
    loss, told = guarded(np.zeros(1, np.float32)), guarded(np.array([label], np.uint8))
    arrays = unassigned(*logits.shape), loss, None, guarded(logits), told
    kernels.call("softmax_cross_entropy_forward", *arrays, 1.0, len(logits), 1)
    return float(loss[0])


def softmax_cross_entropy(case: tuple[int, int, float]) -> Case:
    """share: what another's answers are of the targets; the labels are the rest."""
    classes, n, share = case
    labels = guarded((np.arange(n) * 3 % classes).astype(np.uint8))
    answers = np.random.default_rng(1).dirichlet(np.ones(classes), n).astype(np.float32)
    targets = share * answers + (1 - share) * np.eye(classes)[labels]

    def inputs(generator: np.random.Generator) -> dict[str, Floats]:
        return {"logits": values(generator, n, classes)}

    def forward(kernels: Kernels, at: Inputs) -> Floats:
        """The loss for these targets: of each sample, that of every class, by its share."""
        losses = [
            weight * _loss(kernels, row, label)
            for row, target in zip(at["logits"], targets, strict=True)
            for label, weight in enumerate(target)
            if weight
        ]
        return np.array([sum(losses)], np.float32)

    def backward(kernels: Kernels, at: Inputs, dy: Floats, to: Gradients) -> None:
        p = unassigned(n, classes)
        arrays = p, None, None, at["logits"], labels
        kernels.call("softmax_cross_entropy_forward", *arrays, 1.0, classes, n)
        if share:
            kernels.call("softmax_distill", p, guarded(answers), labels, share, classes, n)
        rest = labels, float(dy[0]), classes, n
        kernels.call("softmax_cross_entropy_backward", to["dlogits"], p, *rest)

    return Case(inputs, forward, backward)


LOGITS = {  # classes, samples, share of the targets that is distilled
    "10 classes": (10, 4, 0.0),
    "2 classes, one sample": (2, 1, 0.0),
    "10 classes, distilled": (10, 4, 0.25),
}


# ---- all of them ----

CASES: dict[str, dict[str, Case]] = {
    **{
        kernel: {name: convolution(kernel, case) for name, case in cases.items()}
        for kernel, cases in {
            "conv2d": CONVOLUTIONS,
            "grouped_conv2d": GROUPED,
            "fast_conv2d": CONVOLUTIONS,
            "fast_depthwise": DEPTHWISE,
        }.items()
    },
    **{
        kernel: {name: linear(kernel, case) for name, case in LAYERS.items()}
        for kernel in ("linear", "fast_linear")
    },
    "group_norm": {name: group_norm(case) for name, case in NORMS.items()},
    **{
        kernel: {name: batch_norm(kernel, case) for name, case in BATCHES.items()}
        for kernel in ("batch_norm", "batch_norm_frozen")
    },
    **{
        kernel: {name: relu(kernel, case) for name, case in SIZES.items()}
        for kernel in ("relu", "relu6", "relu_bits", "relu6_bits")
    },
    "max_pool": {name: max_pool(case) for name, case in POOLS.items()},
    "avg_pool": {name: avg_pool(case) for name, case in POOLS.items()},
    "softmax_cross_entropy": {name: softmax_cross_entropy(case) for name, case in LOGITS.items()},
}
