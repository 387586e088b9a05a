"""What a training pass is made of: steps, the buffers that they work on, and who needs what when.

A schedule is a list of steps: every operation forward, the losses, and what the gradients need in
reverse (``schedule.py`` writes it). Each step assigns buffers of its own; a buffer is never
assigned twice in a pass, so that what is alive when is plain to see. Where a step may write on top
of what it reads for the last time, it does (``Step.over``).

One schedule, and one plan, serves every cut that is built in: a variant runs those of the steps
that its cut and its exits need, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from splitee.graph import Op

GRADIENTS = "gradients"  # one buffer with the gradient of every parameter
MOMENTUM = "momentum"
STATISTICS = "statistics"  # of the batch so far, laid out as the running ones behind the parameters

IN_PLACE = ("group_norm", "batch_norm", "relu", "relu6", "branch")  # backward: d(y) becomes d(x)
ALIGNMENT = 16  # bytes: the widest vector load of a Cortex-M (MVE)


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


def half(tensor: str) -> str:
    """The buffer of a tensor that is kept as float16."""
    return f"{tensor}:half"


def own_gradients(op: Op) -> str:
    """The buffer of an operation's own parameter gradients, where the update is fused."""
    return f"{op.name}:gradients"


def aligned(size: int) -> int:
    """Bytes that a buffer takes of the arena."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def tensor_of(buffer: str) -> str:
    """What a buffer holds, whichever time it was made: a tensor, d(tensor) or another name."""
    return buffer.split("#")[0]


@dataclass(frozen=True)
class Levers:
    """What saves memory, each at a price; all off is the fastest."""

    relu_bits: bool = False  # backward of a ReLU reads a bit per element, not its output: exact
    float16: bool = False  # activations wait for backward as float16: errors of 2^-11
    recompute: float = 0.0  # of the forward pass' MACs, how many may be done again: exact
    fused_update: bool = False  # each layer learns at once: no buffer for all gradients; exact
    local_only: bool = False  # built for gradient = "local": no room for the server's; exact


NO_LEVERS = Levers()


class Variant(NamedTuple):
    """What runs of a schedule: the cut, as the number of its stage, and which exits."""

    cut: int
    upto: bool  # every exit up to the cut, not only the one at it


class Place(NamedTuple):
    """Where a step belongs: it runs in the variants that need what is there."""

    stage: int
    # of the stage: trunk | exit | cut (what only runs where the stage's end is the cut) | upto (and
    # only where all exits up to it learn)
    part: str

    def runs(self, variant: Variant) -> bool:
        """Whether it is one of the variant's."""
        match self.part:
            case "trunk":
                return self.stage <= variant.cut
            case "exit":
                return self.stage == variant.cut or (variant.upto and self.stage < variant.cut)
            case "upto":
                return self.stage == variant.cut and variant.upto
        return self.stage == variant.cut


@dataclass(frozen=True)
class Step:
    """One step of the schedule: at most one kernel's work.

    action: forward | pack | unpack | loss | distill | loss_backward | weigh | backward |
    backward_weight | backward_input | pass | update | follow | send
    """

    action: str
    place: Place
    op: Op | None = None
    exit: str | None = None  # of a loss or a distill: the cut of its exit
    buffers: Mapping[str, str] = ()  # type: ignore[assignment]  # what it works on -> its buffer
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()  # assigned whole
    clears: tuple[str, ...] = ()  # set to zero first
    adds: tuple[str, ...] = ()  # read and added to
    over: tuple[tuple[str, str], ...] = ()  # (written, read): the same memory

    @property
    def stage(self) -> int:
        """The stage that it belongs to."""
        return self.place.stage

    @property
    def part(self) -> str:
        """The part of the stage."""
        return self.place.part

    @property
    def touched(self) -> tuple[str, ...]:
        """Every buffer that it needs."""
        return (*self.reads, *self.writes, *self.clears, *self.adds)

    def runs(self, variant: Variant) -> bool:
        """Whether it is one of the variant's."""
        return self.place.runs(variant)


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
    macs_again: int = 0  # multiply-accumulates of a sample that are done a second time

    def spans(self, variant: Variant) -> dict[str, tuple[int, int]]:
        """First and last step in which a variant needs what is in each buffer."""
        last = len(self.steps) - 1
        spans = dict.fromkeys(self.lasting, (0, last)) | {"input": (0, 0)}
        for i, step in enumerate(self.steps):
            if step.runs(variant):
                for name in step.touched:
                    spans[name] = (spans.get(name, (i, i))[0], max(i, spans.get(name, (i, i))[1]))
        return spans

    def living(self, variant: Variant) -> list[tuple[int, set[str]]]:
        """What a variant needs in each step, and its bytes; of a shared place they count once."""
        steps: list[set[str]] = [set() for _ in self.steps]
        for name, (start, stop) in self.spans(variant).items():
            for i in range(start, stop + 1):
                steps[i].add(name)
        blocks = self.blocks
        return [(sum(aligned(self.sizes[b]) for b in {blocks[n] for n in s}), s) for s in steps]

    @cached_property
    def blocks(self) -> dict[str, str]:
        """For every buffer, the first of those that take turns in its memory."""
        names = dict.fromkeys((*self.lasting, "input"))
        for step in self.steps:
            names |= dict.fromkeys(step.touched)
        below = {written: read for step in self.steps for written, read in step.over}
        found: dict[str, str] = {}
        for name in names:
            first = name
            while first in below:
                first = below[first]
            found[name] = first
        return found
