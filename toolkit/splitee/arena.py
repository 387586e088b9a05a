"""The memory plan: one static arena for a whole training step, and an independent check of it.

``schedule`` lists the steps of a pass, forward and then reversed, with the buffers that each reads
and assigns. ``plan`` gives every buffer a place so that buffers alive at the same time never
overlap. ``verify`` does not look at lifetimes: it replays the schedule on a map of who owns each
byte, and finds every plan under which a step would read something else than what was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random

import numpy as np

from splitee.graph import Graph, Op
from splitee.ops import OPS

ATTEMPTS = 300  # at a better plan than the first
ALIGNMENT = 16  # bytes: the widest vector load of a Cortex-M (MVE)

GRADIENTS = "gradients"  # one buffer with the gradient of every parameter
MOMENTUM = "momentum"


def gradient(tensor: str) -> str:
    """The buffer of dLoss/dtensor."""
    return f"d({tensor})"


def scratch(op: Op, action: str) -> str:
    """A buffer that a step of an operation has for itself."""
    return f"{op.name}:{action} scratch"


def saved(op: Op, name: str) -> str:
    """A buffer that forward leaves for backward, such as the mean of a norm."""
    return f"{op.name}:{name}"


@dataclass(frozen=True)
class Step:
    """One step of the schedule: at most one kernel's work."""

    action: str  # forward | loss | loss_backward | backward | weigh | send
    op: Op | None = None
    exit: str | None = None  # of a loss: the cut of its exit
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()  # assigned whole
    clears: tuple[str, ...] = ()  # set to zero first
    adds: tuple[str, ...] = ()  # read and added to


@dataclass(frozen=True)
class Schedule:
    """Steps [0, infer_end) forward, [infer_end, forward_end) losses, then backward.

    A send stands for the host reading buffers between two steps; no code comes from it.
    """

    steps: tuple[Step, ...]
    infer_end: int
    forward_end: int
    sizes: Mapping[str, int]  # bytes of every buffer at the built capacity
    lasting: tuple[str, ...]  # buffers that are alive through all steps
    aliases: Mapping[str, str]  # tensor -> the one whose buffer it shares


def schedule(graph: Graph, capacity: int, momentum: bool) -> Schedule:
    """The steps of one pass over at most capacity samples, for every gradient mode alike."""
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
        forward.append(
            Step("forward", op, reads=reads, writes=(op.name, *keeps, *own(op, "forward")))
        )
    forward.append(Step("send", reads=(graph.cut, graph.logits)))
    infer_end = len(forward)

    losses, backward = [], []
    backward.append(Step("weigh", writes=(gradient(graph.cut),)))
    started = {gradient(graph.cut)}  # gradients that hold something already

    def starting(*names: str) -> tuple[str, ...]:
        """Those of the gradients that nothing was added to yet."""
        fresh = tuple(n for n in names if n not in started)
        started.update(fresh)
        return fresh

    for name, logits in graph.exits.items():
        p = f"{logits}:softmax"
        sizes[p] = sizes[logits]
        losses.append(Step("loss", exit=name, reads=(logits,), writes=(p,)))
        d = gradient(logits)
        backward.append(Step("loss_backward", exit=name, reads=(p,), clears=starting(d), adds=(d,)))
    losses.append(Step("send", reads=(graph.cut,)))

    for op in reversed(graph.ops):
        kind = OPS[op.kind]
        needed = [gradient(op.name)]
        needed += [at(i) for i in op.inputs] if kind.keeps_inputs else []
        needed += [op.name] if kind.keeps_output else []
        needed += [saved(op, n) for n in kind.saves(op.attrs, graph.shapes[op.name])]
        targets = tuple(gradient(i) for i in op.inputs if graph.needs_gradient(i))
        if not targets and not op.weights:
            continue
        adds = (*targets, GRADIENTS) if op.weights else targets
        step = Step(
            "backward",
            op,
            reads=tuple(needed),
            writes=own(op, "backward"),
            clears=starting(*targets),
            adds=adds,
        )
        backward.append(step)
    steps = (*forward, *losses, *backward)

    used = {b for s in steps for b in (*s.reads, *s.writes, *s.clears, *s.adds)}
    sizes |= {gradient(t): sizes[at(t)] for t in graph.shapes if gradient(t) in used}
    sizes[GRADIENTS] = 4 * graph.parameter_size
    lasting = [GRADIENTS]
    if momentum:
        sizes[MOMENTUM] = 4 * graph.parameter_size
        lasting.append(MOMENTUM)
    return Schedule(steps, infer_end, infer_end + len(losses), sizes, tuple(lasting), alias)


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
    """Replays the schedule byte by byte; returns what would go wrong (empty: the plan is sound)."""
    faults: list[str] = []
    names = list(plan.offsets)
    numbers = {name: i for i, name in enumerate(names)}
    owner = np.full(plan.size, -1, np.int32)

    def part(name: str) -> slice:
        return slice(plan.offsets[name], plan.offsets[name] + schedule.sizes[name])

    for name in names:
        if plan.offsets[name] < 0 or part(name).stop > plan.size:
            faults.append(f"{name} lies outside of the arena")
        if plan.offsets[name] % ALIGNMENT:
            faults.append(f"{name} is not aligned to {ALIGNMENT} bytes")
    for name in (*schedule.lasting, *inputs):
        owner[part(name)] = numbers[name]

    for i, step in enumerate(schedule.steps):

        def check(buffers: Iterable[str], i: int = i) -> None:
            for name in buffers:
                others = owner[part(name)][owner[part(name)] != numbers[name]]
                if others.size:
                    other = names[others[0]] if others[0] >= 0 else "nothing"
                    faults.append(f"step {i} needs {name}, but there lies {other}")

        check(step.reads)
        for name in (*step.clears, *step.writes):
            owner[part(name)] = numbers[name]
        check((*step.reads, *step.adds))  # what a step assigns must not lie on what it reads
    check(schedule.lasting, len(schedule.steps))
    return faults
