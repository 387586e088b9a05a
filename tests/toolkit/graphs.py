"""Random small graphs, and an account of schedules of its own, for tests of the memory plan.

``Replay`` follows what is in every buffer, step by step, and knows nothing of how a schedule comes
about: of each kind of operation it knows what its kernel reads and assigns, and of the graph which
contributions a gradient is the sum of.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from splitee.arena import Plan
from splitee.capture import capture
from splitee.graph import Graph, Op
from splitee.model import Network
from splitee.ops import Array
from splitee.schedule import schedule
from splitee.steps import Levers, Schedule, Step, Variant
from toolkit.networks import CLASSES, SHAPE, resnet, segment_at


class Builder:
    """Appends operations to a trunk, and exits to tensors of it."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.ops: list[Op] = []
        self.parameters: dict[str, Array] = {}
        self.statistics: dict[str, Array] = {}
        self.exits: dict[str, str] = {}

    def graph(self) -> Graph:
        """The graph so far; its cut is the tip of the trunk."""
        trunk = ["input", *(op.name for op in self.ops if not op.name.startswith("exits."))]
        return Graph("input", self.shape, tuple(self.ops), self.parameters, self.statistics,
                     trunk[-1], self.exits, CLASSES)  # fmt: skip

    def image(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.graph().shapes[name]

    def add(
        self, kind: str, inputs: list[str], attrs: Any = None, prefix: str = "", **w: Any
    ) -> str:
        """Appends an operation with weights of the shapes given; returns its name."""
        name = f"{prefix}{kind}{len(self.ops)}"
        for role, shape in w.items():
            group = self.statistics if role in ("mean", "variance") else self.parameters
            group[f"{name}.{role}"] = np.zeros(shape, np.float32)
        self.ops.append(Op(kind, name, tuple(inputs), attrs or {}, {r: f"{name}.{r}" for r in w}))
        return name

    def conv(self, x: str, channels: int, kernel: int, stride: int, *, bias: bool) -> str:
        """A convolution that keeps the image's size where stride is 1."""
        attrs = {"kernel": [kernel] * 2, "stride": [stride] * 2, "padding": [kernel // 2] * 2,
                 "groups": 1}  # fmt: skip
        weights: dict[str, Any] = {"weight": (channels, self.image(x)[0], kernel, kernel)}
        if bias:
            weights["bias"] = (channels,)
        return self.add("conv2d", [x], attrs, **weights)

    def norm(self, x: str, kind: str) -> str:
        """A group or a batch norm."""
        channels = self.image(x)[:1]
        if kind == "group_norm":
            return self.add(
                kind, [x], {"groups": 1, "epsilon": 1e-5}, weight=channels, bias=channels
            )
        attrs = {"epsilon": 1e-5, "momentum": 0.1, "frozen": False}
        return self.add(
            kind, [x], attrs, weight=channels, bias=channels, mean=channels, variance=channels
        )

    def pool(self, x: str, kind: str) -> str:
        """A pool of 2x2, or of 1x1 where the image is too small."""
        size = 2 if min(self.image(x)[1:]) > 1 else 1
        return self.add(kind, [x], {"kernel": [size] * 2, "stride": [size] * 2, "padding": [0, 0]})

    def exit(self, x: str) -> None:
        """A head on top of a tensor."""
        prefix = f"exits.{len(self.exits)}."
        branch = self.add("branch", [x], prefix=prefix)
        size = self.image(x)
        attrs = {"kernel": list(size[1:]), "stride": list(size[1:]), "padding": [0, 0]}
        pooled = self.add("avg_pool", [branch], attrs, prefix)
        self.exits[x] = self.add("linear", [pooled], {}, prefix, weight=(CLASSES, size[0]),
                                 bias=(CLASSES,))  # fmt: skip


RESNET = ("group_norm", "relu", "conv2d", "group_norm")  # behind the first of a block


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """A trunk of convolutions, norms, pools and residual blocks, with exits anywhere."""
    size = draw(st.integers(3, 8))
    builder = Builder((draw(st.integers(1, 3)), size, size))
    x = "input"
    kinds = ("conv2d", "group_norm", "batch_norm", "relu", "relu6", "max_pool", "avg_pool",
             "residual")  # fmt: skip
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=8)):
        match kind:
            case "conv2d":
                x = builder.conv(x, draw(st.integers(1, 6)), draw(st.sampled_from((1, 3))),
                                 draw(st.integers(1, 2)), bias=draw(st.booleans()))  # fmt: skip
            case "group_norm" | "batch_norm":
                x = builder.norm(x, kind)
            case "max_pool" | "avg_pool":
                x = builder.pool(x, kind)
            case "relu" | "relu6":
                x = builder.add(kind, [x])
            case _:
                y = builder.conv(x, builder.image(x)[0], 3, 1, bias=False)
                for behind in draw(st.sampled_from(((), ("relu",), ("group_norm",), RESNET))):
                    match behind:
                        case "relu":
                            y = builder.add("relu", [y])
                        case "group_norm":
                            y = builder.norm(y, behind)
                        case _:
                            y = builder.conv(y, builder.image(x)[0], 3, 1, bias=False)
                x = builder.add("add", [y, x] if draw(st.booleans()) else [x, y])
        if draw(st.booleans()):
            builder.exit(x)
    if x not in builder.exits:
        builder.exit(x)
    return builder.graph()


