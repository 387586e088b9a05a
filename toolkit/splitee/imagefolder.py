"""Datasets that are files: one folder for each class, on disk or in a tar archive.

``train/<class>/<picture>`` and ``test/<class>/<picture>``, as torchvision's ImageFolder has each of
the two; or, where the folders say whose the pictures are, ``train/<client>/<class>/<picture>``.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from splitee import pixels
from splitee.data import Images, draw_order
from splitee.errors import DataError
from splitee.ops import Array

PARTS = ("train", "test")
ORDER = 1797  # the seed of the order in which images lie


class _Files(Protocol):
    """Files and folders by their names within a dataset, with slashes."""

    files: list[str]
    folders: list[str]

    def opened(self, chosen: Sequence[int]) -> Iterator[tuple[int, IO[bytes] | Path]]:
        """Each of the chosen files once, in any order."""


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.files: list[str] = []
        self.folders: list[str] = []
        for place, folders, files in os.walk(path, followlinks=True):
            within = Path(place).relative_to(path)
            self.folders += [(within / name).as_posix() for name in folders]
            self.files += [(within / name).as_posix() for name in files]

    def opened(self, chosen: Sequence[int]) -> Iterator[tuple[int, Path]]:
        for i in chosen:
            yield i, self._path / self.files[i]


class _Archive:
    """A tar file; what is compressed can only be read from front to back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._open() as tar:
            found = tar.getmembers()
        self._members = [m for m in found if m.isfile() or m.islnk() or m.issym()]
        self.files = [m.name.removeprefix("./") for m in self._members]
        self.folders = [m.name.removeprefix("./") for m in found if m.isdir()]

    @contextmanager
    def _open(self) -> Iterator[tarfile.TarFile]:
        try:
            with tarfile.open(self._path) as tar:
                yield tar
        except (OSError, EOFError, KeyError, tarfile.TarError, LZMAError, zlib.error) as error:
            raise DataError(
                f"{self._path}: neither a folder nor a whole tar archive: {error}"
            ) from error

    def opened(self, chosen: Sequence[int]) -> Iterator[tuple[int, IO[bytes]]]:
        with self._open() as tar:
            for i in sorted(chosen, key=lambda i: self._members[i].offset):
                file = tar.extractfile(self._members[i])
                if file is not None:  # not so of a link that leads to a folder
                    yield i, file


@dataclass(frozen=True)
class _Picture:
    """One file, and what its place says of it."""

    number: int  # among all files
    owner: str  # "" where the folders do not say
    label: str


@dataclass(frozen=True)
class Album:
    """Both parts of a dataset of files."""

    train: Images
    test: Images
    class_names: tuple[str, ...]
    owners: Array | None  # of each training image: the name of the client's folder


def read(
    path: Path,
    *,
    owned: bool = False,
    size: int | None = None,
    train: int | None = None,
    test: int | None = None,
) -> Album:
    """The dataset in a folder or a tar archive, in an order drawn once and for all.

    owned: the folders in train are the clients', and have one for each class. size: pixels that
    height and width are brought to. train, test: how many images of each part; None: all. Classes
    are numbered in the order of their names. Raises DataError, naming the file or folder.
    """
    if not path.exists():
        raise DataError(f"{path}: no such folder or archive: is the path right?")
    files: _Files = _Folder(path) if path.is_dir() else _Archive(path)
    parts = [_listed(path, files, part, owned=owned and part == "train") for part in PARTS]
    names = [sorted({picture.label for picture in part}) for part in parts]
    for part, missing in (("train", set(names[1]) - set(names[0])),
                          ("test", set(names[0]) - set(names[1]))):  # fmt: skip
        if missing:
            raise DataError(
                f"{path}: {part} has no images of {_some(sorted(missing))}: add some, or leave the "
                "class out on both sides"
            )
    classes = {name: number for number, name in enumerate(names[0])}
    if len(classes) > 256:
        raise DataError(f"{path}: {len(classes)} classes: a label is a byte, so take at most 256")
    drawn = [
        [part[i] for i in draw_order(len(part), ORDER, 0)[:count]]
        for part, count in zip(parts, (train, test), strict=True)
    ]
    x = _pictures(files, [p.number for part in drawn for p in part], size)
    y = np.array([classes[p.label] for part in drawn for p in part], np.uint8)
    both, first = Images(x, y), len(drawn[0])
    owners = np.array([p.owner for p in drawn[0]]) if owned else None
    return Album(both[:first], both[first:], tuple(classes), owners)


def _listed(path: Path, files: _Files, part: str, *, owned: bool) -> list[_Picture]:
    """The pictures of a part; every folder of a class has one."""
    layout = f"{part}/{'<client>/' if owned else ''}<class>/<picture>"
    depth = layout.count("/") + 1
    known = pixels.suffixes()
    found: dict[tuple[str, ...], _Picture] = {}
    filled = set()
    for number, name in enumerate(files.files):
        place = _within(name, part)
        if place is None or f".{name.rpartition('.')[2]}".lower() not in known:
            continue
        if len(place) != depth:
            cure = (
                'say partition = "folder"' if len(place) == depth + 1 and not owned else "move it"
            )
            raise DataError(f"{path}: {name} does not lie as {layout}: {cure}")
        found[place] = _Picture(number, place[1] if owned else "", place[-2])
        filled.add(place[:-1])
    if not found:
        raise DataError(f"{path}: there are no images that lie as {layout}")
    for name in files.folders:
        place = _within(name, part)
        if place is not None and len(place) == depth - 1 and place not in filled:
            raise DataError(f"{path}: {name}: there are no images in it: add some, or remove it")
    return [picture for _, picture in sorted(found.items())]


def _within(name: str, part: str) -> tuple[str, ...] | None:
    """A name from the part's folder on; None where it lies elsewhere, or is hidden."""
    place = name.split("/")
    start = next((i for i, folder in enumerate(place) if folder in PARTS), None)
    if start is None or place[start] != part or any(p.startswith(".") for p in place):
        return None
    return tuple(place[start:])


def _pictures(files: _Files, chosen: list[int], size: int | None) -> Array:
    """The chosen files as uint8 (samples, channels, height, width): grey where all of them are."""
    found: dict[int, Array] = {}
    for number, file in files.opened(chosen):
        x = pixels.read(file, files.files[number])
        found[number] = pixels.resized(x, (len(x), size, size)) if size else x
        first = next(iter(found))
        if found[number].shape[1:] != found[first].shape[1:]:
            one, other = (
                f"{files.files[i]} has {found[i].shape[2]}x{found[i].shape[1]} pixels"
                for i in (number, first)
            )
            raise DataError(f"{one}, {other}: say size = ... in [data], to bring all to one size")
    channels = max(len(x) for x in found.values())
    shape = (len(chosen), channels, *found[chosen[0]].shape[1:])
    images = np.empty(shape, np.uint8)
    for place, number in enumerate(chosen):
        images[place] = found.pop(number)  # one channel becomes three alike
    return images


def _some(names: list[str]) -> str:
    """Names, not more than can be read."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f'"{name}"' for name in names[:5]) + more
