"""Whole runs of small fleets, from the fleet file to the checkpoint, with every kind of client."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from host_harness import differences, serving, splitee
from splitee import data, zoo
from splitee.assemble import Assembly, Member
from splitee.client import LocalClient, State
from splitee.data import Dataset, draw_order
from splitee.fleet import Fleet, parse
from splitee.ops import Array
from splitee.runs import Run
from splitee.train import ClientDone, ClientLost, Event, RoundDone, fit, train_batch
from splitee_exporters.c import to_c
from splitee_host import boards, launch
from splitee_host.device import Device
from splitee_host.launch import Launcher

BATCH = 16


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """The digits, but few of them: enough for several batches of every client."""
    digits = data.load("digits")
    few = replace(digits, train=digits.train[:180], test=digits.test[:60])
    monkeypatch.setattr(data, "load", lambda name: few)
    return few


def assembled(fleet: Fleet) -> Assembly:
    known = boards.load_boards()
    return Assembly(fleet, lambda name: boards.look_up(known, name).for_assembly)


# ---- every combination of settings ----

COMBINATIONS = list(
    product(
        ("averaging", "sequential"),
        ("local", "server", "both"),
        ("server", "all"),
        ("own", "upto"),
    )
)

MIXED = """\
name = "mixed"
rounds = 1
strategy = "{}"
gradient = "{}"
aggregate = "{}"
exits = "{}"
exit_weight = 0.3
[model]
width = 2
norm = "group"
[[client]]
name = "process"
board = "posix"
cut = "layer1"
capacity = 5
[[client]]
name = "edge"
board = "python"
cut = "layer2"
capacity = 7
[[client]]
name = "local"
board = "torch"
cut = "layer3"
"""


@dataclass(frozen=True)
class Trained:
    """What a run leaves, without its folder."""

    members: list[Member]
    events: list[Event]
    states: Mapping[str, State]
    servers: Mapping[str, Mapping[str, Array]]
    servers_before: Mapping[str, Mapping[str, Array]]


def trained(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, *, other_servers: bool = False
) -> Trained:
    """Trains a fleet; Python clients are served by threads instead of processes.

    other_servers: the servers begin with other weights than the fleet's seed gives them.
    """
    assembly = assembled(fleet)
    members = {m.name: m for m in assembly.members}
    monkeypatch.setattr(
        launch,
        "python_client",
        lambda _, name: serving(assembly.local(members[name]), members[name].build),
    )
    root = Path("build") / "firmware"
    with Launcher(assembly, Path("unused"), to_c, root, lambda text: None) as launcher:
        clients = [launcher.launch(m).client for m in assembly.members]
        strategy = assembly.strategy(clients)
        for server in strategy.servers().values() if other_servers else ():
            server.load({"fc.weight": -server.tensors()["fc.weight"]})

        def weights() -> dict[str, dict[str, Array]]:
            servers = strategy.servers()
            return {
                name: {k: t.detach().numpy().copy() for k, t in server.tensors().items()}
                for name, server in servers.items()
            }

        before = weights()
        events = list(fit(strategy, fleet.rounds))
        ended = events[-1]
        assert isinstance(ended, RoundDone)
        for client in clients:  # the means have come back to them
            assert differences(client.state(), ended.states[client.name]) == []
        return Trained(assembly.members, events, ended.states, weights(), before)


def moved(before: Mapping[str, Array], after: Mapping[str, Array]) -> set[str]:
    return {name for name in after if not np.array_equal(before[name], after[name])}


def all_torch(text: str) -> Fleet:
    """The same fleet of clients in this process."""
    return parse(text.replace('"posix"', '"torch"').replace('"python"', '"torch"'))


def assert_same_numbers(one: Trained, other: Trained) -> None:
    """All weights of clients and servers are the same, to rounding."""
    for name, state in one.states.items():
        for tensor, mine in state.weights.items():
            theirs = other.states[name].weights[tensor]
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4, err_msg=tensor)
    for name, server in one.servers.items():
        for tensor, mine in server.items():
            theirs = other.servers[name][tensor]
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4, err_msg=tensor)


@pytest.mark.parametrize("batch_norm", ["held", "frozen"])
def test_every_kind_of_client_learns_as_torch_does_with_batch_norm(
    batch_norm: str, few_digits: Dataset, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = MIXED.format("averaging", "both", "all", "upto")
    text = text.replace('norm = "group"', f'norm = "batch"\nbatch_norm = "{batch_norm}"')
    if batch_norm == "held":
        text = re.sub("capacity = .", f"capacity = {BATCH}", text)
    mixed = trained(parse(text), monkeypatch)
    assert_same_numbers(mixed, trained(all_torch(text), monkeypatch))
    for member in mixed.members:
        after = mixed.states[member.name].weights
        assert moved(member.state.weights, after) == set(after)  # statistics too


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_every_kind_of_client_learns_as_torch_does(
    combination: tuple[str, str, str, str],
    few_digits: Dataset,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strategy, _, aggregate, exits = combination
    text = MIXED.format(*combination)
    mixed = trained(parse(text), monkeypatch)
    in_torch = trained(all_torch(text), monkeypatch)

    assert not [e for e in mixed.events if isinstance(e, ClientLost)]
    done = {e.client: e for e in mixed.events if isinstance(e, ClientDone)}
    assert list(mixed.states) == ["process", "edge", "local"]
    for member in mixed.members:
        state = mixed.states[member.name]
        samples = len(member.images)
        assert (done[member.name].samples, state.place.samples) == (samples, samples)
        assert (state.place.steps, state.place.position) == (math.ceil(samples / BATCH), samples)
        trained_exits = {n.split(".")[1] for n in state.weights if n.startswith("exits.")}
        cuts = ["stem", "layer1", "layer2", "layer3"]
        depth = cuts.index(member.cut.name) + 1
        assert trained_exits == set(cuts[:depth] if exits == "upto" else cuts[depth - 1 : depth])
        # everything that a client has learns: trunk, and all of its exits
        assert moved(member.state.weights, state.weights) == set(state.weights)
    for name, before in mixed.servers_before.items():
        assert moved(before, mixed.servers[name]) == set(before)

    assert_same_numbers(mixed, in_torch)

    copies: dict[str, list[Array]] = {}  # of a layer, on clients and servers
    owners = [state.weights for state in mixed.states.values()]
    replicas = list(mixed.servers.values())
    for owner in owners + replicas if aggregate == "all" else replicas:
        for tensor, value in owner.items():
            copies.setdefault(tensor, []).append(value)
    shared = {tensor: values for tensor, values in copies.items() if len(values) > 1}
    for tensor, values in shared.items():
        assert all(np.array_equal(values[0], v) for v in values), tensor
    assert ("stem.0.weight" in shared) == (aggregate == "all")
    assert ("fc.weight" in shared) == (strategy == "averaging")
    if aggregate == "server":
        stems = [owner["stem.0.weight"] for owner in owners]
        assert not np.array_equal(stems[0], stems[1])


OWN = {  # of each client: devices learn by SGD, all else by AdamW
    "process": 'gradient = "server"\noptimizer = "sgd"\nlearning_rate = 0.1',
    "edge": 'gradient = "both"\nexit_weight = 0.25\noptimizer = "sgd"\nlearning_rate = 0.02',
    "local": "learning_rate = 0.003",
}


def test_every_kind_of_client_learns_from_its_own_gradient_at_its_own_rate_beside_adamw(
    few_digits: Dataset, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # eps: where a gradient is but rounding, AdamW would make a step of it
    optimizer = '[optimizer]\nkind = "adamw"\nserver_rate = 0.002\neps = 1e-3\nwarmup = 1\n[model]'
    text = MIXED.format("averaging", "local", "all", "upto").replace("[model]", optimizer)
    for name, keys in OWN.items():
        text = text.replace(f'name = "{name}"', f'name = "{name}"\n{keys}')
    mixed, in_torch = (trained(fleet, monkeypatch) for fleet in (parse(text), all_torch(text)))
    assert_same_numbers(mixed, in_torch)
    for name, keys in OWN.items():  # without them, a client learns something else
        fleet = all_torch(text.replace(keys, "").replace('kind = "adamw"', ""))
        other = trained(fleet, monkeypatch).states[name].momentum
        mine = in_torch.states[name].momentum
        assert {n for n in other if n not in mine or not np.allclose(mine[n], other[n], 1e-2)}


@pytest.mark.parametrize("exits", ["own", "upto"])
def test_a_fleet_whose_cuts_could_move_learns_the_same_bit_for_bit(
    exits: str, few_digits: Dataset, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = MIXED.format("averaging", "both", "all", exits)
    fixed = trained(parse(text), monkeypatch)
    deeper = text.replace('cut = "layer', 'deepest = "layer3"\ncut = "layer')
    moving = trained(parse(deeper), monkeypatch)
    cuts = ["stem", "layer1", "layer2", "layer3"]
    assert all([s.cut for s in m.build.stages] == cuts for m in moving.members)
    assert [m.cut.name for m in moving.members] == [m.cut.name for m in fixed.members]
    for name, state in fixed.states.items():
        assert differences(moving.states[name], state) == []
    for name, server in fixed.servers.items():
        assert all(np.array_equal(moving.servers[name][k], v) for k, v in server.items())


@pytest.mark.parametrize("gradient", ["local", "server"])
def test_a_client_learns_the_same_from_any_server_only_with_local_gradients(
    gradient: str, few_digits: Dataset, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = parse(MIXED.format("averaging", gradient, "server", "own"))
    one = trained(fleet, monkeypatch)
    other = trained(fleet, monkeypatch, other_servers=True)
    for name, state in one.states.items():
        assert (differences(state, other.states[name]) == []) == (gradient == "local"), name


# ---- a client and its server are the network ----

ONE = """\
name = "one"
batch = 16
gradient = "server"
[model]
width = 4
[[client]]
name = "process"
board = "posix"
cut = "layer1"
capacity = {}
"""


@pytest.mark.parametrize("capacity", [16, 1])
def test_with_the_servers_gradient_a_client_and_a_server_train_as_the_unsplit_network(
    capacity: int, workplace: Path
) -> None:
    fleet = parse(ONE.format(capacity))
    assembly = assembled(fleet)
    (member,) = assembly.members
    losses = []
    with Launcher(assembly, Path("unused"), to_c, Path("build"), lambda text: None) as launcher:
        client = launcher.launch(member).client
        server = assembly.strategy([client]).server("process")
        for _ in range(20):
            losses.append(train_batch(client, server, BATCH).server_loss or np.nan)

    torch.manual_seed(0)
    model = zoo.build("resnet8", width=4, norm="group", channels=1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    digits = assembly.dataset
    order = draw_order(len(member.images), member.seed, 0)
    expected = []
    for step in range(20):
        taken = member.images[order[BATCH * step : BATCH * (step + 1)]]
        x = torch.from_numpy(taken.x).double() * digits.scale[0] + digits.shift[0]
        loss = F.cross_entropy(model(x), torch.from_numpy(taken.y).long())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        expected.append(loss.item())
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert expected[-1] < 0.8 * expected[0]


# ---- runs by the command line ----

FLEET = """\
name = "{name}"
rounds = {rounds}
strategy = "{strategy}"
aggregate = "{aggregate}"
[model]
width = 2
[[client]]
name = "process"
board = "posix"
cut = "layer1"
[[client]]
name = "local"
board = "torch"
cut = "layer2"
"""


def run(name: str, *, rounds: int = 2, strategy: str = "averaging", aggregate: str = "all") -> Run:
    """Trains the fleet above by the command line, in the current folder."""
    path = Path(f"{name}.toml")
    text = FLEET.format(name=name, rounds=rounds, strategy=strategy, aggregate=aggregate)
    path.write_text(text)
    said = splitee("train", path)
    assert (said.code, said.err) == (0, "")
    return Run(Path("runs") / name)


def summary_of(run: Run) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run.folder / "summary.json").read_text())
    return summary


def without(record: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in keys}


@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
def test_a_second_run_is_bit_identical_but_for_times(
    strategy: str, few_digits: Dataset, workplace: Path
) -> None:
    first, second = (run(f"again{i}", strategy=strategy) for i in range(2))
    assert first.checkpoint_file.read_bytes() == second.checkpoint_file.read_bytes()

    def metrics(run: Run) -> list[dict[str, Any]]:
        # lines come as clients are done; bytes count what had to be sent again
        times = ("seconds", "at_seconds", "bytes_up", "bytes_down")
        lines = [without(line, *times) for line in run.metrics()]
        return sorted(lines, key=lambda line: (line["round"], line.get("client", "~")))

    assert metrics(first) == metrics(second)
    assert len(metrics(first)) == 2 * 3

    def results(run: Run) -> list[dict[str, Any]]:
        times = ("ms_per_sample", "bytes_up_per_sample", "link")
        return [without(client, *times) for client in summary_of(run)["clients"]]

    assert results(first) == results(second)


def test_another_seed_gives_another_run(few_digits: Dataset, workplace: Path) -> None:
    first = run("seed0", rounds=1)
    path = Path("seed1.toml")
    path.write_text(
        first.fleet_file.read_text()
        .replace("seed0", "seed1")
        .replace("rounds = 1", "rounds = 1\nseed = 1")
    )
    assert splitee("train", path).code == 0
    one, other = first.load(), Run(Path("runs") / "seed1").load()
    for name, state in one.states.items():
        assert moved(state.weights, other.states[name].weights) == set(state.weights)


# ---- lost clients ----


def kill_at(monkeypatch: pytest.MonkeyPatch, method: str, call: int) -> None:
    """Kills the firmware's process in its n-th call of a method of Device, when that has ended.

    It is gone for good: nobody starts it again.
    """
    made = Device.__init__

    def for_good(self: Device, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **{**named, "reopen": None})

    monkeypatch.setattr(Device, "__init__", for_good)
    started: list[boards.Running] = []
    start = boards.start

    def recording(*arguments: Any) -> boards.Running:
        started.append(start(*arguments))
        return started[-1]

    original = getattr(Device, method)
    calls = []

    def counting(self: Device, *arguments: Any) -> Any:
        result = original(self, *arguments)
        calls.append(self)
        if len(calls) == call:
            started[-1].process.kill()
            started[-1].process.wait()
        return result

    monkeypatch.setattr(boards, "start", recording)
    monkeypatch.setattr(Device, method, counting)


REASON = 'client "process": posix ended with SIGKILL'
STEPS = math.ceil(90 / BATCH)  # of a client in a round


@pytest.mark.parametrize("aggregate", ["server", "all"])
@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
def test_a_fleet_goes_on_without_a_client_that_is_killed_in_a_round(
    strategy: str,
    aggregate: str,
    few_digits: Dataset,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = run("whole", rounds=1, strategy=strategy, aggregate=aggregate).load()
    kill_at(monkeypatch, "step", STEPS + 1)  # behind the first batch of the second round
    name = "killed"
    path = Path(f"{name}.toml")
    path.write_text(FLEET.format(name=name, rounds=3, strategy=strategy, aggregate=aggregate))
    said = splitee("train", path)
    assert (said.code, said.err) == (0, "")
    assert f"lost in round 2: {REASON}" in said.out

    killed = Run(Path("runs") / name)
    lines = [without(line, "at_seconds") for line in killed.metrics()]
    losses = [line for line in lines if line["event"] == "ClientLost"]
    assert losses == [{"event": "ClientLost", "client": "process", "round": 2, "reason": REASON}]
    passes = [(e["round"], e["client"]) for e in lines if e["event"] == "ClientDone"]
    assert sorted(passes) == [(1, "local"), (1, "process"), (2, "local"), (3, "local")]
    assert [e["round"] for e in lines if e["event"] == "RoundDone"] == [1, 2, 3]

    checkpoint = killed.load()
    assert checkpoint.round == 3
    held, before = checkpoint.states["process"], alone.states["process"]
    if aggregate == "all":  # what it would get when it came back: the means of who is there
        others = checkpoint.states["local"].weights
        shared = {n: others[n] for n in before.weights if n in others}
        assert moved(before.weights, held.weights) == set(shared)
        assert moved(shared, {n: held.weights[n] for n in shared}) == set()
        before = replace(before, weights=held.weights)
    assert differences(held, before) == []
    assert checkpoint.states["local"].place.steps == 3 * STEPS

    assert summary_of(killed)["took_part"] == [
        {"round": 1, "clients": ["local", "process"]},
        {"round": 2, "clients": ["local"], "missing": {"process": REASON}},
        {"round": 3, "clients": ["local"], "missing": {"process": REASON}},
    ]
    assert "process took part in 1 of 3 rounds" in said.out
    assert "round 3 is complete without process" in said.out
    process, local = summary_of(killed)["clients"]
    assert process["lost"] == REASON
    assert 2 * 4 * 64 < process["bytes_up_per_sample"] < 550  # of the pass that it finished
    assert "lost" not in local
    assert agree(killed)


def test_a_half_finished_batch_teaches_the_server_nothing(
    few_digits: Dataset, workplace: Path
) -> None:
    left = []
    # after a whole batch of the second round, and after the first half of the next one
    for method, call in (("step", STEPS + 1), ("backward", 2 * STEPS + 3)):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, method, call)
            left.append(run("half", strategy="sequential").load())
    for whole, half in zip(left[0].servers.values(), left[1].servers.values(), strict=True):
        assert moved(whole, half) == set()
    assert differences(left[0].states["local"], left[1].states["local"]) == []


def test_a_client_that_is_lost_in_the_test_is_tested_by_what_it_had_learnt(
    few_digits: Dataset, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = summary_of(run("calm"))["clients"]
    kill_at(monkeypatch, "infer", 2)
    late = run("late")
    process, local = summary_of(late)["clients"]
    assert process["lost"] == REASON
    assert process["exit_accuracy"] == pytest.approx(calm[0]["exit_accuracy"], abs=1 / 60)
    assert without(local, "ms_per_sample") == without(calm[1], "ms_per_sample")


def test_a_run_whose_only_client_is_killed_ends_and_says_so(
    few_digits: Dataset, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(monkeypatch, "step", 1)
    path = Path("only.toml")
    path.write_text(
        'name = "only"\nrounds = 3\n[model]\nwidth = 2\n'
        '[[client]]\nname = "process"\nboard = "posix"\ncut = "layer1"\n'
    )
    said = splitee("train", path)
    assert said.code == 1
    assert "error: every client was lost" in said.err
    assert f"lost in round 1: {REASON}" in said.out
    (process,) = summary_of(Run(Path("runs") / "only"))["clients"]
    assert process["lost"] == REASON


# ---- what is not finite ----


@pytest.mark.parametrize("client", ["process", "local"])
@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
def test_training_stops_at_what_is_not_finite_and_keeps_the_last_round(
    strategy: str,
    client: str,
    few_digits: Dataset,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run("finite", rounds=1, strategy=strategy)
    of = Device if client == "process" else LocalClient
    set_rate = of.set_rate

    def planting(self: Any, rate: float) -> None:
        set_rate(self, rate)
        if rate != 0.05:  # behind the first round
            weights = {n: w.copy() for n, w in self.state().weights.items()}
            weights["stem.0.weight"][0, 0, 0, 0] = np.nan
            self.load_weights(weights)

    monkeypatch.setattr(of, "set_rate", planting)
    path = Path("infinite.toml")
    text = FLEET.format(name="infinite", rounds=3, strategy=strategy, aggregate="all")
    path.write_text(text + '[optimizer]\nschedule = "cosine"\n')
    said = splitee("train", path)
    assert said.code == 1
    assert said.err == (
        f'error: client "{client}": the gradient of stem.0.weight is not finite in round 2: '
        "nothing was changed; take a smaller learning_rate or clip\n"
    )
    stopped = Run(Path("runs") / "infinite")
    assert stopped.checkpoint_file.read_bytes() == whole.checkpoint_file.read_bytes()
    assert [c["client"] for c in answers(stopped)["clients"]] == ["process", "local"]
    assert {line["round"] for line in stopped.metrics()} == {1}


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_a_second_run_with_rates_and_a_clip_is_bit_identical(
    schedule: str, few_digits: Dataset, workplace: Path
) -> None:
    checkpoints = []
    for settings in ("", *[f'schedule = "{schedule}"\nstep_every = 1\nclip = 0.5\n'] * 2):
        path = Path("rates.toml")
        text = FLEET.format(name="rates", rounds=2, strategy="averaging", aggregate="all")
        path.write_text(f"{text}[optimizer]\n{settings}")
        said = splitee("train", path)
        assert (said.code, said.err) == (0, "")
        checkpoints.append((Path("runs") / "rates" / "checkpoint.safetensors").read_bytes())
    assert checkpoints[1] == checkpoints[2] != checkpoints[0]


def test_every_kind_of_client_clips_as_torch_does_at_the_rate_of_the_round(
    few_digits: Dataset, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = MIXED.format("averaging", "both", "all", "upto").replace("rounds = 1", "rounds = 2")
    text = text.replace("[model]", '[optimizer]\nschedule = "cosine"\nclip = 0.3\n[model]')
    mixed = trained(parse(text), monkeypatch)
    assert_same_numbers(mixed, trained(all_torch(text), monkeypatch))
    free = trained(parse(text.replace("clip = 0.3\n", "")), monkeypatch)
    for name, state in mixed.states.items():
        for tensor, velocity in state.momentum.items():
            other = free.states[name].momentum[tensor]
            assert not np.allclose(velocity, other, rtol=0.05), (name, tensor)


def test_every_kind_of_client_distills_as_torch_does(
    few_digits: Dataset, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = MIXED.format("averaging", "both", "all", "upto")
    text = text.replace("rounds = 1", "rounds = 2\ndistill = 0.5")
    mixed = trained(parse(text), monkeypatch)
    assert_same_numbers(mixed, trained(all_torch(text), monkeypatch))
    without = trained(parse(text.replace("distill = 0.5", "")), monkeypatch)
    for name, state in mixed.states.items():
        weight = "exits.stem.linear.weight"
        other = without.states[name].weights[weight]
        assert not np.allclose(state.weights[weight], other, rtol=0.01, atol=1e-3), name


def test_a_board_over_udp_ends_with_the_weights_of_one_over_a_serial_line(
    few_digits: Dataset, workplace: Path
) -> None:
    path = Path("board.toml")
    checkpoints = []
    for board in ("qemu-m4", "qemu-m4-udp"):
        program = f"{boards.load_boards()[board].prefix}gcc"
        if shutil.which(program) is None or shutil.which("qemu-system-arm") is None:
            pytest.skip(f"{program} or qemu-system-arm is not installed")
        text = 'name = "board"\nrounds = 1\n[model]\nwidth = 2\n[data]\nsamples = 48\n'
        path.write_text(f'{text}[[client]]\nname = "a"\nboard = "{board}"\ncut = "stem"\n')
        said = splitee("train", path)
        assert (said.code, said.err) == (0, "")
        run = Run(Path("runs") / "board")
        (client,) = summary_of(run)["clients"]
        assert client["link"].split(":")[0] == boards.load_boards()[board].link
        checkpoints.append(run.load().states["a"])
    assert differences(*checkpoints) == []


# ---- a device that runs already ----


def test_a_device_serves_one_run_after_another(few_digits: Dataset, workplace: Path) -> None:
    path = Path("attached.toml")
    text = (
        'name = "attached"\nrounds = 1\n[model]\nwidth = 2\n'
        '[[client]]\nname = "process"\nboard = "posix"\ncut = "layer1"\n'
    )
    path.write_text(text)
    said = splitee("build", path)
    elf = Path(said.out.split(": ")[1])
    board = boards.load_boards()["posix"]
    firmware = boards.read_elf(elf)
    with boards.start(board, firmware) as running:
        path.write_text(text + f'link = "{running.link.name}"\n')
        checkpoints = []
        for _ in range(2):
            said = splitee("train", path)
            assert (said.code, said.err) == (0, "")
            checkpoints.append(Path("runs/attached/checkpoint.safetensors").read_bytes())
        (client,) = summary_of(Run(Path("runs") / "attached"))["clients"]
        assert client["link"] == running.link.name
        # what was built here is what it runs: they agree about the segment
        assert client["flash_bytes"] == firmware.flash_bytes
        assert client["memory"]["ram_bytes"] == firmware.ram_bytes
    assert checkpoints[0] == checkpoints[1]


# ---- all kinds at once ----

EVERYTHING = """\
name = "everything"
rounds = 1
aggregate = "all"
exits = "upto"
[model]
width = 4
[[client]]
name = "board"
board = "qemu-m4"
cut = "stem"
share = 0.1
[[client]]
name = "process"
board = "posix"
cut = "layer1"
share = 0.3
[[client]]
name = "edge"
board = "python"
cut = "layer2"
share = 0.3
[[client]]
name = "local"
board = "torch"
cut = "layer3"
share = 0.3
"""

KINDS = {  # tier, board, link
    "board": ("mcu", "qemu-m4", "serial"),
    "process": ("mcu", "posix", "udp"),
    "edge": ("edge", "python", "tcp"),
    "local": ("host", "cuda" if torch.cuda.is_available() else "cpu", "memory"),
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run of a fleet of an emulated board, a process, a Python client and torch."""
    folder = tmp_path_factory.mktemp("everything")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("everything.toml").write_text(EVERYTHING)
        said = splitee("train", "everything.toml")
    assert (said.code, said.err) == (0, "")
    (folder / "said").write_text(said.out)
    return Run(folder / "runs" / "everything")


