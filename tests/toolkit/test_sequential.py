"""Sequential: turns at one shared server, in the fleet's order."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest

from splitee.errors import LinkError
from splitee.ops import Array
from splitee.server import Server
from splitee.train import BatchDone, ClientDone, ClientLost, Event, RoundDone, fit, train_pass
from toolkit.networks import arrays, far, resnet, server_for, unequal
from toolkit.rounds import (
    CUTS,
    REASON,
    SAMPLES,
    SETTINGS,
    Failing,
    Wrapped,
    clients,
    ends,
    everything,
    last_states,
    mean_by_hand,
    pass_of,
    sequential,
)

NEVER = 99  # a period that no test reaches


def by_hand() -> tuple[Server, dict[str, ClientDone]]:
    """The server and the clients after one round of turns, one after the other."""
    server = server_for(resnet(), list(CUTS.values()), SETTINGS)
    turns = [train_pass(c, server, 1, pass_of(c), lambda _: None) for c in clients()]
    return server, {turn.client: turn for turn in turns}


def test_turns_follow_the_fleets_order_and_a_round_ends_once() -> None:
    events = list(sequential(clients()).round(1))
    turns = [(type(e), e.client) for e in events if isinstance(e, BatchDone | ClientDone)]
    assert turns == [
        *[(BatchDone, "a")] * 2, (ClientDone, "a"),
        *[(BatchDone, "b")] * 5, (ClientDone, "b"),
        *[(BatchDone, "c")] * 3, (ClientDone, "c"),
    ]  # fmt: skip
    assert isinstance(events[-1], RoundDone)


def test_every_turn_goes_on_from_the_server_that_the_last_one_left() -> None:
    server, turns = by_hand()
    strategy = sequential(clients(), aggregate="server")
    events = list(strategy.round(1))
    assert unequal(arrays(strategy.server("a").tensors()), arrays(server.tensors())) == []
    assert unequal(arrays(strategy.server("a").momentum()), arrays(server.momentum())) == []
    for name, turn in turns.items():
        assert replace(ends(events)[name], seconds=0, state=turn.state) == replace(turn, seconds=0)
        assert unequal(last_states(events)[name].weights, turn.state.weights) == []
    assert len({id(s) for s in map(strategy.server, CUTS)}) == 1
    assert list(strategy.servers()) == ["server"]


def test_the_order_of_turns_matters() -> None:
    there, back = sequential(clients("abc")), sequential(clients("cba"))
    for strategy in (there, back):
        list(strategy.round(1))
    assert unequal(arrays(there.server("a").tensors()), arrays(back.server("a").tensors())) != []


def test_with_all_clients_copies_are_averaged_with_the_shared_servers() -> None:
    server, turns = by_hand()
    owners: dict[str, list[tuple[Array, int]]] = defaultdict(list)
    for name, turn in turns.items():
        for layer, array in turn.state.weights.items():
            owners[layer].append((array, SAMPLES[name]))
    # the server's copy counts the samples that went through it: a (8) is cut behind the stem, c
    # (12) behind layer1 and b (20) behind layer2
    through = {"layer1": 8, "layer2": 8 + 12, "layer3": 8 + 12 + 20, "fc": 8 + 12 + 20}
    for layer, array in arrays(server.tensors()).items():
        owners[layer].append((array, through[layer.split(".")[0]]))
    means = mean_by_hand(owners)

    strategy = sequential(clients())
    events = list(strategy.round(1))
    shared = arrays(strategy.server("a").tensors())
    assert far(shared, {layer: means[layer] for layer in shared}, 1e-6) == {}
    for client in strategy.clients:
        held = dict(last_states(events)[client.name].weights)
        assert far(held, {layer: means[layer] for layer in held}, 1e-6) == {}
        assert unequal(client.state().weights, held) == []


def test_means_are_taken_every_period() -> None:
    strategy = sequential(clients(), period=2)
    averaged = []
    for number in (1, 2, 3):
        events = list(strategy.round(number))
        done = ends(events)["a"].state.weights
        averaged.append(bool(unequal(last_states(events)["a"].weights, done)))
    assert averaged == [False, True, False]


@pytest.mark.parametrize("aggregate", ["server", "all"])
def test_two_runs_are_the_same_bit_for_bit(aggregate: str) -> None:
    results = []
    for _ in range(2):
        strategy = sequential(clients(), aggregate=aggregate)
        results.append(everything(strategy, last_states(list(fit(strategy, 2)))))
    assert unequal(*results) == []


def test_a_client_that_is_lost_mid_turn_leaves_no_trace() -> None:
    # b is lost in the backward pass of its third batch: the server has learnt from two by then
    server = server_for(resnet(), list(CUTS.values()), SETTINGS)
    a, _, c = clients()
    train_pass(a, server, 1, pass_of(a), lambda _: None)
    train_pass(c, server, 1, pass_of(c), lambda _: None)

    members = [Wrapped(c, Failing("backward", 3 if c.name == "b" else 0)) for c in clients()]
    strategy = sequential(members, aggregate="server")
    events: list[Event] = list(strategy.round(1))
    assert [e for e in events if isinstance(e, ClientLost)] == [ClientLost("b", 1, REASON)]
    assert list(ends(events)) == ["a", "c"]
    assert unequal(arrays(strategy.server("a").tensors()), arrays(server.tensors())) == []
    assert unequal(arrays(strategy.server("a").momentum()), arrays(server.momentum())) == []
    assert unequal(last_states(events)["c"].weights, c.state().weights) == []
    assert set(ends(list(strategy.round(2)))) == {"a", "c"}


def test_a_lost_clients_layers_and_samples_count_in_no_mean() -> None:
    members = [Wrapped(c, Failing("state", 1 if c.name == "a" else 0)) for c in clients()]
    strategy = sequential(members)
    events = list(strategy.round(1))
    states = last_states(events)
    assert isinstance(events[-1], RoundDone)
    assert events[-1].clients == ["b", "c"]
    # with a (cut behind the stem) out, nobody trained the server's layer1: clients' copies count
    owners = {
        layer: [(ends(events)[n].state.weights[layer], SAMPLES[n]) for n in ("b", "c")]
        for layer in states["c"].weights
        if layer.startswith(("stem", "layer1"))
    }
    means = mean_by_hand(owners)
    assert far({layer: states["b"].weights[layer] for layer in means}, means, 1e-6) == {}
    shared = arrays(strategy.server("b").tensors())
    assert (
        unequal(
            {layer: shared[layer] for layer in means if layer in shared},
            {layer: states["b"].weights[layer] for layer in means if layer in shared},
        )
        == []
    )


def test_a_client_that_is_lost_when_means_come_back_is_out() -> None:
    members = [Wrapped(c, Failing("load_weights", 1 if c.name == "c" else 0)) for c in clients()]
    strategy = sequential(members)
    events = list(strategy.round(1))
    assert events[-2] == ClientLost("c", 1, REASON)
    assert [c.name for c in strategy.clients] == ["a", "b"]


def test_errors_of_links_only_lose_a_client() -> None:
    def fail(method: str) -> None:
        if method == "step":
            raise ZeroDivisionError

    assert not issubclass(ZeroDivisionError, LinkError)
    with pytest.raises(ZeroDivisionError):
        list(sequential([Wrapped(c, fail) for c in clients("a")]).round(1))
