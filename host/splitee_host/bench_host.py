"""Measuring the host: what splitting a network costs beside training it in one place.

All cases are ResNet-8 at its usual width on random 3x32x32 images, SGD with momentum, one thread a
process. What is compared runs by turns, and a ratio is that of medians of several runs. Within one
process, time is what the process computed for; between processes it is the clock's.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from splitee import zoo
from splitee.capture import capture
from splitee.client import LocalClient, Place, Settings, State, trunk_weights
from splitee.data import Images, draw_order
from splitee.errors import SpliteeError
from splitee.exits import Exit
from splitee.model import Network, Segment, Tail
from splitee.ops import Array
from splitee.parked import ParkedClient, ParkedServer, Pool
from splitee.place import Build
from splitee.rules import Rules
from splitee.runs import Run
from splitee.server import Server
from splitee.strategies import Averaging
from splitee.train import RoundDone, train_pass
from splitee_host.device import Device
from splitee_host.link import Link, open_link, serve_tcp
from splitee_host.serve import serve
from splitee_host.torch_learner import TorchLearner

SHAPE = (3, 32, 32)
CLASSES = 10
SCALE, SHIFT = (1 / 64,) * 3, (-2.0,) * 3
CUTS = ("stem", "layer1", "layer2")  # in turn, where there are several clients
LINKED = "layer1"  # the cut of the client behind a link: half of the multiplications
RATE, MOMENTUM = 0.05, 0.9

Row = dict[str, Any]
Seconds = Callable[[], float]


@dataclass(frozen=True)
class Pair:
    """A client and the server network that completes it."""

    client: LocalClient
    server: Server


def settings(gradient: str) -> Settings:
    """What clients and servers learn with."""
    return Settings(RATE, MOMENTUM, 0.0, *trunk_weights(gradient))


def images(count: int) -> Images:
    """Noise: what is computed does not depend on it."""
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    return Images(x, random.integers(0, CLASSES, count).astype(np.uint8))


def network() -> nn.Module:
    """The network that all cases train."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return zoo.build("resnet8", classes=CLASSES)


def segment(model: nn.Module, cut: str) -> Segment:
    """The client's half of a copy."""
    whole = Network(copy.deepcopy(model), SHAPE)
    at = whole.cut(cut)
    _, height, width = at.shape
    return Segment(whole, at, {at.name: Exit((at.shape[0], height, width), CLASSES)})


def client(name: str, cut: str, batch: int, gradient: str) -> LocalClient:
    """A client in this process."""
    return LocalClient(
        name, segment(network(), cut), settings(gradient), capacity=batch, scale=SCALE, shift=SHIFT
    )


def pair(name: str, cut: str, batch: int, samples: int) -> Pair:
    """A client with its shard, and its server."""
    here = client(name, cut, batch, "local")
    here.start(State(here.state().weights, {}, Place(samples, 1)), images(samples))
    return Pair(here, server(cut, "local"))


def server(cut: str, gradient: str) -> Server:
    """The server's half of a copy."""
    whole = Network(copy.deepcopy(network()), SHAPE)
    return Server(Tail(whole, [whole.cut(cut)]), settings(gradient))


def central(batch: int, samples: int) -> Callable[[], None]:
    """One epoch of the unsplit network, as one writes it in PyTorch: the yardstick."""
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    shard, order = images(samples), draw_order(samples, 1, 0)
    scale, shift = (torch.tensor(c)[:, None, None] for c in (SCALE, SHIFT))

    def epoch() -> None:
        for start in range(0, samples, batch):
            part = shard[order[start : start + batch]]
            x = torch.tensor(part.x) * scale + shift
            y = torch.as_tensor(part.y).long()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss.item()  # a loop tells how it goes

    return epoch


def timed(run: Callable[[], object], clock: Seconds) -> float:
    """Seconds that it takes by a clock."""
    began = clock()
    run()
    return clock() - began


def by_turns(
    runs: Sequence[Callable[[], object]], repeats: int, clock: Seconds
) -> list[list[float]]:
    """Seconds of every repeat of each; the first of all, which warms up, does not count."""
    for run in runs:
        run()
    rounds = [[timed(run, clock) for run in runs] for _ in range(repeats)]
    return [list(times) for times in zip(*rounds, strict=True)]


def _row(case: str, ratio: float, **detail: object) -> Row:
    return {"case": case, "ratio": round(ratio, 3), "detail": detail}


