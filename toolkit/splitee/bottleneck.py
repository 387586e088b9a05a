"""The learned bottleneck at a cut: fewer channels and pixels cross it, and both ends learn which.

The client's half is a 1x1 convolution, with a stride, on top of its trunk, under the exit at its
cut; the server's half mirrors it. Both halves, and that exit, belong to one client alone: they are
no layers of the network, and nobody averages them. So all their tensors have names that begin with
``PREFIX``, which no part of a network may.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

NAME = "bottleneck"
PREFIX = NAME + "."  # <PREFIX>weight and bias on a client, <PREFIX><client>.* on its server
EXIT = PREFIX + "exit"  # the exit behind it


@dataclass(frozen=True)
class Bottleneck:
    """A client's setting: what crosses its cut."""

    channels: int
    stride: int = 1

    def shape(self, cut: Sequence[int]) -> tuple[int, int, int]:
        """What is sent of activations of a (channels, height, width)."""
        _, height, width = cut
        return self.channels, -(-height // self.stride), -(-width // self.stride)

    def narrow(self, cut: Sequence[int]) -> nn.Conv2d:
        """The client's half, with weights drawn by torch."""
        return nn.Conv2d(cut[0], self.channels, 1, self.stride)

    def mirror(self, cut: Sequence[int]) -> Mirror:
        """The server's half, with weights drawn by torch."""
        return Mirror(self, cut)


class Mirror(nn.Module):
    """The server's half: back to the activations' shape at the cut."""

    def __init__(self, bottleneck: Bottleneck, cut: Sequence[int]) -> None:
        super().__init__()
        channels, self.height, self.width = cut
        self.sent = bottleneck.shape(cut)  # what it widens
        stride = bottleneck.stride
        self.widen = nn.ConvTranspose2d(bottleneck.channels, channels, stride, stride)
        # as of a 1x1 convolution: each value is made of that many, however large the stride is
        bound = 1 / math.sqrt(bottleneck.channels)
        for parameter in self.widen.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, sent: Tensor) -> Tensor:
        whole: Tensor = self.widen(sent)
        return whole[..., : self.height, : self.width]


def is_private(name: str) -> bool:
    """Whether a tensor is one client's alone, and so is not averaged with any other."""
    return name.startswith(PREFIX)
