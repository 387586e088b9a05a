"""A fleet over several processes of torch.distributed: the same as one, and what ends it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from host_harness import splitee
from splitee.errors import FleetError
from splitee.fleet import parse
from splitee.ops import Array
from splitee.ranks import Ranks
from splitee.runs import Run
from splitee_host.cli.ranked import _check

FLEET = """
name = "spread"
rounds = {rounds}
batch = 16
aggregate = "all"
exits = "upto"
participation = 0.7
[data]
samples = 120
[model]
width = 4
""" + "".join(
    f'[[client]]\nname = "{name}"\nboard = "torch"\ncut = "{cut}"\nshare = {share}\n'
    for name, cut, share in (("a", "stem", 2.0), ("b", "layer1", 1.0), ("c", "layer2", 1.0))
)


def over_two(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """torchrun's answer to a `splitee` command in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "splitee_host.cli", *map(str, words)]
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=200, check=False
    )


def arrays(folder: Path) -> dict[str, Array]:
    """All tensors of a checkpoint."""
    held = Run(folder).load()
    parts = [
        *(("client", n, s.weights) for n, s in held.states.items()),
        *(("client momentum", n, s.momentum) for n, s in held.states.items()),
        *(("server", n, weights) for n, weights in held.servers.items()),
        *(("server momentum", n, memory) for n, memory in held.server_momentum.items()),
    ]
    return {f"{kind} {owner} {k}": v for kind, owner, found in parts for k, v in found.items()}


def unequal(folder: Path, other: Path) -> list[str]:
    """The tensors by which two checkpoints differ by more than 1e-6."""
    one, two = arrays(folder), arrays(other)
    assert one.keys() == two.keys()
    return [n for n, a in one.items() if not np.allclose(a, two[n], rtol=0, atol=1e-6)]


def test_two_processes_learn_what_one_does_and_go_on_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fleet.toml").write_text(FLEET.format(rounds=2))
    assert splitee("train", "fleet.toml", "--runs", "one").code == 0
    Path("first.toml").write_text(FLEET.format(rounds=1))
    said = over_two("train", "first.toml", "--runs", "two", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("1 rounds over 2 processes") == 1
    Path("two/spread/fleet.toml").write_text(FLEET.format(rounds=2))
    said = over_two("train", "--resume", "two/spread", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert unequal(Path("one/spread"), Path("two/spread")) == []
    one, two = Run(Path("one/spread")), Run(Path("two/spread"))
    places = [{n: s.place for n, s in run.load().states.items()} for run in (one, two)]
    assert places[0] == places[1]
    assert two.took_part() == one.took_part()
    keys = ("event", "client", "round", "exit_loss", "server_loss", "bytes_up")
    told = [[[r.get(k) for k in keys] for r in run.metrics()] for run in (one, two)]
    assert told[0] == told[1]


BOARD = FLEET.format(rounds=1).replace('"torch"', '"posix"', 1)
REFUSED = {
    "sequential": ('strategy = "sequential"\n' + FLEET.format(rounds=1), "without torchrun"),
    "a board": (BOARD, 'client "a": board = "posix": over several processes'),
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_fleet_that_cannot_be_spread_is_refused(text: str) -> None:
    fleet, says = REFUSED[text]
    with pytest.raises(FleetError, match=says):
        _check(parse(fleet), Ranks(0, 2, "cpu"))


def test_there_are_no_more_processes_than_clients() -> None:
    with pytest.raises(FleetError, match="4 processes and 3 clients: start at most"):
        _check(parse(FLEET.format(rounds=1)), Ranks(0, 4, "cpu"))


def test_every_client_is_of_one_rank() -> None:
    names = list("abcde")
    assert [Ranks(r, 2, "cpu").mine(names) for r in (0, 1)] == [["a", "c", "e"], ["b", "d"]]


PROGRAM = """
import sys, torch
from splitee.ranks import ranks
with ranks() as here:
    here.mean([{"w": (torch.ones(2), 1)}])
    if here.rank == 0:
        here.mean([{"w": (torch.ones(2), 1)}])
"""


def test_a_rank_that_is_lost_ends_the_others_with_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = os.pathsep.join(p for p in sys.path if p)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stderr=subprocess.PIPE, text=True,
            env={**os.environ, **place, "PYTHONPATH": path, "RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in (0, 1)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 0]
    assert "RankLost: another process of this training is gone" in said[0]
