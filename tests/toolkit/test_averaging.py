"""Averaging: replicas in parallel, means over all owners of a layer, lost clients left out."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from splitee.client import LocalClient, Settings
from splitee.data import draw_order
from splitee.ops import Array
from splitee.train import BatchDone, ClientLost, Event, RoundDone, fit
from toolkit.networks import arrays, far, network_input, random_images, resnet, unequal
from toolkit.rounds import (
    BATCH,
    REASON,
    SAMPLES,
    Failing,
    Wrapped,
    averaging,
    clients,
    ends,
    everything,
    last_states,
    mean_by_hand,
)

NEVER = 99  # a period that no test reaches


def owners_after_a_round(*, with_clients: bool) -> dict[str, list[tuple[Array, int]]]:
    """Every layer's copies after one round without aggregation."""
    strategy = averaging(clients(), period=NEVER)
    done = ends(list(strategy.round(1)))
    owners: dict[str, list[tuple[Array, int]]] = defaultdict(list)
    for name, samples in SAMPLES.items():
        copies = arrays(strategy.server(name).tensors())
        if with_clients:
            copies |= done[name].state.weights
        for layer, array in copies.items():
            owners[layer].append((array, samples))
    return dict(owners)


def test_replicas_are_averaged_by_samples_and_clients_keep_their_own_layers() -> None:
    means = mean_by_hand(owners_after_a_round(with_clients=False))
    strategy = averaging(clients(), aggregate="server")
    events = list(strategy.round(1))
    for name in SAMPLES:
        replica = arrays(strategy.server(name).tensors())
        assert far(replica, {layer: means[layer] for layer in replica}, 1e-6) == {}
        done = ends(events)[name].state
        assert unequal(last_states(events)[name].weights, done.weights) == []
    held = {c.name: c.state().weights for c in strategy.clients}
    assert all(unequal(held[n], s.weights) == [] for n, s in last_states(events).items())


def test_with_all_every_owner_of_a_layer_holds_its_mean() -> None:
    means = mean_by_hand(owners_after_a_round(with_clients=True))
    strategy = averaging(clients())
    states = last_states(list(strategy.round(1)))
    for client in strategy.clients:
        replica = arrays(strategy.server(client.name).tensors())
        assert far(replica, {layer: means[layer] for layer in replica}, 1e-6) == {}
        held = dict(states[client.name].weights)
        assert far(held, {layer: means[layer] for layer in held}, 1e-6) == {}
        assert unequal(client.state().weights, held) == []
    assert {n for n in means if n.startswith("exits.")} == {
        f"exits.{cut}.linear.{role}"
        for cut in ("stem", "layer1", "layer2")
        for role in ("weight", "bias")
    }


def test_with_one_step_a_round_all_cuts_together_are_sgd_of_the_unsplit_network() -> None:
    # every layer is owned once for each client, and the mean of steps of SGD, momentum and all, is
    # the step of the mean gradient: that of a batch of all clients' samples
    settings = Settings(0.05, 0.9, 1e-3, exit_weight=0.0, server_weight=1.0)
    members = clients(settings=settings)
    strategy = averaging(members, local_steps=1, settings=settings)
    last = list(fit(strategy, 6))[-1]

    model = resnet().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    shards = {c.name: random_images(SAMPLES[c.name], seed=ord(c.name)) for c in members}
    for step in range(6):
        parts = []
        for name, images in shards.items():
            epoch, start = divmod(step * BATCH, len(images))
            order = draw_order(len(images), ord(name), epoch)
            parts.append(images[order[start : start + BATCH]])
        x = np.concatenate([part.x for part in parts])
        y = torch.as_tensor(np.concatenate([part.y for part in parts])).long()
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(network_input(x)), y))
        optimizer.step()
    expected = arrays(model.state_dict())
    assert isinstance(last, RoundDone)
    for name, state in last.states.items():
        whole = arrays(strategy.server(name).tensors()) | dict(state.weights)
        assert set(expected) <= set(whole)
        assert far({n: whole[n] for n in expected}, expected, 1e-4) == {}


def test_momentum_is_not_averaged() -> None:
    apart, together = averaging(clients(), period=NEVER), averaging(clients())
    done = ends(list(apart.round(1)))
    states = last_states(list(together.round(1)))
    for name in SAMPLES:
        assert unequal(states[name].momentum, done[name].state.momentum) == []
        momenta = (arrays(s.server(name).momentum()) for s in (together, apart))
        assert unequal(*momenta) == []


def test_means_are_taken_every_period() -> None:
    strategy = averaging(clients(), period=2)
    rounds = [list(strategy.round(number)) for number in (1, 2, 3)]
    averaged = []
    for events in rounds:
        states, done = last_states(events), ends(events)
        averaged.append(bool(unequal(states["a"].weights, done["a"].state.weights)))
    assert averaged == [False, True, False]