@pytest.mark.parametrize("name", KINDS)
def test_a_fleet_of_all_kinds_trains(name: str, everything: Run) -> None:
    if name == "board" and not shutil.which("qemu-system-arm"):
        pytest.skip("no qemu-system-arm")
    if name == "board" and not shutil.which("arm-none-eabi-gcc"):
        pytest.skip("no arm-none-eabi-gcc")
    clients = {c["name"]: c for c in summary_of(everything)["clients"]}
    tier, board, link = KINDS[name]
    client = clients[name]
    assert (client["tier"], client["board"]) == (tier, board)
    assert client["link"].startswith(link)
    assert (client["flash_bytes"] > 0) == (tier == "mcu")
    state = everything.load().states[name]
    assert state.place.steps == math.ceil(state.place.samples / BATCH)


def test_the_summary_says_of_each_client_what_the_readme_promises(everything: Run) -> None:
    summary = summary_of(everything)
    assert set(summary) == {"wall_s", "rounds", "clients", "took_part"}
    assert summary["took_part"] == [{"round": 1, "clients": sorted(KINDS)}]
    assert [c["name"] for c in summary["clients"]] == list(KINDS)
    shapes = {"stem": 4 * 64, "layer1": 4 * 64, "layer2": 8 * 16, "layer3": 16 * 4}
    for client in summary["clients"]:
        assert set(client) - {"memory"} == {
            "name", "tier", "board", "link", "cut", "parameters", "arena_bytes", "flash_bytes",
            "bytes_up_per_sample", "ms_per_sample", "exit_accuracy", "server_accuracy",
        }  # fmt: skip
        assert ("memory" in client) == (client["tier"] == "mcu")
        assert client["link"].split(":")[0] in ("serial", "udp", "tcp", "memory")
        assert 0 <= client["exit_accuracy"] <= 1
        assert 0 <= client["server_accuracy"] <= 1
        assert client["parameters"] > 0
        assert client["arena_bytes"] > 0
        assert client["ms_per_sample"] > 0
        sent = 4 * shapes[client["cut"]] + 1
        assert sent <= client["bytes_up_per_sample"] < 1.1 * sent  # and frames