LEVERS = {
    "relu_bits": Levers(relu_bits=True),
    "float16": Levers(float16=True),
    "fused_update": Levers(fused_update=True),
    "local_only": Levers(local_only=True),
    "recompute a quarter": Levers(recompute=0.25),
    "recompute all": Levers(recompute=1.0),
}


def all_levers(recompute: float) -> Levers:
    """Every lever, and a share of the forward pass done again."""
    return Levers(True, True, recompute, True, True)


def levers() -> st.SearchStrategy[Levers]:
    """No lever, each alone, all together, or any others together."""
    share = st.sampled_from((0.0, 0.25, 1.0))
    some = st.builds(Levers, st.booleans(), st.booleans(), share, st.booleans(), st.booleans())
    return st.sampled_from([Levers(), *LEVERS.values()]) | share.map(all_levers) | some


def of_variant(steps: Schedule, graph: Graph, variant: Variant) -> Graph:
    """The part of a graph that a variant of its schedule runs."""
    if len(steps.variants) == 1:
        return graph
    return graph.at(graph.stages[variant.cut].cut, upto=variant.upto)


def running(steps: Schedule, variant: Variant) -> list[tuple[int, Step]]:
    """The steps of a variant, with their numbers."""
    return [(i, step) for i, step in enumerate(steps.steps) if step.runs(variant)]


def macs(graph: Graph, op: Op) -> int:
    """Multiply-accumulates of an operation forward, for one sample."""
    if op.kind not in ("conv2d", "linear"):
        return 0
    # every output is the sum over one filter, or over one row
    weight = graph.weights[op.weights["weight"]]
    return math.prod(graph.shapes[op.name]) * math.prod(weight.shape[1:])


# what is in a buffer


@dataclass(frozen=True)
class Tensor:
    """An activation; exact unless it, or what it was made from, has been a float16."""

    name: str
    exact: bool = True


@dataclass(frozen=True)
class Kept:
    """What forward left for backward: mean, rstd, winner, bits, half or softmax."""

    of: str
    what: str


@dataclass(frozen=True)
class Sum:
    """A gradient so far: of what, and what was added up, once each time that it was."""

    of: str
    parts: frozenset[tuple[tuple[str, int], int]]  # (contributor, number of the input) -> times


@dataclass(frozen=True)
class Scratch:
    pass


Content = Tensor | Kept | Sum | Scratch
LOSS, SERVER = ("loss", 0), ("server", 0)  # contributors beside operations

