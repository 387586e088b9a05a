"""A share of the clients a round, drawn by number; rounds that too few complete do not count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from splitee.client import LocalClient
from splitee.errors import LinkClosed, TooFewClients
from splitee.ops import Array
from splitee.rules import Rules
from splitee.runs import Run
from splitee.strategies import Averaging, Strategy
from splitee.train import ClientDone, Event, RoundDone, RoundFailed, fit
from toolkit.networks import arrays, unequal
from toolkit.rounds import (
    REASON,
    STRATEGIES,
    Failing,
    Wrapped,
    averaging,
    clients,
    ends,
    everything,
    forget,
    last_states,
    troubles,
)

Make = Callable[..., Strategy]
EACH = pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
ONE, TWO = 0.34, 0.67  # of three clients


def draws(seed: int, clients_there: int, participation: float, rounds: int) -> list[list[str]]:
    """Who is drawn, of that many clients."""
    names = [f"c{i}" for i in range(clients_there)]
    rules = Rules(4, participation=participation, seed=seed)
    nobody = [LocalClient.__new__(LocalClient) for _ in names]
    for client, name in zip(nobody, names, strict=True):
        client.name = name
    strategy = Averaging(nobody, {}, rules, states={})
    return [list(strategy.draw(number, names)) for number in range(1, rounds + 1)]


@pytest.mark.parametrize(
    ("participation", "count"), [(1.0, 100), (0.1, 10), (0.07, 7), (0.005, 1), (0.999, 100)]
)
def test_a_round_has_its_share_of_the_clients(participation: float, count: int) -> None:
    for drawn in draws(3, 100, participation, 5):
        assert len(drawn) == len(set(drawn)) == count


def test_draws_hang_on_seed_and_round_alone_and_favour_nobody() -> None:
    drawn = draws(3, 100, 0.1, 1000)
    assert draws(3, 100, 0.1, 1000) == drawn
    assert draws(4, 100, 0.1, 20) != drawn[:20]
    assert len({tuple(sorted(names)) for names in drawn}) == 1000
    counts = Counter(name for names in drawn for name in names)
    # binomial of 1,000 draws of one in ten: a deviation of 9.5, and 5 of them are one in 10,000
    assert set(counts) == {f"c{i}" for i in range(100)}
    assert all(52 < n < 148 for n in counts.values())


def took_part(events: Sequence[Event]) -> list[str]:
    """Of each round, the clients whose passes count."""
    return ["".join(e.clients) for e in events if isinstance(e, RoundDone)]


@EACH
def test_who_is_not_drawn_is_asked_for_nothing(make: Make) -> None:
    asked: list[tuple[str, str]] = []
    members = [Wrapped(c, partial(lambda n, method: asked.append((n, method)), c.name))
               for c in clients()]  # fmt: skip
    strategy = make(members, participation=ONE)
    seen = set()
    for number in range(1, 9):
        asked.clear()
        events = list(strategy.round(number))
        (drawn,) = took_part(events)
        assert {name for name, _ in asked} == {drawn}
        (done,) = (e for e in events if isinstance(e, RoundDone))
        assert done.idle == set("abc") - {drawn}
        assert done.missing == {}
        assert [e.client for e in events if isinstance(e, ClientDone)] == [drawn]
        seen.add(drawn)
    assert seen == set("abc")


@EACH
def test_a_round_of_one_is_that_of_a_fleet_of_one(make: Make) -> None:
    strategy = make(clients(), participation=ONE)
    states = last_states(list(strategy.round(1)))
    (drawn,) = took_part(list(make(clients(), participation=ONE).round(1)))
    before = {c.name: c.state().weights for c in clients()}
    alone = make(clients(drawn))
    expected = last_states(list(alone.round(1)))[drawn]
    assert unequal(states[drawn].weights, expected.weights) == []
    mean = {**arrays(alone.server(drawn).tensors()), **expected.weights}
    for name in set("abc") - {drawn}:
        held = states[name].weights
        assert unequal(held, {n: mean.get(n, a) for n, a in before[name].items()}) == []
        assert unequal(held, before[name]) != []  # the stem is everyone's
        assert states[name].place.steps == 0


@EACH
def test_who_is_drawn_again_begins_with_the_means_that_it_has_missed(make: Make) -> None:
    begun: dict[str, dict[str, Array]] = {}
    members: list[Wrapped] = []

    def note(name: str, method: str) -> None:
        (client,) = (m.inner for m in members if m.name == name)
        if method == "forward" and name not in begun:
            begun[name] = dict(client.state().weights)

    members += [Wrapped(c, partial(note, c.name)) for c in clients()]
    strategy = make(members, participation=ONE)
    was_stale = False
    for number in range(1, 9):
        begun.clear()
        expected = {n: s.weights for n, s in strategy.states.items()}
        held = {m.name: m.inner.state().weights for m in members}
        list(strategy.round(number))
        for name, weights in begun.items():
            assert unequal(weights, expected[name]) == []
            was_stale |= unequal(held[name], expected[name]) != []
    assert was_stale
    for member in members:  # as before a test
        strategy.update(member)
        assert unequal(member.inner.state().weights, strategy.states[member.name].weights) == []


@EACH
def test_a_run_that_goes_on_draws_the_same_and_learns_the_same(make: Make, tmp_path: Path) -> None:
    through = make(clients(), participation=TWO)
    events = list(fit(through, 5))
    assert {len(names) for names in took_part(events)} == {2}
    assert len(set(took_part(events))) > 1

    first, run = make(clients(), participation=TWO), Run(tmp_path)
    done = [e for e in fit(first, 2) if isinstance(e, RoundDone)][-1]
    run.save(2, done.states, first.servers())
    kept, members = run.load(), clients()
    for client in members:
        client.load_state(kept.states[client.name])
    again = make(members, participation=TWO)
    again.load(kept.servers, kept.server_momentum)
    later = list(fit(again, 5, first=3))
    assert took_part(later) == took_part(events)[2:]
    found, expected = (
        everything(s, last_states(e)) for s, e in ((again, later), (through, events))
    )
    assert unequal(found, expected) == []


@EACH
def test_who_is_drawn_and_lost_is_missing_and_all_others_are_idle(make: Make) -> None:
    drawn = took_part(list(make(clients(), participation=TWO).round(1)))[0]
    lost = drawn[0]
    members = [Wrapped(c, Failing("step", 1 if c.name == lost else 0)) for c in clients()]
    *_, done = make(members, participation=TWO).round(1)
    assert isinstance(done, RoundDone)
    assert done.missing == {lost: REASON}
    assert done.idle == set("abc") - set(drawn)
    assert done.clients == [drawn[1]]


# ---- too few ----


class Outage:
    """Loses clients at their last step of the first pass; some are back when they are asked."""

    def __init__(self, names: str, back: str = "") -> None:
        self._names, self._back = names, back
        self._lost: set[str] = set()
        self._steps: Counter[str] = Counter()

    def wrap(self, client: LocalClient) -> LocalClient | Wrapped:
        """The client, in this outage."""
        if client.name not in self._names:
            return client
        return Wrapped(client, partial(self._before, client))

    def _before(self, client: LocalClient, method: str) -> None:
        name = client.name
        self._steps[name] += method == "step"
        if method == "step" and self._steps[name] == 2:
            self._lost.add(name)
            forget(client)
            raise LinkClosed(REASON)
        if name in self._lost:
            asked = method == "rejoin"
            self._steps[f"{name} asked"] += asked
            # not while its pass waits for it, but when the round does
            if not (asked and name in self._back and self._steps[f"{name} asked"] > 1):
                raise LinkClosed(REASON)
            self._lost.discard(name)


def rate(number: int) -> float:
    """That of each round."""
    return 0.05 / number


def failed(events: Sequence[Event]) -> list[RoundFailed]:
    """Rounds that did not count."""
    return [e for e in events if isinstance(e, RoundFailed)]


@EACH
def test_a_round_that_too_few_complete_is_undone_and_begins_again(make: Make) -> None:
    calm = make(clients(), rate=rate)  # which a device that was lost has forgotten
    expected = everything(calm, last_states(list(fit(calm, 2))))
    outage = Outage("bc", back="bc")
    strategy = make([outage.wrap(c) for c in clients()], min_clients=2, rate=rate)
    events = list(fit(strategy, 2))
    assert failed(events) == [RoundFailed(1, ["a"], 2)]
    assert took_part(events) == ["abc", "abc"]
    assert unequal(everything(strategy, last_states(events)), expected) == []


@EACH
def test_a_round_goes_on_without_whom_it_can_do_without(make: Make) -> None:
    outage = Outage("c")
    events = list(make([outage.wrap(c) for c in clients()], min_clients=2).round(1))
    assert failed(events) == []
    assert took_part(events) == ["ab"]


@EACH
def test_training_ends_where_a_round_has_too_few_twice_and_nothing_is_learnt(make: Make) -> None:
    outage = Outage("bc")
    strategy = make([outage.wrap(c) for c in clients()], min_clients=2)
    before = everything(strategy, strategy.states)
    events: list[Event] = []
    message = (
        r"^round 1: fewer clients completed it than it takes \(min_clients = 2\), twice: "
        rf"{REASON.split(':')[0]}: .*; .*; when they are back, go on with the run "
        r"\(splitee train --resume\)$"
    )
    with pytest.raises(TooFewClients, match=message):
        events.extend(fit(strategy, 2))
    assert unequal(everything(strategy, strategy.states), before) == []
    (a,) = strategy.clients
    assert unequal(a.state().weights, strategy.states["a"].weights) == []
    assert a.state().place.steps == 0


def test_others_are_drawn_for_those_that_stay_away() -> None:
    (first,) = took_part(list(averaging(clients(), participation=ONE).round(1)))
    outage = Outage(first)
    strategy = averaging([outage.wrap(c) for c in clients()], participation=ONE)
    events = list(strategy.round(1))
    assert failed(events) == [RoundFailed(1, [], 1)]
    (done,) = (e for e in events if isinstance(e, RoundDone))
    (second,) = done.clients
    assert second != first
    assert done.missing == {first: REASON}
    assert troubles(events) == [("lost", first, 1)]
    assert list(ends(events)) == [second]


def test_what_was_undone_is_in_no_figure(tmp_path: Path) -> None:
    outage = Outage("bc", back="bc")
    run = Run(tmp_path)
    for event in averaging([outage.wrap(c) for c in clients()], min_clients=2).round(1):
        run.log(event)
    records: list[dict[str, Any]] = run.metrics()
    passes = [r["client"] for r in records if r["event"] == "ClientDone"]
    assert passes == ["a", "b", "c"]
    (undone,) = (r for r in records if r["event"] == "RoundFailed")
    assert (undone["clients"], undone["needed"], undone["round"]) == (["a"], 2, 1)
    assert [r["clients"] for r in run.took_part()] == [["a", "b", "c"]]
