"""Early exits: the head on top of a cut, and what it learns from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRID = 4


def grid_for(shape: tuple[int, int, int], grid: int = GRID) -> tuple[int, int]:
    """The largest grid of at most grid x grid cells that divides a (channels, height, width)."""
    _, height, width = shape
    return (
        max(g for g in range(1, min(grid, height) + 1) if height % g == 0),
        max(g for g in range(1, min(grid, width) + 1) if width % g == 0),
    )


class Exit(nn.Module):
    """Pools activations of a (channels, height, width) to a small grid, then one linear layer."""

    def __init__(self, shape: tuple[int, int, int], classes: int, grid: int = GRID) -> None:
        super().__init__()
        rows, columns = grid_for(shape, grid)
        self.pool = nn.AdaptiveAvgPool2d((rows, columns))
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(shape[0] * rows * columns, classes)

    def forward(self, activations: Tensor) -> Tensor:
        return self.linear(self.flatten(self.pool(activations)))  # type: ignore[no-any-return]


def losses(logits: Sequence[Tensor], labels: Tensor, distill: float = 0.0) -> list[Tensor]:
    """What each of a client's exits learns from, the deepest last: summed over the samples.

    logits: (samples, classes) of each. The deepest learns from the labels, by cross-entropy. Of the
    others' targets its softmax is the share distill: their loss is (1 - distill) x cross-entropy
    + distill x KL(deepest || own), but for a constant (Hinton et al., "Distilling the Knowledge in
    a Neural Network", 2015, at temperature 1). Nothing of that comes back to the deepest.
    """
    targets = [labels] * len(logits)
    if distill:
        deepest = logits[-1].detach().softmax(1)
        onehot = F.one_hot(labels, deepest.shape[1]).to(deepest.dtype)
        soft = torch.lerp(onehot, deepest, distill)
        targets[:-1] = [soft] * (len(logits) - 1)
    return [F.cross_entropy(z, t, reduction="sum") for z, t in zip(logits, targets, strict=True)]
