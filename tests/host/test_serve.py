"""A client's own data: its order, its epochs, its limits; the same in every kind of client."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from host_harness import EVERY_END, end, host
from splitee.client import Place
from splitee.data import Images, draw_order
from splitee_host.device import Device
from splitee_host.wire import messages as m
from step_harness import SETTINGS, case, local

CASE = case("resnet8")  # capacity 8, 24 samples
MANY = case("pools", samples=600)  # more places than a byte counts


def take(device: Device, count: int, batch: int) -> tuple[np.ndarray, list[int]]:
    """Activations and labels of a part, which is then done with."""
    part = device.forward(count, batch)
    device.backward(None)
    return part.activations.numpy(), part.labels.tolist()


@pytest.mark.parametrize("kind", EVERY_END)
def test_images_come_in_the_order_drawn_for_each_epoch(kind: str, folder: Path) -> None:
    reference = local(CASE, SETTINGS)
    with torch.no_grad():  # what the trunk makes of every image, in the order they were sent
        scale, shift = CASE.build.scale[0], CASE.build.shift[0]
        x = torch.from_numpy(CASE.images.x).float() * scale + shift
        known = reference.segment.trunk(x)[-1].numpy().reshape(24, -1)
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(replace(CASE.state, place=Place(24, seed=5, epoch=2)), CASE.images)
        for epoch in (2, 3, 4):
            found: list[int] = []
            for _ in range(3):
                activations, labels = take(device, 8, 8)
                distances = np.abs(activations.reshape(8, 1, -1) - known).max(2)
                places = distances.argmin(1).tolist()
                assert distances.min(1).max() < 1e-4 < np.sort(distances, 1)[:, 1].min()
                assert labels == CASE.images.y[places].tolist()
                found += places
            assert found == draw_order(24, 5, epoch).tolist()


PLACES = {
    "the first epoch": Place(600, seed=0),
    "a late one": Place(600, seed=4097, epoch=1000),
    "the last but one that there is": Place(600, seed=1, epoch=0xFFFFFFFE),
    "the largest seed": Place(600, seed=0xFFFFFFFF, epoch=1),
    "the middle of an epoch": Place(600, seed=7, epoch=1, position=298),
    "a shard smaller than the room": Place(257, seed=7, epoch=1),
    "two samples": Place(2, seed=7, epoch=3),
    "one sample": Place(1, seed=7, epoch=3),
}


@pytest.mark.parametrize("title", PLACES)
@pytest.mark.parametrize("kind", EVERY_END)
def test_the_order_is_drawn_alike_in_every_client_for(kind: str, title: str, folder: Path) -> None:
    place = PLACES[title]
    images = MANY.images[: place.samples]
    with end(kind, MANY, folder) as link:
        device = host(link, MANY)
        device.start(replace(MANY.state, place=place), images)
        labels: list[int] = []
        for start in range(place.position, place.samples, 8):
            labels += take(device, min(8, place.samples - start), 8)[1]
        # a new epoch begins with the next sample, not with the last one
        counters = device.counters()
        assert (counters.epoch, counters.position) == (place.epoch, place.samples)
        first = take(device, 1, 1)[1]
        counters = device.counters()
    order = draw_order(place.samples, place.seed, place.epoch)
    assert labels == images.y[order[place.position :]].tolist()
    following = draw_order(place.samples, place.seed, place.epoch + 1)
    assert first == [images.y[following[0]]]
    assert (counters.epoch, counters.position) == (place.epoch + 1, 1)


@pytest.mark.parametrize("kind", EVERY_END)
def test_a_place_counts_samples_and_steps(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(replace(CASE.state, place=Place(20, seed=5, epoch=1)), CASE.images[:20])
        seen = []
        for count in (8, 8, 4, 3):
            take(device, count, count)
            device.step()
            c = device.counters()
            seen.append((c.epoch, c.position, c.steps))
        assert seen == [(1, 8, 1), (1, 16, 2), (1, 20, 3), (2, 3, 4)]
        assert device.state().place == Place(20, seed=5, epoch=2, position=3, steps=4)


@pytest.mark.parametrize("kind", EVERY_END)
def test_a_client_holds_exactly_its_capacity(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(CASE.state, CASE.images)
        assert len(take(device, 8, 64)[1]) == 8
        assert device.request(m.Forward(9, 64), m.Refused).error == m.Error.TOO_MANY_SAMPLES
        activations, logits = device.infer(CASE.images.x[:8])
        assert (len(activations), len(logits)) == (8, 8)


@pytest.mark.parametrize("kind", EVERY_END)
def test_answers_test_images_as_torch_does_and_learns_nothing(kind: str, folder: Path) -> None:
    reference = local(CASE, SETTINGS)
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(CASE.state, CASE.images)
        before = device.counters()
        for images in (CASE.images.x[:8], CASE.images.x[8:11]):
            for mine, theirs in zip(device.infer(images), reference.infer(images), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        after = device.counters()
        weights = device.state().weights
    assert replace(after, frames=0, compute_micros=0) == replace(before, frames=0, compute_micros=0)
    assert all(np.array_equal(w, CASE.state.weights[n]) for n, w in weights.items())


@pytest.mark.parametrize("kind", EVERY_END)
def test_images_between_two_parts_do_not_disturb_the_batch(kind: str, folder: Path) -> None:
    losses = []
    for asked in (False, True):
        with end(kind, CASE, folder) as link:
            device = host(link, CASE)
            device.start(CASE.state, CASE.images)
            take(device, 5, 8)
            if asked:
                device.infer(CASE.images.x[:8])
            take(device, 3, 8)
            losses.append((device.step(), device.state().weights["stem.0.weight"].tobytes()))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", EVERY_END)
def test_a_new_shard_takes_the_place_of_the_old(kind: str, folder: Path) -> None:
    other = Images(255 - CASE.images.x[:9], (CASE.images.y[:9] + 1) % 10)
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(CASE.state, CASE.images)
        take(device, 8, 8)
        device.start(replace(CASE.state, place=Place(9, seed=5)), other)
        labels = take(device, 8, 9)[1] + take(device, 1, 9)[1]
        assert labels == other.y[draw_order(9, 5, 0)].tolist()


@pytest.mark.parametrize("kind", EVERY_END)
def test_time_spent_computing_is_counted(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(CASE.state, CASE.images)
        assert device.counters().compute_micros == 0
        take(device, 8, 8)
        first = device.counters().compute_micros
        take(device, 8, 8)
        assert device.counters().compute_micros > first > 0
