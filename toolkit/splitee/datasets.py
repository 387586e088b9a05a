"""Datasets by name: the digits, torchvision's, a folder of images, and those of a user's module.

All lie in an order that is drawn once and for all, so that the first of them are a fair sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from splitee import data, imagefolder, own, pixels, vision
from splitee.data import Dataset, Images, constants, draw_order
from splitee.errors import DataError
from splitee.fleet import DataTable
from splitee.ops import Array

# torchvision's class, and the folder that it looks for
TORCHVISION = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "stl10": ("STL10", "stl10_binary"),
}
NAMES = ("digits", *TORCHVISION, "folder")


def load(table: DataTable) -> Dataset:
    """The dataset of a fleet file's table, no larger than the table says.

    Raises DataError where it is not there, or cannot be used; MissingTool without torchvision.
    """
    module, _, function = table.name.partition(":")
    if table.name == "folder":
        return _of_folder(table)
    if table.name not in TORCHVISION and (table.path or table.download):
        raise DataError(
            f'data "{table.name}": it has no path, and no download: leave them out, or take another'
        )
    if table.partition == "folder":
        raise DataError(
            f'partition = "folder": the folders of name = "folder" say whose images are whose, and '
            f'"{table.name}" has none: take another'
        )
    if table.name == "digits":
        digits = data.load("digits")
        return _fitted(table, digits.train, digits.test, digits.class_names)
    if table.name in TORCHVISION:
        train, test, names = _of_torchvision(table)
    elif module and function:
        train, test, names = *_own(module, function), ()
    else:
        raise DataError(
            f'data "{table.name}" is unknown: take one of {", ".join(NAMES)} or '
            '"<module>:<function>"'
        )
    return _fitted(table, _shuffled(train), _shuffled(test), names)


def _path(table: DataTable) -> Path:
    if table.path is None:
        raise DataError(f'data "{table.name}": say where it lies: path = "..." in [data]')
    return Path(table.path).expanduser()


def _of_folder(table: DataTable) -> Dataset:
    album = imagefolder.read(
        _path(table),
        owned=table.partition == "folder",
        size=table.size,
        train=table.samples,
        test=table.test_samples,
    )
    made = _fitted(table, album.train, album.test, album.class_names)
    return replace(made, name=_path(table).name, owners=album.owners)


def _of_torchvision(table: DataTable) -> tuple[Images, Images, tuple[str, ...]]:
    kind, folder = TORCHVISION[table.name]
    make = getattr(vision.part("datasets"), kind)
    path = _path(table)
    stl = table.name == "stl10"
    try:
        if table.download:
            path.mkdir(parents=True, exist_ok=True)
        parts = [
            make(path, **({"split": part} if stl else {"train": part == "train"}),
                 download=table.download)
            for part in ("train", "test")
        ]  # fmt: skip
    except (OSError, RuntimeError) as error:  # a failed download is either
        cure = (
            f"download failed: {error}"
            if table.download
            else f"put {folder} there, name the folder that has it, or say download = true"
        )
        raise DataError(f'{path}: no whole "{table.name}" ({folder}) is there: {cure}') from error
    train, test = (
        Images(
            np.ascontiguousarray(p.data if stl else p.data.transpose(0, 3, 1, 2)),
            np.array(p.labels if stl else p.targets, np.uint8),
        )
        for p in parts
    )
    return train, test, tuple(getattr(parts[0], "classes", ()))


def _own(module: str, function: str) -> tuple[Images, Images]:
    """What a user's function returns: (x, y) to train on, and (x, y) to test on."""
    name = f'data "{module}:{function}"'
    try:
        with own.folder_at_hand():  # what it imports as it runs, too
            made = own.load(f"{module}:{function}")()
        (x, y), (test_x, test_y) = made
    except Exception as error:  # whatever a user's module raises
        raise DataError(
            f"{name} cannot be made: {type(error).__name__}: {error}; it takes nothing and returns "
            "(x, y), (test_x, test_y)"
        ) from error
    train, test = _checked(f"{name}: x", x, y), _checked(f"{name}: test_x", test_x, test_y)
    if train.x.shape[1:] != test.x.shape[1:]:
        raise DataError(
            f"{name}: images of {train.x.shape[1:]} to train on, and of {test.x.shape[1:]} to test "
            "on: make them alike"
        )
    return train, test


def _checked(what: str, x: Any, y: Any) -> Images:
    images, labels = np.asarray(x), np.asarray(y)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in pixels.MODES:
        raise DataError(
            f"{what} is {images.dtype} of {images.shape}: return uint8 images, (samples, 1 or 3 "
            "channels, height, width)"
        )
    if labels.shape != (len(images),) or len(labels) == 0:
        raise DataError(
            f"{what} has {len(images)} images and labels of {labels.shape}: give each its own"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 255:
        raise DataError(f"{what} has labels that are no integers from 0 to 255: number the classes")
    return Images(images, labels.astype(np.uint8))


def _shuffled(images: Images) -> Images:
    return images[draw_order(len(images), imagefolder.ORDER, 0)]


def _fitted(table: DataTable, train: Images, test: Images, names: Sequence[str]) -> Dataset:
    """As many images as the table says, of the size that it says."""
    classes = len(names) or 1 + int(max(train.y.max(), test.y.max()))
    train, test = (
        Images(_sized(part.x, table.size), part.y)
        for part in (train[: table.samples], test[: table.test_samples])
    )
    return Dataset(table.name, train, test, classes, *constants(train), tuple(names))


def _sized(x: Array, size: int | None) -> Array:
    if size is None or x.shape[2:] == (size, size):
        return x
    return np.stack([pixels.resized(image, (x.shape[1], size, size)) for image in x])
