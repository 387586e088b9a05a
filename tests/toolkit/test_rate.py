"""A learning rate for each round: what it is, and that every client and server learns at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, StepLR

from splitee.fleet import Fleet
from splitee.rules import Rules
from splitee.strategies import Averaging, Strategy
from splitee.train import ClientLost, fit
from toolkit.networks import unequal
from toolkit.rounds import (
    REASON,
    SETTINGS,
    Failing,
    Wrapped,
    averaging,
    clients,
    everything,
    last_states,
    sequential,
)

NEVER = 99  # a period that no test reaches
ROUNDS = 12


def fleet(**optimizer: object) -> Fleet:
    """A fleet of those rounds."""
    return Fleet.model_validate(
        {"name": "x", "rounds": ROUNDS, "optimizer": optimizer, "client": [{"name": "one"}]}
    )


def in_torch(base: float, **step: float) -> list[float]:
    """The rates of torch's StepLR, or without step CosineAnnealingLR; its steps are rounds."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    scheduler: LRScheduler
    if step:
        scheduler = StepLR(optimizer, int(step["every"]), step["factor"])
    else:
        scheduler = CosineAnnealingLR(optimizer, T_max=ROUNDS)
    rates = []
    for _ in range(ROUNDS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def rates(of: Fleet) -> list[float]:
    """Those of all rounds."""
    return [of.rate(number) for number in range(1, ROUNDS + 1)]


def test_a_rate_stays_unless_the_fleet_file_says_otherwise() -> None:
    assert rates(fleet(learning_rate=0.3)) == [0.3] * ROUNDS
    assert fleet().optimizer.schedule == "constant"


def test_cosine_is_torchs_down_to_zero_behind_the_last_round() -> None:
    found = rates(fleet(learning_rate=0.3, schedule="cosine"))
    assert found == pytest.approx(in_torch(0.3), rel=1e-12)
    assert found[0] == 0.3
    assert 0 < found[-1] < 0.006


@pytest.mark.parametrize(("every", "factor"), [(1, 0.9), (5, 0.1), (4, 0.5), (99, 0.1)])
def test_step_is_torchs(every: int, factor: float) -> None:
    found = rates(fleet(learning_rate=0.3, schedule="step", step_every=every, step_factor=factor))
    assert found == pytest.approx(in_torch(0.3, every=every, factor=factor), rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_a_warm_up_is_torchs_linear_one_times_the_schedule(schedule: str) -> None:
    calm = fleet(learning_rate=0.4, schedule=schedule, step_every=2)
    warm = fleet(learning_rate=0.4, schedule=schedule, step_every=2, warmup=3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    linear = LinearLR(optimizer, start_factor=1 / 4, total_iters=3)
    expected = []
    for rate in rates(calm):
        expected.append(rate * optimizer.param_groups[0]["lr"])
        optimizer.step()
        linear.step()
    assert rates(warm) == pytest.approx(expected, rel=1e-12)


def test_parts_have_rates_and_warm_ups_of_their_own() -> None:
    of = Fleet.model_validate(
        {
            "name": "x",
            "optimizer": {
                "learning_rate": 0.4, "warmup": 1, "server_rate": 0.9, "server_warmup": 2,
            },
            "client": [{"name": "usual"}, {"name": "own", "learning_rate": 0.2}],
        }
    )  # fmt: skip
    for client, expected in (("usual", [0.2, 0.4, 0.4]), ("own", [0.1, 0.2, 0.2])):
        assert [of.rate(n, client) for n in (1, 2, 3)] == pytest.approx(expected)
    assert [of.rate(n) for n in (1, 2, 3)] == pytest.approx([0.3, 0.6, 0.9])
    assert fleet(kind="adamw").rate(1) == 0.001
    assert fleet(kind="sgd").rate(1, "one") == 0.05


def test_a_strategy_gives_each_part_its_own_rate() -> None:
    def rate(number: int, client: str | None) -> float:
        return {"a": 0.1, "b": 0.2, "c": 0.3, None: 0.4}[client] * number

    members = clients()
    servers = averaging(members).servers()
    by_client = {name: servers[f"server.{name}"] for name in "abc"}
    list(Averaging(members, by_client, Rules(4, rate=rate)).round(2))
    found = {c.name: c.settings.learning_rate for c in members}
    assert found == {"a": 0.2, "b": 0.4, "c": 0.6}
    assert {g["lr"] for s in servers.values() for g in s._optimizer.param_groups} == {0.8}


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "averaging": averaging,
    "sequential": sequential,
}


@pytest.mark.parametrize("kind", STRATEGIES)
def test_clients_and_servers_learn_at_the_rate_of_the_round(kind: str) -> None:
    make = STRATEGIES[kind]
    fast = make(clients(), period=NEVER, rate=lambda number: {1: 0.1, 2: 0.0}[number])
    expected = make(clients(settings=replace(SETTINGS, learning_rate=0.1)), period=NEVER)
    for server in expected.servers().values():
        server.set_rate(0.1)
    first = everything(fast, last_states(list(fast.round(1))))
    assert unequal(first, everything(expected, last_states(list(expected.round(1))))) == []
    second = everything(fast, last_states(list(fast.round(2))))
    assert set(unequal(second, first)) == {name for name in first if "/momentum/" in name}


@pytest.mark.parametrize("kind", STRATEGIES)
def test_rounds_that_go_on_later_have_their_own_rates(kind: str) -> None:
    asked = []

    def rate(number: int) -> float:
        asked.append(number)
        return 0.1 / number

    strategy = STRATEGIES[kind](clients(), rate=rate)
    list(fit(strategy, 4, first=3))
    assert set(asked) == {3, 4}
    assert [c.settings.learning_rate for c in strategy.clients] == [0.1 / 4] * 3


def test_a_client_that_is_lost_when_it_is_told_the_rate_is_out() -> None:
    members = [Wrapped(c, Failing("set_rate", 2 if c.name == "b" else 0)) for c in clients()]
    strategy = averaging(members, rate=lambda number: 0.1)
    events = list(fit(strategy, 2))
    assert [e for e in events if isinstance(e, ClientLost)] == [ClientLost("b", 2, REASON)]
    assert [c.name for c in strategy.clients] == ["a", "c"]


def test_a_new_rate_leaves_all_other_settings() -> None:
    (client,) = clients("a")
    client.set_rate(0.3)
    assert client.settings == replace(SETTINGS, learning_rate=0.3)
