"""Data: what a dataset is, the bundled digits, and the order in which a client uses its samples."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from splitee.errors import SpliteeError
from splitee.ops import Array
from splitee.state import Place

DATASETS = ("digits",)


@dataclass(frozen=True)
class Images:
    """Labelled images as they travel and lie on clients: bytes."""

    x: Array  # uint8, (samples, channels, height, width)
    y: Array  # uint8, (samples,)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, places: Array | slice) -> Images:
        return Images(self.x[places], self.y[places])


@dataclass(frozen=True)
class Dataset:
    """Training and test images, and what makes network input of their bytes."""

    name: str
    train: Images
    test: Images
    classes: int
    scale: tuple[float, ...]  # per channel: input = byte * scale + shift
    shift: tuple[float, ...]
    class_names: tuple[str, ...] = ()  # by number; empty where they have none
    owners: Array | None = None  # of each training image: its client's name, where files say so

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train.x.shape[1:]
        return channels, height, width


def load(name: str) -> Dataset:
    """The dataset of that name. Raises SpliteeError when there is none."""
    if name == "digits":
        return _digits()
    raise SpliteeError(f'data "{name}" is unknown: take one of {", ".join(DATASETS)}')


def _digits() -> Dataset:
    """scikit-learn's copy of the UCI test set of handwritten digits (Alpaydin and Kaynak, 1998).

    1,797 images of 8 x 8; the split is fixed: 1,437 to train on, 360 to test on.
    """
    from sklearn.datasets import load_digits  # takes half a second to import

    digits = load_digits()
    x = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    images = Images(x, digits.target.astype(np.uint8))
    order = draw_order(len(images), seed=1797, epoch=0)
    train, test = images[order[:1437]], images[order[1437:]]
    names = tuple(str(digit) for digit in range(10))
    return Dataset("digits", train, test, 10, *constants(train), names)


def constants(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift per channel that give these images zero mean and unit variance.

    A channel that has one value everywhere becomes 0.
    """
    bytes_, channels = np.arange(256), range(images.x.shape[1])
    counts = np.zeros((len(channels), 256), np.int64)
    for start in range(0, len(images), 1000):  # counting takes 8 bytes for each of theirs
        part = images.x[start : start + 1000]
        counts += [np.bincount(part[:, c].ravel(), minlength=256) for c in channels]
    total = counts.sum(1)
    mean = counts @ bytes_ / total
    deviation = np.sqrt((counts * (bytes_ - mean[:, None]) ** 2).sum(1) / total)
    deviation[deviation == 0] = 1
    # float32 values: what a device computes with is what a manifest says
    scale, shift = (1 / deviation).astype(np.float32), (-mean / deviation).astype(np.float32)
    return tuple(scale.tolist()), tuple(shift.tolist())


class Shard:
    """A client's own images, and its way through them: epoch by epoch, each in its own order."""

    def __init__(self) -> None:
        self.images = Images(np.zeros((0,)), np.zeros((0,)))
        self._place = Place(0, 0)
        self._order: Array = np.zeros(0, np.int64)

    @property
    def place(self) -> Place:
        """Where the client stands."""
        return self._place

    @place.setter
    def place(self, place: Place) -> None:
        drawn, wanted = ((p.samples, p.seed, p.epoch) for p in (self._place, place))
        if drawn != wanted:
            self._order = draw_order(*wanted)
        self._place = place

    def upcoming(self, count: int) -> Images:
        """The next count samples; a new epoch begins where one has ended."""
        p = self._place
        if p.position == p.samples:
            self.place = replace(p, epoch=p.epoch + 1, position=0)
        start = self._place.position
        return self.images[self._order[start : start + count]]

    def take(self, count: int) -> Images:
        """The same samples, which are then used."""
        part = self.upcoming(count)
        self.place = replace(self._place, position=self._place.position + len(part))
        return part


def _mix(x: int) -> int:
    """The finaliser of MurmurHash3."""
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def draw_order(size: int, seed: int, epoch: int) -> Array:
    """The permutation of 0..size-1 in which a client uses its samples in an epoch.

    Fisher-Yates over Marsaglia's 32-bit xorshift. ``firmware/core/order.c`` draws the same; a test
    holds one to the other.
    """
    state = _mix(seed ^ _mix(epoch + 1 & 0xFFFFFFFF)) or 1
    order = list(range(size))
    for i in range(size, 1, -1):
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        state ^= state << 5 & 0xFFFFFFFF
        j = state * i >> 32
        order[i - 1], order[j] = order[j], order[i - 1]
    return np.array(order, np.int64)
