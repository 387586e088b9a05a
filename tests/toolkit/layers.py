"""Segments around one layer, for what capture says of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from splitee.exits import Exit
from splitee.model import Network, Segment

Layers = nn.Module | Callable[[Tensor, Tensor], Tensor]


def randomise(model: nn.Module) -> nn.Module:
    """Gives every weight and running statistic a value of its own; variances are positive."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                value = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(value.abs() + 0.1 if name.endswith("_var") else value)
    return model


class Client(nn.Module):
    """A convolution, then a layer, or a function of its output and of another's."""

    def __init__(self, layer: Layers) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, 1, 1)
        self.second = nn.Conv2d(2, 4, 3, 1, 1)
        self.layer = layer
        self.last = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = self.layer(y) if isinstance(self.layer, nn.Module) else self.layer(y, self.second(x))
        return self.last(y)  # type: ignore[no-any-return]


def segment_of(layer: Layers) -> Segment:
    """A segment that ends with the layer, and a linear layer on top of it as its exit."""
    client = randomise(Client(layer))
    network = Network(nn.Sequential(client, nn.Identity()), (2, 6, 9))
    cut = network.cut("0")
    linear = nn.Linear(cut.elements, 3, bias=False)
    head = cast(Exit, nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=linear)))
    return Segment(network, cut, {"0": head})
