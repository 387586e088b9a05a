"""Capture refuses, by name, the layers that have no operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from splitee.capture import capture
from splitee.errors import ModelError
from toolkit.layers import Layers, segment_of


class Broadcast(nn.Module):
    """Adds each channel's mean to the channel."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pool(x)  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[], Layers], str]] = {
    "dilation": (partial(nn.Conv2d, 4, 4, 3, dilation=2), r"^0\.layer: .* without dilation"),
    "reflection": (
        partial(nn.Conv2d, 4, 4, 3, 1, 1, padding_mode="reflect"),
        r"^0\.layer: .* zero-padded",
    ),
    "padding-same": (partial(nn.Conv2d, 4, 4, 3, padding="same"), r'^0\.layer: padding = "same"'),
    "silu": (nn.SiLU, r"^0\.layer: SiLU has no operation here; the kinds are conv2d, linear, "),
    "instance-norm": (partial(nn.InstanceNorm2d, 4), r"^0\.layer: InstanceNorm2d has no operation"),
    "batch-norm-plain": (partial(nn.BatchNorm2d, 4, affine=False), r"^0\.layer: BatchNorm2d has"),
    "batch-norm-no-statistics": (
        partial(nn.BatchNorm2d, 4, track_running_stats=False),
        r"^0\.layer: BatchNorm2d has",
    ),
    "batch-norm-mean-of-all": (
        partial(nn.BatchNorm2d, 4, momentum=None),
        r"^0\.layer: only batch norms with a momentum",
    ),
    "group-norm-plain": (partial(nn.GroupNorm, 2, 4, affine=False), r"^0\.layer: GroupNorm has"),
    "max-pool-ceil": (partial(nn.MaxPool2d, 4, ceil_mode=True), r"^0\.layer: only max pools"),
    "max-pool-dilation": (partial(nn.MaxPool2d, 2, dilation=2), r"^0\.layer: only max pools"),
    "avg-pool-ceil": (partial(nn.AvgPool2d, 4, ceil_mode=True), r"^0\.layer: only average pools"),
    "avg-pool-border": (
        partial(nn.AvgPool2d, 3, 1, 1, count_include_pad=False),
        r"^0\.layer: only average pools that divide by the whole window",
    ),
    "avg-pool-divisor": (
        partial(nn.AvgPool2d, 2, divisor_override=3),
        r"^0\.layer: only average pools that divide by the whole window",
    ),
    "adaptive-uneven": (
        partial(nn.AdaptiveAvgPool2d, 4),
        r"^0\.layer: an image of 6x9 does not divide into 4x4 equal cells",
    ),
    "linear-on-image": (
        partial(nn.Linear, 9, 9),
        r"^0\.layer: only linear layers behind a flatten",
    ),
    "flatten-part": (partial(nn.Flatten, 2), r"^0\.layer: Flatten has no operation"),
    "flatten-end": (partial(nn.Flatten, 1, 2), r"^0\.layer: Flatten has no operation"),
    "flatten-rows": (lambda: lambda a, b: (a + b).flatten(2), r"^flatten: only flatten\(x, 1\)"),
    "add-constant": (lambda: lambda a, b: a + 1, r"^add: only additions of two different tensors"),
    "add-itself": (lambda: lambda a, b: a + a, r"^add: only additions of two different tensors"),
    "add-scaled": (lambda: lambda a, b: torch.add(a, b, alpha=2), r"^add: only additions of two"),
    "add-broadcast": (Broadcast, r"^add: only additions of two different tensors of one shape$"),
    "multiply": (lambda: lambda a, b: a * b, r"^mul: .* has no operation here; cut above it"),
}


@pytest.mark.parametrize("layer", REFUSED)
def test_refuses_a_layer_by_its_name(layer: str) -> None:
    make, message = REFUSED[layer]
    segment = segment_of(make())
    with pytest.raises(ModelError, match=message):
        capture(segment, 3)
