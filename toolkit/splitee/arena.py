"""The memory plan: one static arena for a whole training step, and an independent check of it.

``plan`` gives every buffer of a schedule a place so that buffers alive at the same time never
overlap. ``verify`` does not look at lifetimes: it replays the schedule on a map of who owns each
byte, and finds every plan under which a step would read something else than what was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random

import numpy as np

from splitee.steps import ALIGNMENT, Schedule, Variant, aligned

ATTEMPTS = 300  # at a better plan than an order's first
CLOSE = 1.02  # times the lower bound: no further order is tried


@dataclass(frozen=True)
class Plan:
    """A place for every buffer."""

    offsets: Mapping[str, int]  # bytes from the start of the arena
    size: int  # bytes of the arena
    lower_bound: int  # most bytes alive in one step: no plan can be smaller


def plan(schedule: Schedule) -> Plan:
    """The smallest plan found; greedy, each block in turn takes the lowest place free.

    A block is a buffer, or several of which one is written on the other. Several orders are tried.
    Where none reaches the lower bound, the order of the best is changed in turn: whatever ends
    highest is placed earlier; and so those of the others, until one comes close.
    """
    blocks = schedule.blocks
    sizes = {block: aligned(schedule.sizes[block]) for block in dict.fromkeys(blocks.values())}
    spans = {block: (len(schedule.steps), 0) for block in sizes}
    beside: dict[str, set[str]] = {block: set() for block in sizes}  # alive at the same time
    fullest = dict.fromkeys(sizes, 0)  # bytes alive in the fullest step of each
    bound = 0
    for variant in schedule.variants:
        for name, (start, stop) in schedule.spans(variant).items():
            low, high = spans[blocks[name]]
            spans[blocks[name]] = (min(low, start), max(high, stop))
        for size, names in schedule.living(variant):
            bound = max(bound, size)
            together = {blocks[name] for name in names}
            for block in together:
                beside[block] |= together
                fullest[block] = max(fullest[block], size)
    orders: list[Callable[[str], tuple[int, ...]]] = [
        lambda n: (-sizes[n], spans[n][0]),
        lambda n: (-sizes[n] * (spans[n][1] - spans[n][0] + 1), spans[n][0]),
        lambda n: (spans[n][0], -sizes[n]),
        lambda n: (-(spans[n][1] - spans[n][0]), -sizes[n]),
        lambda n: (-fullest[n], -sizes[n]),
        lambda n: (-sum(sizes[other] for other in beside[n]),),
    ]
    tried = [sorted(sizes, key=order) for order in orders]
    tried.sort(key=lambda order: _place(order, beside, sizes)[1])
    offsets, size = _place(tried[0], beside, sizes)
    for order in tried:
        found = _improved(order, beside, sizes, bound)
        if found[1] < size:
            offsets, size = found
        if size <= CLOSE * bound:
            break
    return Plan({name: offsets[block] for name, block in blocks.items()}, size, bound)


def _improved(
    order: list[str], beside: Mapping[str, set[str]], sizes: Mapping[str, int], bound: int
) -> tuple[dict[str, int], int]:
    """The places that an order comes to, changed as long as that makes no larger plan."""
    offsets, size = _place(order, beside, sizes)
    random = Random(0)  # the same plan every time
    for _ in range(ATTEMPTS):
        if size == bound:
            break
        place = random.choice([i for i, n in enumerate(order) if offsets[n] + sizes[n] == size])
        changed = order[:place] + order[place + 1 :]
        changed.insert(random.randrange(place + 1), order[place])
        found = _place(changed, beside, sizes)
        if found[1] <= size:
            (offsets, size), order = found, changed
    return offsets, size


def _place(
    order: list[str], beside: Mapping[str, set[str]], sizes: Mapping[str, int]
) -> tuple[dict[str, int], int]:
    offsets: dict[str, int] = {}
    for name in order:
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in beside[name]
            if other in offsets
        )
        place = 0
        for low, high in taken:
            if place + sizes[name] <= low:
                break
            place = max(place, high)
        offsets[name] = place
    return offsets, max((offsets[n] + sizes[n] for n in offsets), default=0)


def verify(schedule: Schedule, plan: Plan, inputs: Iterable[str] = ("input",)) -> list[str]:
    """Replays every variant byte by byte; returns what would go wrong (empty: a sound plan)."""
    faults: list[str] = []
    for name, offset in plan.offsets.items():
        if offset < 0 or offset + schedule.sizes[name] > plan.size:
            faults.append(f"{name} lies outside of the arena")
        if offset % ALIGNMENT:
            faults.append(f"{name} is not aligned to {ALIGNMENT} bytes")
    for variant in schedule.variants:
        faults += _replay(schedule, variant, plan, (*schedule.lasting, *inputs))
    return list(dict.fromkeys(faults))


def _replay(
    schedule: Schedule, variant: Variant, plan: Plan, there: Iterable[str]
) -> Iterable[str]:
    """What a variant's steps would find in place of what they need.

    there: the buffers that hold something from the beginning.
    """
    names = list(plan.offsets)
    numbers = {name: i for i, name in enumerate(names)}
    spans = {n: (plan.offsets[n], plan.offsets[n] + schedule.sizes[n]) for n in names}
    # bytes between two neighbouring edges always have the same owner: one entry for all of them
    edges = sorted({edge for span in spans.values() for edge in span})
    entry = {edge: i for i, edge in enumerate(edges)}
    parts = {n: slice(entry[start], entry[stop]) for n, (start, stop) in spans.items()}
    owner = np.full(len(edges), -1, np.int32)
    for name in there:
        owner[parts[name]] = numbers[name]

    def strangers(buffers: Iterable[str], i: int) -> Iterable[str]:
        for name in buffers:
            others = owner[parts[name]][owner[parts[name]] != numbers[name]]
            if others.size:
                other = names[others[0]] if others[0] >= 0 else "nothing"
                yield f"step {i} needs {name}, but there lies {other}"

    for i, step in enumerate(schedule.steps):
        if not step.runs(variant):
            continue
        yield from strangers(step.reads, i)
        for name in (*step.clears, *step.writes):
            owner[parts[name]] = numbers[name]
        # all that a step needs must lie apart, but for what it may write over
        over = {read for written, read in step.over if spans[written] == spans[read]}
        yield from strangers([n for n in step.touched if n not in over], i)
    yield from strangers(schedule.lasting, len(schedule.steps))
