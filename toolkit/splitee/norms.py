"""Frozen batch norm: statistics that stay fixed during a batch and follow once after the step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm by the running statistics, in training too.

    No sample then depends on another, so that a batch in parts is the batch as a whole. While it
    trains, it measures what passes; ``follow`` moves the running statistics towards that, as
    ``nn.BatchNorm2d`` does at once.
    """

    # since the last follow: elements a channel, their sum, and that of their squares
    _count = 0
    _sum = torch.zeros((), dtype=torch.float64)
    _squares = torch.zeros((), dtype=torch.float64)

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> FrozenBatchNorm2d:
        """Shares the parameters and statistics of a batch norm."""
        frozen = cls(norm.num_features, norm.eps, norm.momentum)
        frozen.weight, frozen.bias = norm.weight, norm.bias
        frozen.running_mean, frozen.running_var = norm.running_mean, norm.running_var
        frozen.num_batches_tracked = norm.num_batches_tracked
        return frozen.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalises; nothing is updated."""
        if self.training:
            seen = input.detach().double().transpose(0, 1).flatten(1)
            self._count += seen.shape[1]
            self._sum = self._sum + seen.sum(1)
            self._squares = self._squares + seen.square().sum(1)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the running statistics towards those of the batch measured, and forgets these."""
        if self._count == 0:
            return
        mean = self._sum / self._count
        self._move(self.running_mean, mean)
        if self._count > 1:  # one element says nothing of a variance
            spread = self._squares - self._count * mean**2
            self._move(self.running_var, spread / (self._count - 1))
        self.forget()

    def _move(self, running: Tensor | None, measured: Tensor) -> None:
        assert running is not None
        assert self.momentum is not None
        running.lerp_(measured.to(running.dtype), self.momentum)

    def forget(self) -> None:
        """Drops what was measured of a batch that is not finished."""
        self._count = 0
        self._sum = self._squares = torch.zeros((), dtype=torch.float64)


def freeze(module: nn.Module) -> None:
    """Makes every batch norm in a module a frozen one; names, parameters and statistics stay."""
    for path, norm in list(module.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            module.set_submodule(path, FrozenBatchNorm2d.of(norm))


def frozen_norms(module: nn.Module) -> list[FrozenBatchNorm2d]:
    """The frozen batch norms in a module."""
    return [m for m in module.modules() if isinstance(m, FrozenBatchNorm2d)]