def fleet4(batch: int = 32, repeats: int = 12) -> Row:
    """Samples a second of four clients in this process against centralised training."""
    samples = 2 * batch
    pairs = [pair(f"c{i}", CUTS[i % len(CUTS)], batch, samples) for i in range(4)]
    epoch = central(batch, samples)

    def unsplit() -> None:
        for _ in pairs:
            epoch()

    whole, split = by_turns([unsplit, lambda: passes(pairs, batch)], repeats, time.process_time)
    count = len(pairs) * samples
    return _row(
        "fleet4",
        median(whole) / median(split),
        samples_per_s=round(count / median(split), 1),
        central_samples_per_s=round(count / median(whole), 1),
        best_ratio=round(min(whole) / min(split), 3),
        batch=batch,
        cuts=[p.client.cut for p in pairs],
    )


def passes(pairs: Sequence[Pair], batch: int) -> None:
    """A round of clients in this process, up to what is averaged, with the means."""
    servers = {p.client.name: p.server for p in pairs}
    for _ in Averaging([p.client for p in pairs], servers, Rules(batch)).round(1):
        pass


def loopback(batch: int, repeats: int = 12) -> Row:
    """Steps a second of a client in a process of its own, by TCP, against the unsplit network."""
    steps = max(2, 32 // batch)
    samples = batch * steps
    epoch = central(batch, samples)
    with _far_client(batch, samples) as link:
        build = _build(batch, samples)
        device = Device("far", link, build, settings("server"))
        shard = images(samples)
        weights = client("far", LINKED, batch, "server").state().weights
        device.start(State(weights, {}, Place(samples, 1)), shard)
        behind = server(LINKED, "server")

        def split() -> None:
            train_pass(device, behind, 1, [batch] * steps, lambda _: None)

        before = replace(device.traffic)
        whole, parted = by_turns([epoch, split], repeats, time.perf_counter)
        traffic = (device.traffic.activations_up - before.activations_up) / (repeats + 1) / samples
    return _row(
        f"loopback{batch}",
        median(whole) / median(parted),
        steps_per_s=round(steps / median(parted), 1),
        unsplit_steps_per_s=round(steps / median(whole), 1),
        best_ratio=round(min(whole) / min(parted), 3),
        bytes_up_per_sample=round(traffic),
        cut=LINKED,
        gradient="server",
        codec="float32",
    )


def _build(batch: int, samples: int) -> Build:
    graph = capture(segment(network(), LINKED), CLASSES)
    return Build(graph, batch, True, samples, SCALE, SHIFT)


@contextmanager
def _far_client(batch: int, samples: int) -> Iterator[Link]:
    """A process that is the client, and a link to it."""
    program = f"from splitee_host import bench_host; bench_host.be_client({batch}, {samples})"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            with open_link(process.stdout.readline().strip()) as link:
                yield link
        finally:
            process.terminate()


def be_client(batch: int, samples: int) -> None:
    """Is the client behind a link, until the host leaves."""
    torch.set_num_threads(1)
    learner = TorchLearner(client("far", LINKED, batch, "server"))
    with serve_tcp() as listener:
        sys.stdout.write(f"{listener.url}\n")
        sys.stdout.flush()
        with listener.accept() as link:
            serve(link, learner, _build(batch, samples))


def clients16(batch: int = 32, repeats: int = 6) -> Row:
    """Time a sample of sixteen clients against one, and what their servers hold."""
    samples = 4 * batch
    many = [pair(f"c{i}", LINKED, batch, samples) for i in range(16)]
    one = [pair("c0", LINKED, batch, samples)]
    single, all_of_them = by_turns(
        [lambda: passes(one, batch), lambda: passes(many, batch)], repeats, time.process_time
    )
    held = sum(t.nbytes for t in many[0].server.tensors().values())
    held += sum(t.nbytes for t in many[0].server.momentum().values())
    return _row(
        "clients16",
        median(all_of_them) / len(many) / median(single),
        ms_per_sample=round(1000 * median(all_of_them) / len(many) / samples, 3),
        single_ms_per_sample=round(1000 * median(single) / samples, 3),
        server_bytes_per_client=held,
        server_bytes=held * len(many),
        batch=batch,
        cut=LINKED,
    )


def simulated1000(clients: int = 1000) -> Row:
    """A round of a thousand clients, a tenth of them drawn, in a process of its own."""
    program = f"from splitee_host import bench_host; bench_host.simulate({clients})"
    said = _say(sys.executable, "-c", program)
    found = json.loads(said.splitlines()[-1])
    return _row("simulated1000", found["seconds"] / 60, **found)


def simulate(clients: int) -> None:
    """Makes the clients, trains one round and prints what it took."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    here, servers = [], {}
    pools = {cut: (Pool(client("", cut, 16, "local")), Pool(server(cut, "local"))) for cut in CUTS}
    begins = {cut: pools[cut][0].pattern.state().weights for cut in CUTS}
    everything = images(20 * clients)
    for number, cut in enumerate(islice(cycle(CUTS), clients)):
        clients_pool, servers_pool = pools[cut]
        name = f"c{number}"
        here.append(ParkedClient(name, clients_pool))
        shard = everything[20 * number : 20 * (number + 1)]
        here[-1].start(State(begins[cut], {}, Place(len(shard), number)), shard)
        servers[name] = ParkedServer(name, servers_pool, RATE)
    rules = Rules(16, aggregate="all", participation=0.1)
    strategy = Averaging(here, servers, rules)
    ready = time.perf_counter()
    *_, done = strategy.round(1)
    assert isinstance(done, RoundDone)
    found = {
        "seconds": round(time.perf_counter() - began, 2),
        "round_seconds": round(time.perf_counter() - ready, 2),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "clients": clients,
        "drawn": len(done.clients),
        "live_networks": sum(pool.made for pair_of in pools.values() for pool in pair_of),
    }
    sys.stdout.write(json.dumps(found) + "\n")


SPREAD = (0, 1, 2, 3)  # the clients of torchrun2, which two processes share


def torchrun2(rounds: int = 4) -> Row:
    """A round over two processes of torchrun against one process, and against two apart."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        apart_by = _difference(folder)
        one = _train(folder, "one", [_alone(_fleet(folder, "one", SPREAD, rounds))])
        two = _train(folder, "two", [_spread(_fleet(folder, "two", SPREAD, rounds))])
        halves = [_fleet(folder, f"half{i}", SPREAD[i::2], rounds) for i in range(2)]
        apart = _train(folder, "half0", [_alone(half) for half in halves])
        apart = max(apart, _seconds(folder / "half1"))
    return _row(
        "torchrun2",
        two / one,
        round_s=round(two, 2),
        single_round_s=round(one, 2),
        against_two_apart=round(two / apart, 3),
        largest_difference_after_one_round=apart_by,
    )


def _fleet(folder: Path, name: str, which: Sequence[int], rounds: int) -> Path:
    """A fleet file of these clients, with as many samples each."""
    tables = "".join(
        f'[[client]]\nname = "c{i}"\nboard = "torch"\ncut = "{CUTS[i % len(CUTS)]}"\n'
        for i in which
    )
    text = (
        f'name = "{name}"\nrounds = {rounds}\nlocal_steps = 80\naggregate = "all"\n'
        f"[data]\nsamples = {320 * len(which)}\n{tables}"
    )
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _alone(fleet: Path) -> list[str]:
    return [sys.executable, "-m", "splitee_host.cli", "train", str(fleet)]


def _spread(fleet: Path) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc-per-node", "2", "-m", *_alone(fleet)[2:]]


def _train(folder: Path, name: str, commands: Sequence[Sequence[str]]) -> float:
    """Runs the commands at the same time; seconds that a round of that run took."""
    with ExitStack() as ends:
        running = [
            ends.enter_context(
                subprocess.Popen(
                    [*command, "--runs", str(folder)],
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            )
            for command in commands
        ]
    if any(process.returncode for process in running):
        raise SpliteeError(f"splitee train ended with an error, which it has printed: {name}")
    return _seconds(folder / name)


def _seconds(run: Path) -> float:
    """Of a run's fastest round, behind the first."""
    ends = [r["at_seconds"] for r in Run(run).metrics() if r["event"] == "RoundDone"]
    return float(min(b - a for a, b in pairwise(ends)))


def _difference(folder: Path) -> float:
    """The largest between any two values of one process and of two after a round."""
    fleets = [_fleet(folder, name, SPREAD, 1) for name in ("here", "there")]
    for command in (_alone(fleets[0]), _spread(fleets[1])):
        _say(*command, "--runs", str(folder))
    one, two = (Run(folder / fleet.stem).load() for fleet in fleets)
    found = [
        float(np.abs(mine - other[owner][name]).max())
        for here, other in (
            (_weights(one.states), _weights(two.states)),
            (one.servers, two.servers),
            (one.server_momentum, two.server_momentum),
        )
        for owner, arrays in here.items()
        for name, mine in arrays.items()
    ]
    return max(found)


def _weights(states: Mapping[str, State]) -> Mapping[str, Mapping[str, Array]]:
    return {name: state.weights for name, state in states.items()}


def _say(*command: str) -> str:
    """What a command prints, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment
    ).stdout


CASES: dict[str, Callable[[], Row]] = {
    "fleet4": fleet4,
    "loopback1": lambda: loopback(1),
    "loopback32": lambda: loopback(32),
    "clients16": clients16,
    "simulated1000": simulated1000,
    "torchrun2": torchrun2,
}


def rows(names: Sequence[str]) -> Iterator[Row]:
    """The rows of these cases, as they are measured. Raises SpliteeError for an unknown one."""
    for name in names:
        if name not in CASES:
            raise SpliteeError(f'no case "{name}" is measured: there are {", ".join(CASES)}')
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # clients in this process train one by one
    for name in names:
        yield CASES[name]()
