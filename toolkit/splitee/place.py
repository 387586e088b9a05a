"""What a client's segment takes, and what fits where: known before anything is built or sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from splitee import arena
from splitee.errors import CutError
from splitee.graph import Graph, Stage


@dataclass(frozen=True)
class Room:
    """The memory of a board, and what the firmware takes of it beside any segment; in bytes."""

    ram: int
    flash: int
    code: int  # flash of the firmware without a segment
    static: int  # RAM of the firmware without a segment: buffers, tables
    stack: int


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
    def schedule(self) -> arena.Schedule:
        """The steps of one pass."""
        return arena.schedule(self.graph, self.capacity, self.momentum, moves=self.moves)

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

    @property
    def bytes_up_per_sample(self) -> int:
        """What a sample sends up at the deepest cut: its activations as float32, and its label."""
        return 4 * self.graph.elements(self.graph.cut) + 1

    @property
    def arena_bytes(self) -> int:
        """Activations, gradients and momentum: the planned arena."""
        return self.plan.size

    @property
    def weight_bytes(self) -> int:
        """Weights and statistics: in RAM, with a copy of the initial values in flash."""
        return 4 * self.graph.weight_size

    def ram_bytes(self, room: Room) -> int:
        """Everything that the device keeps in RAM."""
        segment = self.arena_bytes + self.weight_bytes + self.shard_bytes + self.capacity
        return segment + room.static + room.stack

    def flash_bytes(self, room: Room) -> int:
        """Everything that is flashed (an upper bound: the code is measured with all kernels)."""
        steps = sum(step.action != "send" for step in self.schedule.steps)
        return room.code + self.weight_bytes + STEP_CODE * steps

    def shortage(self, room: Room) -> str | None:
        """What is missing, as 'needs 81 KB of RAM, 17 KB more than …'; None when it fits."""
        for what, needed, there in (
            ("RAM", self.ram_bytes(room), room.ram),
            ("flash", self.flash_bytes(room), room.flash),
        ):
            if needed > there:
                return (
                    f"needs {kib(needed)} of {what}, {kib(needed - there)} more than the "
                    f"{kib(there)} there are"
                )
        return None


# Flash of one generated step: a call with its arguments and, for a window, its shape. Measured at
# -O3 on the M4F as 40 to 75 bytes; a test holds flash_bytes against real builds.
STEP_CODE = 96


def kib(size: int) -> str:
    """A size in KB (1,024 bytes) for people."""
    return f"{size / 1024:,.0f} KB" if size >= 10240 else f"{size / 1024:,.1f} KB"


def deepest_that_fits(builds: Sequence[Build], room: Room | None) -> Build | None:
    """The last of the builds, ordered from the shallowest cut on, that fits."""
    fitting = [b for b in builds if room is None or b.shortage(room) is None]
    return fitting[-1] if fitting else None
