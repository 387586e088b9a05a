"""The step in torch: clipped by the norm of all that learns, never from what is not finite."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from splitee import step
from splitee.client import LocalClient, Settings
from splitee.errors import LinkError, NotFinite, SpliteeError
from splitee.ops import Array
from splitee.server import Server
from splitee.strategies import Strategy
from splitee.train import ClientDone, Event, RoundDone, train_batch
from toolkit.networks import arrays, far, local_client, random_images, resnet, server_for, unequal
from toolkit.rounds import averaging, clients, everything, last_states, sequential

CUT = "layer2"
SETTINGS = Settings(0.05, 0.9, 1e-3, exit_weight=0.5, server_weight=0.5)
CURE = "nothing was changed; take a smaller learning_rate or clip"


def halves(
    settings: Settings,
    *,
    norm: str = "group",
    upto: bool = True,
    seed: int = 0,
    frozen: bool = False,
) -> tuple[LocalClient, Server]:
    """A client, which holds four samples at once, and its server."""
    model = resnet(norm=norm, seed=seed)
    client = local_client(
        model, CUT, settings, random_images(16), capacity=4, upto=upto, frozen=frozen
    )
    return client, server_for(model, [CUT], settings)


def parts(client: LocalClient, server: Server, count: int = 2) -> None:
    """A batch up to its step."""
    for _ in range(count):
        part = client.forward(4, 4 * count)
        client.backward(server.learn(part.activations, part.labels, CUT, 4 * count, gradient=True))


# ---- clipping ----


def clipped(
    weights: Mapping[str, Array], gradients: Mapping[str, Array], clip: float
) -> dict[str, Array]:
    """The velocity after a first step in float64, with torch's own clip_grad_norm_."""
    parameters = {n: nn.Parameter(torch.tensor(weights[n], dtype=torch.float64)) for n in gradients}
    for name, gradient in gradients.items():
        parameters[name].grad = torch.tensor(gradient, dtype=torch.float64)
    assert nn.utils.clip_grad_norm_(parameters.values(), clip) > 2 * clip
    optimizer = torch.optim.SGD(parameters.values(), 0.05, 0.9, weight_decay=1e-3)
    optimizer.step()
    return arrays({n: optimizer.state[p]["momentum_buffer"] for n, p in parameters.items()})


@pytest.mark.parametrize("upto", [False, True], ids=["own", "upto"])
def test_each_half_is_clipped_by_the_norm_of_all_its_own_gradients(upto: bool) -> None:
    client, server = halves(replace(SETTINGS, clip=0.1), upto=upto)
    parts(client, server)
    theirs = arrays({n: t.grad for n, t in server.tensors().items() if t.grad is not None})
    expected = (
        clipped(client.state().weights, client.gradients(), 0.1),
        clipped(arrays(server.tensors()), theirs, 0.1),
    )
    client.step()
    server.step()
    assert far(dict(client.state().momentum), expected[0]) == {}
    assert far(arrays(server.momentum()), expected[1]) == {}


def test_layers_that_take_no_part_do_not_count_in_the_norm() -> None:
    client, server = halves(replace(SETTINGS, clip=0.1))
    parts(client, server)
    client.step()
    client.move("stem", upto=True)
    client.forward(4, 4)
    client.backward(torch.zeros(4, 4, 8, 8))
    gradients = client.gradients()
    weights, momentum = client.state().weights, client.state().momentum
    client.step()
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
    assert norm > 0.2
    for name, gradient in gradients.items():
        expected = 0.9 * momentum[name] + gradient * (0.1 / norm) + 1e-3 * weights[name]
        np.testing.assert_allclose(client.state().momentum[name], expected, rtol=1e-4, atol=1e-6)


def test_what_is_within_the_clip_learns_as_without_one_bit_for_bit() -> None:
    found = []
    for clip in (0.0, 1e6):
        client, server = halves(replace(SETTINGS, clip=clip))
        for _ in range(2):
            parts(client, server)
            client.step()
            server.step()
        found.append({**client.state().weights, **arrays(server.tensors())})
    assert unequal(*found) == []


# ---- what is not finite ----


def test_the_first_value_that_is_not_finite_is_named() -> None:
    first, second = (nn.Parameter(torch.zeros(2, 3)) for _ in range(2))
    unused = nn.Parameter(torch.full((2,), math.nan))
    named = {"first": first, "unused": unused, "second": second}
    first.grad, second.grad = torch.ones(2, 3), torch.ones(2, 3)
    step.check("it", named, 1.0)
    for value in (math.inf, -math.inf, math.nan):
        second.grad = torch.tensor([[0.0, 3e38, -3e38], [0.0, value, value]])
        with pytest.raises(NotFinite) as caught:
            step.check("it", named, value)
        assert (caught.value.tensor, caught.value.place) == ("second", 4)
        assert str(caught.value) == f"it: the gradient of second is not finite: {CURE}"
        second.grad = torch.zeros(2, 3)
        with pytest.raises(NotFinite) as caught:
            step.check("it", named, value)
        assert caught.value.tensor == ""
        assert str(caught.value) == f"it: the loss is not finite: {CURE}"
    said = str(caught.value.in_round(3))
    assert said == f"it: the loss is not finite in round 3: {CURE}"


def test_it_is_no_error_of_a_link() -> None:
    # which a fleet goes on without
    assert issubclass(NotFinite, SpliteeError)
    assert not issubclass(NotFinite, LinkError)


def poison(half: LocalClient | Server, name: str) -> None:
    """Makes one value of a parameter's gradient infinite, as the batch's parts have left it."""
    tensors = half.tensors() if isinstance(half, Server) else half.segment.tensors()
    gradient = tensors[name].grad
    assert gradient is not None
    gradient.view(-1)[-1] = math.inf


