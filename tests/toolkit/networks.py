"""The small networks, images and clients that the toolkit's tests use."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from splitee import zoo
from splitee.client import LocalClient, Place, Settings, State
from splitee.data import Images
from splitee.exits import Exit
from splitee.model import Cut, Network, Segment, Tail
from splitee.norms import freeze
from splitee.ops import Array
from splitee.server import Server

CLASSES = 10
SHAPE = (1, 8, 8)
SCALE, SHIFT = (0.0125,), (-1.5,)  # input = byte * SCALE + SHIFT: about unit variance


def vgg() -> nn.Sequential:
    """A plain chain, whose layers are called "0" to "12"."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 1, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, 1, 1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, 1, 1),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> Any:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Widen, convolve each channel, narrow; with a shortcut where the shape stays (torchvision)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.shortcut = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            _conv_norm(inputs, hidden, 1),
            _conv_norm(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)  # type: ignore[no-any-return]


class MobileNet(nn.Module):
    """After torchvision's MobileNetV2, with three blocks; the second and third keep the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv_norm(1, 4, 3),
            InvertedResidual(4, 6, 2, 2),
            InvertedResidual(6, 6, 1, 2),
            InvertedResidual(6, 6, 1, 2),
            _conv_norm(6, 12, 1),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(12, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))  # type: ignore[no-any-return]


def resnet(name: str = "resnet8", *, norm: str = "group", width: int = 4, seed: int = 0) -> Any:
    """One of the zoo's, narrow, for images of SHAPE; the same weights for the same seed."""
    torch.manual_seed(seed)
    return zoo.build(name, width=width, norm=norm, classes=CLASSES, channels=SHAPE[0])


def segment_at(network: Network, spec: str | int, *, upto: bool = False) -> Segment:
    """The segment of a network up to a cut, with its exit or all exits up to it."""
    cut = network.cut(spec)
    cuts = [c for c in network.cuts if network.position(c) <= network.position(cut)]
    chosen = cuts if upto else [cut]
    torch.manual_seed(99)
    return Segment(network, cut, {c.name: exit_for(c) for c in chosen})


def exit_for(cut: Cut) -> Exit:
    """A head on top of a cut."""
    channels, height, width = cut.shape
    return Exit((channels, height, width), CLASSES)


def random_images(count: int, seed: int = 0) -> Images:
    """Labelled noise."""
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 256, (count, *SHAPE), np.uint8)
    return Images(x, generator.integers(0, CLASSES, count).astype(np.uint8))


def network_input(images: Array) -> Tensor:
    """What a network sees of uint8 images."""
    return torch.as_tensor(images) * torch.tensor(SCALE)[0] + torch.tensor(SHIFT)[0]


def local_client(
    model: nn.Module,
    spec: str | int,
    settings: Settings,
    images: Images,
    *,
    capacity: int,
    upto: bool = False,
    name: str = "one",
    seed: int = 7,
    frozen: bool = False,
) -> LocalClient:
    """A started client with its own copy of the model."""
    segment = segment_at(Network(copy.deepcopy(model), SHAPE), spec, upto=upto)
    if frozen:
        freeze(segment)
    client = LocalClient(name, segment, settings, capacity=capacity, scale=SCALE, shift=SHIFT)
    weights = {n: t.detach().numpy().copy() for n, t in segment.tensors().items()}
    client.start(State(weights, {}, Place(len(images), seed)), images)
    return client


def server_for(model: nn.Module, specs: list[str | int], settings: Settings) -> Server:
    """A server with its own copy of the model, entered at those cuts."""
    network = Network(copy.deepcopy(model), SHAPE)
    return Server(Tail(network, [network.cut(s) for s in specs]), settings)


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Copies of tensors, by name."""
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def unequal(found: Mapping[str, Array], expected: Mapping[str, Array]) -> list[str]:
    """Names of the tensors that are missing, too many or not the same bit for bit."""
    return [
        name
        for name in sorted({*found, *expected})
        if name not in found
        or name not in expected
        or found[name].dtype != expected[name].dtype
        or not np.array_equal(found[name], expected[name])
    ]


def relative_errors(found: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, float]:
    """Largest error of every tensor; small tensors are measured against 1e-3 of the largest."""
    assert set(found) == set(expected)
    largest = max(float(np.abs(e).max()) for e in expected.values())
    return {
        name: float(np.abs(found[name] - e).max() / max(np.abs(e).max(), 1e-3 * largest))
        for name, e in expected.items()
    }


def far(
    found: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float = 1e-5
) -> dict[str, float]:
    """The tensors whose relative error is above the tolerance."""
    errors = relative_errors(found, expected)
    return {name: error for name, error in errors.items() if not error <= tolerance}