# what forward leaves for backward beside the output, and backward reads beside d(output)
KEEPS = {"group_norm": ("mean", "rstd"), "max_pool": ("winner",)}
BACKWARD_NEEDS: dict[str, tuple[str, ...]] = {
    "conv2d": ("input",),
    "linear": ("input",),
    "group_norm": ("input", "mean", "rstd"),
    "batch_norm": ("input", "statistics"),
    "relu": ("output",),
    "relu6": ("output",),
    "max_pool": ("winner",),
    "avg_pool": (),
    "branch": (),
}


class Replay:
    """One variant's pass over a schedule; an AssertionError says what is wrong with it."""

    def __init__(
        self, schedule: Schedule, graph: Graph, variant: Variant, levers: Levers, *, moves: bool
    ) -> None:
        self.schedule, self.levers = schedule, levers
        self.graph = of_variant(schedule, graph, variant)
        self.server = moves or not levers.local_only  # has a say in the gradient at the cut
        # with float16, where that saves something
        bits = any(name.endswith(":bits") for name in schedule.sizes)
        self.bits = levers.relu_bits or (levers.float16 and bits)
        self.held: dict[str, Content] = {"input": Tensor("input")}
        self.assigned = {"input"}
        self.computed: Counter[str] = Counter()  # operation -> times
        self.measured: Counter[str] = Counter()
        self.learned: Counter[str] = Counter()  # how often its parameters' gradient was added
        self.updated: set[str] = set()
        self.followed: list[str] = []
        self.sent: list[tuple[str, ...]] = []
        # what each step made of what, but for those that only move a gradient to its place
        self.log: list[tuple[str, str, tuple[Content, ...], tuple[Content, ...]]] = []
        for i, step in running(schedule, variant):
            self.step, self.number = step, i
            self.roles: dict[str, set[str]] = {r: set() for r in ROLES}
            self.said: tuple[list[Content], list[Content]] = ([], [])
            self.check(step.stage <= variant.cut, "it belongs to a deeper stage")
            self.run(step)
            for role in ROLES:
                self.check(self.roles[role] == set(getattr(step, role)), f"{role} of the step")
                self.check(len(set(getattr(step, role))) == len(getattr(step, role)), role)
            self.check(set().union(*self.roles.values()) == set(step.buffers.values()), "buffers")
            if step.action not in ("pass", "send"):
                what = step.op.name if step.op else step.exit or "cut"
                self.log.append((step.action, what, tuple(self.said[0]), tuple(self.said[1])))
        self.end()

    def end(self) -> None:
        """Everything has been done, and what must not be done twice has not."""
        ops = self.graph.ops
        once = {op.name: 1 for op in ops if op.weights}
        assert self.learned == once, "gradients of parameters"
        assert self.updated == (set(once) if self.levers.fused_update else set()), "updates"
        assert set(self.computed) == {op.name for op in ops if op.kind != "branch"}, "forward"
        measures = [op.name for op in ops if op.kind == "batch_norm"]
        assert self.measured == Counter(measures), "statistics"
        assert self.followed == measures, "running statistics"
        cut, logits = self.graph.cut, self.graph.logits
        assert self.sent == [(cut, logits)] * 2, "what the host reads"

    def check(self, right: bool, what: str) -> None:
        assert right, f"step {self.number}, {what}: {self.step}"

    # buffers

    def name(self, what: str) -> str:
        """The buffer of something that a step works on."""
        what = what if what in self.step.buffers else self.schedule.aliases.get(what, what)
        self.check(what in self.step.buffers, f"it has no {what}")
        return self.step.buffers[what]

    def read(self, what: str) -> Content:
        buffer = self.name(what)
        self.check(buffer in self.held, f"{buffer} is not there")
        self.roles["reads"].add(buffer)
        self.said[0].append(self.held[buffer])
        return self.held[buffer]

    def finds(self, what: str, expected: Content) -> None:
        self.check(self.read(what) == expected, f"needs {expected}")

    def activation(self, tensor: str) -> Tensor:
        """Reads an activation, in whichever precision."""
        found, true_name = self.read(tensor), self.schedule.aliases.get(tensor, tensor)
        self.check(isinstance(found, Tensor) and found.name == true_name, f"needs {tensor}")
        assert isinstance(found, Tensor)
        early = self.number < self.schedule.forward_end
        self.check(found.exact or (self.levers.float16 and not early), "it is rounded")
        return found

    def assign(self, what: str, content: Content, role: str = "writes") -> None:
        buffer = self.name(what)
        self.check(buffer not in self.assigned, f"{buffer} is assigned again")
        self.roles[role].add(buffer)
        self.assigned.add(buffer)
        for written, read in self.step.over:
            if written == buffer:
                self.check(read in self.roles["reads"], f"{read} is written on, not read")
                self.check(self.schedule.sizes[written] == self.schedule.sizes[read], "sizes")
                self.held.pop(read)
        self.held[buffer] = content
        self.said[1].append(content)

    def whole(self, tensor: str) -> Sum:
        """A gradient with everything that it is the sum of."""
        parts = Counter(
            (op.name, i) for op in self.graph.ops for i, x in enumerate(op.inputs) if x == tensor
        )
        parts.update([LOSS] if tensor in self.graph.exits.values() else [])
        parts.update([SERVER] if tensor == self.graph.cut and self.server else [])
        return Sum(tensor, frozenset(parts.items()))

    def gradient(self, op: Op) -> None:
        """Reads the gradient of an operation's output."""
        self.finds(f"d({op.name})", self.whole(op.name))

    def begin(self, tensor: str, *parts: tuple[str, int], what: str = "") -> None:
        """Assigns a gradient."""
        content = Sum(tensor, frozenset(Counter(parts).items()))
        self.assign(what or f"d({tensor})", content)

    def contribute(self, tensor: str, part: tuple[str, int], what: str = "") -> None:
        """Adds to a gradient, which the step may clear first."""
        what = what or f"d({tensor})"
        buffer = self.name(what)
        if buffer in self.step.clears:
            self.assign(what, Sum(tensor, frozenset()), "clears")
        self.roles["adds"].add(buffer)
        self.check(buffer in self.held, f"{buffer} is not there")
        found = self.held[buffer]
        self.check(isinstance(found, Sum) and found.of == tensor, f"{buffer} is not d({tensor})")
        assert isinstance(found, Sum)
        parts = Counter(dict(found.parts))
        parts[part] += 1
        self.held[buffer] = Sum(tensor, frozenset(parts.items()))
        self.said[1].append(self.held[buffer])

    def scratch(self, *, needed: bool) -> None:
        self.check(("scratch" in self.step.buffers) == needed, "scratch")
        if needed:
            self.assign("scratch", Scratch())

    def lasting(self, role: str, name: str) -> None:
        self.check(name in self.schedule.lasting, f"{name} does not last")
        self.roles[role].add(self.name(name))

    # steps

    def run(self, step: Step) -> None:
        op = step.op
        self.check(step.exit is None or op is None, "an operation or a loss")
        match step.action:
            case "send":
                self.send()
            case "loss" | "loss_backward":
                assert step.exit is not None
                self.loss(self.graph.exits[step.exit])
            case "weigh":
                self.check(self.server and op is None, "the server has no say")
                self.begin(self.graph.cut, SERVER)
                self.check(self.name(f"d({self.graph.cut})") == f"d({self.graph.cut})", "name")
            case _:
                assert op is not None
                actions: dict[str, Callable[[Op], None]] = {
                    "forward": self.forward, "pack": self.pack, "unpack": self.unpack,
                    "backward": self.backward, "backward_weight": self.backward_weight,
                    "backward_input": self.backward_input, "pass": self.hand_on,
                    "update": self.update, "follow": self.follow,
                }  # fmt: skip
                actions[step.action](op)
        self.check(len(step.over) <= 1, "one buffer is written on another at most")
        self.check(all(read not in self.held for _, read in step.over), "over what is not there")

    def send(self) -> None:
        """The host knows the first buffer of what is sent by its name."""
        for name in self.step.buffers:
            self.check(self.activation(name).exact and self.name(name) == name, "what is sent")
        self.sent.append(tuple(self.step.buffers))

    def loss(self, logits: str) -> None:
        if self.step.action == "loss":
            self.activation(logits)
            self.assign(f"{logits}:softmax", Kept(logits, "softmax"))
        else:
            self.finds(f"{logits}:softmax", Kept(logits, "softmax"))
            self.contribute(logits, LOSS)

    def forward(self, op: Op) -> None:
        self.check(op.name not in self.updated, "its weights are those of the next step already")
        inputs = [self.activation(x) for x in op.inputs]
        self.assign(op.name, Tensor(op.name, all(x.exact for x in inputs)))
        again = self.computed[op.name] > 0
        bits = op.kind in ("relu", "relu6") and self.bits and not again
        for what in (*KEEPS.get(op.kind, ()), *(["bits"] if bits else [])):
            self.assign(f"{op.name}:{what}", Kept(op.name, what))
        self.scratch(needed=op.kind == "conv2d")
        if op.kind == "batch_norm" and not again:
            self.lasting("adds", "statistics")
            self.measured[op.name] += 1
        self.computed[op.name] += 1

    def pack(self, op: Op) -> None:
        self.check(self.levers.float16 and self.activation(op.name).exact, "float16")
        self.assign(f"{op.name}:half", Kept(op.name, "half"))

    def unpack(self, op: Op) -> None:
        self.finds(f"{op.name}:half", Kept(op.name, "half"))
        self.assign(op.name, Tensor(op.name, exact=False))

    def learn(self, op: Op) -> None:
        """Adds the gradients of an operation's parameters."""
        self.check(op.name not in self.updated, "it has learnt already")
        self.learned[op.name] += 1
        if not self.levers.fused_update:
            self.lasting("adds", "gradients")
            return
        own = f"{op.name}:gradients"
        self.check(self.name(own) in self.step.clears, "its gradients are not cleared")
        self.contribute(own, (op.name, 0), own)

    def update(self, op: Op) -> None:
        own = f"{op.name}:gradients"
        self.finds(own, Sum(own, frozenset({((op.name, 0), 1)})))
        self.check(self.levers.fused_update and op.name not in self.updated, "an update")
        self.updated.add(op.name)

    def backward_weight(self, op: Op) -> None:
        self.gradient(op)
        self.activation(op.inputs[0])
        self.scratch(needed=op.kind == "conv2d")
        self.learn(op)

    def backward_input(self, op: Op) -> None:
        self.check(op.name not in self.updated, "its weights are those of the next step already")
        self.gradient(op)
        self.scratch(needed=op.kind == "conv2d")
        self.contribute(op.inputs[0], (op.name, 0))

    def backward(self, op: Op) -> None:
        self.gradient(op)
        for need in BACKWARD_NEEDS[op.kind]:
            if need == "input":
                self.activation(op.inputs[0])
            elif need == "output" and self.bits:
                self.finds(f"{op.name}:bits", Kept(op.name, "bits"))
            elif need == "output":
                # rounded, it may be at the other side of where the gradient ends
                self.check(self.activation(op.name).exact, "a bound needs the exact output")
            elif need == "statistics":
                self.lasting("reads", need)
            else:
                self.finds(f"{op.name}:{need}", Kept(op.name, need))
        if op.kind in ("max_pool", "avg_pool"):
            self.contribute(op.inputs[0], (op.name, 0))
            return
        # these kernels know no other way than on top of the gradient that they are given
        x, d = f"d({op.inputs[0]})", f"d({op.name})"
        self.check(self.step.over == ((self.name(x), self.name(d)),), "it works in place")
        if op.weights:
            self.check(op.name not in self.updated, "its weights are those of the next step")
            self.learn(op)
        self.begin(op.inputs[0], (op.name, 0))

    def hand_on(self, op: Op) -> None:
        """A sum's gradient is that of each term; others have worked theirs out already."""
        target = self.name("to").split("#")[0].removeprefix("d(").removesuffix(")")
        part = (op.name, op.inputs.index(target))
        ready = Sum(target, frozenset({(part, 1)}))
        self.finds("from", self.whole(op.name) if op.kind == "add" else ready)
        if self.name("to") in self.step.writes:
            self.begin(target, part, what="to")
        else:
            self.contribute(target, part, "to")

    def follow(self, op: Op) -> None:
        self.lasting("reads", "statistics")
        self.check(self.number >= self.schedule.backward_end, "behind the step")
        self.followed.append(op.name)


