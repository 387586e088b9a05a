"""Random small graphs, and lifetimes of buffers worked out anew, for tests of the memory plan."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from splitee.arena import Plan, Schedule, Step, schedule
from splitee.capture import capture
from splitee.graph import Graph, Op
from splitee.model import Network
from splitee.ops import Array
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


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """A trunk of convolutions, norms, pools and residual blocks, with exits anywhere."""
    size = draw(st.integers(3, 8))
    builder = Builder((draw(st.integers(1, 3)), size, size))
    x = "input"
    kinds = ("conv2d", "group_norm", "batch_norm", "relu", "max_pool", "avg_pool", "residual")
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=8)):
        match kind:
            case "conv2d":
                x = builder.conv(x, draw(st.integers(1, 6)), draw(st.sampled_from((1, 3))),
                                 draw(st.integers(1, 2)), bias=draw(st.booleans()))  # fmt: skip
            case "group_norm" | "batch_norm":
                x = builder.norm(x, kind)
            case "max_pool" | "avg_pool":
                x = builder.pool(x, kind)
            case "relu":
                x = builder.add("relu", [x])
            case _:
                y = builder.conv(x, builder.image(x)[0], 3, 1, bias=False)
                if draw(st.booleans()):
                    y = builder.add("relu", [y])
                x = builder.add("add", [y, x] if draw(st.booleans()) else [x, y])
        if draw(st.booleans()):
            builder.exit(x)
    if x not in builder.exits:
        builder.exit(x)
    return builder.graph()


def touched(step: Step) -> set[str]:
    """Every buffer that a step has to do with."""
    return {*step.reads, *step.writes, *step.clears, *step.adds}


def alive(schedule: Schedule) -> list[set[str]]:
    """The buffers alive in each step: touched up to it and from it on, or lasting."""
    sets = [touched(step) for step in schedule.steps]
    sets[0].add("input")
    before = [set[str]().union(*sets[: i + 1]) for i in range(len(sets))]
    after = [set[str]().union(*sets[i:]) for i in range(len(sets))]
    return [(b & a) | set(schedule.lasting) for b, a in zip(before, after, strict=True)]


def overlaps(schedule: Schedule, plan: Plan) -> set[frozenset[str]]:
    """The pairs of buffers that share bytes while both are alive."""
    found = set()
    for together in alive(schedule):
        placed = sorted((plan.offsets[n], plan.offsets[n] + schedule.sizes[n], n) for n in together)
        for i, (_, stop, name) in enumerate(placed):
            for start, _, other in placed[i + 1 :]:
                if start < stop:
                    found.add(frozenset({name, other}))
    return found


def resnet_schedule(norm: str = "group") -> Schedule:
    """The schedule of a narrow resnet8 up to layer2, with all its exits."""
    network = Network(resnet(norm=norm), SHAPE)
    return schedule(capture(segment_at(network, "layer2", upto=True), CLASSES), 3, momentum=True)
