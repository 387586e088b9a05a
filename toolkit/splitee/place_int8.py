"""What a segment of 8 bits takes of a board: known before it is built.

It answers images and learns nothing. So its weights stay in flash, and of RAM it needs what is
alive at the same time on the way to its cut and its exit.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from splitee import arena
from splitee.int8 import Int8Graph, Int8Op
from splitee.place import STEP_CODE, Memory, Room, lacks
from splitee.steps import Place, Schedule, Step, Variant

INPUT = "input"  # the buffer that is full before a schedule's first step
IN_PLACE = ("add", "relu", "group_norm")  # element by element: the output may lie on an input

_EVERY_PASS = Place(0, "trunk")
_PIXELS, _PIXELS_MAX = 4, 16  # of int8.h: gathered at once, beyond the first where they are small
_SCRATCH_SOME, _SCRATCH_MAX = 512, 4096


def scratch(op: Int8Op) -> str:
    """The buffer that an operation has for itself."""
    return f"{op.name}:scratch"


def scratch_bytes(graph: Int8Graph, op: Int8Op) -> int:
    """What int8.h says that an operation needs for itself, in bytes; a test compares the two."""
    channels = graph.shapes[op.inputs[0]][-1]
    if op.kind == "group_norm":
        return 5 * channels  # an int32 and an int8 for each
    if op.kind != "conv2d":
        return 0
    if graph.depthwise(op):
        return channels
    one: int = math.prod(op.attrs["kernel"]) * (channels // op.attrs["groups"])
    several = min(_PIXELS_MAX, _SCRATCH_SOME // one // 4 * 4)
    return one * max(several, min(_PIXELS, _SCRATCH_MAX // one), 1)


def schedule(
    graph: Int8Graph,
    capacity: int,
    scratch_bytes: Callable[[Int8Graph, Int8Op], int] = scratch_bytes,
    in_place: tuple[str, ...] = IN_PLACE,
) -> Schedule:
    """A step for each operation, and then the host, which reads activations and logits.

    in_place: kinds that write on an input which nothing needs any more.
    """
    buffers = {graph.input: INPUT, **{op.name: op.name for op in graph.ops}}
    sizes = {buffer: capacity * graph.elements(name) for name, buffer in buffers.items()}
    last = {name: i for i, op in enumerate(graph.ops) for name in op.inputs}
    last |= dict.fromkeys((graph.cut, graph.logits), len(graph.ops))
    steps = []
    for i, op in enumerate(graph.ops):
        writes = [op.name]
        if own := scratch_bytes(graph, op):
            sizes[scratch(op)] = own
            writes.append(scratch(op))
        free = [buffers[x] for x in op.inputs if last[x] == i and op.kind in in_place]
        reads = tuple(buffers[x] for x in op.inputs)
        over = ((op.name, free[0]),) if free else ()
        steps.append(Step("forward", _EVERY_PASS, reads=reads, writes=tuple(writes), over=over))
    sent = (buffers[graph.cut], buffers[graph.logits])
    steps.append(Step("send", _EVERY_PASS, reads=sent))
    end = len(graph.ops)
    return Schedule(
        steps=tuple(steps),
        variants=(Variant(0, True),),
        infer_end=end,
        forward_end=end,
        backward_end=end,
        sizes=sizes,
        lasting=(),
        aliases={},
    )


@dataclass(frozen=True)
class Int8Build:
    """A segment of 8 bits as it is built for a device."""

    graph: Int8Graph
    cut: str  # the name of the cut at its end
    capacity: int = 1  # samples held at once

    @cached_property
    def schedule(self) -> Schedule:
        """The steps of one pass."""
        return schedule(self.graph, self.capacity)

    @cached_property
    def plan(self) -> arena.Plan:
        """The place of every buffer. Verified: an unsound plan is our defect."""
        plan = arena.plan(self.schedule)
        faults = arena.verify(self.schedule, plan)
        assert not faults, faults
        return plan

    @cached_property
    def checksum(self) -> int:
        """What host and device compare at hello: all that an answer depends on, and capacity."""
        return zlib.crc32(f"{self.graph.checksum} {self.capacity}".encode())

    @property
    def weight_bytes(self) -> int:
        """Weights and biases, and a multiplier and a shift for each channel: all in flash."""
        weights = sum(w.nbytes for w in self.graph.weights.values())
        return weights + sum(5 * self.graph.requant(op)[0].size for op in self.graph.ops)

    @property
    def bytes_up_sure(self) -> int:
        """What a sample sends up that its exit answers: its logits."""
        return self.graph.classes

    @property
    def bytes_up_per_sample(self) -> int:
        """What a sample sends up that the server answers: its activations, too."""
        return self.graph.classes + self.graph.elements(self.graph.cut)

    def memory(self, room: Room) -> Memory:
        """What it takes of a board's memory beside flash."""
        return Memory(
            arena=self.plan.size,
            weights=0,
            labels=0,
            shard=0,
            static=room.static,
            stack=room.stack,
        )

    def flash_bytes(self, room: Room) -> int:
        """Everything that is flashed (an upper bound: the code is measured with all kernels)."""
        return room.code + self.weight_bytes + STEP_CODE * len(self.graph.ops)

    def shortage(self, room: Room) -> str | None:
        """What is missing, as 'needs 81 KB of RAM, 17 KB more than …'; None when it fits."""
        for what, needed, there in (
            ("RAM", self.memory(room).ram, room.ram),
            ("flash", self.flash_bytes(room), room.flash),
        ):
            if needed > there:
                return lacks(what, needed, there)
        return None