ROLES = ("reads", "writes", "clears", "adds")


def replays(
    steps: Schedule, graph: Graph, levers: Levers, *, moves: bool = False
) -> dict[Variant, Replay]:
    """The pass of every variant."""
    return {v: Replay(steps, graph, v, levers, moves=moves) for v in steps.variants}


# what is alive


def touched(step: Step) -> set[str]:
    """Every buffer that a step has to do with."""
    return {*step.reads, *step.writes, *step.clears, *step.adds}


def alive(schedule: Schedule, variant: Variant) -> list[set[str]]:
    """The buffers alive in each step of a variant: touched up to it and from it on, or lasting."""
    sets = [touched(step) for _, step in running(schedule, variant)]
    sets[0].add("input")
    before = [set[str]().union(*sets[: i + 1]) for i in range(len(sets))]
    after = [set[str]().union(*sets[i:]) for i in range(len(sets))]
    return [(b & a) | set(schedule.lasting) for b, a in zip(before, after, strict=True)]


def fullest(schedule: Schedule) -> int:
    """Most bytes alive in one step of any variant; what is written on another has its place."""
    found = 0
    together: dict[str, set[str]] = {}  # buffers that have one place among them
    for step in schedule.steps:
        for written, read in step.over:
            place = together.get(written, {written}) | together.get(read, {read})
            together |= dict.fromkeys(place, place)
    for variant in schedule.variants:
        for names in alive(schedule, variant):
            places = {min(together.get(name, {name})): schedule.sizes[name] for name in names}
            found = max(found, sum(-(-size // 16) * 16 for size in places.values()))
    return found


def overlaps(
    schedule: Schedule, plan: Plan, variants: Iterable[Variant] = ()
) -> set[frozenset[str]]:
    """The pairs of buffers that share bytes while both are alive.

    A step's own input and output may, if it says so and they lie at the same place.
    """
    found = set()
    for variant in variants or schedule.variants:
        steps = [step for _, step in running(schedule, variant)]
        for step, together in zip(steps, alive(schedule, variant), strict=True):
            placed = sorted(
                (plan.offsets[n], plan.offsets[n] + schedule.sizes[n], n) for n in together
            )
            for i, (low, stop, name) in enumerate(placed):
                for start, high, other in placed[i + 1 :]:
                    pair = {(name, other), (other, name)}
                    same = (low, stop) == (start, high) and not pair.isdisjoint(step.over)
                    if start < stop and not same:
                        found.add(frozenset({name, other}))
    return found


def resnet_graph(norm: str = "group", cut: str = "layer2") -> Graph:
    """A narrow resnet8 with all its exits up to a cut."""
    return capture(segment_at(Network(resnet(norm=norm), SHAPE), cut, upto=True), CLASSES)


def resnet_schedule(norm: str = "group") -> Schedule:
    """Its schedule."""
    return schedule(resnet_graph(norm), 3, momentum=True)