class Turns:
    """Lets clients hand in their states in a given order only."""

    def __init__(self, order: str) -> None:
        self._order = order
        self._handed_in = {name: threading.Event() for name in order}
        self.seen: list[str] = []

    def wrap(self, client: LocalClient) -> Wrapped:
        """The client, whose answer waits for the one before it."""
        return Wrapped(client, lambda method: self._wait(client.name, method))

    def _wait(self, name: str, method: str) -> None:
        if method != "state" or self._handed_in[name].is_set():
            return
        before = self._order[: self._order.index(name)][-1:]
        assert all(self._handed_in[other].wait(20) for other in before)
        self.seen.append(name)
        self._handed_in[name].set()


@pytest.mark.parametrize("aggregate", ["server", "all"])
def test_the_order_of_answers_does_not_matter_bit_for_bit(aggregate: str) -> None:
    results = []
    for order in ("abc", "cab", "bca"):
        turns = Turns(order)
        strategy = averaging([turns.wrap(c) for c in clients()], aggregate=aggregate)
        events = [e for number in (1, 2) for e in strategy.round(number)]
        assert "".join(turns.seen) == order
        results.append(everything(strategy, last_states(events)))
        assert list(last_states(events)) == ["a", "b", "c"]
    assert unequal(results[1], results[0]) == []
    assert unequal(results[2], results[0]) == []


def test_clients_train_at_the_same_time() -> None:
    barrier = threading.Barrier(3)
    met = set()

    def meet(name: str, method: str) -> None:
        if method == "forward" and name not in met:
            barrier.wait(20)  # passes only when all three are under way
            met.add(name)

    members = [Wrapped(c, partial(meet, c.name)) for c in clients()]
    assert len(ends(list(averaging(members).round(1)))) == 3


def batches_of(events: list[Event], name: str) -> list[Event]:
    """A client's batches."""
    return [e for e in events if isinstance(e, BatchDone) and e.client == name]


@pytest.mark.parametrize("aggregate", ["server", "all"])
def test_a_client_that_is_lost_mid_round_is_left_out_and_the_round_goes_on(aggregate: str) -> None:
    three = [Wrapped(c, Failing("forward", 3 if c.name == "b" else 0)) for c in clients()]
    strategy = averaging(three, aggregate=aggregate)
    events = list(strategy.round(1))
    assert [e for e in events if isinstance(e, ClientLost)] == [ClientLost("b", 1, REASON)]
    assert len(batches_of(events, "b")) == 2
    assert [c.name for c in strategy.clients] == ["a", "c"]
    assert isinstance(events[-1], RoundDone)
    assert events[-1].clients == ["a", "c"]
    assert events[-1].missing == {"b": REASON}
    events += strategy.round(2)

    alone = averaging(clients("ac"), aggregate=aggregate)
    expected = [e for number in (1, 2) for e in alone.round(number)]
    for name in ("a", "c"):
        assert batches_of(events, name) == batches_of(expected, name)
        replicas = (arrays(s.server(name).tensors()) for s in (strategy, alone))
        assert unequal(*replicas) == []
        states = (last_states(e)[name].weights for e in (events, expected))
        assert unequal(*states) == []


def test_a_client_that_is_lost_when_means_come_back_is_out_and_the_others_have_them() -> None:
    members = [Wrapped(c, Failing("load_weights", 1 if c.name == "a" else 0)) for c in clients()]
    strategy = averaging(members)
    events = list(strategy.round(1))
    assert events[-2] == ClientLost("a", 1, REASON)
    expected = last_states(list(averaging(clients()).round(1)))
    for client in strategy.clients:
        assert unequal(client.state().weights, expected[client.name].weights) == []
    assert [c.name for c in strategy.clients] == ["b", "c"]


def test_training_ends_when_every_client_is_lost() -> None:
    members = [Wrapped(c, Failing("step", 1)) for c in clients()]
    strategy = averaging(members)
    before = everything(strategy, {})
    events = list(fit(strategy, 5))
    assert sorted(e.client for e in events if isinstance(e, ClientLost)) == ["a", "b", "c"]
    assert [e for e in events if isinstance(e, RoundDone)] == []  # nobody completed one
    assert unequal(everything(strategy, {}), before) == []  # half a batch teaches nothing
    assert strategy.away == dict.fromkeys("abc", REASON)


def test_an_error_of_ours_is_raised_and_leaves_nobody_waiting() -> None:
    def fail(method: str) -> None:
        if method == "step":
            raise ZeroDivisionError

    strategy = averaging([Wrapped(c, fail) for c in clients("a")])
    with pytest.raises(ZeroDivisionError):
        list(strategy.round(1))


def test_one_client_is_its_own_mean() -> None:
    results = []
    for period in (1, NEVER):
        strategy = averaging(clients("b"), period=period)
        events: Iterator[Event] = fit(strategy, 2)
        results.append(everything(strategy, last_states(list(events))))
    assert unequal(*results) == []


def test_weights_of_a_checkpoint_come_back_into_the_replicas() -> None:
    trained, fresh = averaging(clients(), period=NEVER), averaging(clients())
    list(trained.round(1))
    kept = {name: arrays(server.tensors()) for name, server in trained.servers().items()}
    assert list(kept) == ["server.a", "server.b", "server.c"]
    fresh.load(kept)
    for name, server in fresh.servers().items():
        assert unequal(arrays(server.tensors()), kept[name]) == []
