"""Images for exports: from a dataset, a file or a folder, resized to a network's input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from splitee import data, samples
from splitee.errors import SpliteeError


def test_the_digits_stay_as_they_are_where_they_fit() -> None:
    images = samples.load("digits", (1, 8, 8))
    assert np.array_equal(images.x, data.load("digits").train.x)


def test_the_digits_are_resized_as_pillow_does() -> None:
    images = samples.load("digits", (3, 20, 16))
    assert images.x.shape == (1437, 3, 20, 16)
    assert images.x.dtype == np.uint8
    assert np.array_equal(images.y, data.load("digits").train.y)
    whole = Image.fromarray(data.load("digits").train.x[5, 0]).convert("RGB")
    resized = np.asarray(whole.resize((16, 20), Image.Resampling.BILINEAR))
    assert np.array_equal(images.x[5], resized.transpose(2, 0, 1))


def test_an_npz_file_has_images_and_labels(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (5, 3, 6, 4), np.uint8)
    np.savez(tmp_path / "both.npz", x=x, y=np.arange(5))
    images = samples.load(str(tmp_path / "both.npz"), (3, 6, 4))
    assert np.array_equal(images.x, x)
    assert images.y.tolist() == [0, 1, 2, 3, 4]
    np.savez(tmp_path / "alone.npz", x=x)
    grey = samples.load(str(tmp_path / "alone.npz"), (1, 6, 4))
    assert grey.x.shape == (5, 1, 6, 4)
    assert grey.y.tolist() == [0] * 5


def test_a_folder_has_one_folder_for_each_class(tmp_path: Path) -> None:
    for name, value in (("cats", 10), ("dogs", 200)):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (9, 7), (value, i, 0)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    images = samples.load(str(tmp_path), (3, 7, 9))
    assert images.y.tolist() == [0, 0, 1, 1]
    assert images.x[:, :2, 3, 3].tolist() == [[10, 0], [10, 1], [200, 0], [200, 1]]


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    def refused(source: Path | str, message: str) -> None:
        with pytest.raises(SpliteeError, match=message):
            samples.load(str(source), (3, 8, 8))

    refused("mnist", r'^data "mnist" is unknown: take one of digits, a .npz file or a folder')
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", r"none: there are no images in it$")
    (tmp_path / "none" / "a.png").write_bytes(b"no image")
    refused(tmp_path / "none", r"a\.png: not an image that can be read")
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    refused(tmp_path / "bad.npz", r"bad\.npz: no .npz file with images x")
    np.savez(tmp_path / "floats.npz", x=np.zeros((2, 3, 8, 8)))
    refused(tmp_path / "floats.npz", r"x is float64 of \(2, 3, 8, 8\): give it uint8 images")
    np.savez(tmp_path / "odd.npz", x=np.zeros((2, 3, 8, 8), np.uint8), y=np.zeros(3))
    refused(tmp_path / "odd.npz", r"2 images x and 3 labels y: give each its own$")