def test_the_summary_says_of_each_firmware_what_memory_it_takes(everything: Run) -> None:
    said = (everything.folder.parents[1] / "said").read_text()
    known = boards.load_boards()
    for client in summary_of(everything)["clients"][:2]:
        memory, board = client["memory"], known[client["board"]]
        assert memory["arena_bytes"] == client["arena_bytes"]
        assert memory["shard_bytes"] == everything.load().states[client["name"]].place.samples * 67
        parts = ("arena", "weights", "labels", "shard", "static", "stack")
        assert memory["ram_bytes"] == sum(memory[f"{part}_bytes"] for part in parts)
        assert memory["ram_bytes"] < memory["board_ram_bytes"] == board.ram_bytes
        if client["board"] == "posix":
            assert memory["stack_used_bytes"] is None
        else:
            assert 0 < memory["stack_used_bytes"] < memory["stack_bytes"] == board.stack_bytes
            stack = f"{memory['stack_used_bytes']:,} of {memory['stack_bytes']:,}"
            assert re.search(rf"^{client['name']} .* {stack} ", said, re.MULTILINE)
        ram = f"{memory['ram_bytes']:,} of {memory['board_ram_bytes']:,}"
        assert re.search(rf"^{client['name']} .* {ram} *$", said, re.MULTILINE)


