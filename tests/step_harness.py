"""What the tests of training steps share: networks with data, and the firmware that trains them."""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

from splitee import zoo
from splitee.bottleneck import Bottleneck
from splitee.capture import capture
from splitee.client import LocalClient, Place, Settings, State
from splitee.data import Images
from splitee.exits import Exit
from splitee.model import Network, Segment
from splitee.norms import freeze
from splitee.ops import Array
from splitee.place import Build
from splitee.steps import NO_LEVERS, Levers
from splitee_exporters.c import to_c
from splitee_host import boards
from splitee_host.device import Device
from splitee_host.link import Link
from toolkit.mobilenet import MobileNetV2

FIRMWARE = boards.firmware_root()
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


def vgg() -> nn.Module:
    """A plain chain: convolutions with biases, one of them in groups, batch norms, max pools."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4, momentum=0.2),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.BatchNorm2d(6, eps=1e-3),
        nn.ReLU(),
        nn.MaxPool2d(2, 2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2, 2),
        nn.Flatten(),
        nn.Linear(8 * 3 * 2, 3),
    )


def windows() -> nn.Module:
    """Pools of windows that overlap, and a ReLU that belongs to no layer; no norms."""
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, 2, 1),
        nn.MaxPool2d(3, 1, 1),
        nn.ReLU(),
        nn.AvgPool2d(3, 1, 1),
        nn.Flatten(),
        nn.Linear(5 * 5 * 7, 3),
    )


def mobilenet() -> nn.Module:
    """MobileNetV2, narrow; some of what comes to a ReLU6 is above six."""
    model = MobileNetV2(0.125, 4, channels=3, classes=10)
    for module in model.modules():
        if isinstance(module, nn.Sequential) and isinstance(module[-1], nn.ReLU6):
            norm = module[1]
            assert isinstance(norm, nn.BatchNorm2d)
            nn.init.constant_(norm.weight, 2.0)
            nn.init.constant_(norm.bias, 2.0)
    return model


@dataclass(frozen=True)
class _Source:
    """A network whose first cuts make a segment."""

    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    classes: int
    depth: int  # cuts up to the segment's


def _source(kind: str, width: int | None) -> _Source:
    match kind:
        case "pools":
            return _Source(pools, (2, 13, 11), 3, 2)
        case "vgg":
            return _Source(vgg, (2, 13, 11), 3, 3)
        case "windows":
            return _Source(windows, (2, 9, 13), 3, 4)
        case "mobilenet":
            return _Source(mobilenet, (3, 11, 12), 10, 4)
    name, _, norm = kind.partition("-")
    usual, depth = {"resnet8": (6, 3), "resnet18": (4, 4), "resnet20": (4, 5)}[name]
    make = partial(zoo.build, name, width=width or usual, norm=norm or "group", channels=1)
    return _Source(make, (1, 8, 8), 10, depth)


def case(
    kind: str,
    *,
    width: int | None = None,
    capacity: int = 8,
    samples: int = 24,
    momentum: bool = True,
    moves: bool = False,
    distills: bool = False,
    levers: Levers = NO_LEVERS,
    bottleneck: Bottleneck | None = None,
) -> Case:
    """The first stages of a network, exits at every cut, and a bottleneck at the last if given.

    kind: resnet8, resnet18 or resnet20, with "-batch" behind it for batch norms; pools, vgg,
    windows or mobilenet. "-frozen" behind any of them freezes its batch norms.
    """
    torch.manual_seed(7)
    source = _source(kind.removesuffix("-frozen"), width)
    shape, classes = source.shape, source.classes
    network = Network(source.make(), shape)
    cuts = network.cuts[: source.depth]
    exits = {c.name: Exit(_image(c.shape), classes) for c in cuts}
    narrow = None
    if bottleneck is not None:
        narrow = bottleneck.narrow(cuts[-1].shape)
        exits[cuts[-1].name] = Exit(bottleneck.shape(cuts[-1].shape), classes)
    segment = Segment(network, cuts[-1], exits, narrow)
    if kind.endswith("-frozen"):
        freeze(segment)
    with torch.no_grad():  # norms that only scale by one and add zero would hide mistakes
        for name, tensor in segment.tensors().items():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
            if name.endswith("running_var"):
                tensor.abs_()
    channels = shape[0]
    build = Build(
        capture(segment, classes),
        capacity,
        momentum,
        samples,
        scale=(1 / 64,) * channels,
        shift=(-2.0,) * channels,
        moves=moves,
        distills=distills,
        levers=levers,
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


@cache
def _objects() -> Path:
    """A folder that lasts as long as the tests."""
    folder = Path(tempfile.mkdtemp(prefix="splitee-objects-"))
    atexit.register(shutil.rmtree, folder)
    return folder


@contextmanager
def device(
    case: Case,
    board: str,
    folder: Path,
    settings: Settings,
    *,
    source: str | None = None,
    through: Callable[[Link], Link] = lambda link: link,
) -> Iterator[Device]:
    """The case's firmware, built and running on a board.

    source replaces the generated C; through may put something between the host and the link.
    """
    with running(board, folder, source or to_c(case.build)) as on:
        device = Device(board, through(on.link), case.build, settings, close=on.close)
        device.start(case.state, case.images)
        yield device


@contextmanager
def running(board: str, folder: Path, source: str) -> Iterator[boards.Running]:
    """The firmware with that segment.c, built and running on a board."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "segment.c").write_text(source)
    known = boards.load_boards()[board]
    sanitize = board == "posix"
    # -O1: sanitizers make the compiler slow enough
    overrides = {"OPTIMIZE": "-O1"} if sanitize else {}
    # all but the segment is the same in every case: it is made once for each board, but for a
    # firmware with a fault planted
    kind = "int8" if "kernels/int8.h" in source else "float"
    objects = _objects() / f"{board}-{kind}" if boards.firmware_root() == FIRMWARE else folder
    for made in ("segment.o", "segment.d"):
        (objects / made).unlink(missing_ok=True)
    firmware = boards.build(known, folder, objects, sanitize=sanitize, overrides=overrides)
    if objects != folder:
        elf = Path(shutil.copy2(firmware.elf, folder / "device.elf"))
        firmware = replace(firmware, elf=elf)
    with boards.start(known, firmware) as on:
        yield on


@contextmanager
def planted(folder: Path, file: str, old: str, new: str) -> Iterator[None]:
    """Firmware is built with a fault in one of its files, from a copy of the sources.

    With the same folder, only that file is compiled again for the next fault.
    """
    root = folder / "sources"
    if not root.exists():
        shutil.copytree(boards.firmware_root(), root)
    text = (root / file).read_text()
    assert text.count(old) == 1, "the text to change is not there, or not alone"
    (root / file).write_text(text.replace(old, new))
    try:
        with mock.patch.object(boards, "firmware_root", return_value=root):
            yield
    finally:
        (root / file).write_text(text)


def norm_of_gradients(tensors: dict[str, Array]) -> float:
    """Of the gradients of all parameters together, among the tensors of a step."""
    found = [g for name, g in tensors.items() if name.startswith("gradient of ")]
    return float(np.linalg.norm(np.concatenate([g.ravel() for g in found]).astype(np.float64)))


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
