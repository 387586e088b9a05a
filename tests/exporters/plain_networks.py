"""A plain chain of layers, as a user's own module makes one."""

from __future__ import annotations

from torch import nn

from splitee.zoo import normalisation


def vgg(classes: int, channels: int, norm: str) -> nn.Sequential:
    """After Simonyan and Zisserman, arXiv 1409.1556: 3x3 convolutions, halved by max pools."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        normalisation(norm, 8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        normalisation(norm, 12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU6(),
        nn.AvgPool2d(3, 1, 1),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, classes),
    )
