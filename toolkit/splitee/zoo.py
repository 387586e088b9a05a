"""The bundled networks: CIFAR-style residual networks of 8, 18 and 20 layers.

After He et al., arXiv 1512.03385 (section 4.2 for resnet8 and resnet20, with projection shortcuts);
resnet18 is the ImageNet network with a 3x3 stem and no max pool, as is usual on 32x32 images.
"""

from __future__ import annotations

from torch import Tensor, nn

from splitee.errors import ModelError

# blocks in each stage, and the width of the first stage that the literature uses
DEPTHS: dict[str, tuple[tuple[int, ...], int]] = {
    "resnet8": ((1, 1, 1), 16),
    "resnet18": ((2, 2, 2, 2), 64),
    "resnet20": ((3, 3, 3), 16),
}
NORMS = ("batch", "group")
GROUP_CHANNELS = 4  # channels in one group; 2 to 8 trained alike on the digits


def normalisation(kind: str, channels: int) -> nn.Module:
    """Batch norm, or group norm with groups of (at most) GROUP_CHANNELS channels."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        size = next(s for s in range(GROUP_CHANNELS, 0, -1) if channels % s == 0)
        return nn.GroupNorm(channels // size, channels)
    raise ModelError(f'norm = "{kind}" is unknown: take one of {", ".join(NORMS)}')


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, 1x1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = normalisation(norm, outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = normalisation(norm, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), normalisation(norm, outputs)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y)) + self.shortcut(x)
        return self.relu2(y)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """stem, layer1, layer2, ...: every stage behind the first halves the image."""

    def __init__(
        self, blocks: tuple[int, ...], width: int, norm: str, classes: int, channels: int
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1, bias=False), normalisation(norm, width), nn.ReLU()
        )
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width << stage
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            layer = nn.Sequential()
            for stride in strides:
                layer.append(Block(inputs, outputs, stride, norm))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", layer)
        self.depth = len(blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in range(self.depth):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(self.flatten(self.pool(x)))  # type: ignore[no-any-return]


def build(
    name: str,
    *,
    width: int | None = None,
    norm: str = "batch",
    classes: int = 10,
    channels: int = 3,
) -> ResNet:
    """The network called name; width is that of the first stage.

    Raises ModelError for a name or a norm that does not exist. Weights come from torch's global
    random state.
    """
    if name not in DEPTHS:
        raise ModelError(f'model "{name}" is unknown: take one of {", ".join(DEPTHS)}')
    blocks, usual = DEPTHS[name]
    return ResNet(blocks, width or usual, norm, classes, channels)
