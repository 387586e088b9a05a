"""What changes training images: as torchvision would, anew in every epoch, and ever the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitee import vision, zoo
from splitee.augment import Augmentation, augmented
from splitee.client import LocalClient
from splitee.data import Images, draw_order
from splitee.exits import Exit
from splitee.model import Network, Segment
from splitee.ops import Array
from splitee.state import Place, Settings

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


def test_each_name_of_the_list_is_drawn_apart() -> None:
    x = images(1000)
    twice = augmented(x, ["flip", "flip"], START)
    assert 420 < (twice == x).all((1, 2, 3)).sum() < 580  # five standard deviations


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


OF_TORCHVISION = get_args(Augmentation)[2:]
TRANSFORMS = vision.part("transforms")
CLASSES = {
    "jitter": TRANSFORMS.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
    "erase": TRANSFORMS.RandomErasing(),
    "auto": TRANSFORMS.AutoAugment(TRANSFORMS.AutoAugmentPolicy.CIFAR10),
    "rand": TRANSFORMS.RandAugment(),
    "trivial": TRANSFORMS.TrivialAugmentWide(),
}


@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_an_image_is_what_torchvision_makes_of_it_with_numbers_of_its_own(name: str) -> None:
    x = images(12)
    changed = augmented(x, [name], START)
    assert changed.dtype == np.uint8
    key, counter = [START.seed, START.epoch], [START.position, 0, 0, 0]
    seeds = np.random.Philox(key=key, counter=counter).random_raw(4 * 12)[::4]
    with torch.random.fork_rng(devices=[]):
        for image, seed, found in zip(x, seeds, changed, strict=True):
            torch.manual_seed(int(seed))  # here torchvision draws from the global state
            expected = CLASSES[name](torch.from_numpy(image)).numpy()
            assert np.array_equal(found, expected)
    assert (changed != x).any((1, 2, 3)).sum() >= 3


@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_torchs_random_state_is_neither_used_nor_moved(name: str) -> None:
    x, found = images(8, channels=1), []
    with torch.random.fork_rng(devices=[]):
        for noise in (1, 2):
            torch.manual_seed(noise)
            before = torch.get_rng_state()
            found.append(augmented(x, [name, "crop"], START))
            assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(found[0], found[1])


def test_clients_in_threads_get_what_each_gets_alone() -> None:
    x, names = images(30), ["trivial", "erase", "flip"]
    starts = [replace(START, seed=seed) for seed in range(4)]
    alone = [augmented(x, names, start) for start in starts]
    barrier = Barrier(len(starts))

    def change(start: Place) -> Array:
        barrier.wait()
        return augmented(x, names, start)

    with ThreadPoolExecutor(len(starts)) as threads:
        for found, expected in zip(threads.map(change, starts), alone, strict=True):
            assert np.array_equal(found, expected)


def client(names: list[str]) -> LocalClient:
    """A small client of nothing but a stem."""
    torch.manual_seed(0)
    network = Network(zoo.build("resnet8", width=4, norm="group"), (3, 8, 8))
    cut = network.cut("stem")
    segment = Segment(network, cut, {"stem": Exit((4, 8, 8), 10)})
    return LocalClient("one", segment, Settings(0.1), capacity=8, scale=(1 / 64,) * 3,
                       shift=(-2.0,) * 3, augment=names)  # fmt: skip


def seen(local: LocalClient, counts: list[int]) -> Array:
    """What a client's network is given in parts of so many samples, as bytes again."""
    found: list[Array] = []

    def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        found.append(((inputs[0] + 2) * 64).round().to(torch.uint8).numpy())

    with local.segment.trunk.register_forward_pre_hook(keep):
        for count in counts:
            local.forward(count, 8)
            local.backward(None)
        local.step()
    return np.concatenate(found)


def test_a_client_trains_on_changed_images_and_answers_for_them_as_they_are() -> None:
    shard = Images(images(12, height=8), np.zeros(12, np.uint8))
    local = client(["crop", "flip"])
    local.start(local.state(), shard)
    for epoch in range(2):
        local.place = Place(12, seed=5, epoch=epoch)
        x = shard[draw_order(12, 5, epoch)].x
        expected = augmented(x, ["crop", "flip"], Place(12, 5, epoch))
        assert (expected != x).any()
        assert np.array_equal(seen(local, [8, 8]), expected)  # the second part is of four
    plain = client([])
    for one in (local, plain):
        one.load_weights(client([]).state().weights)
    assert torch.equal(local.infer(shard.x[:8])[1], plain.infer(shard.x[:8])[1])


def test_a_pass_that_is_replayed_sees_the_same_images() -> None:
    shard = Images(images(12, height=8), np.zeros(12, np.uint8))
    local = client(["crop", "trivial"])
    local.start(local.state(), shard)
    local.place = Place(12, seed=5)
    seen(local, [5])
    state = local.state()
    first = seen(local, [4, 3])
    local.rejoin(state, within=1.0)
    assert np.array_equal(seen(local, [7]), first)
