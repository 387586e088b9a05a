"""Clients that are lost and come back: the same weights bit for bit, or a round without them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest

from splitee import train
from splitee.attendance import REPLAYS
from splitee.client import LocalClient, Settings, State, trunk_weights
from splitee.errors import Late, LinkClosed, Mismatch
from splitee.ops import Array
from splitee.rules import Rules
from splitee.server import Server
from splitee.strategies import Averaging, Strategy
from splitee.train import BatchDone, ClientBack, ClientDone, ClientLost, Event, RoundDone, fit
from toolkit.networks import arrays, resnet, server_for, unequal
from toolkit.rounds import (
    BATCH,
    CUTS,
    REASON,
    SAMPLES,
    SETTINGS,
    STRATEGIES,
    Failing,
    Resetting,
    Wrapped,
    averaging,
    clients,
    ends,
    everything,
    forget,
    last_states,
    sequential,
    states_of,
    troubles,
)

ROUNDS = 2
BATCHES = -(-SAMPLES["b"] // BATCH)  # of b in a round

# Where b is reset in its second round: nothing learnt yet, in the midst, all learnt.
RESETS = {
    "rate": ("set_rate", 2),
    "first-forward": ("forward", BATCHES + 1),
    "backward": ("backward", BATCHES + 3),
    "step": ("step", BATCHES + 3),
    "last-step": ("step", 2 * BATCHES),
    "state": ("state", 2),
}


def rate(number: int) -> float:
    """One for each round, which a device that was reset has forgotten."""
    return 0.05 / number


def settings_for(gradient: str) -> Settings:
    """With momentum, decay and a clip; a trunk that learns from those."""
    exit_weight, server_weight = trunk_weights(gradient)
    return Settings(0.05, 0.9, 1e-3, exit_weight, server_weight, clip=1.0)


def trained(
    kind: str, resets: Sequence[Resetting], *, aggregate: str, gradient: str, norm: str
) -> tuple[dict[str, Array], list[Event]]:
    """All that is learnt in those rounds, by owner and name, and what happened; b is reset."""
    settings = settings_for(gradient)
    members: list[LocalClient | Wrapped] = list(clients(settings=settings, norm=norm))
    for reset in resets:
        assert isinstance(members[1], LocalClient)
        members[1] = reset.wrap(members[1])
    strategy = STRATEGIES[kind](
        members, aggregate=aggregate, norm=norm, settings=settings, rate=rate
    )
    events = list(fit(strategy, ROUNDS))
    return everything(strategy, last_states(events)), events


def bits(found: dict[str, Array]) -> dict[str, bytes]:
    """The same as bytes: a zero has a sign there."""
    return {name: array.tobytes() for name, array in found.items()}


SOME = ("backward", "last-step")
CASES = [
    *[(k, a, g, "group") for k in STRATEGIES for a in ("server", "all")
      for g in ("local", "server", "both")],
    *[(k, a, "both", "batch") for k in STRATEGIES for a in ("server", "all")],
]  # fmt: skip


@pytest.mark.parametrize(("kind", "aggregate", "gradient", "norm"), CASES)
def test_a_reset_in_a_round_changes_no_bit(
    kind: str, aggregate: str, gradient: str, norm: str
) -> None:
    run = partial(trained, kind, aggregate=aggregate, gradient=gradient, norm=norm)
    expected, calm = run([])
    assert troubles(calm) == []
    everywhere = aggregate == "all" and gradient == "both"
    for where in RESETS if everywhere else SOME:
        method, call = RESETS[where]
        reset = Resetting(method, call)
        found, events = run([reset])
        assert reset.rejoined == 1, where
        assert troubles(events) == [("back", "b", 2)], where
        assert unequal(found, expected) == [], where
        assert bits(found) == bits(expected), where
        assert [e.clients for e in events if isinstance(e, RoundDone)] == [["a", "b", "c"]] * ROUNDS
        assert len(figures(events)) == len(figures(calm)) == 3 * ROUNDS
        assert figures(events) == figures(calm), where


def figures(events: Sequence[Event]) -> list[tuple[object, ...]]:
    """What is shown of every pass, without times and without bytes, which do count replays."""
    return sorted(
        (e.round, e.client, e.samples, e.exit_loss, e.exit_accuracy, e.server_loss,
         e.activations_up)
        for e in events if isinstance(e, ClientDone)
    )  # fmt: skip


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_reset_in_the_first_batch_of_all_changes_no_bit(kind: str) -> None:
    run = partial(trained, kind, aggregate="all", gradient="both", norm="batch")
    expected, _ = run([])
    found, events = run([Resetting("step", 1)])
    assert troubles(events) == [("back", "b", 1)]
    assert bits(found) == bits(expected)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_reset_while_the_means_come_back_changes_no_bit(kind: str) -> None:
    run = partial(trained, kind, aggregate="all", gradient="both", norm="group")
    expected, _ = run([])
    found, events = run([Resetting("load_weights", 2)])
    assert troubles(events) == [("back", "b", 2)]
    assert bits(found) == bits(expected)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_three_resets_in_a_pass_change_no_bit(kind: str) -> None:
    run = partial(trained, kind, aggregate="all", gradient="both", norm="group")
    expected, _ = run([])
    found, events = run([Resetting("step", 6, 8, 13)])
    assert troubles(events) == [("back", "b", 2)] * 3
    assert bits(found) == bits(expected)


def test_what_is_replayed_counts_as_traffic_and_in_no_other_figure() -> None:
    run = partial(trained, "averaging", aggregate="server", gradient="both", norm="group")
    calm, troubled = (ends_of(run(resets)[1]) for resets in ([], [Resetting("step", BATCHES + 3)]))
    sample = calm["b"].bytes_up // SAMPLES["b"]
    assert troubled["b"].bytes_up == calm["b"].bytes_up + 3 * BATCH * sample
    assert troubled["b"].bytes_down > calm["b"].bytes_down
    assert troubled["b"].activations_up == calm["b"].activations_up
    assert troubled["a"].bytes_up == calm["a"].bytes_up


def ends_of(events: Sequence[Event]) -> dict[str, ClientDone]:
    """The passes of the second round."""
    return ends([e for e in events if isinstance(e, ClientDone) and e.round == 2])


def test_a_server_goes_back_to_a_snapshot_bit_for_bit() -> None:
    server = server_for(resnet(norm="batch"), ["stem"], SETTINGS)
    (client,) = clients("a", norm="batch")

    def held() -> dict[str, bytes]:
        momentum = {f"{n}/momentum": v for n, v in arrays(server.momentum()).items()}
        return bits(arrays(server.tensors()) | momentum)

    fresh = server.snapshot()
    before = [held()]
    assert not server.momentum()
    train.train_batch(client, server, BATCH)
    later = server.snapshot()
    before.append(held())
    train.train_batch(client, server, BATCH)
    part = client.forward(BATCH, BATCH)  # and half a batch
    server.learn(part.activations, part.labels, "stem", BATCH, gradient=False)
    for snapshot, expected in ((later, before[1]), (fresh, before[0])):
        server.restore(snapshot)
        assert held() == expected
        assert all(t.grad is None for t in server.tensors().values())
    assert before[0] != before[1]


# ---- who does not come back ----


class Gone:
    """Answers nothing from the first step of one round to the beginning of a later one."""

    def __init__(self, client: LocalClient, first: int, last: int) -> None:
        self._client = client
        self._first, self._last = first, last
        self.round = 0  # set by who runs the rounds
        self._lost = False

    def __call__(self, method: str) -> None:
        if self._first <= self.round < self._last and method == "step":
            self._lost = True
            forget(self._client)
        if method == "rejoin" and self.round >= self._last:
            self._lost = False
        if self._lost:
            raise LinkClosed(REASON)


def rounds_with_b_gone(
    kind: str, aggregate: str, first: int, last: int, rounds: int
) -> tuple[Strategy, list[list[Event]]]:
    """Rounds in which b is lost in one and comes back in a later one."""
    a, b, c = clients()
    gone = Gone(b, first, last)
    strategy = STRATEGIES[kind]([a, Wrapped(b, gone), c], aggregate=aggregate, rate=rate)
    events = []
    for number in range(1, rounds + 1):
        gone.round = number
        events.append(list(strategy.round(number)))
    return strategy, events


@pytest.mark.parametrize("aggregate", ["server", "all"])
@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_round_is_complete_without_a_client_that_returns_in_a_later_one(
    kind: str, aggregate: str
) -> None:
    strategy, events = rounds_with_b_gone(kind, aggregate, 2, 4, 5)
    done = [e[-1] for e in events]
    assert all(isinstance(e, RoundDone) for e in done)
    took_part = [e.clients for e in done if isinstance(e, RoundDone)]
    assert took_part == [list("abc"), list("ac"), list("ac"), list("abc"), list("abc")]
    missing = [dict(e.missing) for e in done if isinstance(e, RoundDone)]
    assert missing == [{}, {"b": REASON}, {"b": REASON}, {}, {}]
    assert troubles([e for r in events for e in r]) == [("lost", "b", 2), ("back", "b", 4)]
    assert [e.name for e in strategy.clients] == list("abc")
    # two rounds less have taught b, and its data order goes on where it was
    place = last_states(events[-1])["b"].place
    assert (place.epoch, place.position, place.steps) == (2, SAMPLES["b"], 3 * BATCHES)


@pytest.mark.parametrize("aggregate", ["server", "all"])
def test_who_was_away_returns_with_the_last_means_and_its_own_momentum(aggregate: str) -> None:
    strategy, events = rounds_with_b_gone("averaging", aggregate, 2, 3, 2)
    before, after = last_states(events[0])["b"], last_states(events[1])["b"]
    others = last_states(events[1])["c"].weights
    assert unequal(after.momentum, before.momentum) == []
    assert after.place == before.place
    changed = set(unequal(after.weights, before.weights))
    # the deepest of all owns layers that no other has a copy of
    shared = {n for n in before.weights if n in others or n in strategy.server("a").tensors()}
    assert changed == (shared if aggregate == "all" else set())
    assert shared < set(before.weights)
    for name in changed & set(others):
        assert np.array_equal(after.weights[name], others[name])
    seen: list[State] = []
    b = strategy.everyone[1]
    assert isinstance(b, Wrapped)
    rejoin = b.inner.rejoin

    def recording(state: State, within: float) -> None:
        seen.append(state)
        rejoin(state, within)

    b.inner.rejoin = recording  # type: ignore[method-assign]
    b._before.round = 3  # type: ignore[attr-defined]
    list(strategy.round(3))
    assert len(seen) == 1
    assert unequal(seen[0].weights, after.weights) == []
    assert unequal(seen[0].momentum, before.momentum) == []


@pytest.mark.parametrize("aggregate", ["server", "all"])
def test_all_replicas_get_the_means_and_one_without_its_client_keeps_its_momentum(
    aggregate: str,
) -> None:
    strategy, _ = rounds_with_b_gone("averaging", aggregate, 2, 9, 2)
    alone, _ = rounds_with_b_gone("averaging", aggregate, 9, 9, 1)
    replica, others = (arrays(strategy.server(n).tensors()) for n in "bc")
    assert unequal(replica, {n: others[n] for n in replica}) == []
    momenta = [arrays(s.server("b").momentum()) for s in (strategy, alone)]
    assert unequal(*momenta) == []


def test_who_did_not_finish_is_left_out_of_the_means() -> None:
    strategy, events = rounds_with_b_gone("averaging", "all", 1, 9, 1)
    alone = averaging(clients("ac"), rate=rate)
    expected = last_states(list(alone.round(1)))
    for name in "ac":
        assert unequal(last_states(events[0])[name].weights, expected[name].weights) == []
        replicas = (arrays(s.server(name).tensors()) for s in (strategy, alone))
        assert unequal(*replicas) == []


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_client_that_is_reset_in_every_pass_is_given_up(kind: str) -> None:
    reset = Resetting("step", *range(1, 200))
    a, b, c = clients()
    strategy = STRATEGIES[kind]([a, reset.wrap(b), c], aggregate="server")
    events = list(strategy.round(1))
    assert troubles(events) == [("back", "b", 1)] * REPLAYS + [("lost", "b", 1)]
    (lost,) = [e for e in events if isinstance(e, ClientLost)]
    assert lost.reason == f"{REASON} (it was lost in each of 4 attempts at its pass)"
    assert reset.rejoined == REPLAYS
    others = everything(strategy, last_states(events))
    expected = STRATEGIES[kind](clients("ac"), aggregate="server")
    alone = everything(expected, last_states(list(expected.round(1))))
    assert unequal({n: others[n] for n in alone}, alone) == []


def test_a_device_that_comes_back_with_other_firmware_says_so() -> None:
    def flashed(method: str) -> None:
        if method == "step":
            raise LinkClosed(REASON)
        if method == "rejoin":
            raise Mismatch("another segment: run `splitee build`")

    a, b, _ = clients()
    events = list(averaging([a, Wrapped(b, flashed)]).round(1))
    assert [e.reason for e in events if isinstance(e, ClientLost)] == [
        "another segment: run `splitee build`"
    ]


# ---- when all are away ----


class Blackout:
    """Takes all clients away at some steps; they are back when they were asked often enough."""

    def __init__(self, at: int, asked: int) -> None:
        self._at, self._asked = at, asked
        self._steps = 0

    def wrap(self, client: LocalClient) -> Wrapped:
        """The client, in this blackout."""
        own = Resetting("step", self._at)
        left = self._asked

        def before(method: str) -> None:
            nonlocal left
            if method == "rejoin" and left:
                left -= 1
                raise LinkClosed(REASON)
            own(method)

        own.wrap(client)
        return Wrapped(client, before)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_round_that_all_were_lost_in_begins_again_and_no_bit_differs(kind: str) -> None:
    calm = STRATEGIES[kind](clients(), rate=rate)
    expected = everything(calm, last_states(list(fit(calm, 2))))
    strategy = STRATEGIES[kind]([Blackout(2, 1).wrap(c) for c in clients()], rate=rate)
    events = list(fit(strategy, 2))
    assert sorted(troubles(events)) == [*[("back", n, 1) for n in "abc"],
                                        *[("lost", n, 1) for n in "abc"]]  # fmt: skip
    assert [e.clients for e in events if isinstance(e, RoundDone)] == [["a", "b", "c"]] * 2
    assert bits(everything(strategy, last_states(events))) == bits(expected)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_lone_client_that_is_lost_in_every_pass_ends_the_training(kind: str) -> None:
    reset = Resetting("step", *range(1, 200))
    strategy = STRATEGIES[kind]([reset.wrap(*clients("b"))])
    events = list(fit(strategy, 5))
    assert [e for e in events if isinstance(e, RoundDone)] == []
    assert list(strategy.away) == ["b"]
    assert len([e for e in events if isinstance(e, ClientLost)]) == 2


# ---- late ----


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_round_does_not_wait_for_a_slow_client_beyond_its_deadline(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time is what the slow client's steps take; nothing waits for a clock."""
    passed = threading.local()  # of the thread that a client's pass runs in
    monkeypatch.setattr("time.monotonic", lambda: getattr(passed, "seconds", 0.0))
    alone = STRATEGIES[kind](clients("ac"), aggregate="all")
    expected = everything(alone, last_states(list(fit(alone, 2))))

    def slowly(seconds: float, method: str) -> None:
        if method == "set_rate":  # its pass begins
            passed.seconds = 0.0
        if method == "step":
            passed.seconds += seconds

    pace = {"a": 1.0, "b": 50.0, "c": 1.0}
    members = [Wrapped(c, partial(slowly, pace[c.name])) for c in clients()]
    strategy = STRATEGIES[kind](
        members, aggregate="all", rate=lambda _: SETTINGS.learning_rate, round_deadline=100.0
    )
    events = list(fit(strategy, 2))
    reason = (
        'client "b": 8 of 20 samples were done at the deadline: give it a smaller share or a '
        "shallower cut, or the round more time (round_deadline)"
    )
    assert [e.missing for e in events if isinstance(e, RoundDone)] == [{"b": reason}] * 2
    assert troubles(events) == [("lost", "b", 1), ("back", "b", 2), ("lost", "b", 2)]
    found = everything(strategy, last_states(events))
    assert unequal({n: found[n] for n in expected}, expected) == []
    assert all(m.deadline is None for m in members)
    assert last_states(events)["b"].place.steps == 0


