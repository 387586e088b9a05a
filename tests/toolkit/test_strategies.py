"""A strategy of a user's own: found by its name, and held to what it may answer."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splitee.assemble import Assembly, Board
from splitee.client import Client
from splitee.errors import StrategyError
from splitee.fleet import parse
from splitee.means import Copy, cross_layer_mean, owners
from splitee.strategies import Averaging, Sequential, Strategy, of_name
from splitee.train import ClientDone, Event, RoundDone, fit
from toolkit.networks import unequal
from toolkit.rounds import averaging, clients, everything, last_states, sequential

FLEET = """\
name = "own"
strategy = "{strategy}"
[model]
width = 4
norm = "group"
[data]
samples = 32
[[client]]
name = "a"
cut = "stem"
[[client]]
name = "b"
cut = "layer1"
"""

MODULE = """
from splitee.strategies import Sequential

class Backwards(Sequential):
    def passes(self, clients, number):
        return (yield from super().passes(clients[::-1], number))

function = len
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the folder at hand."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "strategies_at_hand.py").write_text(MODULE)
    (tmp_path / "broken_at_hand.py").write_text("1 / 0\n")
    yield "strategies_at_hand"
    sys.modules.pop("strategies_at_hand", None)


def test_a_fleet_learns_by_the_class_that_its_file_names(module: str) -> None:
    text = FLEET.format(strategy=f"{module}:Backwards")
    assembly = Assembly(parse(text), lambda board: Board(False, None))
    members = [assembly.local(m) for m in assembly.members]
    for client, member in zip(members, assembly.members, strict=True):
        client.start(member.state, member.images)
    strategy = assembly.strategy(members)
    assert type(strategy).__name__ == "Backwards"
    assert list(strategy.servers()) == ["server"]
    turns = [e.client for e in strategy.round(1) if isinstance(e, ClientDone)]
    assert turns == ["b", "a"]


