"""What changes training images: as torchvision would, anew in every epoch, and ever the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitee import vision
from splitee.augment import augmented
from splitee.ops import Array
from splitee.state import Place

transforms = vision.part("transforms.functional")
START = Place(1000, seed=7)


def images(count: int, channels: int = 3, height: int = 10, width: int = 8) -> Array:
    """Random images, no two windows of which are alike."""
    shape = (count, channels, height, width)
    return np.random.default_rng(count).integers(1, 256, shape, np.uint8)


def cropped(image: Array) -> dict[tuple[int, int], bytes]:
    """What torchvision cuts from an image that is padded with 4 pixels, at each place."""
    padded = transforms.pad(torch.from_numpy(image), 4)
    return {
        (down, right): transforms.crop(padded, down, right, *image.shape[1:]).numpy().tobytes()
        for down in range(9)
        for right in range(9)
    }


def test_crop_cuts_what_torchvision_cuts_and_every_place_about_as_often() -> None:
    x = images(1)
    place_of = {pixels: place for place, pixels in cropped(x[0]).items()}
    many = augmented(x.repeat(8100, 0), ["crop"], START)
    assert many.shape == (8100, *x.shape[1:])
    assert many.dtype == np.uint8
    counts = np.zeros((9, 9), int)
    for image in many:
        counts[place_of[image.tobytes()]] += 1
    # 100 each; the standard deviation is 9.9
    assert counts.min() > 60
    assert counts.max() < 140


def test_flip_mirrors_about_every_other_image_as_torchvision_does() -> None:
    x = images(1000)
    mirrored = transforms.hflip(torch.from_numpy(x)).numpy()
    flipped = augmented(x, ["flip"], START)
    is_mirrored = (flipped == mirrored).all((1, 2, 3))
    assert (is_mirrored | (flipped == x).all((1, 2, 3))).all()
    assert 420 < is_mirrored.sum() < 580  # five standard deviations


def test_crop_and_flip_are_drawn_apart() -> None:
    x = images(1).repeat(2000, 0)
    down = [bool(image[0, 0].any()) for image in augmented(x, ["crop"], START)]
    both = augmented(x, ["crop", "flip"], START)
    unflipped = (both == augmented(x, ["crop"], START)).all((1, 2, 3))
    assert abs(np.corrcoef(down, unflipped)[0, 1]) < 0.12  # five standard deviations


@given(st.integers(0, 60), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1),
       st.lists(st.integers(1, 40), min_size=1, max_size=4))  # fmt: skip
def test_a_sample_is_changed_alike_however_its_batch_is_cut(
    first: int, seed: int, epoch: int, parts: list[int]
) -> None:
    x, names = images(sum(parts)), ["crop", "flip"]
    start = Place(200, seed, epoch, first)
    whole = augmented(x, names, start)
    for count in parts:
        assert np.array_equal(augmented(x[:count], names, start), whole[:count])
        x, whole = x[count:], whole[count:]
        start = replace(start, position=start.position + count)


@pytest.mark.parametrize("other", [replace(START, seed=8), replace(START, epoch=1),
                                   replace(START, position=500)])  # fmt: skip
def test_another_client_epoch_or_place_is_drawn_anew(other: Place) -> None:
    x = images(50)
    here, there = (augmented(x, ["crop", "flip"], p) for p in (START, other))
    assert (here != there).any((1, 2, 3)).sum() > 40


def test_without_names_images_stay_and_those_given_are_never_changed() -> None:
    x = images(20)
    before = x.copy()
    assert augmented(x, [], START) is x
    augmented(x, ["crop", "flip"], START)
    assert np.array_equal(x, before)