def test_the_deadline_counts_from_the_round_or_from_the_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    given: dict[str, float | None] = {}

    def later(client: list[Wrapped], method: str) -> None:
        nonlocal now
        if method == "forward":
            given.setdefault(client[0].name, client[0].deadline)
        if method == "state":
            now += 5.0  # a turn is over

    def wrapped() -> list[Wrapped]:
        members = []
        for client in clients():
            me: list[Wrapped] = []
            me.append(Wrapped(client, partial(later, me)))
            members += me
        return members

    list(sequential(wrapped(), round_deadline=60.0).round(1))
    assert given == {"a": 1060.0, "b": 1065.0, "c": 1070.0}
    given.clear()
    began = now
    list(averaging(wrapped(), round_deadline=60.0).round(1))
    assert set(given.values()) == {began + 60.0}


def test_a_late_client_is_not_waited_for() -> None:
    def late(method: str) -> None:
        if method == "backward":
            raise Late("too late")
        assert method != "rejoin"

    a, b, _ = clients()
    events = list(averaging([a, Wrapped(b, late)]).round(1))
    assert troubles(events) == [("lost", "b", 1)]


def test_a_lost_client_is_waited_for_to_the_deadline_at_most() -> None:
    asked: list[float] = []

    class Patient(Wrapped):
        def rejoin(self, state: State, within: float) -> None:
            """Never comes back."""
            asked.append(within)
            raise LinkClosed(REASON)

    def lost(method: str) -> None:
        if method == "step":
            raise LinkClosed(REASON)

    for deadline in (None, 10.0):
        a, b, _ = clients()
        list(averaging([a, Patient(b, lost)], round_deadline=deadline).round(1))
    assert asked[0] == 30.0
    assert 0.0 < asked[1] <= 10.0


