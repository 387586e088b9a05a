"""A host that moves the cut of a running device, firmware and Python client alike."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from host_harness import EVERY_END, Recorder, differences, end, host
from splitee.client import Client, Place, State, Stepped
from splitee.errors import CutError, DeviceRefused
from splitee_host.device import Device
from splitee_host.wire import messages as m
from splitee_host.wire.frame import FrameReader
from step_harness import SETTINGS, case, local

CASE = case("resnet8", moves=True)  # capacity 8, 24 samples
BUILD = CASE.build
CUTS = ("stem", "layer1", "layer2")
WALK = (("layer2", True), ("stem", False), ("layer1", True), ("layer2", False), ("stem", True))
BOTH = replace(SETTINGS, exit_weight=0.3, server_weight=0.7)


def train(client: Client, steps: int) -> list[Stepped]:
    """Whole batches in two parts, with a server's gradient that follows from the activations."""
    done = []
    for _ in range(steps):
        for count in (5, 3):
            part = client.forward(count, 8)
            client.backward(0.01 * part.activations.cos())
        done.append(client.step())
    return done


@pytest.mark.parametrize("kind", EVERY_END)
def test_trains_at_every_cut_as_torch_does(kind: str, folder: Path) -> None:
    reference = local(CASE, BOTH)
    with end(kind, CASE, folder) as link:
        device = host(link, CASE, BOTH)
        device.start(CASE.state, CASE.images)
        for cut, upto in WALK:
            for client in (device, reference):
                client.move(cut, upto=upto)
                assert client.cut == cut
            mine, theirs = train(device, 2), train(reference, 2)
            for found, expected in zip(mine, theirs, strict=True):
                assert found.correct == expected.correct
                assert found.loss == pytest.approx(expected.loss, rel=1e-4)
            states = device.state(), reference.state()
            assert states[0].place == states[1].place
            for name, weight in states[1].weights.items():
                np.testing.assert_allclose(states[0].weights[name], weight, rtol=1e-3, atol=1e-5)
            for name, velocity in states[1].momentum.items():
                np.testing.assert_allclose(states[0].momentum[name], velocity, rtol=2e-3, atol=1e-4)


def every(device: Device) -> tuple[bytes, bytes]:
    """Weights and momentum of all layers that are built in."""
    graph = BUILD.graph
    return (
        device.read(m.Region.WEIGHTS, 0, 4 * graph.weight_size),
        device.read(m.Region.MOMENTUM, 0, 4 * graph.parameter_size),
    )


@pytest.mark.parametrize("kind", EVERY_END)
def test_moving_changes_no_layer(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE, BOTH)
        device.start(CASE.state, CASE.images)
        train(device, 1)
        before = every(device), device.state()
        for cut, upto in (*WALK, ("layer2", True)):
            device.move(cut, upto=upto)
            assert every(device) == before[0]
        assert differences(device.state(), before[1]) == []


@pytest.mark.parametrize("kind", EVERY_END)
def test_a_state_is_of_the_layers_up_to_the_cut(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE, BOTH)
        device.start(CASE.state, CASE.images)
        train(device, 1)
        whole = device.state()
        for cut, upto in WALK:
            device.move(cut, upto=upto)
            part = BUILD.graph.at(cut, upto=upto)
            expected = State(
                {n: whole.weights[n] for n in part.weights},
                {n: whole.momentum[n] for n in part.parameters},
                whole.place,
            )
            assert differences(device.state(), expected) == []
            assert list(device.gradients()) == list(part.parameters)


@pytest.mark.parametrize("kind", EVERY_END)
def test_loading_reaches_the_layers_up_to_the_cut_and_no_others(kind: str, folder: Path) -> None:
    rng = np.random.default_rng(7)
    graph = BUILD.graph
    place = Place(samples=24, seed=9, epoch=3, position=5, steps=7)
    with end(kind, CASE, folder) as link:
        device = host(link, CASE, BOTH)
        device.start(CASE.state, CASE.images)
        train(device, 1)
        before = device.state()
        for cut, upto in (("layer1", False), ("stem", True)):
            device.move(cut, upto=upto)
            part = graph.at(cut, upto=upto)
            given = State(
                part.unflatten(rng.standard_normal(part.weight_size, np.float32)),
                part.unflatten_parameters(rng.standard_normal(part.parameter_size, np.float32)),
                place,
            )
            device.load_state(given)
            assert differences(device.state(), given) == []
            device.move("layer2", upto=True)
            before = State(
                {**before.weights, **given.weights}, {**before.momentum, **given.momentum}, place
            )
            assert differences(device.state(), before) == []


@pytest.mark.parametrize("kind", EVERY_END)
def test_another_device_goes_on_where_one_was_moved_to(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE, BOTH)
        device.start(CASE.state, CASE.images)
        train(device, 2)
        device.move("layer1", upto=False)
        train(device, 1)
        state = device.state()
        expected = train(device, 4), device.state()
    with end(kind, CASE, folder) as link:
        device = host(link, CASE, BOTH, cut="layer1", upto=False)
        device.start(state, CASE.images)
        assert train(device, 4) == expected[0]
        assert differences(device.state(), expected[1]) == []


