"""From a fleet file to networks, segments, shards and servers, before any device is touched."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import nn

from splitee import datasets, partition, strategies, zoo
from splitee.bottleneck import Mirror
from splitee.capture import capture
from splitee.client import Client, LocalClient, Place, State
from splitee.data import Dataset, Images
from splitee.errors import CutError, FitError, FleetError
from splitee.exits import Exit
from splitee.fleet import ClientTable, DataTable, Fleet
from splitee.graph import Graph
from splitee.model import Cut, Network, Segment, Tail
from splitee.norms import freeze
from splitee.parked import ParkedClient, ParkedServer, Pool
from splitee.place import Build, Room, deepest_that_fits
from splitee.server import Server
from splitee.steps import Levers
from splitee.strategies import Strategy

PARKED_FROM = 16  # clients in this process that are alike, from which on they are parked
FIRMWARE_CAPACITY = 8  # samples that firmware holds at once, where the fleet file does not say


@dataclass(frozen=True)
class Board:
    """What assembling needs to know of a board."""

    firmware: bool  # runs the C firmware, and so a segment that is built in
    room: Room | None  # None: as much as a computer has
    here: bool = True  # its client computes in the host's process


@dataclass(frozen=True)
class Member:
    """One client, ready to be brought up: its segment with initial weights, and its shard."""

    table: ClientTable
    cut: Cut  # where it begins
    upto: bool  # with all exits built in up to there, or only the one at the cut
    segment: Segment  # all that is built in
    build: Build
    images: Images
    seed: int  # of its data order

    @property
    def name(self) -> str:
        """The client's name."""
        return self.table.name

    @cached_property
    def graph(self) -> Graph:
        """What runs at its cut."""
        return self.build.graph.at(self.cut.name, upto=self.upto)

    @cached_property
    def state(self) -> State:
        """Where it starts: initial weights, no momentum yet, at the head of its data order."""
        tensors = self.segment.at(self.cut.name, upto=self.upto).tensors()
        weights = {n: t.detach().cpu().numpy().copy() for n, t in tensors.items()}
        return State(weights, {}, Place(len(self.images), self.seed))

    def another(self, table: ClientTable, images: Images, seed: int) -> Member:
        """A client of the same kind: it shares what was made for this one, weights included."""
        member = replace(self, table=table, images=images, seed=seed)
        state = replace(self.state, place=Place(len(images), seed))
        vars(member).update(graph=self.graph, state=state)  # not to be made again
        return member


@dataclass(frozen=True)
class _OwnLayers:
    """What is one client's alone where it has a bottleneck, with initial weights."""

    narrow: nn.Conv2d
    exit: Exit
    mirror: Mirror


