"""The kinds of operation a graph is made of: shape rule, meaning in numpy, cost.

A shape is that of one sample; arrays have the batch in front. The numpy meaning is the reference
that exported code is held to, written for reading and computed in the dtype of its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Attrs = Mapping[str, Any]
Weights = Mapping[str, Array]  # by role: weight, bias, mean, variance


@dataclass(frozen=True)
class Kind:
    """What an operation means and what its backward pass needs."""

    shape: Callable[[Attrs, list[Shape], Mapping[str, Shape]], Shape]
    run: Callable[[Attrs, list[Array], Weights], Array]
    macs: Callable[[Shape, Mapping[str, Shape]], int] = lambda out, weights: 0
    keeps_inputs: bool = False  # backward reads the inputs
    keeps_output: bool = False  # backward reads the output
    measures: bool = False  # forward measures its input for running statistics
    # bytes that a pass needs for itself while it runs, whatever the batch
    scratch: Callable[[Attrs, Shape, Shape], int] = lambda attrs, x, out: 0
    # further tensors that forward assigns for backward: name -> bytes per sample
    saves: Callable[[Attrs, Shape], dict[str, int]] = lambda attrs, out: {}


def _window(attrs: Attrs, size: Shape) -> Shape:
    """Output height and width of a sliding window."""
    return tuple(
        (n + 2 * p - k) // s + 1
        for n, k, s, p in zip(size, attrs["kernel"], attrs["stride"], attrs["padding"], strict=True)
    )


def _patches(x: Array, attrs: Attrs, fill: float) -> Array:
    """Every window of x (n, c, h, w): an array (n, c, out_h, out_w, kernel_h, kernel_w)."""
    (ph, pw), (sh, sw) = attrs["padding"], attrs["stride"]
    x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)), constant_values=fill)
    windows: Array = np.lib.stride_tricks.sliding_window_view(
        x, tuple(attrs["kernel"]), axis=(2, 3)
    )
    return windows[:, :, ::sh, ::sw]


def _conv2d(attrs: Attrs, inputs: list[Array], weights: Weights) -> Array:
    patches = _patches(inputs[0], attrs, 0.0)
    groups = attrs["groups"]
    n, c, h, w = patches.shape[:4]
    patches = patches.reshape(n, groups, c // groups, *patches.shape[2:])
    weight = weights["weight"].reshape(groups, -1, *weights["weight"].shape[1:])
    y: Array = np.einsum("ngchwij,gocij->ngohw", patches, weight, optimize=True)
    y = y.reshape(n, -1, h, w)
    if "bias" in weights:
        y += weights["bias"][:, None, None]
    return y


SCRATCH_MAX = 4096  # bytes


def depthwise(attrs: Attrs, x: Shape, out: Shape) -> bool:
    """Whether a convolution makes each channel of one channel."""
    groups: int = attrs["groups"]
    return groups == x[0] == out[0] > 1


def _conv2d_scratch(attrs: Attrs, x: Shape, out: Shape) -> int:
    """What fast.h says that a convolution needs, in bytes; a test compares the two."""
    channels, height, width = x
    if depthwise(attrs, x, out):
        channels = 1
    elif attrs["groups"] == 1:
        channels = max(channels, out[0])
    else:
        return 0
    rows, columns = attrs["padding"]
    whole: int = channels * (height + 2 * rows + 2) * (width + 2 * columns + 6)
    return min(4 * whole, SCRATCH_MAX)


def _conv_transpose2d(attrs: Attrs, inputs: list[Array], weights: Weights) -> Array:
    """Of windows that do not overlap; what of the last ones lies outside of its size is left."""
    x, (height, width) = inputs[0], attrs["size"]
    y = np.einsum("nchw,coij->nohiwj", x, weights["weight"], optimize=True)
    n, channels, rows, kh, columns, kw = y.shape
    whole: Array = y.reshape(n, channels, rows * kh, columns * kw) + weights["bias"][:, None, None]
    return whole[..., :height, :width]


def _group_norm(attrs: Attrs, inputs: list[Array], weights: Weights) -> Array:
    x = inputs[0]
    grouped = x.reshape(len(x), attrs["groups"], -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    y: Array = (centred / np.sqrt(variance + attrs["epsilon"])).reshape(x.shape)
    y *= weights["weight"][:, None, None]
    y += weights["bias"][:, None, None]
    return y


def _batch_norm(attrs: Attrs, inputs: list[Array], weights: Weights) -> Array:
    """With the running statistics: what batch norm means outside training."""
    scale: Array = weights["weight"] / np.sqrt(weights["variance"] + attrs["epsilon"])
    shift: Array = weights["bias"] - weights["mean"] * scale
    y: Array = inputs[0] * scale[:, None, None] + shift[:, None, None]
    return y


def _linear(attrs: Attrs, inputs: list[Array], weights: Weights) -> Array:
    y = inputs[0].reshape(len(inputs[0]), -1) @ weights["weight"].T
    return y + weights["bias"] if "bias" in weights else y


def _same(attrs: Attrs, inputs: list[Shape], weights: Mapping[str, Shape]) -> Shape:
    return inputs[0]


OPS: dict[str, Kind] = {
    "conv2d": Kind(
        shape=lambda a, x, w: (w["weight"][0], *_window(a, x[0][1:])),
        run=_conv2d,
        macs=lambda out, w: math.prod(out) * math.prod(w["weight"][1:]),
        keeps_inputs=True,
        scratch=_conv2d_scratch,
    ),
    "linear": Kind(
        shape=lambda a, x, w: (w["weight"][0],),
        run=_linear,
        macs=lambda out, w: math.prod(w["weight"]),
        keeps_inputs=True,
    ),
    "group_norm": Kind(
        shape=_same,
        run=_group_norm,
        keeps_inputs=True,
        saves=lambda a, out: {"mean": 4 * a["groups"], "rstd": 4 * a["groups"]},
    ),
    "batch_norm": Kind(shape=_same, run=_batch_norm, keeps_inputs=True, measures=True),
    "relu": Kind(
        shape=_same,
        run=lambda a, x, w: np.maximum(x[0], 0),
        keeps_output=True,
    ),
    "relu6": Kind(
        shape=_same,
        run=lambda a, x, w: np.clip(x[0], 0, 6),
        keeps_output=True,
    ),
    "add": Kind(shape=_same, run=lambda a, x, w: x[0] + x[1]),
    "max_pool": Kind(
        shape=lambda a, x, w: (x[0][0], *_window(a, x[0][1:])),
        run=lambda a, x, w: _patches(x[0], a, -np.inf).max((-2, -1)),
        saves=lambda a, out: {"winner": math.prod(out)},
    ),
    # padding counts as zeros, as PyTorch's count_include_pad
    "avg_pool": Kind(
        shape=lambda a, x, w: (x[0][0], *_window(a, x[0][1:])),
        run=lambda a, x, w: _patches(x[0], a, 0.0).mean((-2, -1)),
    ),
    # widens what a bottleneck has sent
    "conv_transpose2d": Kind(
        shape=lambda a, x, w: (w["weight"][1], *a["size"]),
        run=_conv_transpose2d,
        macs=lambda out, w: math.prod(out) * w["weight"][0],
    ),
    # hands the trunk's tensor to an exit; its gradient is weighted on the way back
    "branch": Kind(shape=_same, run=lambda a, x, w: x[0]),
}

SERVER_ONLY = ("conv_transpose2d",)  # kinds that are run and written, but never trained on a client
