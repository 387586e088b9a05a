"""The memory plan: one static arena for a whole training step, and an independent check of it.

``schedule`` lists the steps of a pass, forward and then reversed, with the buffers that each reads
and assigns. ``plan`` gives every buffer a place so that buffers alive at the same time never
overlap. ``verify`` does not look at lifetimes: it replays the schedule on a map of who owns each
byte, and finds every plan under which a step would read something else than what was written.

One schedule, and one plan, serves every cut that is built in: a variant runs those of the steps
that its cut and its exits need, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np

from splitee.graph import Graph, Op
from splitee.ops import OPS

ATTEMPTS = 300  # at a better plan than the first
ALIGNMENT = 16  # bytes: the widest vector load of a Cortex-M (MVE)

GRADIENTS = "gradients"  # one buffer with the gradient of every parameter
MOMENTUM = "momentum"
STATISTICS = "statistics"  # of the batch so far, laid out as the running ones behind the parameters


def gradient(tensor: str) -> str:
    """The buffer of dLoss/dtensor."""
    return f"d({tensor})"


def scratch(op: Op, action: str) -> str:
    """A buffer that a step of an operation has for itself."""
    return f"{op.name}:{action} scratch"


def softmax(logits: str) -> str:
    """The buffer of an exit's probabilities."""
    return f"{logits}:softmax"


def saved(op: Op, name: str) -> str:
    """A buffer that forward leaves for backward, such as the mean of a norm."""
    return f"{op.name}:{name}"


class Variant(NamedTuple):
    """What runs of a schedule: the cut, as the number of its stage, and which exits."""

    cut: int
    upto: bool  # every exit up to the cut, not only the one at it


@dataclass(frozen=True)
class Step:
    """One step of the schedule: at most one kernel's work."""

    action: str  # forward | loss | loss_backward | backward | weigh | send | follow
    stage: int
    part: str  # of the stage: trunk | exit | cut (what only runs where the stage's end is the cut)
    op: Op | None = None
    exit: str | None = None  # of a loss: the cut of its exit
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()  # assigned whole
    clears: tuple[str, ...] = ()  # set to zero first
    adds: tuple[str, ...] = ()  # read and added to

    def runs(self, variant: Variant) -> bool:
        """Whether it is one of the variant's."""
        match self.part:
            case "trunk":
                return self.stage <= variant.cut
            case "exit":
                return self.stage == variant.cut or (variant.upto and self.stage < variant.cut)
        return self.stage == variant.cut


@dataclass(frozen=True)
class Schedule:
    """Steps [0, infer_end) forward, [infer_end, forward_end) losses, then backward to backward_end.

    Behind it, once the weights are updated, running statistics follow those of the batch. A send
    stands for the host reading buffers between two steps; no code comes from it.
    """

    steps: tuple[Step, ...]
    variants: tuple[Variant, ...]
    infer_end: int
    forward_end: int
    backward_end: int
    sizes: Mapping[str, int]  # bytes of every buffer at the built capacity
    lasting: tuple[str, ...]  # buffers that are alive through all steps
    aliases: Mapping[str, str]  # tensor -> the one whose buffer it shares