@pytest.mark.parametrize("kind", EVERY_END)
def test_a_new_host_puts_the_cut_where_it_wants_it(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        first = host(link, CASE, BOTH, cut="stem", upto=False, session=1)
        first.start(CASE.state, CASE.images)
        first.forward(5, 8)  # a batch that is never finished
        second = host(link, CASE, BOTH, session=2)
        second.start(CASE.state, CASE.images)
        expected = train(second, 2)
    with end(kind, CASE, folder) as link:
        only = host(link, CASE, BOTH)
        only.start(CASE.state, CASE.images)
        assert train(only, 2) == expected


@pytest.mark.parametrize("kind", EVERY_END)
def test_answers_test_images_at_every_cut_as_torch_does(kind: str, folder: Path) -> None:
    reference = local(CASE, SETTINGS)
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(CASE.state, CASE.images)
        for cut, upto in WALK:
            device.move(cut, upto=upto)
            reference.move(cut, upto=upto)
            found, expected = (c.infer(CASE.images.x[:8]) for c in (device, reference))
            assert found[0].shape == (8, *BUILD.graph.shapes[device.graph.cut])
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", EVERY_END)
def test_regions_are_as_large_as_the_tensors_at_the_cut(kind: str, folder: Path) -> None:
    sizes = {"stem": 4 * 8 * 384, "layer1": 4 * 8 * 384, "layer2": 4 * 8 * 192}
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(CASE.state, CASE.images)
        for cut, size in sizes.items():
            device.move(cut, upto=True)
            for region in (m.Region.ACTIVATIONS, m.Region.GRADIENT):
                assert len(device.read(region, 0, size)) == size
                answer = device.request(m.Read(region, size, 1), m.Refused)
                assert answer == m.Refused(m.Error.OUT_OF_RANGE, size)
            device.write(m.Region.GRADIENT, bytes(size))
            answer = device.request(m.Write(m.Region.GRADIENT, size, b"a"), m.Refused)
            assert answer == m.Refused(m.Error.OUT_OF_RANGE, size)


@pytest.mark.parametrize("kind", EVERY_END)
def test_refuses_cuts_that_are_not_built_in(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(CASE.state, CASE.images)
        device.move("stem", upto=True)
        for cut in (0, 4, 255):
            answer = device.request(m.Select(cut, 1), m.Refused)
            assert answer == m.Refused(m.Error.NO_SUCH_CUT, 3)
        part = device.forward(2, 2)
        assert part.activations.shape == (2, 6, 8, 8)  # still at the stem


@pytest.mark.parametrize("kind", EVERY_END)
def test_any_number_but_zero_is_all_exits(kind: str, folder: Path) -> None:
    results = []
    for number in (1, 0xFF):
        with end(kind, CASE, folder) as link:
            device = host(link, CASE, BOTH)
            device.start(CASE.state, CASE.images)
            device.request(m.Select(3, number), m.Done)
            results.append((train(device, 1), every(device)))
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", EVERY_END)
def test_a_cut_that_is_refused_in_the_midst_of_a_batch_leaves_it_whole(
    kind: str, folder: Path
) -> None:
    results = []
    for disturbed in (False, True):
        with end(kind, CASE, folder) as link:
            device = host(link, CASE, BOTH)
            device.start(CASE.state, CASE.images)
            part = device.forward(5, 8)
            if disturbed:
                with pytest.raises(DeviceRefused, match=r"Select refused: .* wrong time"):
                    device.move("stem", upto=True)
            assert device.cut == "layer2"
            device.backward(0.01 * part.activations)
            device.forward(3, 8)
            device.backward(0.01 * part.activations[:3])
            results.append((device.step(), device.state().weights["stem.0.weight"].tobytes()))
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", EVERY_END)
def test_moving_takes_one_small_request(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        recorder = Recorder(link)
        device = host(recorder, CASE)
        device.start(CASE.state, CASE.images)
        sent = len(recorder.sent)
        device.move("layer1", upto=False)
        (coded,) = recorder.sent[sent:]
        (frame,) = FrameReader().feed(coded)
        assert (frame.code, frame.body) == (m.Select.CODE, bytes([2, 0]))


def test_a_host_knows_which_cuts_are_built_in(folder: Path) -> None:
    single = case("pools")
    with end("python", single, folder) as link:
        device = host(link, single)
        device.start(single.state, single.images)
        with pytest.raises(CutError, match="with its exit alone: build it with `deepest`"):
            device.move(device.cut, upto=False)
        with pytest.raises(CutError, match=re.escape(f"built for {device.cut}, not for layer1")):
            device.move("layer1", upto=True)
        device.move(device.cut, upto=True)
        assert len(device.forward(2, 2).labels) == 2
