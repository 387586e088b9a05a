"""Graph -> segment.c: a list of calls to the hand-written kernels, over one static arena.

The file implements ``firmware/core/segment.h``. Every step of the schedule is a case of one switch,
so that the release firmware can also be single-stepped and compared tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from splitee.errors import ModelError
from splitee.graph import Graph, Op
from splitee.ops import Array, Shape, depthwise
from splitee.place import Build
from splitee.steps import (
    ALIGNMENT,
    GRADIENTS,
    MOMENTUM,
    STATISTICS,
    Step,
    gradient,
    half,
    own_gradients,
    saved,
    softmax,
)

KINDS = (
    "conv2d", "linear", "group_norm", "batch_norm", "relu", "relu6", "add", "max_pool", "avg_pool",
    "branch",
)  # fmt: skip


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _literals(values: Array) -> str:
    """Values as exact hexadecimal C literals, four to a line."""
    # a mantissa of float32 ends in zeros as a double's
    texts = [
        re.sub(r"\.?0+p", "p", float(v).hex()) + "f" for v in np.asarray(values, np.float32).ravel()
    ]
    lines = [", ".join(texts[i : i + 4]) for i in range(0, len(texts), 4)]
    return ",\n    ".join(lines)


class _Writer:
    def __init__(self, build: Build) -> None:
        self.build = build
        self.graph: Graph = build.graph
        for op in self.graph.ops:
            if op.kind not in KINDS:
                raise ModelError(
                    f"{op.name}: the C exporter has no {op.kind}; it has {', '.join(KINDS)}"
                )

    # names of things in C

    def buffer(self, name: str) -> str:
        """A pointer to a buffer of the arena."""
        return f"(arena + {self.build.plan.offsets[name] // 4})"

    def at(self, step: Step, name: str) -> str:
        """A pointer to what a step works on: a tensor, a gradient, or what is the step's own."""
        name = name if name in step.buffers else self.build.schedule.aliases[name]
        return self.buffer(step.buffers[name])

    def shape(self, tensor: str) -> Shape:
        return self.graph.shapes[tensor]

    def size(self, tensor: str) -> str:
        """Number of values in a tensor of the part at hand."""
        return f"n * {self.graph.elements(tensor)}"

    def weight(self, op: Op, role: str) -> str:
        return f"weights + {self.graph.places[op.weights[role]]}" if role in op.weights else "NULL"

    def weight_gradient(self, step: Step, op: Op, role: str) -> str:
        if role not in op.weights:
            return "NULL"
        place = self.graph.places[op.weights[role]]
        if own_gradients(op) in step.buffers:
            return f"{self.at(step, own_gradients(op))} + {place - self.first_weight(op)}"
        return f"{self.at(step, GRADIENTS)} + {place}"

    def first_weight(self, op: Op) -> int:
        """Where the parameters of an operation begin; they are neighbours."""
        trained = [name for name in op.weights.values() if name in self.graph.parameters]
        return min(self.graph.places[name] for name in trained)

    def running(self, op: Op) -> tuple[str, str]:
        """Mean and variance of all batches so far."""
        return self.weight(op, "mean"), self.weight(op, "variance")

    def of_batch(self, op: Op) -> tuple[str, str]:
        """Mean and variance of the batch at hand."""
        first = self.graph.parameter_size
        mean, variance = (
            f"{self.buffer(STATISTICS)} + {self.graph.places[op.weights[role]] - first}"
            for role in ("mean", "variance")
        )
        return mean, variance

    # steps

    def call(self, step: Step) -> list[str]:
        """The statements of a step; a send has none."""
        match step.action:
            case "send":
                return []
            case "weigh":
                return [self.weigh(step)]
            case "distill":
                return [self.distill(step)]
            case "loss" | "loss_backward":
                return [*self.clears(step), self.loss(step)]
        assert step.op is not None
        action = step.action.removesuffix("_weight").removesuffix("_input")
        general = {"pack": self.pack, "unpack": self.unpack, "pass": self.hand_on,
                   "update": self.update}  # fmt: skip
        method = general.get(action) or getattr(self, f"{step.op.kind}_{action}")
        # a batch norm measures before it normalises: two statements
        return [*self.clears(step), *method(step, step.op).splitlines()]

    def clears(self, step: Step) -> list[str]:
        found = []
        for name, buffer in step.buffers.items():
            if buffer not in step.clears:
                continue
            tensor = name[2:-1] if name.startswith("d(") else None
            size = (
                f"{self.size(tensor)} * sizeof(float)"
                if tensor in self.graph.shapes
                else f"{self.build.schedule.sizes[buffer]}"
            )
            found.append(f"memset({self.buffer(buffer)}, 0, {size})")
        return found

    def weigh(self, step: Step) -> str:
        cut = self.build.stages[step.stage].point
        d = self.at(step, gradient(cut))
        return f"gradient_weigh({d}, pass->server_weight, {self.size(cut)})"

    def pack(self, step: Step, op: Op) -> str:
        h, x = self.at(step, half(op.name)), self.at(step, op.name)
        return f"half_pack((uint16_t *){h}, {x}, {self.size(op.name)})"

    def unpack(self, step: Step, op: Op) -> str:
        x, h = self.at(step, op.name), self.at(step, half(op.name))
        return f"half_unpack({x}, (const uint16_t *){h}, {self.size(op.name)})"

    def hand_on(self, step: Step, op: Op) -> str:
        to, source, size = self.at(step, "to"), self.at(step, "from"), self.size(op.name)
        if step.over:
            return ""  # it is there already
        if step.writes:
            return f"memcpy({to}, {source}, {size} * sizeof(float))"
        return f"gradient_add({to}, {source}, {size})"

    def update(self, step: Step, op: Op) -> str:
        first = self.first_weight(op)
        size = self.build.schedule.sizes[step.buffers[own_gradients(op)]] // 4
        return f"fused_learn(pass, {first}, {self.at(step, own_gradients(op))}, {size})"

    def loss(self, step: Step) -> str:
        assert step.exit is not None
        logits = self.graph.exits[step.exit]
        p = self.at(step, softmax(logits))
        rest = f"pass->labels, pass->inverse_batch, {self.graph.classes}, n)"
        if step.action == "loss_backward":
            d = self.at(step, gradient(logits))
            return f"softmax_cross_entropy_backward({d}, {p}, {rest}"
        return (
            f"softmax_cross_entropy_forward({p}, {self.told(step)}, {self.at(step, logits)}, {rest}"
        )

    def distill(self, step: Step) -> str:
        """An exit's softmax, with another's made part of what it learns from."""
        (p,), (teacher,) = step.adds, step.reads
        rest = f"pass->labels, pass->settings->distill, {self.graph.classes}, n)"
        return f"softmax_distill({self.buffer(p)}, {self.buffer(teacher)}, {rest}"

    def told(self, step: Step) -> str:
        """Where a loss and its count go: those of the exit at the cut are the pass's."""
        assert step.exit is not None
        if step.part == "trunk":  # an exit that is never at the cut
            return "NULL, NULL"
        at_cut = f"pass->cut == {step.stage} ? " if self.build.moves else ""
        else_nothing = " : NULL" if self.build.moves else ""
        return ", ".join(f"{at_cut}&pass->{out}{else_nothing}" for out in ("loss", "correct"))

    def conv2d_forward(self, step: Step, op: Op) -> str:
        kernel, shape = self.convolution(step, op, "forward")
        return (
            f"{kernel}({self.at(step, op.name)}, {self.at(step, op.inputs[0])}, "
            f"{self.weight(op, 'weight')}, {self.weight(op, 'bias')}, {shape})"
        )

    def conv2d_backward(self, step: Step, op: Op) -> str:
        kernel, shape = self.convolution(step, op, "backward")
        return f"{kernel}({self.layer_gradients(step, op)}, {shape})"

    def layer_gradients(self, step: Step, op: Op) -> str:
        """The arguments of a backward kernel that all layers have: a step wants dw or dx alone."""
        if step.action == "backward_weight":
            dw, db = (self.weight_gradient(step, op, role) for role in ("weight", "bias"))
            dx, x = "NULL", self.at(step, op.inputs[0])
        else:
            dw = db = x = "NULL"
            dx = self.at(step, gradient(op.inputs[0]))
        dy = self.at(step, gradient(op.name))
        return f"{dx}, {dw}, {db}, {dy}, {x}, {self.weight(op, 'weight')}"

    def convolution(self, step: Step, op: Op, action: str) -> tuple[str, str]:
        """The kernel's name, and the arguments that follow the tensors."""
        window, groups = f"&{self.window(op)}", op.attrs["groups"]
        alone = depthwise(op.attrs, self.shape(op.inputs[0]), self.shape(op.name))
        if groups != 1 and not alone:
            return f"grouped_conv2d_{action}", f"{window}, {groups}, n"
        scratch = self.at(step, "scratch")
        return f"fast_{'depthwise' if alone else 'conv2d'}_{action}", f"{window}, n, {scratch}"

    def linear_forward(self, step: Step, op: Op) -> str:
        inputs, outputs = self.graph.elements(op.inputs[0]), self.graph.elements(op.name)
        return (
            f"fast_linear_forward({self.at(step, op.name)}, {self.at(step, op.inputs[0])}, "
            f"{self.weight(op, 'weight')}, {self.weight(op, 'bias')}, {inputs}, {outputs}, n)"
        )

    def linear_backward(self, step: Step, op: Op) -> str:
        inputs, outputs = self.graph.elements(op.inputs[0]), self.graph.elements(op.name)
        return f"fast_linear_backward({self.layer_gradients(step, op)}, {inputs}, {outputs}, n)"

    def group_norm_forward(self, step: Step, op: Op) -> str:
        channels, height, width = self.shape(op.name)
        mean, rstd = (self.at(step, saved(op, name)) for name in ("mean", "rstd"))
        return (
            f"group_norm_forward({self.at(step, op.name)}, {mean}, {rstd}, "
            f"{self.at(step, op.inputs[0])}, {self.weight(op, 'weight')}, "
            f"{self.weight(op, 'bias')}, {channels}, {op.attrs['groups']}, {height * width}, "
            f"{_literals(np.array(op.attrs['epsilon']))}, n)"
        )

    def group_norm_backward(self, step: Step, op: Op) -> str:
        channels, height, width = self.shape(op.name)
        mean, rstd = (self.at(step, saved(op, name)) for name in ("mean", "rstd"))
        return (
            f"group_norm_backward({self.norm_gradients(step, op)}, {mean}, {rstd}, {channels}, "
            f"{op.attrs['groups']}, {height * width}, n)"
        )

    def norm_gradients(self, step: Step, op: Op) -> str:
        """The arguments of a backward kernel that all norms have."""
        dw, db = (self.weight_gradient(step, op, role) for role in ("weight", "bias"))
        d, x = self.in_place(step, op), self.at(step, op.inputs[0])
        return f"{d}, {dw}, {db}, {x}, {self.weight(op, 'weight')}"

    def in_place(self, step: Step, op: Op) -> str:
        """The gradient of the output, which becomes that of the input where it lies."""
        assert step.over, step
        return self.at(step, gradient(op.name))

    def batch_norm_forward(self, step: Step, op: Op) -> str:
        channels, height, width = self.shape(op.name)
        frozen = op.attrs["frozen"]
        x, sizes = self.at(step, op.inputs[0]), f"{channels}, {height * width}"
        measured, running = self.of_batch(op), self.running(op)
        mean, variance = (
            r if frozen else f"pass->learns ? {m} : {r}"
            for m, r in zip(measured, running, strict=True)
        )
        seen = "pass->seen" if frozen else "0"
        measure = f"batch_norm_measure({', '.join(measured)}, {x}, {sizes}, {seen}, n)"
        return (f"if (pass->learns) {measure}\n" if STATISTICS in step.buffers else "") + (
            f"batch_norm_forward({self.at(step, op.name)}, {x}, {self.weight(op, 'weight')}, "
            f"{self.weight(op, 'bias')}, {mean}, {variance}, {sizes}, "
            f"{_literals(np.array(op.attrs['epsilon']))}, n)"
        )

    def batch_norm_backward(self, step: Step, op: Op) -> str:
        channels, height, width = self.shape(op.name)
        frozen = op.attrs["frozen"]
        mean, variance = self.running(op) if frozen else self.of_batch(op)
        return (
            f"batch_norm{'_frozen' if frozen else ''}_backward({self.norm_gradients(step, op)}, "
            f"{mean}, {variance}, {channels}, {height * width}, "
            f"{_literals(np.array(op.attrs['epsilon']))}, n)"
        )

    def batch_norm_follow(self, step: Step, op: Op) -> str:
        channels, height, width = self.shape(op.name)
        return (
            f"batch_norm_follow({', '.join((*self.running(op), *self.of_batch(op)))}, {channels}, "
            f"(pass->seen + n) * {height * width}, {_literals(np.array(op.attrs['momentum']))})"
        )

    def relu_forward(self, step: Step, op: Op) -> str:
        y, x, size = self.at(step, op.name), self.at(step, op.inputs[0]), self.size(op.name)
        if saved(op, "bits") in step.buffers:
            return f"{op.kind}_forward_bits({y}, (uint8_t *){self.bits(step, op)}, {x}, {size})"
        return f"{op.kind}_forward({y}, {x}, {size})"

    def relu_backward(self, step: Step, op: Op) -> str:
        d, size = self.in_place(step, op), self.size(op.name)
        if saved(op, "bits") in step.buffers:
            return f"relu_backward_bits({d}, (const uint8_t *){self.bits(step, op)}, {size})"
        return f"{op.kind}_backward({d}, {self.at(step, op.name)}, {size})"

    def bits(self, step: Step, op: Op) -> str:
        return self.at(step, saved(op, "bits"))

    relu6_forward, relu6_backward = relu_forward, relu_backward

    def add_forward(self, step: Step, op: Op) -> str:
        a, b = (self.at(step, name) for name in op.inputs)
        return f"add_forward({self.at(step, op.name)}, {a}, {b}, {self.size(op.name)})"

    def max_pool_forward(self, step: Step, op: Op) -> str:
        winner = f"(uint8_t *){self.at(step, saved(op, 'winner'))}"
        return (
            f"max_pool_forward({self.at(step, op.name)}, {winner}, "
            f"{self.at(step, op.inputs[0])}, &{self.window(op)}, n)"
        )

    def max_pool_backward(self, step: Step, op: Op) -> str:
        winner = f"(const uint8_t *){self.at(step, saved(op, 'winner'))}"
        dx, dy = self.at(step, gradient(op.inputs[0])), self.at(step, gradient(op.name))
        return f"max_pool_backward({dx}, {dy}, {winner}, &{self.window(op)}, n)"

    def avg_pool_forward(self, step: Step, op: Op) -> str:
        return (
            f"avg_pool_forward({self.at(step, op.name)}, {self.at(step, op.inputs[0])}, "
            f"&{self.window(op)}, n)"
        )

    def avg_pool_backward(self, step: Step, op: Op) -> str:
        dx, dy = self.at(step, gradient(op.inputs[0])), self.at(step, gradient(op.name))
        return f"avg_pool_backward({dx}, {dy}, &{self.window(op)}, n)"

    def branch_backward(self, step: Step, op: Op) -> str:
        d = self.in_place(step, op)
        return f"gradient_weigh({d}, pass->exit_weight, {self.size(op.name)})"

    # the file

    def window(self, op: Op) -> str:
        return f"window_{_identifier(op.name)}"

    def windows(self) -> Iterable[str]:
        for op in self.graph.ops:
            if "kernel" in op.attrs:
                values = [
                    *self.shape(op.inputs[0]), *self.shape(op.name),
                    *op.attrs["kernel"], *op.attrs["stride"], *op.attrs["padding"],
                ]  # fmt: skip
                text = ", ".join(str(v) for v in values)
                yield f"static const struct window {self.window(op)} = {{{text}}};"

    def cases(self) -> Iterable[str]:
        for number, step in enumerate(self.build.schedule.steps):
            what = step.op.name if step.op else step.exit or self.build.stages[step.stage].point
            yield f"    case {number}: // {step.action} {what}"
            yield from (f"        {statement};" for statement in self.call(step) if statement)
            yield "        break;"

    def steps(self) -> Iterable[str]:
        """The table of where each step belongs."""
        texts = [f"{{{s.stage}, STEP_{s.part.upper()}}}" for s in self.build.schedule.steps]
        yield "static const struct step steps[] = {"
        yield from (f"    {', '.join(texts[i : i + 5])}," for i in range(0, len(texts), 5))
        yield "};"

    def stages(self) -> Iterable[str]:
        """The table of what is different at each cut."""
        yield "static const struct stage stages[] = {"
        end = 0
        for stage in self.build.stages:
            exit = end + self.parameters(stage.trunk)
            end = exit + self.parameters(stage.exit)
            yield f"    {{ // {stage.cut}"
            yield f"        .exit_parameters = {exit},"
            yield f"        .parameters_end = {end},"
            yield f"        .activation_size = {self.graph.elements(stage.point)},"
            yield f"        .activations = {self.buffer(stage.point)},"
            yield f"        .gradient = {self.gradient_of(stage.point)},"
            yield f"        .logits = {self.buffer(stage.logits)},"
            yield "    },"
        yield "};"

    def gradient_of(self, point: str) -> str:
        """Where the server's gradient goes, if the segment has room for it."""
        if self.build.levers.local_only and not self.build.moves:
            return "NULL"
        return self.buffer(gradient(point))

    def shard(self) -> Iterable[str]:
        """Room for samples; none in a program that brings its own."""
        samples, size = self.build.samples_max, self.build.record_size
        if samples:
            yield f"SEGMENT_SHARD static uint8_t shard[{samples * size}];"
            yield f"SEGMENT_SHARD static uint16_t order[{samples}];"

    def parameters(self, ops: Iterable[Op]) -> int:
        """Number of values that these operations train."""
        names = {name for op in ops for name in op.weights.values()}
        return sum(v.size for name, v in self.graph.parameters.items() if name in names)

    def render(self) -> str:
        build, graph, plan = self.build, self.graph, self.build.plan
        momentum = self.buffer(MOMENTUM) if build.momentum else "NULL"
        gradients = "NULL" if build.levers.fused_update else self.buffer(GRADIENTS)
        lines = [
            "// Generated by splitee_exporters/c.py: a client's segment up to "
            f"{build.stages[-1].cut}; do not edit.",
            '#include "core/segment.h"',
            "",
            "#include <string.h>",
            "",
            *(['#include "core/fused.h"'] if build.levers.fused_update else []),
            '#include "kernels/fast/fast.h"',
            '#include "kernels/kernels.h"',
            *(['#include "protocol/messages.h"'] if build.distills else []),
            "",
            f"// {plan.size} bytes planned; {plan.lower_bound} are alive at once at most.",
            f"static _Alignas({ALIGNMENT}) float arena[{plan.size // 4}];",
            f"static float weights[{max(1, graph.weight_size)}] = {{",
            "    " + _literals(graph.flatten(graph.weights)),
            "};",
            *self.shard(),
            f"static uint8_t labels[{build.capacity}];",
            f"static const float scale[] = {{{_literals(np.array(build.scale))}}};",
            f"static const float shift[] = {{{_literals(np.array(build.shift))}}};",
            *self.windows(),
            *self.steps(),
            *self.stages(),
            "",
            "const struct segment segment = {",
            f"    .checksum = 0x{build.checksum:08x}u,",
            f"    .capacity = {build.capacity},",
            f"    .classes = {graph.classes},",
            "    .value_size = sizeof(float),",
            *(["    .distills = 1,"] if build.distills else []),
            f"    .cuts = {len(build.stages)},",
            f"    .infer_end = {build.schedule.infer_end},",
            f"    .forward_end = {build.schedule.forward_end},",
            f"    .backward_end = {build.schedule.backward_end},",
            f"    .step_end = {len(build.schedule.steps)},",
            f"    .channels = {graph.input_shape[0]},",
            f"    .samples_max = {build.samples_max},",
            f"    .input_size = {graph.elements(graph.input)},",
            f"    .parameter_size = {graph.parameter_size},",
            f"    .weight_size = {graph.weight_size},",
            "    .arena_size = sizeof arena,",
            "    .steps = steps,",
            "    .stages = stages,",
            "    .arena = (uint8_t *)arena,",
            "    .weights = weights,",
            f"    .gradients = {gradients},",
            f"    .momentum = {momentum},",
            f"    .input = {self.buffer(graph.input)},",
            *(["    .shard = shard,", "    .order = order,"] if build.samples_max else []),
            "    .labels = labels,",
            "    .scale = scale,",
            "    .shift = shift,",
            "};",
            "",
            "void segment_run(unsigned step, struct pass *pass)",
            "{",
            "    const size_t n = pass->count;",
            "    switch (step) {",
            *self.cases(),
            "    default:",
            "        break;",
            "    }",
            "}",
            "",
        ]
        return "\n".join(lines)


def to_c(build: Build) -> str:
    """The text of segment.c.

    Raises ModelError, naming the operation, for a kind that has no kernel.
    """
    return _Writer(build).render()
