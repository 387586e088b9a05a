"""Rates, clipping and steps that are not taken, behind a link: in C and in Python alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from host_harness import EVERY_END, Recorder, differences, end, host
from splitee.client import Client, Settings, State, Stepped
from splitee.errors import NotFinite
from splitee.ops import Array
from splitee_host.device import Device
from splitee_host.wire import messages as m
from splitee_host.wire.frame import FrameReader
from step_harness import SETTINGS, Case, case, local

CASE = case("resnet8")  # capacity 8, 24 samples
GRAPH = CASE.build.graph
BOTH = replace(SETTINGS, exit_weight=0.3, server_weight=0.7)
SERVER = replace(SETTINGS, exit_weight=0.0, server_weight=1.0)
CURE = "is not finite: nothing was changed; take a smaller learning_rate or clip"


def sent(activations: Tensor) -> Tensor:
    """A server's gradient that follows from the activations, and is finite in any case."""
    return 0.01 * activations.nan_to_num(0, 1, 1).cos()


def train(client: Client, steps: int) -> list[Stepped]:
    """Whole batches in two parts."""
    done = []
    for _ in range(steps):
        for count in (5, 3):
            part = client.forward(count, 8)
            client.backward(sent(part.activations) if client.settings.wants_gradient else None)
        done.append(client.step())
    return done


# ---- rates ----


@pytest.mark.parametrize("kind", EVERY_END)
def test_a_new_rate_is_one_request_and_one_that_stays_is_none(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        recorder = Recorder(link)
        device = host(recorder, CASE)
        device.start(CASE.state, CASE.images)
        sent = len(recorder.sent)
        device.set_rate(SETTINGS.learning_rate)
        assert len(recorder.sent) == sent
        device.set_rate(0.25)
        (coded,) = recorder.sent[sent:]
        (frame,) = FrameReader().feed(coded)
        message = m.unpack(frame.code, frame.body)
        assert isinstance(message, m.Settings)
        assert message.learning_rate == 0.25
        assert device.settings == replace(SETTINGS, learning_rate=0.25)


@pytest.mark.parametrize("kind", EVERY_END)
def test_a_device_learns_at_a_new_rate_from_the_next_step_on(kind: str, folder: Path) -> None:
    reference = local(CASE, SETTINGS)
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(CASE.state, CASE.images)
        for rate in (0.1, 0.03, 0.0):
            for client in (device, reference):
                client.set_rate(rate)
                train(client, 1)
            assert_close(device.state(), reference.state())
        before = device.state().weights
        train(device, 1)
        assert all(np.array_equal(w, before[n]) for n, w in device.state().weights.items())


@pytest.mark.parametrize("kind", EVERY_END)
def test_a_device_that_starts_anew_has_the_rate_of_its_round(kind: str, folder: Path) -> None:
    learnt = []
    for begun in (False, True):
        with end(kind, CASE, folder) as link:
            settings = SETTINGS if begun else replace(SETTINGS, learning_rate=0.01)
            device = host(link, CASE, settings)
            if begun:
                device.start(CASE.state, CASE.images)
                device.set_rate(0.01)
            device.start(CASE.state, CASE.images)
            train(device, 1)
            learnt.append(device.state())
    assert differences(*learnt) == []


def assert_close(mine: State, theirs: State) -> None:
    assert mine.place == theirs.place
    for values, expected in ((mine.weights, theirs.weights), (mine.momentum, theirs.momentum)):
        for name, value in values.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-5, err_msg=name)


# ---- clipping ----


@pytest.mark.parametrize("kind", EVERY_END)
def test_gradients_are_clipped_as_torch_does(kind: str, folder: Path) -> None:
    clipped = replace(BOTH, clip=0.2)
    reference, free = local(CASE, clipped), local(CASE, BOTH)
    with end(kind, CASE, folder) as link:
        device = host(link, CASE, clipped)
        device.start(CASE.state, CASE.images)
        for client in (device, reference, free):
            train(client, 4)
        state = device.state()
    assert_close(state, reference.state())
    other = free.state().momentum
    assert not any(np.allclose(state.momentum[n], v, rtol=0.1) for n, v in other.items())


@pytest.mark.parametrize("kind", EVERY_END)
def test_a_clip_may_come_and_go_between_batches(kind: str, folder: Path) -> None:
    reference = local(CASE, BOTH)
    with end(kind, CASE, folder) as link:
        device = host(link, CASE, BOTH)
        device.start(CASE.state, CASE.images)
        for clip in (0.2, 0.0, 0.05):
            for client in (device, reference):
                client.settings = replace(BOTH, clip=clip)
                train(client, 1)
            assert_close(device.state(), reference.state())


# ---- what is not finite ----


def with_values(state: State, values: Mapping[str, float]) -> State:
    """The state with the first value of some weights replaced; of a norm's, with all of them."""
    weights = {n: w.copy() for n, w in state.weights.items()}
    for name, value in values.items():
        weights[name].reshape(-1)[: None if weights[name].ndim == 1 else 1] = value
    return replace(state, weights=weights)


# a norm that lets nothing pass its relu, and so no gradient either
DEAD = {"stem.1.weight": 0.0, "stem.1.bias": -1.0}
PLANTED: dict[str, tuple[Settings, dict[str, float], str]] = {
    "NaN at the bottom": (SETTINGS, {"stem.0.weight": math.nan}, "stem.0.weight"),
    "infinity at the bottom": (SETTINGS, {"stem.0.weight": math.inf}, "stem.0.weight"),
    "NaN at the top": (BOTH, {"layer2.0.conv2.weight": math.nan}, "stem.0.weight"),
    "NaN above a dead stem": (
        SETTINGS,
        {**DEAD, "layer1.0.conv1.weight": math.nan},
        "layer1.0.conv1.weight",
    ),
    "NaN in a lower exit": (
        SERVER,
        {"exits.stem.linear.weight": math.nan},
        "exits.stem.linear.weight",
    ),
    "minus infinity in the last exit": (
        SERVER,
        {"exits.layer2.linear.weight": -math.inf},
        "exits.layer2.linear.weight",
    ),
}


