"""Clients and servers that are live only while they train learn what others do, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from splitee.client import LocalClient
from splitee.errors import NotFinite
from splitee.parked import ParkedClient, ParkedServer, Pool
from splitee.server import Server
from splitee.state import Settings
from splitee.strategies import Averaging, Strategy
from splitee.train import Event, evaluate, fit
from toolkit.networks import local_client, random_images, resnet, server_for
from toolkit.rounds import BATCH, SETTINGS, everything, last_states, rules_of

NAMES = "abcdef"
CUT = "layer1"

Pools = tuple[Pool[LocalClient], Pool[Server]]


def shard(name: str) -> int:
    return 6 + 3 * NAMES.index(name)  # samples


def live(norm: str, settings: Settings) -> Strategy:
    """A client and a server for each name, from the same weights."""
    clients = [
        local_client(
            resnet(norm=norm), CUT, settings, random_images(shard(n), seed=ord(n)),
            capacity=BATCH, name=n, seed=ord(n),
        )
        for n in NAMES
    ]  # fmt: skip
    servers = {n: server_for(resnet(norm=norm), [CUT], settings) for n in NAMES}
    return Averaging(clients, servers, rules_of(participation=0.5, aggregate="all"))


def parked(norm: str, settings: Settings) -> tuple[Strategy, list[ParkedClient], Pools]:
    """The same, of which as many are alive as train at the same time."""
    twin = live(norm, settings)
    pattern = local_client(
        resnet(norm=norm), CUT, settings, random_images(1), capacity=BATCH, name="", seed=0
    )
    pools = Pool(pattern), Pool(server_for(resnet(norm=norm), [CUT], settings))
    clients, servers = [], {}
    for client in twin.clients:
        clients.append(ParkedClient(client.name, pools[0]))
        images = random_images(shard(client.name), seed=ord(client.name))
        clients[-1].start(twin.states[client.name], images)
        servers[client.name] = ParkedServer(client.name, pools[1], settings.learning_rate)
    return Averaging(clients, servers, twin.rules), clients, pools


def run(strategy: Strategy, rounds: int = 4) -> list[Event]:
    return list(fit(strategy, rounds))


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("threads", ["1", "3"])
def test_parked_clients_learn_what_live_ones_do(
    norm: str, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    ours, _, pools = parked(norm, SETTINGS)
    theirs = live(norm, SETTINGS)
    found, expected = (everything(s, last_states(run(s))) for s in (ours, theirs))
    assert found.keys() == expected.keys()
    assert [n for n, a in expected.items() if a.tobytes() != found[n].tobytes()] == []
    assert all(pool.made <= int(threads) for pool in pools)


def test_what_all_have_alike_is_there_once() -> None:
    ours, _, _ = parked("group", SETTINGS)
    states = last_states(run(ours, 1))
    assert len({id(s.weights["stem.0.weight"]) for s in states.values()}) == 1
    assert len({s.tensors()["fc.weight"].data_ptr() for s in ours.servers().values()}) == 1


def test_a_parked_client_answers_as_a_live_one() -> None:
    ours, clients, _ = parked("batch", SETTINGS)
    theirs = live("batch", SETTINGS)
    images = random_images(11)
    for strategy in (ours, theirs):
        run(strategy, 2)
    for one, client in zip(clients, theirs.clients, strict=True):
        theirs.update(client)
        ours.update(one)
        expected = evaluate(client, theirs.server(client.name), images)
        found = evaluate(one, ours.server(one.name), images)
        assert found.exit_logits.tobytes() == expected.exit_logits.tobytes()
        assert found.server_logits.tobytes() == expected.server_logits.tobytes()


def test_a_batch_that_is_not_finite_leaves_nothing_in_what_was_borrowed() -> None:
    ours, (first, *_), _ = parked("batch", SETTINGS)
    server, good = ours.server("a"), ours.states["a"].weights
    first.load_weights({n: np.full(w.shape, np.nan, np.float32) for n, w in good.items()})

    def learn() -> None:
        with first.awake(), server.awake():
            part = first.forward(BATCH, BATCH)
            server.learn(part.activations, part.labels, CUT, BATCH, gradient=False)
            server.check()

    with pytest.raises(NotFinite):
        learn()
    first.load_weights(good)
    fresh, _, _ = parked("batch", SETTINGS)
    found, expected = (everything(s, last_states(run(s, 1))) for s in (ours, fresh))
    assert [n for n, a in expected.items() if a.tobytes() != found[n].tobytes()] == []
