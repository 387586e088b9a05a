"""Batch norm behind a link: in C and in Python alike, held and frozen."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from host_harness import EVERY_END, end, host
from splitee.client import Client, State
from step_harness import SETTINGS, Case, case, local

HELD, FROZEN = case("resnet8-batch"), case("resnet8-batch-frozen", capacity=5)
SMALL = replace(SETTINGS, learning_rate=0.003)
MODES = [pytest.param(HELD, (8,), id="held"), pytest.param(FROZEN, (5, 3), id="frozen")]


def batch(client: Client, parts: tuple[int, ...]) -> None:
    """One step on the next samples, in parts."""
    for count in parts:
        client.forward(count, sum(parts))
        client.backward(None)
    client.step()


def assert_close(mine: State, theirs: State) -> None:
    assert mine.place == theirs.place
    for values, expected in ((mine.weights, theirs.weights), (mine.momentum, theirs.momentum)):
        for name, value in values.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("the_case", "parts"), MODES)
@pytest.mark.parametrize("kind", EVERY_END)
def test_every_kind_of_client_learns_as_torch_does(
    kind: str, the_case: Case, parts: tuple[int, ...], folder: Path
) -> None:
    reference = local(the_case, SMALL)
    with end(kind, the_case, folder) as link:
        device = host(link, the_case, SMALL)
        device.start(the_case.state, the_case.images)
        for _ in range(6):  # two epochs
            batch(device, parts)
            batch(reference, parts)
        state = device.state()
    assert_close(state, reference.state())
    moved = [n for n in the_case.build.graph.statistics if "running" in n]
    assert len(moved) == 12  # mean and variance of the stem's, layer1's two and layer2's three
    assert not any(np.array_equal(state.weights[n], the_case.state.weights[n]) for n in moved)


@pytest.mark.parametrize(("the_case", "parts"), MODES)
@pytest.mark.parametrize("kind", EVERY_END)
def test_images_are_answered_by_the_running_statistics_and_teach_nothing(
    kind: str, the_case: Case, parts: tuple[int, ...], folder: Path
) -> None:
    with end(kind, the_case, folder) as link:
        device = host(link, the_case)
        device.start(the_case.state, the_case.images)
        batch(device, parts)
        before = device.state()
        answers = device.infer(the_case.images.x[:5])
        after = device.state()
    segment = copy.deepcopy(the_case.segment).double().eval()
    with torch.no_grad():
        for name, tensor in segment.tensors().items():
            tensor.copy_(torch.from_numpy(before.weights[name]))
        scale, shift = the_case.build.scale[0], the_case.build.shift[0]
        points, logits = segment(torch.from_numpy(the_case.images.x[:5]).double() * scale + shift)
    for mine, theirs in zip(answers, (points[-1], logits[-1]), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    assert all(np.array_equal(after.weights[n], w) for n, w in before.weights.items())


@pytest.mark.parametrize("kind", EVERY_END)
def test_images_between_two_parts_do_not_disturb_the_statistics(kind: str, folder: Path) -> None:
    states = []
    for asked in (False, True):
        with end(kind, FROZEN, folder) as link:
            device = host(link, FROZEN)
            device.start(FROZEN.state, FROZEN.images)
            for count in (5, 3):
                device.forward(count, 8)
                device.backward(None)
                if asked:
                    device.infer(FROZEN.images.x[:2])
            device.step()
            states.append(device.state().weights)
    assert all(np.array_equal(states[0][n], w) for n, w in states[1].items())


@pytest.mark.parametrize("kind", EVERY_END)
def test_a_batch_left_half_done_leaves_no_statistics(kind: str, folder: Path) -> None:
    states = []
    for disturbed in (False, True):
        with end(kind, FROZEN, folder) as link:
            device = host(link, FROZEN)
            device.start(FROZEN.state, FROZEN.images)
            if disturbed:
                device.forward(5, 8)
                device.backward(None)
                device.start(FROZEN.state, FROZEN.images)  # a host that begins anew
            batch(device, (5, 3))
            states.append(device.state().weights)
    assert all(np.array_equal(states[0][n], w) for n, w in states[1].items())
