"""Writes down the steps of one training pass: a walk through the graph and back.

Backward, it goes from operation with parameters to operation with parameters; what lies between
two of them is made when it is needed. The levers trade memory for something else: with
``recompute``, tensors are forgotten after use and made again before the next one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from splitee.forget import forget, fullness
from splitee.graph import Graph, Op
from splitee.ops import OPS
from splitee.steps import (
    GRADIENTS,
    IN_PLACE,
    MOMENTUM,
    NO_LEVERS,
    STATISTICS,
    Levers,
    Place,
    Schedule,
    Step,
    Variant,
    gradient,
    half,
    own_gradients,
    saved,
    scratch,
    softmax,
    tensor_of,
)

POINTWISE = ("group_norm", "batch_norm", "relu", "relu6", "add")  # forward may write on its input
POOLS = ("max_pool", "avg_pool")
BITS = ("relu", "relu6")  # one bit an element says whether the gradient passes


def schedule(
    graph: Graph,
    capacity: int,
    momentum: bool,
    *,
    moves: bool = False,
    distills: bool = False,
    levers: Levers = NO_LEVERS,
) -> Schedule:
    """The steps of one pass over at most capacity samples.

    moves: the cut can be at the end of every stage, with its exit alone or with all up to it.
    Otherwise it stays at the graph's, and all exits run. distills: the exit at the cut can teach
    those below.
    """
    walk = Pass(graph, capacity, moves, distills, levers)
    found = [walk.again(frozenset())]
    if levers.recompute:
        found.append(walk.again(forget(walk)))
    if levers.recompute and levers.float16:  # what is made again may be smaller without
        exact = Pass(graph, capacity, moves, distills, replace(levers, float16=False))
        found.append(exact.again(forget(exact)))
    return min(found, key=lambda walk: fullness(walk, every=True).most).schedule(momentum)


class Pass:
    """One walk through the graph and back, which writes the steps down."""

    def __init__(
        self,
        graph: Graph,
        capacity: int,
        moves: bool,
        distills: bool,
        levers: Levers,
        forgotten: frozenset[str] = frozenset(),
        halved: frozenset[str] = frozenset(),
    ) -> None:
        """forgotten: made again before each use. halved: wait for backward as float16."""
        self.graph, self.capacity, self.moves, self.levers = graph, capacity, moves, levers
        self.distills = distills
        self.forgotten, self.halved = forgotten, halved
        # rounded to float16, a value just below the end of a ReLU6 would let nothing pass any more
        self.bits = levers.relu_bits or levers.float16
        self.stages = graph.stages if moves else (graph.joined,)
        # at the shallowest cut the exit at it is all that there is up to it
        self.variants = tuple(
            Variant(s, upto) for s in range(len(self.stages)) for upto in (False, True) if s or upto
        )
        self.places = {
            op.name: Place(number, part)
            for number, stage in enumerate(self.stages)
            for part, ops in (("trunk", stage.trunk), ("exit", stage.exit))
            for op in ops
        }
        self.ops = {op.name: op for op in graph.ops}
        self.alias = {op.name: op.inputs[0] for op in graph.ops if op.kind == "branch"}
        self.consumers: dict[str, list[tuple[Op, int]]] = {name: [] for name in graph.shapes}
        for op in reversed(graph.ops):
            for i, name in enumerate(op.inputs):
                self.consumers[name].append((op, i))
        # where a cut can be, the server has a say in the gradient
        says = moves or not levers.local_only
        self.points = {stage.point for stage in self.stages} if says else set()

        self.backward = False  # whether the walk is on its way back
        self.steps: list[Step] = []
        self.sizes = {"input": self.bytes("input")}
        self.held = {"input": "input"}  # value -> the buffer that it was last made in
        self.made_at: dict[str, Place] = {"input": Place(0, "trunk")}
        self.used: dict[str, int] = {"input": 0}  # value -> number of steps when it was last used
        self.times: Counter[str] = Counter({"input": 1})
        self.begun: set[str] = set()  # tensors whose gradient something was added to
        self.complete: set[str] = set()  # tensors whose gradient is whole
        self.delivered: set[tuple[str, int]] = set()  # inputs of additions that have theirs
        self.waiting: set[str] = set()  # tensors of the forward pass that backward reads
        self.macs_again = 0
        self._walk()

    def again(self, forgotten: frozenset[str]) -> Pass:
        """The same pass, with other tensors made again."""
        build = self.graph, self.capacity, self.moves, self.distills, self.levers
        found = Pass(*build, forgotten)
        if not self.levers.float16:
            return found
        # a step more for a small tensor gains nothing
        worth = max(map(self.bytes, self.graph.shapes)) / 16
        waiting = found.waiting - forgotten - {"input"}
        halved = frozenset(t for t in waiting if self.bytes(t) >= worth)
        return Pass(*build, forgotten, halved)

    def schedule(self, momentum: bool) -> Schedule:
        """What was written down."""
        graph = self.graph
        lasting = [] if self.levers.fused_update else [GRADIENTS]
        sizes = self.sizes | {GRADIENTS: 4 * graph.parameter_size}
        if momentum:
            sizes[MOMENTUM] = 4 * graph.parameter_size
            lasting.append(MOMENTUM)
        if any(OPS[op.kind].measures for op in graph.ops):
            sizes[STATISTICS] = 4 * (graph.weight_size - graph.parameter_size)
            lasting.append(STATISTICS)
        return Schedule(
            tuple(_in_place(self.steps, self.variants, sizes)),
            self.variants,
            self.infer_end,
            self.forward_end,
            self.backward_end,
            sizes,
            tuple(lasting),
            self.alias,
            self.macs_again,
        )

    # the walk

    def _walk(self) -> None:
        graph = self.graph
        ends = {stage.logits: (number, stage) for number, stage in enumerate(self.stages)}
        exits = {logits: name for name, logits in graph.exits.items()}
        for op in graph.ops:
            if op.kind != "branch":
                self.compute(op, self.places[op.name])
            if op.name in ends:
                number, stage = ends[op.name]
                self.write("send", Place(number, "cut"), reads=(stage.point, stage.logits))
        self.infer_end = len(self.steps)

        for logits, name in exits.items():
            p = softmax(logits)
            self.sizes[p] = self.bytes(logits)
            reads = {logits: self.get(logits, self.places[logits])}
            self.write("loss", self.places[logits], exit=name, reads=reads, writes=(p,))
        if self.distills:
            self.distill()
        for number, stage in enumerate(self.stages):
            # the host may look at the logits first, and leave activations out
            self.write("send", Place(number, "cut"), reads=(stage.point, stage.logits))
        self.forward_end = len(self.steps)

        self.backward = True
        for name in self.halved:
            del self.held[name]
        for op in reversed(graph.ops):
            if op.name in ends:
                number, stage = ends[op.name]
                self.weigh(number, last=stage is self.stages[-1])
            if op.name in exits:
                d, first = self.start(op.name, self.places[op.name])
                p = softmax(op.name)
                self.write(
                    "loss_backward",
                    self.places[op.name],
                    exit=exits[op.name],
                    reads=(p,),
                    clears=(d,) if first else (),
                    adds=(d,),
                )
            if op.weights:  # the gradients between these are made when they are needed
                self.learn(op)
        self.backward_end = len(self.steps)
        for op in graph.ops:
            if OPS[op.kind].measures:
                self.write("follow", self.places[op.name], op, reads=(STATISTICS,))

    def distill(self) -> None:
        """What exits learn from the one at the cut, wherever that is.

        It is made part of their softmax, so that backward neither knows nor waits for another.
        """
        exits = list(self.graph.exits.items())
        for number, stage in enumerate(self.stages):
            deepest = softmax(stage.logits)
            for name, logits in exits[: exits.index((stage.cut, stage.logits))]:
                place, own = Place(number, "upto"), softmax(logits)
                self.write("distill", place, exit=name, reads=(deepest,), adds=(own,))

    def compute(self, op: Op, place: Place, *, again: bool = False) -> None:
        """An operation forward."""
        graph, kind = self.graph, OPS[op.kind]
        reads = {name: self.get(name, place) for name in op.inputs}
        writes = {op.name: self.make(op.name, place)}
        shape = graph.shapes[op.name]
        keeps = {n: self.capacity * size for n, size in kind.saves(op.attrs, shape).items()}
        if self.bits and op.kind in BITS and not again:
            keeps["bits"] = -(-self.capacity * graph.elements(op.name) // 8)
        for name, size in keeps.items():
            # made again, it is what it was: what was left for backward the first time stays
            writes[saved(op, name)] = self.buffer(saved(op, name), size)
        writes |= self.scratch(op, "forward")
        measured = {STATISTICS: STATISTICS} if kind.measures and not again else {}
        over = tuple((writes[op.name], x) for x in reads.values()) if op.kind in POINTWISE else ()
        self.write("forward", place, op, reads=reads, writes=writes, adds=measured, over=over)
        if again:
            shapes = {role: graph.weights[name].shape for role, name in op.weights.items()}
            self.macs_again += kind.macs(shape, shapes)
        elif op.name in self.halved:
            packed = {half(op.name): half(op.name)}
            self.sizes[half(op.name)] = self.bytes(op.name) // 2
            self.write("pack", place, op, reads={op.name: writes[op.name]}, writes=packed)

    def weigh(self, number: int, *, last: bool) -> None:
        """The server's gradient at a cut, which the host has written where it belongs."""
        point = self.stages[number].point
        if point not in self.points:
            return
        place = Place(number, "cut")
        d = self.held.get(gradient(point)) or self.make(gradient(point), place)
        if last:
            self.begun.add(point)
        self.write("weigh", place, writes={gradient(point): d})

    def learn(self, op: Op) -> None:
        """What an operation with parameters does backward."""
        place, (x, *_) = self.places[op.name], op.inputs
        wanted = self.graph.needs_gradient(x)
        # Making either again takes more memory on the way than in the end: the one first that
        # adds a tensor to those alive, then the one that only grows for a while.
        order = [x, gradient(op.name)]
        found = {n: self.get(n, place) for n in (order[::-1] if self.grows(op.name) else order)}
        tensor, d = ({name: found[name]} for name in order)
        target, fresh = {GRADIENTS: GRADIENTS}, {}
        if self.levers.fused_update:
            target = fresh = {own_gradients(op): own_gradients(op)}
            learnt = self.graph.parameters.keys() & op.weights.values()
            size = sum(self.graph.parameters[name].size for name in learnt)
            self.sizes[own_gradients(op)] = 4 * size
        if op.kind in IN_PLACE:
            measured = {STATISTICS: STATISTICS} if OPS[op.kind].measures else {}
            kept = {saved(op, n): saved(op, n) for n in self.saves(op)} | measured
            self.transform(op, tensor | d | kept, target, clears=fresh, wanted=wanted)
        else:
            self.write(
                "backward_weight",
                place,
                op,
                reads=tensor | d,
                writes=self.scratch(op, "backward_weight"),
                clears=fresh,
                adds=target,
            )
            if wanted:
                self.add("backward_input", op, d, self.scratch(op, "backward_input"))
        if self.levers.fused_update:
            self.write("update", place, op, reads=target)

    def grows(self, tensor: str) -> bool:
        """Whether a part of a tensor's gradient is there, and the rest comes on top of it."""
        return tensor in self.begun or any(
            self.grows(op.name) for op, _ in self.consumers[tensor] if op.kind in (*IN_PLACE, "add")
        )

    def gather(self, tensor: str) -> None:
        """Makes a tensor's gradient whole: adds what operations without parameters contribute."""
        self.complete.add(tensor)
        for op, i in self.consumers[tensor]:
            place = self.places[op.name]
            if op.weights or (op.name, i) in self.delivered:
                continue
            if op.kind == "add":
                self.share(op, i)
                continue
            kept = {saved(op, n): saved(op, n) for n in self.saves(op)}
            if op.kind in BITS and not self.bits:
                kept[op.name] = self.get(op.name, place)
            d = {gradient(op.name): self.get(gradient(op.name), place)}
            if op.kind in POOLS:
                self.add("backward", op, d | kept, {})
            else:
                self.transform(op, d | kept, {})

    def share(self, op: Op, i: int) -> None:
        """Hands the gradient of a sum on: to all its terms at once, if it is not made again."""
        lazy = any(gradient(name) in self.forgotten for name in (op.name, *op.inputs))
        for term in (i,) if lazy else range(len(op.inputs)):
            x = op.inputs[term]
            if (op.name, term) not in self.delivered and self.graph.needs_gradient(x):
                if not lazy:
                    self.delivered.add((op.name, term))
                source = self.get(gradient(op.name), self.places[op.name])
                self.hand_on(op, source, x)

    def transform(
        self,
        op: Op,
        reads: Mapping[str, str],
        adds: Mapping[str, str],
        *,
        clears: Mapping[str, str] = {},
        wanted: bool = True,
    ) -> None:
        """A backward step in place: the gradient of the output becomes that of the input."""
        x, place = op.inputs[0], self.places[op.name]
        alone = len(self.consumers[x]) == 1 and x not in self.points
        value = gradient(x) if alone else f"{gradient(x)} by {op.name}"
        if alone:
            self.begun.add(x)
        result = self.make(value, place, self.bytes(x))
        over = ((result, reads[gradient(op.name)]),)
        writes = {gradient(x): result}
        self.write("backward", place, op, reads=reads, writes=writes, clears=clears, adds=adds,
                   over=over)  # fmt: skip
        if wanted and not alone:
            self.hand_on(op, result, x)

    def hand_on(self, op: Op, source: str, x: str) -> None:
        """Adds a gradient that is there to that of a tensor."""
        d, first = self.start(x, self.places[op.name])
        names = {"from": source}, {"to": d}
        place = self.places[op.name]
        if first:
            self.write("pass", place, op, reads=names[0], writes=names[1], over=((d, source),))
        else:
            self.write("pass", place, op, reads=names[0], adds=names[1])

    def add(self, action: str, op: Op, reads: Mapping[str, str], writes: Mapping[str, str]) -> None:
        """A backward step that adds to the gradient of the operation's input."""
        x, place = op.inputs[0], self.places[op.name]
        d, first = self.start(x, place)
        target = {gradient(x): d}
        self.write(action, place, op, reads=reads, writes=writes, clears=target if first else {},
                   adds=target)  # fmt: skip

    def start(self, tensor: str, place: Place) -> tuple[str, bool]:
        """The buffer of a tensor's gradient, and whether it has to be assigned first."""
        first = tensor not in self.begun
        self.begun.add(tensor)
        d = gradient(tensor)
        if d in self.held and not (first and d in self.forgotten):
            return self.held[d], first
        return self.make(d, place), first

    # buffers

    def get(self, value: str, place: Place) -> str:
        """The buffer that a step at a place finds a tensor or a gradient in."""
        value = self.alias.get(value, value)
        tensor = value[2:-1] if value.startswith("d(") else None
        there = self.held.get(value)
        fleeting = value in self.forgotten or (self.backward and value in self.halved)
        lost = fleeting and self.used.get(value) != len(self.steps)
        if there is not None and fleeting:
            lost = lost or not self.covers(self.made_at[there], place)
        if tensor is not None:
            if lost and tensor in self.complete:
                self.complete.discard(tensor)
                self.begun.discard(tensor)
            if tensor not in self.complete:
                self.gather(tensor)
        elif there is None or lost:
            if self.backward and value in self.halved:
                self.unpack(value, place)
            else:
                self.compute(self.ops[value], place, again=True)
        elif self.backward and value not in self.forgotten:
            self.waiting.add(value)
        return self.held[value]

    def unpack(self, tensor: str, place: Place) -> None:
        writes = {tensor: self.make(tensor, place)}
        self.write("unpack", place, self.ops[tensor], reads={half(tensor): half(tensor)},
                   writes=writes)  # fmt: skip

    def covers(self, made: Place, needed: Place) -> bool:
        """Whether what was made at a place is there in every variant that needs it at another."""
        return all(made.runs(v) for v in self.variants if needed.runs(v))

    def make(self, value: str, place: Place, size: int | None = None) -> str:
        """A fresh buffer for a tensor or a gradient."""
        tensor = value[2:-1] if value.startswith("d(") and value.endswith(")") else value
        name = self.buffer(value, self.bytes(tensor) if size is None else size)
        self.held[value] = name
        self.made_at[name] = place
        return name

    def buffer(self, value: str, size: int) -> str:
        self.times[value] += 1
        name = value if self.times[value] == 1 else f"{value}#{self.times[value]}"
        self.sizes[name] = size
        return name

    def bytes(self, tensor: str) -> int:
        return 4 * self.capacity * self.graph.elements(tensor)

    def saves(self, op: Op) -> Iterable[str]:
        """What forward left for backward beside its output."""
        yield from OPS[op.kind].saves(op.attrs, self.graph.shapes[op.name])
        if self.bits and op.kind in BITS:
            yield "bits"

    def scratch(self, op: Op, action: str) -> dict[str, str]:
        """The scratch of a step, if it needs any."""
        x, out = self.graph.shapes[op.inputs[0]], self.graph.shapes[op.name]
        size = OPS[op.kind].scratch(op.attrs, x, out)
        return {"scratch": self.buffer(scratch(op, action), size)} if size else {}

    def write(
        self,
        action: str,
        place: Place,
        op: Op | None = None,
        *,
        exit: str | None = None,
        reads: Mapping[str, str] | tuple[str, ...] = (),
        writes: Mapping[str, str] | tuple[str, ...] = (),
        clears: Mapping[str, str] | tuple[str, ...] = (),
        adds: Mapping[str, str] | tuple[str, ...] = (),
        over: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """Writes a step down."""
        buffers: dict[str, str] = {}
        listed: list[tuple[str, ...]] = []
        for names in (reads, writes, clears, adds):
            named = names if isinstance(names, Mapping) else {n: n for n in names}
            buffers |= named
            listed.append(tuple(dict.fromkeys(named.values())))
        read, written, cleared, added = listed
        self.steps.append(
            Step(action, place, op, exit, buffers, read, written, cleared, added, over)
        )
        for buffer in (b for group in listed for b in group):
            self.used[tensor_of(buffer)] = len(self.steps)


def _in_place(
    steps: list[Step], variants: Iterable[Variant], sizes: Mapping[str, int]
) -> Iterable[Step]:
    """Lets steps write on what nobody reads after them."""
    last = {
        v: {name: i for i, step in enumerate(steps) if step.runs(v) for name in step.touched}
        for v in variants
    }
    for i, step in enumerate(steps):
        taken: list[tuple[str, str]] = []
        for written, read in step.over:
            free = all(last[v][read] == i for v in variants if step.runs(v))
            if free and sizes[written] == sizes[read] and not taken:
                taken.append((written, read))
        yield replace(step, over=tuple(taken))
