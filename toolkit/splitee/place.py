"""What a client's segment takes, and what fits where: known before anything is built or sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from splitee import arena
from splitee.codec import PLAIN, Coding
from splitee.errors import CutError
from splitee.graph import Graph, Stage
from splitee.schedule import schedule
from splitee.steps import Levers, Schedule


@dataclass(frozen=True)
class Room:
    """The memory of a board, and what the firmware takes of it beside any segment; in bytes."""

    ram: int
    flash: int
    code: int  # flash of the firmware without a segment
    static: int  # RAM of the firmware without a segment: buffers, tables
    stack: int
    shard: int | None = None  # a memory for the shard alone; None: it is in RAM with the rest


@dataclass(frozen=True)
class Memory:
    """What a firmware with its segment takes beside flash, by part: planned or measured; bytes."""

    arena: int
    weights: int  # and statistics
    labels: int
    shard: int  # records, and their order
    static: int  # variables of the firmware itself
    stack: int  # set aside; 0 where the system gives one
    apart: bool = False  # whether the shard lies in a memory of its own

    @property
    def ram(self) -> int:
        """All that is in RAM."""
        segment = self.arena + self.weights + self.labels
        return segment + self.static + self.stack + (0 if self.apart else self.shard)


@dataclass(frozen=True)
class Build:
    """A segment as it is built for a device: everything that is fixed before it runs."""

    graph: Graph  # up to the deepest cut
    capacity: int  # samples held at once
    momentum: bool  # whether the optimiser has a velocity per parameter
    samples_max: int  # records that the shard has room for
    scale: tuple[float, ...]  # per channel: input = byte * scale + shift
    shift: tuple[float, ...]
    moves: bool = False  # whether the cut can be at any of the graph's exits, or only at the last
    distills: bool = False  # whether the exit at the cut can teach those below
    levers: Levers = field(default_factory=Levers)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages at whose ends the cut can be; the device counts them from 1."""
        return self.graph.stages if self.moves else (self.graph.joined,)

    def number(self, cut: str, *, upto: bool) -> int:
        """The number of a cut on the device.

        Raises CutError for one that is not built in, or that is not with these exits.
        """
        cuts = [stage.cut for stage in self.stages]
        if cut in cuts and (self.moves or upto or len(self.graph.exits) == 1):
            return 1 + cuts.index(cut)
        exits = "every exit up to it" if upto else "its exit alone"
        raise CutError(
            f"the segment is built for {', '.join(cuts)}, not for {cut} with {exits}: build it "
            "with `deepest` in the fleet file"
        )

    @cached_property
    def schedule(self) -> Schedule:
        """The steps of one pass."""
        return schedule(
            self.graph,
            self.capacity,
            self.momentum,
            moves=self.moves,
            distills=self.distills,
            levers=self.levers,
        )

    @cached_property
    def plan(self) -> arena.Plan:
        """The place of every buffer, at every cut. Verified: an unsound plan is our defect."""
        plan = arena.plan(self.schedule)
        faults = arena.verify(self.schedule, plan)
        assert not faults, faults
        return plan

    @cached_property
    def checksum(self) -> int:
        """What host and device compare at hello: structure and build settings, not values."""
        constants = np.array([self.scale, self.shift], np.float32).tobytes()
        return self.graph.checksum(
            capacity=self.capacity,
            momentum=int(self.momentum),
            samples_max=self.samples_max,
            moves=int(self.moves),
            **({"distills": 1} if self.distills else {}),
            **asdict(self.levers),
            constants=int.from_bytes(constants, "little"),
        )

    @property
    def record_size(self) -> int:
        """Bytes of a sample in the shard: one label, then the uint8 image."""
        return 1 + self.graph.elements(self.graph.input)

    @property
    def shard_bytes(self) -> int:
        """RAM of the shard: records, and a uint16 place in the data order for each."""
        return self.samples_max * (self.record_size + 2)

    def bytes_up_per_sample(self, coding: Coding = PLAIN, *, unsure: bool = False) -> int:
        """What a sample sends up at the deepest cut: its activations, coded, and its label.

        unsure: only where its exit is unsure of it, which its logits tell; these go up, too.
        """
        activations = coding.up(self.graph.elements(self.graph.cut)).size
        return activations + (self.bytes_up_sure if unsure else 1)

    @property
    def bytes_up_sure(self) -> int:
        """What is left of that where the exit is sure: label and logits."""
        return 1 + 4 * self.graph.classes

    @property
    def arena_bytes(self) -> int:
        """Activations, gradients and momentum: the planned arena."""
        return self.plan.size

    @property
    def weight_bytes(self) -> int:
        """Weights and statistics: in RAM, with a copy of the initial values in flash."""
        return 4 * self.graph.weight_size

    def memory(self, room: Room) -> Memory:
        """What it takes of a board's memory."""
        return Memory(
            arena=self.arena_bytes,
            weights=self.weight_bytes,
            labels=self.capacity,
            shard=self.shard_bytes,
            static=room.static,
            stack=room.stack,
            apart=room.shard is not None,
        )

    def ram_bytes(self, room: Room) -> int:
        """Everything that the device keeps in RAM."""
        return self.memory(room).ram

    def samples_that_fit(self, room: Room) -> int:
        """How many samples the shard could have: beside all else in RAM, or in its own memory."""
        if room.shard is None:
            free = room.ram - (self.ram_bytes(room) - self.shard_bytes)
        else:
            free = room.shard - SHARD_GAP
        return min(max(0, free // (self.record_size + 2)), SAMPLES_MAX)

    def flash_bytes(self, room: Room) -> int:
        """Everything that is flashed (an upper bound: the code is measured with all kernels)."""
        steps = sum(step.action != "send" for step in self.schedule.steps)
        return room.code + self.weight_bytes + STEP_CODE * steps

    def shortage(self, room: Room) -> str | None:
        """What is missing, as 'needs 81 KB of RAM, 17 KB more than …'; None when it fits.

        Where all but the shard fits, it says how many samples do.
        """
        apart = room.shard is not None
        for what, needed, there, has_shard in (
            ("RAM", self.ram_bytes(room), room.ram, not apart),
            ("memory for its shard", self.shard_bytes + SHARD_GAP, room.shard, apart),
            ("flash", self.flash_bytes(room), room.flash, False),
        ):
            if there is not None and needed > there:
                fitting = self.samples_that_fit(room) if has_shard else 0
                shard = f" (of its {self.samples_max:,} samples {fitting:,} fit)" if fitting else ""
                return lacks(what, needed, there) + shard
        return None


@dataclass(frozen=True)
class Effect:
    """What another value of one setting would do to a build."""

    setting: str
    now: str  # the value that it has
    other: str
    arena_bytes: int  # with the other value
    price: str  # of what saves memory


def effects(build: Build) -> list[Effect]:
    """What each lever does to a build: pulled where it is not, and let go where it is."""
    found = []
    if build.capacity > 1:
        fewer = max(1, build.capacity // 2)
        arena = replace(build, capacity=fewer).arena_bytes
        price = "a batch takes more parts"
        found.append(Effect("capacity", str(build.capacity), str(fewer), arena, price))
    for name, price in LEVER_PRICES.items():
        value = getattr(build.levers, name)
        other: Any = (1.0 if not value else 0.0) if name == "recompute" else not value
        if name == "local_only" and build.moves:
            continue
        changed = replace(build, levers=replace(build.levers, **{name: other}))
        pulled = build if value else changed
        again = pulled.schedule.macs_again / pulled.graph.macs()[0]
        now, then = (str(v).lower() for v in (value, other))
        found.append(Effect(name, now, then, changed.arena_bytes, price.format(again=again)))
    return found


LEVER_PRICES = {
    "relu_bits": "none: exact",
    "float16": "activations within 2^-11, gradients within 0.5 %",
    "recompute": "{again:.0%} of the forward pass again; exact",
    "fused_update": "capacity = batch, momentum = 0, no clip; a NaN takes the round back; exact",
    "local_only": 'gradient = "local" only; exact',
}

# Flash of one generated step: a call with its arguments and, for a window, its shape. Measured at
# -O3 on the M4F as 40 to 75 bytes; a test holds flash_bytes against real builds.
STEP_CODE = 96

# Places in the data order are 16-bit numbers, on the wire too.
SAMPLES_MAX = 0xFFFF

# In a memory of its own, the shard's order begins at an even address behind its records, or they at
# a word behind it.
SHARD_GAP = 3


def kib(size: int) -> str:
    """A size in KB (1,024 bytes) for people."""
    return f"{size / 1024:,.0f} KB" if size >= 10240 else f"{size / 1024:,.1f} KB"


def lacks(what: str, needed: int, there: int) -> str:
    """What is missing of a memory, in words."""
    more = kib(needed - there)
    return f"needs {kib(needed)} of {what}, {more} more than the {kib(there)} there are"


def deepest_that_fits(builds: Sequence[Build], room: Room | None) -> Build | None:
    """The last of the builds, ordered from the shallowest cut on, that fits."""
    fitting = [b for b in builds if room is None or b.shortage(room) is None]
    return fitting[-1] if fitting else None