def test_the_built_in_ones_have_their_names() -> None:
    assert (of_name("averaging"), of_name("sequential")) == (Averaging, Sequential)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_at_hand:It", 'strategy "not_at_hand:It" cannot be loaded: ModuleNotFoundError: .*: '
         "is its module in this folder, or installed\\?"),
        ("strategies_at_hand:It", "cannot be loaded: AttributeError: .* 'It'"),
        ("broken_at_hand:It", "cannot be loaded: ZeroDivisionError: division by zero"),
        ("strategies_at_hand:function", "is no strategy: take a subclass of "
         "splitee.strategies.Strategy"),
        ("builtins:dict", "is no strategy"),
    ],
)  # fmt: skip
def test_what_is_no_strategy_is_refused(module: str, name: str, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        of_name(name)


class Backwards(Sequential):
    """Turns from the last client to the first."""

    def passes(
        self, clients: Sequence[Client], number: int
    ) -> Generator[Event, None, list[ClientDone]]:
        """Every client's turn."""
        return (yield from super().passes(clients[::-1], number))


def test_turns_in_another_order_are_those_of_another_fleet() -> None:
    strategy = sequential(clients(), kind=Backwards, aggregate="server")
    found = everything(strategy, last_states(list(fit(strategy, 2))))
    other = sequential(clients("cba"), aggregate="server")
    expected = everything(other, last_states(list(fit(other, 2))))
    assert unequal(found, expected) == []


class Named(Strategy):
    """Averages the deepest layers alone; the fleet's first two clients learn."""

    def draw(self, number: int, names: Sequence[str]) -> Sequence[str]:
        """The first two."""
        return names[:2]

    def passes(
        self, clients: Sequence[Client], number: int
    ) -> Generator[Event, None, list[ClientDone]]:
        """At once."""
        return (yield from self.at_once(clients, number))

    def copies(self, done: Sequence[ClientDone]) -> list[Copy]:
        """Of the classifier."""
        found = [self.server(d.client).tensors() for d in done]
        return [{n: (t[n], 1) for n in t if n.startswith("fc.")} for t in found]


def test_each_answer_can_be_a_class_own() -> None:
    strategy = averaging(clients(), kind=Named, aggregate="server")
    *_, done = strategy.round(1)
    assert isinstance(done, RoundDone)
    assert (done.clients, done.idle) == (["a", "b"], {"c"})
    replicas = [strategy.server(n).tensors() for n in "abc"]
    for name, tensor in replicas[0].items():
        if all(name in r for r in replicas):
            same = all(torch.equal(tensor, r[name]) for r in replicas)
            assert same == name.startswith("fc.")


class Wrong(Averaging):
    """Answers what the tests put here."""

    drawn: Sequence[str] = "abc"
    means: Mapping[str, Tensor] = {}

    def draw(self, number: int, names: Sequence[str]) -> Sequence[str]:
        """Those."""
        return self.drawn

    def mean(self, copies: Sequence[Copy]) -> Mapping[str, Tensor]:
        """Those."""
        return {**cross_layer_mean(copies), **self.means}


@pytest.mark.parametrize(
    ("means", "message"),
    [
        ({"fc.bias": torch.zeros(())}, r"mean of fc.bias is \(\), its copies are \(\d+,\)"),
        (
            {"fc.bais": torch.zeros(4)},
            r"of fc.bais is \(4,\), its copies are no layer of that name",
        ),
    ],
)
def test_means_of_other_shapes_or_names_are_refused(
    means: Mapping[str, Tensor], message: str
) -> None:
    strategy = averaging(clients(), kind=Wrong)
    assert isinstance(strategy, Wrong)
    strategy.means = means
    with pytest.raises(StrategyError, match=message):
        list(strategy.round(1))


def test_clients_that_there_are_not_cannot_be_drawn() -> None:
    strategy = averaging(clients(), kind=Wrong)
    assert isinstance(strategy, Wrong)
    strategy.drawn = "ax"
    with pytest.raises(StrategyError, match=r"Wrong\.draw: x cannot take part in round 1"):
        list(strategy.round(1))


def test_copies_that_nothing_trained_count_where_none_was() -> None:
    one, two = torch.ones(2), torch.zeros(2)
    assert owners([{"w": (one, 0)}, {"w": (two, 3)}])["w"][0][1] == 3
    assert len(owners([{"w": (one, 0)}, {"w": (two, 0)}])["w"]) == 1
    assert owners([{"bottleneck.weight": (one, 3)}]) == {}


# ---- gradients mixed in a fleet ----


def test_each_client_learns_from_the_gradient_that_its_table_names() -> None:
    modes = {"a": ("server", None), "b": ("both", 0.25)}

    def trained(mixed: bool, gradient: str, weight: float | None) -> Mapping[str, object]:
        fleet = parse(FLEET.format(strategy="averaging"))
        own = {c.name: modes[c.name] if mixed else (None, None) for c in fleet.client}
        tables = [
            c.model_copy(update={"gradient": own[c.name][0], "exit_weight": own[c.name][1]})
            for c in fleet.client
        ]
        fleet = fleet.model_copy(
            update={"client": tables, "gradient": gradient, "exit_weight": weight or 0.5}
        )
        assembly = Assembly(fleet, lambda board: Board(False, None))
        members = [assembly.local(m) for m in assembly.members]
        for client, member in zip(members, assembly.members, strict=True):
            client.start(member.state, member.images)
        strategy = assembly.strategy(members)
        strategy.rules = replace(strategy.rules, period=9)
        list(strategy.round(1))
        return strategy.states

    mixed = trained(True, "local", None)
    for name, (gradient, weight) in modes.items():
        states = {
            mode: trained(False, mode, weight)[name].weights  # type: ignore[attr-defined]
            for mode in ("local", "server", "both")
        }
        mine = mixed[name].weights  # type: ignore[attr-defined]
        assert [m for m, w in states.items() if unequal(mine, w) == []] == [gradient]