def schedule(graph: Graph, capacity: int, momentum: bool, *, moves: bool = False) -> Schedule:
    """The steps of one pass over at most capacity samples, for every gradient mode alike.

    moves: the cut can be at the end of every stage, with its exit alone or with all up to it.
    Otherwise it stays at the graph's, and all exits run.
    """
    stages = graph.stages if moves else (graph.joined,)
    # at the shallowest cut the exit at it is all that there is up to it
    variants = [Variant(s, upto) for s in range(len(stages)) for upto in (False, True) if s or upto]
    ends = {stage.logits: (number, stage) for number, stage in enumerate(stages)}  # last operation
    places = {  # of each operation: its stage, and the part of it
        op.name: (number, part)
        for number, stage in enumerate(stages)
        for part, ops in (("trunk", stage.trunk), ("exit", stage.exit))
        for op in ops
    }
    alias = {op.name: op.inputs[0] for op in graph.ops if op.kind == "branch"}

    def at(tensor: str) -> str:
        return alias.get(tensor, tensor)

    def own(op: Op, action: str) -> tuple[str, ...]:
        """The scratch of a step, if it needs any."""
        x, out = graph.shapes[op.inputs[0]], graph.shapes[op.name]
        size = OPS[op.kind].scratch(op.attrs, x, out)
        if size == 0:
            return ()
        sizes[scratch(op, action)] = size
        return (scratch(op, action),)

    sizes = {t: 4 * capacity * graph.elements(t) for t in graph.shapes if t not in alias}
    forward = []
    for op in graph.ops:
        if op.kind == "branch":
            continue
        keeps = {
            saved(op, n): s for n, s in OPS[op.kind].saves(op.attrs, graph.shapes[op.name]).items()
        }
        sizes |= {name: capacity * size for name, size in keeps.items()}
        reads = tuple(at(i) for i in op.inputs)
        measured = (STATISTICS,) if OPS[op.kind].measures else ()
        place = places[op.name]
        writes = (op.name, *keeps, *own(op, "forward"))
        forward.append(Step("forward", *place, op, reads=reads, writes=writes, adds=measured))
        if op.name in ends:
            number, stage = ends[op.name]
            forward.append(Step("send", number, "cut", reads=(stage.point, stage.logits)))
    infer_end = len(forward)

    losses = []
    for name, logits in graph.exits.items():
        p = softmax(logits)
        sizes[p] = sizes[logits]
        losses.append(Step("loss", *places[logits], exit=name, reads=(logits,), writes=(p,)))
    for number, stage in enumerate(stages):
        losses.append(Step("send", number, "cut", reads=(stage.point,)))

    backward = []
    started: set[str] = set()  # gradients that hold something already, at the deepest cut

    def starting(*names: str) -> tuple[str, ...]:
        """Those of the gradients that nothing was added to yet."""
        fresh = tuple(n for n in names if n not in started)
        started.update(fresh)
        return fresh

    exits = {logits: name for name, logits in graph.exits.items()}
    for op in reversed(graph.ops):
        place = places[op.name]
        if op.name in ends:
            number, stage = ends[op.name]
            d = gradient(stage.point)
            backward.append(Step("weigh", number, "cut", writes=(d,)))
            if stage is stages[-1]:
                started.add(d)
        if op.name in exits:
            d, p = gradient(op.name), softmax(op.name)
            backward.append(
                Step(
                    "loss_backward",
                    *place,
                    exit=exits[op.name],
                    reads=(p,),
                    clears=starting(d),
                    adds=(d,),
                )
            )
        kind = OPS[op.kind]
        needed = [gradient(op.name)]
        needed += [at(i) for i in op.inputs] if kind.keeps_inputs else []
        needed += [op.name] if kind.keeps_output else []
        needed += [saved(op, n) for n in kind.saves(op.attrs, graph.shapes[op.name])]
        needed += [STATISTICS] if kind.measures else []
        targets = tuple(gradient(i) for i in op.inputs if graph.needs_gradient(i))
        if not targets and not op.weights:
            continue
        adds = (*targets, GRADIENTS) if op.weights else targets
        backward.append(
            Step(
                "backward",
                *place,
                op,
                reads=tuple(needed),
                writes=own(op, "backward"),
                clears=starting(*targets),
                adds=adds,
            )
        )
    follow = [
        Step("follow", *places[op.name], op, reads=(STATISTICS,))
        for op in graph.ops
        if OPS[op.kind].measures
    ]
    steps = (*forward, *losses, *backward, *follow)

    used = {b for s in steps for b in (*s.reads, *s.writes, *s.clears, *s.adds)}
    sizes |= {gradient(t): sizes[at(t)] for t in graph.shapes if gradient(t) in used}
    sizes[GRADIENTS] = 4 * graph.parameter_size
    lasting = [GRADIENTS]
    if momentum:
        sizes[MOMENTUM] = 4 * graph.parameter_size
        lasting.append(MOMENTUM)
    if follow:
        sizes[STATISTICS] = 4 * (graph.weight_size - graph.parameter_size)
        lasting.append(STATISTICS)
    forward_end = infer_end + len(losses)
    backward_end = forward_end + len(backward)
    return Schedule(
        steps, tuple(variants), infer_end, forward_end, backward_end, sizes, tuple(lasting), alias
    )


def lifetimes(schedule: Schedule, inputs: Iterable[str] = ("input",)) -> dict[str, tuple[int, int]]:
    """First and last step in which each buffer holds something that is needed."""
    last = len(schedule.steps) - 1
    spans = dict.fromkeys(schedule.lasting, (0, last)) | dict.fromkeys(inputs, (0, 0))
    for i, step in enumerate(schedule.steps):
        for name in (*step.reads, *step.writes, *step.clears, *step.adds):
            first = spans.get(name, (i, i))[0]
            spans[name] = (first, max(i, spans.get(name, (i, i))[1]))
    return spans


@dataclass(frozen=True)
class Plan:
    """A place for every buffer."""

    offsets: Mapping[str, int]  # bytes from the start of the arena
    size: int  # bytes of the arena
    lower_bound: int  # most bytes alive in one step: no plan can be smaller


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan(schedule: Schedule) -> Plan:
    """The smallest plan found; greedy, each buffer in turn takes the lowest place free.

    Several orders are tried. Where none reaches the lower bound, the order of the best is changed
    in turn: whatever ends highest is placed earlier.
    """
    spans = lifetimes(schedule)
    sizes = {name: _up(schedule.sizes[name]) for name in spans}
    alive = [
        sum(sizes[n] for n, (a, b) in spans.items() if a <= i <= b)
        for i in range(len(schedule.steps))
    ]
    orders: list[Callable[[str], tuple[int, ...]]] = [
        lambda n: (-sizes[n], spans[n][0]),
        lambda n: (-sizes[n] * (spans[n][1] - spans[n][0] + 1), spans[n][0]),
        lambda n: (spans[n][0], -sizes[n]),
        lambda n: (-(spans[n][1] - spans[n][0]), -sizes[n]),
    ]
    tried = [sorted(spans, key=order) for order in orders]
    offsets, size, order = min(
        ((*_place(order, spans, sizes), order) for order in tried), key=lambda found: found[1]
    )
    random = Random(0)  # the same plan every time
    for _ in range(ATTEMPTS):
        if size == max(alive):
            break
        place = random.choice([i for i, n in enumerate(order) if offsets[n] + sizes[n] == size])
        changed = order[:place] + order[place + 1 :]
        changed.insert(random.randrange(place + 1), order[place])
        found = _place(changed, spans, sizes)
        if found[1] <= size:
            (offsets, size), order = found, changed
    return Plan(offsets, size, max(alive))


def _place(
    order: list[str], spans: Mapping[str, tuple[int, int]], sizes: Mapping[str, int]
) -> tuple[dict[str, int], int]:
    offsets: dict[str, int] = {}
    for name in order:
        start, stop = spans[name]
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if spans[other][0] <= stop and start <= spans[other][1]
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
        # what a step assigns must not lie on what it reads
        yield from strangers((*step.reads, *step.adds), i)
    yield from strangers(schedule.lasting, len(schedule.steps))