def held(client: LocalClient, server: Server) -> dict[str, Array]:
    """All weights, statistics and momenta, and the client's steps."""
    state = client.state()
    found = {**state.weights, **arrays(server.tensors())}
    found |= {f"momentum/{n}": v for n, v in {**state.momentum}.items()}
    found |= {f"momentum/{n}": v for n, v in arrays(server.momentum()).items()}
    return found | {"steps": np.array(state.place.steps)}


CLIENTS = list(halves(SETTINGS)[0].gradients())
SERVERS = list(halves(SETTINGS)[1].tensors())


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_does_not_learn_from_what_is_not_finite_in(name: str) -> None:
    client, server = halves(SETTINGS)
    train_batch(client, server, 8)
    before = held(client, server)
    parts(client, server)
    poison(client, name)
    server.discard()
    with pytest.raises(NotFinite, match=re.escape(f'client "one": the gradient of {name} is')):
        client.step()
    assert unequal(held(client, server), before) == []
    assert not any(g.any() for g in client.gradients().values())


@pytest.mark.parametrize("name", SERVERS)
def test_neither_half_learns_when_the_server_does_not_learn_from(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = halves(SETTINGS)
    train_batch(client, server, 8)
    before = held(client, server)
    check = server.check

    def poisoned() -> None:
        poison(server, name)
        check()

    monkeypatch.setattr(server, "check", poisoned)
    with pytest.raises(NotFinite, match=re.escape(f"the server: the gradient of {name} is")):
        train_batch(client, server, 8)
    assert unequal(held(client, server), before) == []


@pytest.mark.parametrize("batch_norm", ["held", "frozen"])
def test_after_a_batch_that_was_refused_the_next_one_teaches_as_if_it_had_not_been(
    batch_norm: str,
) -> None:
    results = []
    for refused in (False, True):
        client, server = halves(SETTINGS, norm="batch", frozen=batch_norm == "frozen")
        train_batch(client, server, 8)
        before = held(client, server)
        if refused:
            parts(client, server)
            assert client.state().place.position == 16
            poison(client, "stem.0.weight")
            server.discard()
            with pytest.raises(NotFinite):
                client.step()
            assert unequal(held(client, server), before) == []  # running statistics too
        else:
            client.place = replace(client.place, position=16)
        results.append((train_batch(client, server, 8), held(client, server)))
    assert results[0][0] == results[1][0]
    assert unequal(results[0][1], results[1][1]) == []


def test_an_infinite_loss_alone_is_noticed() -> None:
    client, server = halves(replace(SETTINGS, server_weight=0.0, exit_weight=1.0))
    bias = client.segment.tensors()["exits.layer2.linear.bias"]
    with torch.no_grad():  # the gradients of a softmax stay finite
        bias.copy_(torch.where(torch.arange(10) == 3, 3e38, -3e38))
    before = held(client, server)
    with pytest.raises(NotFinite, match='client "one": the loss is not finite: '):
        train_batch(client, server, 8)
    assert unequal(held(client, server), before) == []


@pytest.mark.parametrize("server_weight", [0.0, 0.5], ids=["local", "both"])
def test_the_half_is_named_in_which_it_began(server_weight: float) -> None:
    settings = replace(SETTINGS, server_weight=server_weight)
    for name, owner in (("stem.0.weight", 'client "one": '), ("fc.weight", "the server: ")):
        client, server = halves(settings)
        tensors = client.segment.tensors() | server.tensors()
        with torch.no_grad():
            tensors[name].view(-1)[0] = math.nan
        with pytest.raises(NotFinite, match=f"^{owner}the gradient of "):
            train_batch(client, server, 8)


# ---- rounds ----

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "averaging": averaging,
    "sequential": sequential,
}


@pytest.mark.parametrize("kind", STRATEGIES)
def test_training_stops_and_says_whose_gradient_it_was_and_when(kind: str) -> None:
    strategy = STRATEGIES[kind](clients())
    events = list(strategy.round(1))
    assert isinstance(events[-1], RoundDone)
    kept = copy.deepcopy(last_states(events))
    b = strategy.clients[1]
    assert isinstance(b, LocalClient)
    with torch.no_grad():
        b.segment.tensors()["layer1.0.conv1.weight"][0, 0, 0, 0] = math.nan
    seen: list[Event] = []
    with pytest.raises(NotFinite) as caught:
        seen.extend(strategy.round(2))
    assert str(caught.value) == (
        f'client "b": the gradient of stem.0.weight is not finite in round 2: {CURE}'
    )
    assert not [e for e in seen if isinstance(e, RoundDone)]
    assert all(not isinstance(e, ClientDone) or e.client != "b" for e in seen)
    # what the last round left is whole
    for name, state in kept.items():
        assert unequal(last_states(events)[name].weights, state.weights) == []
        assert all(np.isfinite(w).all() for w in state.weights.values())
    assert all(np.isfinite(a).all() for a in everything(strategy, {}).values())
    assert all(t.grad is None for t in strategy.server("b").tensors().values())


def test_a_server_is_named_by_its_client() -> None:
    server = Server(halves(SETTINGS)[1].tail, SETTINGS, name='the server of client "b"')
    part = halves(SETTINGS)[0].forward(4, 4)
    server.learn(part.activations * math.nan, part.labels, CUT, 4, gradient=False)
    said = 'the server of client "b": the gradient of layer3'
    with pytest.raises(NotFinite, match=re.escape(said)):
        server.check()