class Assembly:
    """A fleet's networks and shards. Everything is drawn from the fleet's seed."""

    def __init__(self, fleet: Fleet, boards: Callable[[str], Board]) -> None:
        """boards tells of a board by name, and raises SpliteeError for an unknown one."""
        self.fleet = fleet
        self.boards = {c.name: boards(c.board) for c in fleet.client}
        self.dataset, self.held_out = _held_out(fleet.data)
        self.norm = self._norm()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fleet.seed)
            self._model = zoo.build(
                fleet.model.name,
                width=fleet.model.width,
                norm=self.norm,
                classes=self.dataset.classes,
                channels=self.dataset.shape[0],
            )
            self._network = Network(self._model, self.dataset.shape)
            self._exits = {c.name: Exit(_image(c), self.dataset.classes) for c in self.cuts}
        shares = {c.name: c.share for c in fleet.client}
        places = partition.places(self.dataset, fleet.data, shares, fleet.seed)
        self._shards = {name: self.dataset.train[held] for name, held in places.items()}

        self._made: dict[str, Member] = {}  # the first of each kind
        self._pools: dict[str, tuple[Pool[LocalClient], Pool[Server]]] = {}
        self._counts = Counter(self._kind(c) for c in fleet.client)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The cuts of the fleet's network."""
        return self._network.cuts

    def _norm(self) -> str:
        norm = self.fleet.model.norm
        firmware = any(board.firmware for board in self.boards.values())
        return norm if norm != "auto" else ("group" if firmware else "batch")

    def _segment(self, table: ClientTable, cut: Cut, *, moves: bool) -> Segment:
        """A client's own copy of the network up to a cut, with the exits that are built in."""
        network = Network(copy.deepcopy(self._model), self.dataset.shape)
        last = self.cuts.index(cut)
        first = 0 if moves or self.fleet.exits == "upto" else last
        exits = {c.name: copy.deepcopy(self._exits[c.name]) for c in self.cuts[first : last + 1]}
        own = self._own_layers(table, cut)
        if own is None:
            segment = Segment(network, cut, exits)
        else:
            exits[cut.name] = own.exit
            segment = Segment(network, cut, exits, own.narrow)
        if self.fleet.model.batch_norm == "frozen":
            freeze(segment)
        return segment

    def _own_layers(self, table: ClientTable, cut: Cut) -> _OwnLayers | None:
        """What a client with a bottleneck has for itself; the same whenever it is asked for."""
        bottleneck = table.narrowing
        if bottleneck is None:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed(table.name))
            return _OwnLayers(
                bottleneck.narrow(cut.shape),
                Exit(bottleneck.shape(cut.shape), self.dataset.classes),
                bottleneck.mirror(cut.shape),
            )

    def _seed(self, client: str) -> int:
        index = [c.name for c in self.fleet.client].index(client)
        return (self.fleet.seed * 4096 + index) & 0xFFFFFFFF  # 32 bits on a device

    def capacity(self, table: ClientTable) -> int:
        """Samples that a client holds at once."""
        usual = FIRMWARE_CAPACITY if self.boards[table.name].firmware else self.fleet.batch
        return min(table.capacity or usual, self.fleet.batch)

    def build(self, table: ClientTable, cut: Cut, *, moves: bool = False) -> Build:
        """What a client would be built with, up to a cut.

        moves: with every cut up to it, and their exits, so that the client's can move.
        Raises FleetError where a setting of the fleet rules one of the client's levers out.
        """
        return self._build(table, self._segment(table, cut, moves=moves), moves)

    def _levers(self, table: ClientTable) -> Levers:
        """The client's levers, if the fleet allows them."""
        levers, fleet = table.levers, self.fleet
        o = fleet.optimizer
        pulled = [f.name for f in fields(levers) if getattr(levers, f.name)]
        refused = [
            (bool(pulled) and not self.boards[table.name].firmware, pulled,
             f"{table.board} runs no firmware: leave it out"),
            (levers.fused_update and o.momentum != 0, ["fused_update"],
             "the update is fused behind a layer's gradient, which has no momentum: take "
             "momentum = 0"),
            (levers.fused_update and o.clip is not None, ["fused_update"],
             "clipping needs all gradients before any weight learns: take no clip"),
            (levers.fused_update and self.capacity(table) < fleet.batch, ["fused_update"],
             f"a batch has to be one part: take capacity = {fleet.batch}"),
            (levers.local_only and fleet.settings(table).wants_gradient, ["local_only"],
             "the server's gradient has no room with it, and gradient = "
             f'"{table.gradient or fleet.gradient}"'),
            (levers.local_only and table.deepest is not None, ["local_only"],
             "a cut that moves needs the gradient's room: leave out deepest"),
        ]  # fmt: skip
        for is_refused, names, why in refused:
            if is_refused:
                raise FleetError(f'client "{table.name}": {names[0]}: {why}')
        return levers

    def _build(self, table: ClientTable, segment: Segment, moves: bool) -> Build:
        return Build(
            graph=capture(segment, self.dataset.classes),
            capacity=self.capacity(table),
            momentum=self.fleet.optimizer.momentum != 0,
            samples_max=len(self._shards[table.name]),
            scale=self.dataset.scale,
            shift=self.dataset.shift,
            moves=moves,
            distills=self.fleet.distill > 0,
            levers=self._levers(table),
        )

    def builds(self, table: ClientTable, *, moves: bool = False) -> list[Build]:
        """What a client would be built with up to each cut, the shallowest first."""
        return [self.build(table, cut, moves=moves) for cut in self.cuts]

    def choose(self, table: ClientTable) -> tuple[Cut, Cut]:
        """Where a client begins, and up to which cut it is built.

        They are the cuts that the fleet file names, or the deepest that fits.
        """
        if table.deepest is None:
            cut = self._chosen(table, table.cut, moves=False)
            return cut, cut
        deepest = self._chosen(table, table.deepest, moves=True)
        cut = deepest if table.cut == "auto" else self._chosen(table, table.cut, moves=True)
        if self.cuts.index(cut) > self.cuts.index(deepest):
            raise CutError(
                f'client "{table.name}": cut "{cut.name}" lies behind "{deepest.name}", the '
                f'deepest that it is built with: take deepest = "{cut.name}" or a shallower cut'
            )
        return cut, deepest

    def _chosen(self, table: ClientTable, spec: str | int, *, moves: bool) -> Cut:
        if spec != "auto":
            cut = self._network.cut(spec)
            if cut.number is None:
                listed = ", ".join(f"{c.number} {c.name}" for c in self.cuts)
                raise CutError(f'cut "{cut.name}" has no exit; clients take one of {listed}')
            return cut
        room = self.boards[table.name].room
        builds = [self.build(table, cut, moves=moves) for cut in self._narrowable(table)]
        fitting = deepest_that_fits(builds, room)
        if fitting is None:
            raise FitError(self._no_fit(table, self.cuts[0]))
        return self._network.cut(fitting.stages[-1].cut)

    def _narrowable(self, table: ClientTable) -> list[Cut]:
        """The cuts at which a client's bottleneck, if it has one, can be: all or the shallower."""
        return [c for c in self.cuts if self.bottleneck_fault(table, c) is None] or [self.cuts[0]]

    def bottleneck_fault(self, table: ClientTable, cut: Cut) -> str | None:
        """Why a client's bottleneck cannot be at a cut; None: it can, or there is none."""
        _, height, width = cut.shape
        if table.bottleneck and table.bottleneck_stride > min(height, width):
            return (
                f"bottleneck_stride = {table.bottleneck_stride}: the image at {cut.name} is "
                f"{height}x{width}: take a smaller stride or a shallower cut"
            )
        return None

    def _no_fit(self, table: ClientTable, cut: Cut) -> str:
        room = self.boards[table.name].room
        assert room is not None
        moves = table.deepest is not None
        fitting = deepest_that_fits(self.builds(table, moves=moves), room)
        where = (
            f'{"build up to" if moves else "cut at"} "{fitting.stages[-1].cut}", which fits'
            if fitting
            else "take a narrower network, a smaller capacity or share, or a larger board"
        )
        shortage = self.build(table, cut, moves=moves).shortage(room)
        return (
            f'client "{table.name}": its segment up to {cut.name} {shortage} on '
            f"{table.board}: {where}"
        )

    def member(self, name: str) -> Member:
        """A client's part.

        Raises CutError for a cut that does not exist and FitError for a segment that is larger
        than its board; the message names the cut that fits.
        """
        (table,) = (c for c in self.fleet.client if c.name == name)
        kind = self._kind(table)
        if kind not in self._made or table.bottleneck is not None:  # of which each has its own
            self._made[kind] = self._member(table)
        return self._made[kind].another(table, self._shards[name], self._seed(name))

    def _kind(self, table: ClientTable) -> str:
        """The same for clients that differ in nothing but their names and images."""
        said = table.model_dump_json(exclude={"name", "share"})
        return f"{len(self._shards[table.name])} {said}"

    def _member(self, table: ClientTable) -> Member:
        name = table.name
        self._check_optimizer(table)
        self._check_sending(table)
        cut, deepest = self.choose(table)
        moves = table.deepest is not None
        if fault := self.bottleneck_fault(table, cut):
            raise FleetError(f'client "{name}": {fault}')
        segment = self._segment(table, deepest, moves=moves)
        build = self._build(table, segment, moves)
        room = self.boards[name].room
        if room is not None and build.shortage(room):
            raise FitError(self._no_fit(table, deepest))
        self._check_codecs(table, segment, moves=moves)
        if self.norm == "batch":
            self._check_batch_norm(table, cut, deepest, build)
        # without other cuts, the exits that are built in are those that the fleet has
        upto = not moves or self.fleet.exits == "upto"
        return Member(table, cut, upto, segment, build, self._shards[name], self._seed(name))

    def _check_optimizer(self, table: ClientTable) -> None:
        """Raises FleetError where a client cannot learn by the optimiser that it has."""
        kind, fleet = table.optimizer or self.fleet.optimizer.kind, self.fleet.optimizer
        if kind == "adamw" and not self.boards[table.name].here:
            raise FleetError(
                f'client "{table.name}": optimizer = "adamw": clients behind a link learn by SGD '
                'alone: give this one optimizer = "sgd" and a learning_rate'
            )
        if kind != fleet.kind and table.learning_rate is None:
            raise FleetError(
                f'client "{table.name}": optimizer = "{kind}": the fleet\'s learning_rate is for '
                f'"{fleet.kind}": give this client one of its own'
            )

    def _check_sending(self, table: ClientTable) -> None:
        """Raises FleetError where a client cannot send less in the way that its table says."""
        batch, name = self.fleet.batch, f'client "{table.name}"'
        if table.bottleneck is None and table.bottleneck_stride > 1:
            raise FleetError(
                f"{name}: bottleneck_stride: there is no bottleneck: give it channels "
                "(bottleneck = ...), or leave the stride out"
            )
        if table.bottleneck is not None and table.deepest is not None:
            raise FleetError(
                f"{name}: bottleneck: it belongs to one cut, and with deepest the cut moves: leave "
                "one of them out"
            )
        parts = self.capacity(table) < batch
        if table.send == "unsure" and self.fleet.settings(table).wants_gradient and parts:
            gradient = table.gradient or self.fleet.gradient
            raise FleetError(
                f'{name}: send = "unsure": with gradient = "{gradient}" the server '
                "returns the gradient of a mean over the samples sent, and so has to know how many "
                f"a batch sends: take capacity = {batch}"
            )

    def _check_codecs(self, table: ClientTable, segment: Segment, *, moves: bool) -> None:
        """Raises FleetError where a codec is of no use at a cut that the client can be at."""
        names = segment.exit_names if moves else segment.exit_names[-1:]
        for cut in (c for c in self.cuts if c.name in names):
            sent = table.narrowing.shape(cut.shape) if table.narrowing else cut.shape
            elements = math.prod(sent)
            for key, codec in (
                ("codec", table.coding.up(elements)),
                ("gradient_codec", table.coding.down(elements)),
            ):
                if codec.fault:
                    raise FleetError(
                        f'client "{table.name}": {key} = "{codec.kind}" at {cut.name}: '
                        f"{codec.fault}: take another"
                    )

    def _check_batch_norm(self, table: ClientTable, cut: Cut, deepest: Cut, build: Build) -> None:
        """Raises FleetError where batch norm would have too few samples to learn from."""
        name = table.name
        batch, held = self.fleet.batch, self.fleet.model.batch_norm == "held"
        if held and build.capacity < batch:
            raise FleetError(
                f'client "{name}": batch norm needs the whole batch at once: '
                f'capacity = {batch}, batch_norm = "frozen" or norm = "group"'
            )
        norms = self._network.norms_of_single_values(None if held else deepest)
        if norms and 1 in _parts(len(self._shards[name]), batch, build.capacity):
            raise FleetError(
                f'client "{name}": of a part of one sample, {norms[0]} sees one value a channel, '
                "and batch norm needs more: take another capacity, batch or share, or "
                'norm = "group"'
            )
        behind = self._network.norms_of_single_values(cut)
        if behind and table.send == "unsure":
            raise FleetError(
                f'client "{name}": send = "unsure": of a single sample, {behind[0]} sees one value '
                'a channel, and batch norm needs more: take norm = "group"'
            )

    @cached_property
    def members(self) -> list[Member]:
        """Every client's part, in the fleet file's order."""
        return [self.member(c.name) for c in self.fleet.client]

    def local(self, member: Member, device: str = "cpu") -> LocalClient:
        """The client in this process that a member describes; start it before it trains."""
        client = LocalClient(
            member.name,
            copy.deepcopy(member.segment),
            self.fleet.settings(member.table),
            capacity=member.build.capacity,
            scale=self.dataset.scale,
            shift=self.dataset.shift,
            device=device,
            coding=member.table.coding,
            unsure=self.fleet.unsure(member.table),
            augment=self.fleet.data.augment,
        )
        client.move(member.cut.name, upto=member.upto)
        return client

    def here(self, member: Member, device: str = "cpu") -> LocalClient | ParkedClient:
        """That client, or where there are many alike one that is live only while it trains."""
        table = member.table
        alike = self._counts[self._kind(table)]
        if alike < PARKED_FROM or "auto" in (table.cut, table.deepest):  # these may move
            return self.local(member, device)
        pools = self._pools.get(self._kind(table))
        if pools is None:
            pools = Pool(self.local(member, device)), Pool(self.replica(member, device))
            self._pools[self._kind(table)] = pools
        return ParkedClient(member.name, pools[0])

    def strategy(
        self,
        clients: Sequence[Client],
        device: str = "cpu",
        *,
        states: Mapping[str, State] | None = None,
    ) -> Strategy:
        """The fleet's strategy over clients (a subset of the fleet's, in its order).

        states: where they are, by name; None: where they start.
        """
        if states is None:
            names = {c.name for c in clients}
            states = {m.name: m.state for m in self.members if m.name in names}
        fleet = self.fleet
        kind = strategies.of_name(fleet.strategy)
        if kind.shared:
            server = self._server(self.members, device, "the server")
            servers = dict.fromkeys((c.name for c in clients), server)
        else:
            members = {m.name: m for m in self.members}
            servers = {c.name: self.completing(c, members[c.name], device) for c in clients}
        return kind(clients, servers, fleet.rules, states=states)

    def completing(self, client: Client, member: Member, device: str) -> Server:
        """The server network of one client, live as long as that is."""
        if not isinstance(client, ParkedClient):
            return self.replica(member, device)
        _, pool = self._pools[self._kind(member.table)]
        rate = self.fleet.server_settings.learning_rate
        return ParkedServer(f'the server of client "{member.name}"', pool, rate)

    def replica(self, member: Member, device: str = "cpu") -> Server:
        """The server network of one client alone."""
        return self._server([member], device, f'the server of client "{member.name}"')

    def _server(self, members: Sequence[Member], device: str, name: str) -> Server:
        model: nn.Module = copy.deepcopy(self._model)
        own = {m.name: self._own_layers(m.table, m.cut) for m in members}
        mirrors = {client: layers.mirror for client, layers in own.items() if layers}
        tail = Tail(Network(model, self.dataset.shape), [m.cut for m in members], mirrors)
        return Server(tail, self.fleet.server_settings, device, name=name)


def _held_out(table: DataTable) -> tuple[Dataset, Images]:
    """A fleet's data, and the training images that nobody is trained on.

    The setting samples counts those that are left to train on.
    """
    extra = table.held_out or 0
    if table.samples is not None:
        table = table.model_copy(update={"samples": table.samples + extra})
    whole = datasets.load(table)
    kept = len(whole.train) - extra
    if kept <= 0:
        raise FleetError(
            f"data.held_out = {extra:,}: there are {len(whole.train):,} training images: hold "
            "fewer out"
        )
    owners = whole.owners if whole.owners is None else whole.owners[:kept]
    return replace(whole, train=whole.train[:kept], owners=owners), whole.train[kept:]


def _parts(samples: int, batch: int, capacity: int) -> set[int]:
    """How many samples the parts of a client's batches have."""
    batches = {min(batch, samples - start) for start in range(0, samples, batch)}
    return {min(capacity, size - start) for size in batches for start in range(0, size, capacity)}


def _image(cut: Cut) -> tuple[int, int, int]:
    channels, height, width = cut.shape
    return channels, height, width
