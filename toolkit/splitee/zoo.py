"""The bundled networks, and those of torchvision and of a user's own module.

Bundled are CIFAR-style residual networks of 8, 18 and 20 layers, after He et al., arXiv 1512.03385
(section 4.2 for resnet8 and resnet20, with projection shortcuts); resnet18 is the ImageNet network
with a 3x3 stem and no max pool, as is usual on 32x32 images.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import Tensor, nn

from splitee import own, vision
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
) -> nn.Module:
    """The network called name; width is that of the first stage.

    name: a bundled network, "torchvision:<model>" without weights, or "<module>:<function>", which
    is called with those of classes, channels, width and norm that it takes. Raises ModelError for
    a name or a norm that does not exist, and where a network cannot have what is asked for. Weights
    come from torch's global random state.
    """
    if norm not in NORMS:
        raise ModelError(f'norm = "{norm}" is unknown: take one of {", ".join(NORMS)}')
    source, _, member = name.partition(":")
    if source == "torchvision" and member:
        return _torchvision(member, width=width, norm=norm, classes=classes, channels=channels)
    if member:
        return _own(source, member, width=width, norm=norm, classes=classes, channels=channels)
    if name not in DEPTHS:
        raise ModelError(
            f'model "{name}" is unknown: take one of {", ".join(DEPTHS)}, "torchvision:<model>" or '
            '"<module>:<function>"'
        )
    blocks, usual = DEPTHS[name]
    return ResNet(blocks, width or usual, norm, classes, channels)


def _torchvision(
    name: str, *, width: int | None, norm: str, classes: int, channels: int
) -> nn.Module:
    if width is not None or channels != 3:
        raise ModelError(
            f'model "torchvision:{name}" has a width of its own and takes images of 3 channels'
        )
    models = vision.part("models")
    try:
        builder = models.get_model_builder(name)
    except ValueError as error:
        raise ModelError(
            f'torchvision has no model "{name}": take one of {", ".join(models.list_models())}'
        ) from error
    settings = {} if norm == "batch" else {"norm_layer": partial(normalisation, norm)}
    try:
        model: nn.Module = builder(num_classes=classes, **settings)
    except TypeError as error:  # its builder takes no norm
        raise ModelError(f'model "torchvision:{name}" has no norm = "{norm}"') from error
    return model


def _own(module: str, function: str, **settings: Any) -> nn.Module:
    name = f'model "{module}:{function}"'
    try:
        with own.folder_at_hand():
            make = own.load(f"{module}:{function}")
            takes = inspect.signature(make).parameters
            model = make(**{k: v for k, v in settings.items() if k in takes})
    except Exception as error:  # whatever a user's module raises
        raise ModelError(f"{name} cannot be made: {type(error).__name__}: {error}") from error
    if isinstance(model, nn.Module):
        return model
    raise ModelError(f"{name} is a {type(model).__name__}: return a torch.nn.Module")