def test_strategies_ask_clients_where_they_are_unless_they_are_told() -> None:
    members = clients()
    servers = {c.name: server_for(resnet(), [c.cut], SETTINGS) for c in members}
    strategy = Averaging(members, servers, Rules(BATCH))
    for name, state in states_of(members).items():
        assert unequal(strategy.states[name].weights, state.weights) == []


def test_a_local_client_comes_back_in_exactly_that_state() -> None:
    (client,) = clients("b", norm="batch")
    server: Server = server_for(resnet(norm="batch"), [CUTS["b"]], SETTINGS)
    train.train_batch(client, server, BATCH)
    state = client.state()
    train.train_batch(client, server, BATCH)
    client.forward(BATCH, BATCH)
    client.rejoin(state, 1.0)
    again = client.state()
    assert bits(dict(again.weights)) == bits(dict(state.weights))
    assert bits(dict(again.momentum)) == bits(dict(state.momentum))
    assert again.place == state.place
    assert all(p.grad is None for p in client.segment.parameters())


def test_events_of_a_replay_tell_which_batches_do_not_count() -> None:
    strategy = sequential([Resetting("step", 3).wrap(*clients("b"))], rate=rate)
    events = [e for e in strategy.round(1) if isinstance(e, BatchDone | ClientBack | ClientDone)]
    kinds = [type(e).__name__ for e in events]
    assert kinds == ["BatchDone"] * 2 + ["ClientBack"] + ["BatchDone"] * BATCHES + ["ClientDone"]
    assert events[0] == events[3]  # the same batch again, bit for bit
    assert events[1] == events[4]


