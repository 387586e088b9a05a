"""MobileNetV2, its modules called as torchvision's are: what torchvision itself is not needed for.

After Sandler et al., arXiv 1801.04381, table 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# expansion, channels, blocks, stride of the first block
STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip


def _conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Module:
    """torchvision's Conv2dNormActivation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Widen, convolve each channel, narrow; with a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.shortcut = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *([_conv_norm(inputs, hidden, 1)] if expansion != 1 else []),
            _conv_norm(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)  # type: ignore[no-any-return]


class MobileNetV2(nn.Module):
    """The network; every number of channels is a multiple of divisor, and no smaller than it."""

    def __init__(
        self, width: float = 1.0, divisor: int = 8, *, channels: int, classes: int
    ) -> None:
        super().__init__()

        def scaled(count: int) -> int:
            nearest = max(divisor, int(count * width + divisor / 2) // divisor * divisor)
            return nearest if nearest >= 0.9 * count * width else nearest + divisor

        inputs = scaled(32)
        layers = [_conv_norm(channels, inputs, 3, 2)]
        for expansion, count, blocks, stride in STAGES:
            for block in range(blocks):
                first = stride if block == 0 else 1
                layers.append(InvertedResidual(inputs, scaled(count), first, expansion))
                inputs = scaled(count)
        last = max(1280, scaled(1280))
        layers.append(_conv_norm(inputs, last, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))  # type: ignore[no-any-return]