def refused(device: Device) -> NotFinite:
    """How a device answers a batch from which it cannot learn; it has changed nothing then."""
    before = bits(device.state())
    steps = device.counters().steps
    with pytest.raises(NotFinite) as caught:
        train(device, 1)
    assert bits(device.state()) == before
    assert device.counters().steps == steps
    return caught.value


def bits(state: State) -> dict[str, bytes]:
    """Weights, statistics and momentum, NaNs included."""
    found = {n: w.tobytes() for n, w in state.weights.items()}
    return found | {f"momentum of {n}": v.tobytes() for n, v in state.momentum.items()}


@pytest.mark.parametrize("title", PLANTED)
@pytest.mark.parametrize("kind", EVERY_END)
def test_no_step_is_taken_from(kind: str, title: str, folder: Path) -> None:
    settings, values, name = PLANTED[title]
    with end(kind, CASE, folder) as link:
        device = host(link, CASE, settings)
        device.start(CASE.state, CASE.images)
        train(device, 1)
        whole = device.state()
        device.load_weights(with_values(whole, values).weights)
        error = refused(device)
        assert str(error) == f'client "it": the gradient of {name} {CURE}'
        assert (error.tensor, error.place) == (name, 0)
        assert device.request(m.Step(), m.Refused) == m.Refused(m.Error.OUT_OF_ORDER, 0)
        # it goes on as if it had been given these weights without that batch
        device.load_weights(whole.weights)
        place = device.state().place
        learnt = train(device, 2), device.state()
        device.load_state(replace(whole, place=place))
        assert train(device, 2) == learnt[0]
        assert differences(device.state(), learnt[1]) == []


@pytest.mark.parametrize("kind", EVERY_END)
def test_no_step_is_taken_from_a_gradient_of_the_server_that_is_none(
    kind: str, folder: Path
) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE, BOTH)
        device.start(CASE.state, CASE.images)
        part = device.forward(8, 8)
        gradient = torch.zeros_like(part.activations)
        passes = part.activations.argmax()  # where the relu below lets it through
        gradient.view(-1)[passes] = math.nan
        device.backward(gradient)
        with pytest.raises(NotFinite, match=r"the gradient of stem\.0\.weight is not finite"):
            device.step()
        weights = device.state().weights
        assert all(np.array_equal(w, CASE.state.weights[n]) for n, w in weights.items())
        assert len(train(device, 1)) == 1


@pytest.mark.parametrize("kind", EVERY_END)
def test_no_step_is_taken_from_an_infinite_loss(kind: str, folder: Path) -> None:
    weights: dict[str, Array] = dict(CASE.state.weights)
    weights["exits.layer2.linear.bias"] = np.where(np.arange(10) == 3, 3e38, -3e38).astype("f4")
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(replace(CASE.state, weights=weights), CASE.images)
        error = refused(device)
    assert str(error) == f'client "it": the loss {CURE}'


@pytest.mark.parametrize("kind", EVERY_END)
def test_a_step_that_was_refused_is_refused_again_when_its_frame_comes_twice(
    kind: str, folder: Path
) -> None:
    with end(kind, CASE, folder) as link:
        recorder = Recorder(link)
        device = host(recorder, CASE)
        device.start(with_values(CASE.state, {"stem.0.weight": math.nan}), CASE.images)
        for count in (5, 3):
            device.forward(count, 8)
            device.backward(None)
        with pytest.raises(NotFinite):
            device.step()
        recorder.write(recorder.sent[-1])
        while len(recorder.answers) < len(recorder.sent):
            recorder.read(20.0)
        assert recorder.answers[-1] == recorder.answers[-2]
        (frame,) = FrameReader().feed(recorder.answers[-1])
        assert m.unpack(frame.code, frame.body) == m.Refused(m.Error.NOT_FINITE, 0)


HELD = case("resnet8-batch")
FROZEN = case("resnet8-batch-frozen", capacity=5)


@pytest.mark.parametrize(
    ("the_case", "counts"),
    [pytest.param(HELD, (8,), id="held"), pytest.param(FROZEN, (5, 3), id="frozen")],
)
@pytest.mark.parametrize("kind", EVERY_END)
def test_running_statistics_stay_too(
    kind: str, the_case: Case, counts: tuple[int, ...], folder: Path
) -> None:
    settings = replace(BOTH, learning_rate=0.003)
    states = []
    for planted in (False, True):
        with end(kind, the_case, folder) as link:
            device = host(link, the_case, settings)
            device.start(the_case.state, the_case.images)
            if planted:
                for count in counts:
                    part = device.forward(count, 8)
                    device.backward(torch.full_like(part.activations, math.inf))
                with pytest.raises(NotFinite):
                    device.step()
                assert bits(device.state()) == bits(the_case.state) | {
                    f"momentum of {n}": bytes(4 * p.size)
                    for n, p in the_case.build.graph.parameters.items()
                }
                device.load_state(the_case.state)
            for count in counts:
                part = device.forward(count, 8)
                device.backward(sent(part.activations))
            device.step()
            states.append(device.state())
    assert differences(*states) == []
