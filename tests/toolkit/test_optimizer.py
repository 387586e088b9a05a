"""SGD and AdamW on both halves: torch's own, and what they remember goes on bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from splitee import optimizer
from splitee.client import Settings
from splitee.runs import Run
from splitee.state import AdamW
from splitee.strategies import Strategy
from splitee.train import RoundDone, train_batch
from toolkit.networks import (
    arrays,
    far,
    local_client,
    network_input,
    random_images,
    resnet,
    server_for,
    unequal,
)
from toolkit.rounds import (
    STRATEGIES,
    Resetting,
    clients,
    everything,
    last_states,
    troubles,
)

# gradient = "server": the trunk learns as in the whole network
RETURNED = Settings(0.05, 0.9, 1e-2, exit_weight=0.0, server_weight=1.0, clip=1e6)
ADAMW = replace(RETURNED, learning_rate=0.004, adamw=AdamW(0.8, 0.95, 1e-5))
BATCHES = [list(range(start, start + 8)) for start in range(0, 32, 8)]


def in_torch(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """What the settings mean."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.adamw is None:
        return torch.optim.SGD(parameters, rate, settings.momentum, weight_decay=decay)
    betas = (0.8, 0.95)
    return torch.optim.AdamW(parameters, rate, betas, eps=1e-5, weight_decay=decay)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (ADAMW, ADAMW),
        (ADAMW, replace(ADAMW, learning_rate=0.02)),
        (RETURNED, ADAMW),
        (ADAMW, RETURNED),
    ],
    ids=["adamw", "server-rate", "sgd-adamw", "adamw-sgd"],
)
@pytest.mark.parametrize("cut", ["stem", "layer2"])
def test_both_halves_learn_as_torch_has_it(cut: str, mine: Settings, theirs: Settings) -> None:
    images, whole = random_images(32), copy.deepcopy(resnet())
    client = local_client(resnet(), cut, mine, images, capacity=8)
    server = server_for(resnet(), [cut], theirs)
    trunk = {n for n in client.state().weights if not n.startswith("exits.")}
    halves = [
        in_torch([p for n, p in whole.named_parameters() if (n in trunk) is held], settings)
        for held, settings in ((True, mine), (False, theirs))
    ]
    order = client.upcoming(32)
    for places in BATCHES:
        train_batch(client, server, 8)
        labels = torch.as_tensor(order.y[places]).long()
        loss = F.cross_entropy(whole(network_input(order.x[places])), labels)
        torch.autograd.backward(loss)
        for half in halves:
            half.step()
            half.zero_grad()
    expected = arrays(whole.state_dict())
    held = {n: a for n, a in client.state().weights.items() if n in trunk}
    assert far(held | arrays(server.tensors()), expected, 1e-4) == {}
    started = arrays(resnet().state_dict())
    assert set(unequal(expected, started)) == set(started)


def test_what_adamw_remembers_has_names_and_layers_that_learnt_nothing_have_none() -> None:
    client = local_client(resnet(), "layer3", ADAMW, random_images(8), capacity=8)
    server = server_for(resnet(), ["stem", "layer3"], ADAMW)
    assert client.state().momentum == server.momentum() == {}
    for _ in range(2):
        train_batch(client, server, 4)
    assert sorted(server.momentum()) == [
        f"fc.{p}.{kept}" for p in ("bias", "weight") for kept in ("exp_avg", "exp_avg_sq", "step")
    ]
    assert server.momentum()["fc.bias.step"] == 2
    assert {n.rsplit(".", 1)[0] for n in client.state().momentum} == set(client.gradients())


def test_it_remembers_copies() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    learning = in_torch([parameter], ADAMW)
    kept = {
        "p.exp_avg": torch.ones(3),
        "p.exp_avg_sq": torch.ones(3),
        "p.step": torch.full((1,), 4.0),  # as a file has it, which knows no single number
    }
    optimizer.remember(learning, {"p": parameter}, kept)
    learning.step()
    assert kept["p.exp_avg"].tolist() == [1.0] * 3
    assert optimizer.memory(learning, {"p": parameter})["p.step"] == 5
    optimizer.remember(learning, {"p": parameter}, {})
    assert optimizer.memory(learning, {"p": parameter}) == {}


# ---- what goes on ----

MIXED = replace(ADAMW, exit_weight=0.5, server_weight=0.5)
Make = Callable[..., Strategy]


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
def test_a_reset_changes_no_bit(make: Make) -> None:
    found = []
    for resets in ((), (2, 9)):
        reset, (a, b, c) = Resetting("step", *resets), clients(settings=MIXED)
        strategy = make([a, reset.wrap(b), c], settings=MIXED, rate=lambda number: 0.01 / number)
        events = [e for number in (1, 2) for e in strategy.round(number)]
        assert len(troubles(events)) == reset.rejoined == len(resets)
        found.append(everything(strategy, last_states(events)))
    assert (
        "server.b/momentum/fc.bias.step" in found[0] or "server/momentum/fc.bias.step" in found[0]
    )
    assert "b/momentum/stem.0.weight.exp_avg_sq" in found[0]
    assert unequal(*found) == []


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
def test_a_checkpoint_goes_on_bit_for_bit(make: Make, tmp_path: Path) -> None:
    through = make(clients(settings=MIXED), settings=MIXED)
    events = [e for number in (1, 2) for e in through.round(number)]
    expected = everything(through, last_states(events))

    first, run = make(clients(settings=MIXED), settings=MIXED), Run(tmp_path)
    *_, done = first.round(1)
    assert isinstance(done, RoundDone)
    run.save(1, done.states, first.servers())
    kept = run.load()
    members = clients(settings=MIXED)
    for client in members:
        client.load_state(kept.states[client.name])
    again = make(members, settings=MIXED)
    again.load(kept.servers, kept.server_momentum)
    found = everything(again, last_states(list(again.round(2))))
    assert unequal(found, expected) == []