def test_means_that_cannot_be_sent_make_a_client_go_away_and_its_state_has_them() -> None:
    members = [Wrapped(c, Failing("load_weights", 1 if c.name == "b" else 0)) for c in clients()]
    strategy = averaging(members)
    events = list(strategy.round(1))
    calm = averaging(clients())
    expected = last_states(list(calm.round(1)))
    assert troubles(events) == [("lost", "b", 1)]
    assert isinstance(events[-1], RoundDone)
    assert events[-1].missing == {}  # its pass counts
    for name, state in expected.items():
        assert unequal(events[-1].states[name].weights, state.weights) == []


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_round_that_is_given_up_does_not_go_on_behind_our_back(kind: str) -> None:
    """As by Ctrl-C: the generator is closed in the midst of a round."""
    steps = []

    class Waiting(Wrapped):
        """Its second step waits until it is asked to end; the test would hang otherwise."""

        def __init__(self, client: LocalClient) -> None:
            self.waits, self.asked = threading.Event(), threading.Event()
            super().__init__(client, self._wait)

        def _wait(self, method: str) -> None:
            if method == "step":
                steps.append(method)
            if method == "step" and len(steps) > 1:
                self.waits.set()
                assert self.asked.wait(20)

        @property
        def deadline(self) -> float | None:
            """When it has to end."""
            return self._deadline

        @deadline.setter
        def deadline(self, deadline: float | None) -> None:
            self._deadline = deadline
            if deadline is not None:
                self.asked.set()

    (member,) = members = [Waiting(c) for c in clients("b")]
    strategy = STRATEGIES[kind](members)
    going = strategy.round(1)
    assert isinstance(next(going), BatchDone)
    assert member.waits.wait(20)
    going.close()  # type: ignore[attr-defined]
    assert member.asked.is_set()
    assert len(steps) == 2
    assert member.deadline is None
