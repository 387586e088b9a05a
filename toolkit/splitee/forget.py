"""Which tensors and gradients of a pass are worth making again, so that less is alive at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from splitee.steps import IN_PLACE, Schedule, aligned, gradient, tensor_of

if TYPE_CHECKING:
    from splitee.schedule import Pass


def forget(kept: Pass) -> frozenset[str]:
    """The tensors and gradients to make again, so that least is alive at once.

    Greedy: of all that is alive in the fullest step, forgets what empties the fullest steps most,
    until nothing helps or the MACs allowed are spent; then remembers again what did not help.
    """
    limit = kept.levers.recompute * kept.graph.macs()[0]
    forgotten: frozenset[str] = frozenset()
    best = fullness(kept.again(forgotten))
    while True:
        found = forgotten
        for more in _candidates(kept, best.fullest):
            trial = kept.again(forgotten | more)
            if trial.macs_again <= limit and (full := fullness(trial)).score < best.score:
                better, best = full, best._replace(score=full.score)
                found = forgotten | more
        if found == forgotten:
            break
        forgotten, best = found, better
    for value in sorted(forgotten):
        trial = kept.again(forgotten - {value})
        if trial.macs_again <= limit and fullness(trial).most <= best.most:
            forgotten -= {value}
    return forgotten


class Fullness(NamedTuple):
    """How full the steps of a pass are."""

    score: float  # how full the fullest steps are, the fullest above all
    most: float  # KB alive in that one
    fullest: set[str]  # what that is


def fullness(walk: Pass, *, every: bool = False) -> Fullness:
    """How full the steps of a pass are.

    every: in every variant, not only where the cut is deepest and all exits learn.
    """
    found = walk.schedule(momentum=False)
    if not _possible(found):
        return Fullness(np.inf, np.inf, set())
    blocks = found.blocks
    score, most, fullest = 0.0, 0.0, set[str]()
    for variant in found.variants if every else found.variants[-1:]:
        spans = found.spans(variant)
        alive: dict[str, tuple[int, int]] = {}
        for name, (start, stop) in spans.items():
            low, high = alive.get(blocks[name], (start, stop))
            alive[blocks[name]] = (min(low, start), max(high, stop))
        sizes = np.zeros(len(found.steps) + 1)
        for block, (start, stop) in alive.items():
            sizes[start] += aligned(found.sizes[block])
            sizes[stop + 1] -= aligned(found.sizes[block])
        sizes = np.cumsum(sizes) / 1024
        score += float((sizes**16).sum())
        if sizes.max() > most:
            most, at = float(sizes.max()), int(sizes.argmax())
            fullest = {name for name, (start, stop) in spans.items() if start <= at <= stop}
    return Fullness(score, most, fullest)


def _possible(found: Schedule) -> bool:
    """Whether kernels can do it: in place where they must, and with weights as they were."""
    updated = set()
    for step in found.steps:
        if step.op is None:
            continue
        if step.action == "backward" and step.op.kind in IN_PLACE and not step.over:
            return False  # the gradient is wanted once more
        if step.action == "forward" and step.op.name in updated:
            return False
        if step.action == "update":
            updated.add(step.op.name)
    return True


def _candidates(walk: Pass, alive: set[str]) -> Iterable[frozenset[str]]:
    """What could be forgotten together: a tensor with all that leads to it from a costly one."""
    for buffer in sorted({tensor_of(name) for name in alive}):
        for deep in (False, True):
            closure = frozenset(_sources(walk, buffer, deep))
            if closure:
                yield closure


def _sources(walk: Pass, value: str, deep: bool) -> Iterable[str]:
    """A value that can be made again, with those without a cost of their own that it is made of.

    deep: with the convolutions at which that ends, too.
    """
    graph = walk.graph
    value = walk.alias.get(value, value)
    if value.startswith("d(") and value.endswith(")"):
        tensor = value[2:-1]
        if tensor not in graph.shapes or tensor in walk.points:
            return
        consumers = walk.consumers[tensor]
        if not consumers or any(op.weights for op, _ in consumers):
            return
        yield value
        for op, _ in consumers:
            yield from _sources(walk, gradient(op.name), deep=False)
    elif value in walk.ops:
        op = walk.ops[value]
        costly = op.kind in ("conv2d", "linear")
        if costly and not deep:
            return
        yield value
        if not costly:
            for name in op.inputs:
                yield from _sources(walk, name, deep)
