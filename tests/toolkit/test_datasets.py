"""Datasets by name, from files in their real formats, and what is wrong with those that fail."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

from splitee import data, datasets, vision
from splitee.data import Dataset, Images, constants
from splitee.errors import DataError, SpliteeError
from splitee.fleet import DataTable
from splitee.ops import Array

ARCHIVE = "SPLITEE_CIFAR10"  # where cifar10-jpeg.tar.xz is
CLASSES = ("ant", "bee", "cat")


def load(name: str, path: Path | None = None, **keys: Any) -> Dataset:
    """The dataset of a table with these keys."""
    return datasets.load(DataTable(name=name, path=None if path is None else str(path), **keys))


def rows(images: Images) -> list[tuple[int, bytes]]:
    """Labels and pixels, in an order of their own."""
    return sorted((int(y), x.tobytes()) for x, y in zip(images.x, images.y, strict=True))


def pixels(seed: int, height: int = 6, width: int = 5) -> Array:
    """A picture as Pillow has it: (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of three classes, 8 each to train on and 3 to test on, and what is no picture."""
    root = tmp_path / "pictures"
    for part, count in (("train", 8), ("test", 3)):
        for number, label in enumerate(CLASSES):
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                made = pixels(100 * number + i + 50 * (part == "test"))
                Image.fromarray(made).save(root / part / label / f"{i}.png")
    (root / "train" / "notes.txt").write_text("no picture")
    (root / "train" / "ant" / "._0.png").write_bytes(b"what macOS leaves in archives")
    (root / "README.png").write_bytes(b"in neither part")
    return root


def packed(folder: Path, name: str, prefix: str = "") -> Path:
    """An archive of a folder, its files in the opposite order."""
    archive = folder.parent / name
    mode: Any = f"w:{archive.suffix.removeprefix('.').replace('tar', '')}"
    with tarfile.open(archive, mode) as tar:
        for file in sorted(folder.rglob("*"), reverse=True):
            tar.add(file, prefix + file.relative_to(folder).as_posix(), recursive=False)
    return archive


# ---- a folder, or an archive of one ----


def test_a_folder_has_what_torchvisions_image_folder_reads(folder: Path) -> None:
    made = load("folder", folder)
    assert (made.name, made.classes, made.class_names) == ("pictures", 3, CLASSES)
    assert made.shape == (3, 6, 5)
    (folder / "train" / "ant" / "._0.png").unlink()  # which it takes for a picture
    for part, found in (("train", made.train), ("test", made.test)):
        expected = vision.part("datasets").ImageFolder(folder / part)
        assert expected.classes == list(CLASSES)
        assert rows(found) == sorted(
            (y, np.asarray(x).transpose(2, 0, 1).tobytes()) for x, y in expected
        )
        assert found.x.dtype == found.y.dtype == np.uint8
    assert (made.scale, made.shift) == constants(made.train)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("p.tar", ""), ("p.tar.gz", "./"), ("p.tar.xz", "pictures/"), ("p.tar.bz2", "a/b/")],
)
def test_an_archive_is_the_folder_to_the_bit(folder: Path, name: str, prefix: str) -> None:
    made, expected = load("folder", packed(folder, name, prefix)), load("folder", folder)
    for found, wanted in ((made.train, expected.train), (made.test, expected.test)):
        assert np.array_equal(found.x, wanted.x)
        assert np.array_equal(found.y, wanted.y)
    assert made.class_names == expected.class_names


def test_fewer_samples_are_the_first_of_all_and_of_every_class(folder: Path) -> None:
    whole, fewer = load("folder", folder), load("folder", folder, samples=9, test_samples=4)
    assert np.array_equal(fewer.train.x, whole.train.x[:9])
    assert np.array_equal(fewer.test.y, whole.test.y[:4])
    assert set(fewer.train.y.tolist()) == {0, 1, 2}
    assert whole.train.y.tolist() != sorted(whole.train.y.tolist())
    assert (fewer.scale, fewer.shift) == constants(fewer.train)


def test_grey_pictures_have_one_channel_and_three_where_others_have_colours(folder: Path) -> None:
    for file in folder.glob("t*/*/?.png"):
        with Image.open(file) as image:
            image.convert("L").save(file)
    grey = load("folder", folder)
    assert grey.shape == (1, 6, 5)
    Image.fromarray(pixels(1)).save(folder / "test" / "ant" / "9.png")
    mixed = load("folder", folder)
    assert mixed.shape == (3, 6, 5)
    assert (mixed.train.x == mixed.train.x[:, :1]).all()
    assert np.array_equal(mixed.train.x[:, :1], grey.train.x)


def test_size_brings_all_to_one_size_as_pillow_does(folder: Path) -> None:
    odd = Image.fromarray(pixels(7, height=9, width=12))
    odd.save(folder / "train" / "cat" / "odd.png")
    made = load("folder", folder, size=4)
    assert made.shape == (3, 4, 4)
    expected = np.asarray(odd.resize((4, 4), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert (2, expected.tobytes()) in rows(made.train)


def test_the_folders_of_clients_say_whose_images_are_whose(folder: Path) -> None:
    for name, classes in (("anna", "ant bee"), ("ben", "cat")):
        for label in classes.split():
            (folder / "train" / name).mkdir(exist_ok=True)
            (folder / "train" / label).rename(folder / "train" / name / label)
    for place in (folder, packed(folder, "owned.tar.gz")):
        made = load("folder", place, partition="folder", samples=20)
        assert made.owners is not None
        assert len(made.owners) == len(made.train) == 20
        assert [CLASSES[y] == "cat" for y in made.train.y] == [o == "ben" for o in made.owners]


def spoilt(folder: Path, how: str) -> None:
    """What is wrong with a folder."""
    train = folder / "train"
    match how:
        case "empty":
            (train / "dog").mkdir()
        case "deep":
            (train / "ant" / "more").mkdir()
            (train / "ant" / "0.png").rename(train / "ant" / "more" / "0.png")
        case "shallow":
            (train / "ant" / "0.png").rename(train / "0.png")
        case "no picture":
            (train / "bee" / "3.png").write_bytes(b"no picture")
        case "cut short":
            whole = (train / "bee" / "3.png").read_bytes()
            (train / "bee" / "3.png").write_bytes(whole[: len(whole) // 2])
        case "sizes":
            Image.fromarray(pixels(0, 7, 9)).save(train / "cat" / "1.png")
        case "strange":
            (folder / "test" / "dog").mkdir()
            Image.fromarray(pixels(0)).save(folder / "test" / "dog" / "0.png")
        case "untested":
            (folder / "test" / "ant").rename(folder / "ant")
        case "neither":
            train.rename(folder / "training")
        case "many":
            for i in range(257):
                for part in ("train", "test"):
                    (folder / part / f"c{i}").mkdir()
                    (folder / part / f"c{i}" / "0.png").write_bytes(b"never read")


FAULTS = {
    "empty": r"train/dog: there are no images in it: add some, or remove it$",
    "deep": r"train/ant/more/0\.png does not lie as train/<class>/<picture>: say partition = "
    '"folder"$',
    "shallow": r"train/0\.png does not lie as train/<class>/<picture>: move it$",
    "no picture": r"train/bee/3\.png: not an image that can be read",
    "cut short": r"train/bee/3\.png: not an image that can be read",
    "sizes": r"(cat/1\.png has 9x7 pixels, .* 5x6|5x6 pixels, .*cat/1\.png has 9x7) pixels: say "
    "size = ",
    "strange": r'train has no images of "dog": add some, or leave the class out on both sides$',
    "untested": r'test has no images of "ant"',
    "neither": r"there are no images that lie as train/<class>/<picture>$",
    "many": r"260 classes: a label is a byte, so take at most 256$",
}


@pytest.mark.parametrize("how", FAULTS)
@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_what_is_wrong_with_files_is_named(folder: Path, how: str, kind: str) -> None:
    spoilt(folder, how)
    place = folder if kind == "folder" else packed(folder, "p.tar.gz")
    with pytest.raises(DataError, match=f"{place.name}: .*{FAULTS[how]}" if how not in (
        "no picture", "cut short", "sizes") else FAULTS[how]):  # fmt: skip
        load("folder", place)


def test_a_path_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'^data "folder": say where it lies: path = "..." in '):
        load("folder")
    with pytest.raises(DataError, match=r"gone: no such folder or archive: is the path right\?$"):
        load("folder", tmp_path / "gone")
    (tmp_path / "notes").write_text("no archive")
    with pytest.raises(DataError, match="notes: neither a folder nor a whole tar archive"):
        load("folder", tmp_path / "notes")
    with pytest.raises(DataError, match=r'^data "digits": it has no path, and no download: leave'):
        load("digits", tmp_path)


@pytest.mark.parametrize("name", ["p.tar.gz", "p.tar.xz", "p.tar.bz2"])
def test_an_archive_that_was_cut_short_is_not_taken(folder: Path, name: str) -> None:
    archive = packed(folder, name)
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(DataError, match=f"{name}: neither a folder nor a whole tar archive: "):
        load("folder", archive)


def test_links_are_what_they_lead_to(folder: Path) -> None:
    expected = load("folder", folder)
    moved = folder.parent / "elsewhere"
    (folder / "train" / "ant").rename(moved)
    (folder / "train" / "ant").symlink_to(moved, target_is_directory=True)
    (folder / "test" / "bee" / "0.png").unlink()
    kept = folder / "kept.png"
    (folder / "test" / "bee" / "1.png").rename(kept)
    for name in ("0.png", "1.png"):
        (folder / "test" / "bee" / name).hardlink_to(kept)
    assert rows(load("folder", folder).train) == rows(expected.train)
    (folder / "train" / "ant").unlink()
    moved.rename(folder / "train" / "ant")
    there, archived = load("folder", folder), load("folder", packed(folder, "p.tar"))
    assert rows(there.test) == rows(archived.test)
    assert len(there.test) == len(expected.test)


@pytest.mark.skipif(ARCHIVE not in os.environ, reason=f"{ARCHIVE} does not say where it is")
def test_the_archive_of_cifar10_is_read_as_its_folder_would_be(tmp_path: Path) -> None:
    archive = Path(os.environ[ARCHIVE])
    made = load("folder", archive, samples=1500, test_samples=300)
    assert made.shape == (3, 32, 32)
    assert made.class_names[:3] == ("airplane", "automobile", "bird")
    counts = np.bincount(made.train.y, minlength=10)
    assert counts.min() > 100  # of 150; the standard deviation is 12
    assert counts.max() < 200
    found = {
        x.tobytes(): made.class_names[y] for x, y in zip(*vars(made.train).values(), strict=True)
    }
    seen: Counter[str] = Counter()
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.startswith("train/cat/") and member.isfile():
                file = tar.extractfile(member)
                assert file is not None
                picture = np.asarray(Image.open(io.BytesIO(file.read()))).transpose(2, 0, 1)
                seen[found.get(picture.tobytes(), "not drawn")] += 1
            elif seen:
                break
    assert seen == {"cat": counts[3], "not drawn": 5000 - counts[3]}


# ---- torchvision's ----


def pickled(folder: Path, name: str, content: dict[str, Any]) -> tuple[str, str]:
    """A pickle in the protocol of Python 2. Returns its name and checksum."""
    return binary(folder, name, pickle.dumps(content, protocol=2))


def binary(folder: Path, name: str, content: bytes) -> tuple[str, str]:
    """A file of bare bytes. Returns its name and checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return name, hashlib.md5(content).hexdigest()


Known = dict[str, Any]  # what torchvision's class knows of its files


def cifar10(root: Path, train: Images, test: Images) -> Known:
    """The files of cifar-10-python.tar.gz, with these images in two batches and a test batch."""
    folder, half = root / "cifar-10-batches-py", len(train) // 2

    def batch(name: str, images: Images) -> tuple[str, str]:
        content = {"batch_label": name, "labels": images.y.tolist(),
                   "data": images.x.reshape(len(images), 3072), "filenames": []}  # fmt: skip
        return pickled(folder, name, content)

    names = [f"class {i}" for i in range(10)]
    meta = pickled(folder, "batches.meta", {"label_names": names, "num_vis": 3072})
    return {
        "train_list": [batch("data_batch_1", train[:half]), batch("data_batch_2", train[half:])],
        "test_list": [batch("test_batch", test)],
        "meta": {"filename": meta[0], "key": "label_names", "md5": meta[1]},
    }


def cifar100(root: Path, train: Images, test: Images) -> Known:
    """The files of cifar-100-python.tar.gz, with these images."""
    folder = root / "cifar-100-python"

    def batch(name: str, images: Images) -> tuple[str, str]:
        content = {"fine_labels": images.y.tolist(), "coarse_labels": [0] * len(images),
                   "data": images.x.reshape(len(images), 3072), "filenames": []}  # fmt: skip
        return pickled(folder, name, content)

    names = [f"class {i}" for i in range(100)]
    meta = pickled(folder, "meta", {"fine_label_names": names, "coarse_label_names": []})
    return {
        "train_list": [batch("train", train)],
        "test_list": [batch("test", test)],
        "meta": {"filename": meta[0], "key": "fine_label_names", "md5": meta[1]},
    }


def stl10(root: Path, train: Images, test: Images) -> Known:
    """The files of stl10_binary.tar.gz: images column by column, classes counted from 1."""
    folder = root / "stl10_binary"

    def part(name: str, images: Images) -> list[tuple[str, str]]:
        return [
            binary(folder, f"{name}_X.bin", images.x.transpose(0, 1, 3, 2).tobytes()),
            binary(folder, f"{name}_y.bin", (images.y + 1).tobytes()),
        ]

    unlabelled = binary(folder, "unlabeled_X.bin", train.x[:1].tobytes())
    (folder / "class_names.txt").write_text("".join(f"class {i}\n" for i in range(10)))
    return {
        "train_list": [*part("train", train), unlabelled],
        "test_list": part("test", test),
    }


FORMATS: dict[str, tuple[Callable[[Path, Images, Images], Known], str, int, int]] = {
    "cifar10": (cifar10, "CIFAR10", 32, 10),
    "cifar100": (cifar100, "CIFAR100", 32, 100),
    "stl10": (stl10, "STL10", 96, 10),
}


def written(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Images, Images, Known]:
    """A small dataset in its real format, sorted by class; torchvision knows its checksums."""
    write, kind, side, classes = FORMATS[name]
    random = np.random.default_rng(0)
    train, test = (
        Images(
            random.integers(0, 256, (count, 3, side, side), np.uint8),
            np.sort(random.integers(0, classes, count)).astype(np.uint8),
        )
        for count in (40, 12)
    )
    known = write(root, train, test)
    for key, value in known.items():
        monkeypatch.setattr(getattr(vision.part("datasets"), kind), key, value)
    return train, test, known


@pytest.mark.parametrize("name", FORMATS)
def test_torchvisions_files_are_read_to_the_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test, _ = written(name, tmp_path, monkeypatch)
    _, _, side, classes = FORMATS[name]
    made = load(name, tmp_path)
    assert (made.name, made.classes, made.shape) == (name, classes, (3, side, side))
    assert made.class_names == tuple(f"class {i}" for i in range(classes))
    for found, expected in ((made.train, train), (made.test, test)):
        assert rows(found) == rows(expected)
        assert found.x.dtype == found.y.dtype == np.uint8
        assert found.y.tolist() != expected.y.tolist()  # which is sorted
    assert np.array_equal(load(name, tmp_path, samples=7).train.x, made.train.x[:7])
    assert load(name, tmp_path, size=8, samples=7).shape == (3, 8, 8)


@pytest.mark.parametrize("name", FORMATS)
def test_files_that_are_missing_or_damaged_are_not_taken(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = datasets.TORCHVISION[name][1]
    message = (
        rf'{{}}: no whole "{name}" \({folder}\) is there: put {folder} there, name the folder that '
        "has it, or say download = true$"
    )
    with pytest.raises(DataError, match=message.format("gone")):
        load(name, tmp_path / "gone")
    _, _, known = written(name, tmp_path, monkeypatch)
    file = tmp_path / folder / known["test_list"][0][0]
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(DataError, match=message.format(re.escape(str(tmp_path)))):
        load(name, tmp_path)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def offered(folder: Path) -> Iterator[str]:
    """A folder on the web: its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder)) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_what_is_not_there_is_downloaded_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, _, _ = written("cifar10", tmp_path / "web", monkeypatch)
    archive = tmp_path / "web" / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "web" / "cifar-10-batches-py", "cifar-10-batches-py")
    kind = vision.part("datasets").CIFAR10
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    with offered(archive.parent) as address:
        monkeypatch.setattr(kind, "url", f"{address}/{archive.name}")
        made = load("cifar10", tmp_path / "new" / "data", download=True)
    assert rows(made.train) == rows(train)
    again = load("cifar10", tmp_path / "new" / "data", download=True)  # nobody is asked
    assert rows(again.train) == rows(train)
    with pytest.raises(DataError, match=r'no whole "cifar10" .* is there: download failed: '):
        load("cifar10", tmp_path / "other", download=True)


# ---- a user's module ----


def module(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, returned: str) -> str:
    """A module with a function that returns something; in the folder at hand."""
    (folder / f"{name}.py").write_text(
        f"import numpy as np\nx = np.arange(48, dtype=np.uint8).reshape(6, 1, 2, 4)\n"
        f"def make():\n    return {returned}\n"
    )
    monkeypatch.chdir(folder)
    return f"{name}:make"


def test_a_users_function_gives_images_and_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module(
        monkeypatch, tmp_path, "good", "(x, [0, 1, 2, 0, 1, 2]), (x[:2], np.ones(2, int))"
    )
    made = load(name)
    assert (made.name, made.classes, made.shape, made.class_names) == (name, 3, (1, 2, 4), ())
    x = np.arange(48, dtype=np.uint8).reshape(6, 1, 2, 4)
    assert rows(made.train) == rows(Images(x, np.array([0, 1, 2] * 2, np.uint8)))
    assert rows(made.test) == rows(Images(x[:2], np.ones(2, np.uint8)))
    assert len(load(name, samples=4).train) == 4


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("x / 255, x", r"cannot be made: ValueError: .* returns \(x, y\), \(test_x, test_y\)$"),
        ("(x / 255, np.ones(6)), (x, np.ones(6))", r"x is float64 of \(6, 1, 2, 4\): return uint8"),
        ("(x, [0] * 6), (x[0], [0])", r"test_x is uint8 of \(1, 2, 4\): return uint8 images"),
        ("(x, [0] * 5), (x, [0] * 6)", r"x has 6 images and labels of \(5,\): give each its own$"),
        ("(x, [0.5] * 6), (x, [0] * 6)", "x has labels that are no integers from 0 to 255"),
        ("(x, [256] * 6), (x, [0] * 6)", "x has labels that are no integers from 0 to 255"),
        ("(x, [0] * 6), (x[..., :2], [0] * 6)", r"images of \(1, 2, 4\) to train .* \(1, 2, 2\)"),
    ],
)
def test_what_a_users_function_may_not_return_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returned: str, message: str,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    number = request.node.callspec.indices["returned"]
    name = module(monkeypatch, tmp_path, f"bad{number}", returned)
    with pytest.raises(DataError, match=rf'^data "{name}".*{message}'):
        load(name)


def test_a_module_that_does_not_exist_is_named() -> None:
    with pytest.raises(DataError, match=r'^data "no_such_module:f" cannot be made: ModuleNotFound'):
        load("no_such_module:f")


# ---- all ----


def test_the_digits_are_whole_unless_fewer_are_asked_for() -> None:
    made, digits = load("digits"), data.load("digits")
    assert np.array_equal(made.train.x, digits.train.x)
    assert (made.scale, made.shift) == (digits.scale, digits.shift)
    fewer = load("digits", samples=100, test_samples=50)
    assert np.array_equal(fewer.train.x, digits.train.x[:100])
    assert np.array_equal(fewer.test.y, digits.test.y[:50])
    assert load("digits", size=16).shape == (1, 16, 16)


def test_a_dataset_that_does_not_exist_lists_those_there_are() -> None:
    message = (
        'data "mnist" is unknown: take one of digits, cifar10, cifar100, stl10, folder or '
        '"<module>:<function>"'
    )
    with pytest.raises(SpliteeError, match=f"^{re.escape(message)}$"):
        load("mnist")


def test_folders_of_clients_are_those_of_a_folder() -> None:
    with pytest.raises(DataError, match=r'^partition = "folder": .* and "digits" has none'):
        load("digits", partition="folder")
