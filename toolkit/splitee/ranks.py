"""A fleet over several processes, on one machine or many: each rank trains some of the clients.

torch.distributed does it: torchrun starts the processes, gloo (between CPUs) and nccl (between
GPUs) carry what they exchange. A rank has the clients of its own and their server replicas; layers
are averaged by one all-reduce a round. Rank 0 alone writes and prints: events, states and servers
of all ranks are gathered there when a round is complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from splitee.client import Client, State
from splitee.errors import RankLost
from splitee.means import Copy, owners
from splitee.rules import Rules
from splitee.server import Server
from splitee.strategies import Averaging
from splitee.train import BatchDone, Event, RoundDone, fit

T = TypeVar("T")


def launched() -> bool:
    """Whether this process is one of torchrun's."""
    return dist.is_torchelastic_launched()


@dataclass(frozen=True)
class Ranks:
    """The processes of this training, and which of them this is."""

    rank: int
    size: int
    device: str  # where this one computes

    def mine(self, names: Sequence[str]) -> list[str]:
        """Whom this rank trains: every size'th, so that neighbours in a fleet file are spread."""
        return list(names[self.rank :: self.size])

    def gathered(self, here: T) -> list[T]:
        """What each rank brings, in their order, at rank 0; nothing elsewhere."""
        found: list[Any] = [None] * self.size
        with _named():
            dist.gather_object(here, found if self.rank == 0 else None)
        return found if self.rank == 0 else []

    def told(self, here: T | None) -> T:
        """What rank 0 has, everywhere."""
        box: list[Any] = [here]
        with _named():
            dist.broadcast_object_list(box)
        found: T = box[0]
        return found

    def mean(self, copies: Sequence[Copy]) -> dict[str, Tensor]:
        """``cross_layer_mean`` over the copies of all ranks; every rank has all of it.

        Sums are float64, in the order of copies within a rank, and then in that of the all-reduce:
        to rounding those of one process.
        """
        here = owners(copies)
        shapes = {name: tuple(owned[0][0].shape) for name, owned in here.items()}
        everywhere: list[Any] = [None] * self.size
        with _named():
            dist.all_gather_object(everywhere, shapes)
        layout = dict(sorted({k: v for known in everywhere for k, v in known.items()}.items()))
        sums = [torch.zeros(0, dtype=torch.float64)]
        for name, shape in layout.items():
            total = torch.zeros(shape, dtype=torch.float64)
            samples = 0
            for tensor, count in here.get(name, []):
                total += tensor.cpu().to(torch.float64) * count
                samples += count
            sums += [total.flatten(), torch.tensor([samples], dtype=torch.float64)]
        flat = torch.cat(sums).to(self.device)
        with _named():
            dist.all_reduce(flat)
        flat, means, place = flat.cpu(), {}, 0
        for name, shape in layout.items():
            size = torch.Size(shape).numel()
            total, samples_of = flat[place : place + size], flat[place + size]
            means[name] = (total / samples_of).reshape(shape).to(torch.float32)
            place += size + 1
        return means


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Joins the others that torchrun has started, each on a GPU of its own where there is one."""
    local = int(os.environ["LOCAL_RANK"])
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{local % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


@contextmanager
def _named() -> Iterator[None]:
    """Says what a lost connection between ranks means."""
    try:
        yield
    except (RuntimeError, dist.DistBackendError) as error:
        first = str(error).partition("\n")[0]
        raise RankLost(
            f"another process of this training is gone, or cannot be reached ({first}): its own "
            "words say why; start all of them again with --resume and the folder of the run"
        ) from error


class RankedAveraging(Averaging):
    """Averaging of which this rank has some of the clients."""

    def __init__(
        self,
        clients: Sequence[Client],
        servers: Mapping[str, Server],
        rules: Rules,
        *,
        states: Mapping[str, State] | None,
        everyone: Sequence[str],
        ranks: Ranks,
    ) -> None:
        """clients, servers, states: of this rank. everyone: all of the fleet, in its order."""
        # clients in these processes cannot be lost: whoever is drawn completes the round
        super().__init__(clients, servers, replace(rules, min_clients=0), states=states)
        self.names = list(everyone)
        self._ranks = ranks

    def draw(self, number: int, names: Sequence[str]) -> Sequence[str]:
        """Those of this rank among who is drawn of the whole fleet: every rank draws alike."""
        drawn = set(super().draw(number, self.names))
        return [name for name in names if name in drawn]

    def _count(self) -> int:
        return len(self.names)

    def _means(self, copies: Sequence[Copy]) -> Mapping[str, Tensor]:
        return self._ranks.mean(copies)


@dataclass(frozen=True)
class _Held:
    """A server, as another rank tells of it."""

    weights: Mapping[str, Tensor]
    memory: Mapping[str, Tensor]

    def tensors(self) -> Mapping[str, Tensor]:
        return self.weights

    def momentum(self) -> Mapping[str, Tensor]:
        return self.memory


@dataclass(frozen=True)
class RankDone:
    """A round of one rank, or, at rank 0, of all of them."""

    events: list[Event]  # without batches; the last is its RoundDone
    servers: Mapping[str, _Held]


def rounds(
    strategy: RankedAveraging, ranks: Ranks, number: int, first: int
) -> Iterator[Event | RankDone]:
    """Rounds first..number: the batches of this rank as they come, then its round.

    At rank 0 that is the whole fleet's: its events are those of all ranks, and the last is the
    RoundDone of all clients, in the fleet's order.
    """
    events: list[Event] = []
    for event in fit(strategy, number, first):
        if isinstance(event, BatchDone):
            yield event
            continue
        events.append(event)
        if isinstance(event, RoundDone):
            servers = {
                name: _Held(_copied(s.tensors()), _copied(s.momentum()))
                for name, s in strategy.servers().items()
            }
            parts = ranks.gathered(RankDone(events, servers))
            if parts:
                yield _joined(parts, strategy.names)
            events = []


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _joined(parts: Sequence[RankDone], everyone: Sequence[str]) -> RankDone:
    """The rounds of all ranks as one."""
    ends = [part.events[-1] for part in parts]
    dones = [end for end in ends if isinstance(end, RoundDone)]
    states = {name: state for done in dones for name, state in done.states.items()}
    idle = frozenset(name for done in dones for name in done.idle)
    whole = RoundDone(dones[0].round, {name: states[name] for name in everyone}, {}, idle)
    others = [event for part in parts for event in part.events[:-1]]
    servers = {name: held for part in parts for name, held in part.servers.items()}
    return RankDone(
        [*others, whole], {f"server.{name}": servers[f"server.{name}"] for name in everyone}
    )
