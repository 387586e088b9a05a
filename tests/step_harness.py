"""What the tests of training steps share: networks with data, and the firmware that trains them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from splitee import zoo
from splitee.capture import capture
from splitee.client import LocalClient, Place, Settings, State
from splitee.data import Images
from splitee.exits import Exit
from splitee.model import Network, Segment
from splitee.place import Build
from splitee_exporters.c import to_c
from splitee_host import boards
from splitee_host.device import Device

SETTINGS = Settings(learning_rate=0.1, momentum=0.9, weight_decay=0.01)


@dataclass(frozen=True)
class Case:
    """A segment with its data: everything that both sides start from."""

    segment: Segment
    build: Build
    images: Images
    state: State


def pools() -> nn.Module:
    """Layers that resnets have not: biases, max and average pools, odd sizes."""
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, 2, 1),
        nn.GroupNorm(1, 5),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(5, 7, (3, 2), (1, 2), (0, 1)),
        nn.ReLU(),
        nn.AvgPool2d(2, 1, 1),
        nn.Conv2d(7, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def case(
    kind: str,
    *,
    width: int = 6,
    capacity: int = 8,
    samples: int = 24,
    momentum: bool = True,
    moves: bool = False,
) -> Case:
    """resnet8 up to layer2, or the network of pools up to its second stage, exits at every cut."""
    torch.manual_seed(7)
    if kind == "resnet8":
        shape, classes, depth = (1, 8, 8), 10, 3
        model: nn.Module = zoo.build("resnet8", width=width, norm="group", channels=1)
    else:
        shape, classes, depth = (2, 13, 11), 3, 2
        model = pools()
    network = Network(model, shape)
    cuts = network.cuts[:depth]
    segment = Segment(network, cuts[-1], {c.name: Exit(_image(c.shape), classes) for c in cuts})
    with torch.no_grad():  # norms that only scale by one and add zero would hide mistakes
        for tensor in segment.tensors().values():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
    channels = shape[0]
    build = Build(
        capture(segment, classes),
        capacity,
        momentum,
        samples,
        scale=(1 / 64,) * channels,
        shift=(-2.0,) * channels,
        moves=moves,
    )
    rng = np.random.default_rng(3)
    images = Images(
        rng.integers(0, 256, (samples, *shape), np.uint8),
        rng.integers(0, classes, samples, np.uint8),
    )
    weights = {n: t.detach().numpy().copy() for n, t in segment.tensors().items()}
    return Case(segment, build, images, State(weights, {}, Place(samples, seed=5)))


def case_on(board: str, kind: str) -> Case:
    """The case, or a narrower one where the board has too little memory for it."""
    the_case = case(kind)
    room = boards.load_boards()[board].for_assembly.room
    assert room is not None
    return the_case if the_case.build.shortage(room) is None else case(kind, width=4, capacity=6)


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, height, width


@contextmanager
def device(
    case: Case, board: str, folder: Path, settings: Settings, *, source: str | None = None
) -> Iterator[Device]:
    """The case's firmware, built and running on a board; source replaces the generated C."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "segment.c").write_text(source or to_c(case.build))
    known = boards.load_boards()[board]
    firmware = boards.build(known, folder, folder, sanitize=board == "posix")
    with boards.start(known, firmware) as running:
        device = Device(board, running.link, case.build, settings, close=running.close)
        device.start(case.state, case.images)
        yield device


def local(case: Case, settings: Settings) -> LocalClient:
    """The same client in torch."""
    b = case.build
    client = LocalClient(
        "local",
        copy.deepcopy(case.segment),
        settings,
        capacity=b.capacity,
        scale=b.scale,
        shift=b.shift,
    )
    client.start(case.state, case.images)
    return client
