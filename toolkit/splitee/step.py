"""The step of a batch in torch: gradients are checked and clipped before anything learns from them.

``firmware/core/step.c`` does the same on a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from splitee.errors import NotFinite


def check(owner: str, parameters: Mapping[str, Tensor], loss: float) -> None:
    """Raises NotFinite when a gradient, or else the loss, is infinite or no number."""
    gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    # a sum is read once and is finite only where its terms are: nearly always that is all
    sums = [g.sum() for g in gradients.values()]
    if sums and not torch.stack(sums).sum().isfinite():
        for name, gradient in gradients.items():
            wrong = (~gradient.isfinite()).flatten().nonzero()
            if len(wrong):  # otherwise only the sum was too large
                raise NotFinite(owner, name, int(wrong[0]))
    if not math.isfinite(loss):
        raise NotFinite(owner)


def clip(parameters: Iterable[Tensor], norm: float) -> None:
    """Scales the gradients of all parameters together to at most that norm; 0: any."""
    if norm:
        nn.utils.clip_grad_norm_(parameters, norm)


class Kept:
    """A module's statistics as they were before a batch, for a batch that is not finished.

    Batch norm moves its running statistics in the forward pass already.
    """

    def __init__(self, module: nn.Module) -> None:
        self._live = list(module.buffers())
        self._kept: list[tuple[Tensor, Tensor]] = []

    def keep(self) -> None:
        """Notes them, unless those of this batch are noted."""
        if not self._kept:
            self._kept = [(b, b.clone()) for b in self._live]

    def restore(self) -> None:
        """Puts back what was noted, if anything was."""
        for live, before in self._kept:
            live.copy_(before)
        self._kept = []

    def forget(self) -> None:
        """The batch is finished."""
        self._kept = []
