"""Means of layers, over all that own a copy of them, whatever their cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from splitee.bottleneck import is_private
from splitee.state import State

Copy = Mapping[str, tuple[Tensor, int]]  # an owner's layers: tensor and samples that trained it


def client_copy(state: State, samples: int) -> Copy:
    """A client's layers, which so many samples trained."""
    return {name: (torch.as_tensor(w), samples) for name, w in state.weights.items()}


def owners(copies: Sequence[Copy]) -> dict[str, list[tuple[Tensor, int]]]:
    """The copies of every layer, in the order of their owners.

    All of a layer are on the device of the first. Copies that no sample trained count only where no
    copy was trained. What is one client's alone, such as a bottleneck, is left out.
    """
    found: dict[str, list[tuple[Tensor, int]]] = {}
    for copy in copies:
        for name, (tensor, samples) in copy.items():
            if is_private(name):
                continue
            owned = found.setdefault(name, [])
            device = owned[0][0].device if owned else tensor.device
            owned.append((tensor.detach().to(device), samples))
    return {name: [o for o in owned if o[1] > 0] or owned[:1] for name, owned in found.items()}


def cross_layer_mean(copies: Sequence[Copy]) -> dict[str, Tensor]:
    """Every layer of ``owners``, averaged over its copies, weighted by samples.

    Sums run in the order of copies, in float64, so that the result does not depend on who answered
    first. A layer with one owner is that owner's, bit for bit.
    """
    means = {}
    for name, owned in owners(copies).items():
        first, _ = owned[0]
        if len(owned) == 1:
            means[name] = first.clone()
            continue
        total = torch.zeros_like(first, dtype=torch.float64)
        for tensor, samples in owned:
            total += tensor.to(torch.float64) * samples
        means[name] = (total / sum(n for _, n in owned)).to(first.dtype)
    return means