def test_all_owners_of_a_layer_have_its_mean_afterwards(everything: Run) -> None:
    checkpoint = everything.load()
    copies: dict[str, list[Array]] = {}
    for owner in (*(s.weights for s in checkpoint.states.values()), *checkpoint.servers.values()):
        for name, value in owner.items():
            copies.setdefault(name, []).append(value)
    assert len(copies["stem.0.weight"]) == 4
    assert len(copies["exits.stem.linear.weight"]) == 4
    assert len(copies["layer3.0.conv1.weight"]) == 4  # three replicas and a client
    assert len(copies["fc.weight"]) == 4
    for name, values in copies.items():
        assert all(np.array_equal(values[0], v) for v in values), name


def test_a_run_leaves_its_fleet_file_metrics_and_picture(everything: Run) -> None:
    assert everything.fleet_file.read_text() == EVERYTHING
    assert (everything.folder / "summary.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    done = {e["client"]: e for e in everything.metrics() if e["event"] == "ClientDone"}
    assert set(done) == set(KINDS)
    for client in done.values():
        assert 0 < client["exit_loss"] < 5
        assert 0 < client["server_loss"] < 5
        assert 0 <= client["exit_accuracy"] <= 1
        assert client["bytes_up"] > 0


def test_a_run_shows_each_client_and_the_table_at_the_end(everything: Run) -> None:
    said = (everything.folder.parents[1] / "said").read_text()
    for name in KINDS:
        assert f"round 1  {name}" in said
    for client in summary_of(everything)["clients"]:
        (line,) = [
            x for x in said.splitlines() if x.split()[:2] == [client["name"], client["tier"]]
        ]
        assert f"{100 * client['exit_accuracy']:.1f} %" in line
        assert f"{100 * client['server_accuracy']:.1f} %" in line
    assert "runs/everything/" in said.splitlines()[-1]


def answers(run: Run, *options: str) -> dict[str, Any]:
    said = splitee("eval", run.folder, "--json", *options)
    assert (said.code, said.err) == (0, "")
    found: dict[str, Any] = json.loads(said.out)
    return found


def agree(run: Run) -> bool:
    """Whether eval finds the accuracies of the summary; one test image more or less is rounding."""
    images = len(data.load("digits").test)
    told = {c["name"]: c for c in summary_of(run)["clients"]}
    found = {c["client"]: c for c in answers(run)["clients"]}
    return set(told) == set(found) and all(
        abs(told[name][key] - found[name][key]) <= 1.01 / images
        for name in told
        for key in ("exit_accuracy", "server_accuracy")
    )


def test_eval_agrees_with_the_summary(everything: Run) -> None:
    assert agree(everything)
    found = answers(everything)
    assert (found["round"], found["entropy"]) == (1, 0.5)
    assert [c["cut"] for c in found["clients"]] == ["stem", "layer1", "layer2", "layer3"]


def test_at_entropy_1_exits_answer_all_and_at_0_the_server_does(everything: Run) -> None:
    for client in answers(everything, "--entropy", "1")["clients"]:
        assert client["share_at_exit"] == 1
        assert client["accuracy"] == client["exit_accuracy"]
    for client in answers(everything, "--entropy", "0")["clients"]:
        assert client["share_at_exit"] == 0
        assert client["accuracy"] == client["server_accuracy"]
    for client in answers(everything, "--entropy", "0.7")["clients"]:
        assert 0 <= client["share_at_exit"] <= 1
    said = splitee("eval", everything.folder)
    assert "round 1; exits answer up to an entropy of 0.5" in said.out
    for name in KINDS:
        assert name in said.out
