"""Int8Graph -> segment.c: calls to the kernels of ``firmware/kernels/int8.h`` over one arena.

The file implements ``firmware/core/segment.h``, as that of ``c.py`` does, for a segment that only
answers images. All that is constant stays in flash.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from splitee.errors import ModelError
from splitee.int8 import Int8Op, of_means, of_squares
from splitee.ops import Array
from splitee.place_int8 import INPUT, Int8Build, scratch
from splitee.steps import ALIGNMENT

KINDS = ("conv2d", "linear", "group_norm", "add", "mean", "avg_pool", "max_pool", "relu")
TAPS_MAX = 49  # of a depthwise convolution's window: INT8_TAPS of int8.h

Lines = Iterator[str]


def _values(values: Iterable[object], a_line: int = 20) -> str:
    texts = [str(v) for v in values]
    lines = [", ".join(texts[i : i + a_line]) for i in range(0, len(texts), a_line)]
    return ",\n    ".join(lines)


def _float(value: float) -> str:
    return f"{float(value).hex()}f"


def _array(kind: str, name: str, values: Array) -> str:
    return f"static const {kind} {name}[] = {{\n    {_values(values.ravel())}}};"


class _Writer:
    def __init__(self, build: Int8Build) -> None:
        self.build = build
        self.graph = build.graph
        for op in self.graph.ops:
            self.refuse(op)

    def refuse(self, op: Int8Op) -> None:
        if op.kind not in KINDS:
            raise ModelError(
                f"{op.name}: the C exporter has no {op.kind} in 8 bits; it has {', '.join(KINDS)}"
            )
        if self.graph.depthwise(op) and math.prod(op.attrs["kernel"]) > TAPS_MAX:
            rows, columns = op.attrs["kernel"]
            raise ModelError(
                f"{op.name}: a depthwise window of {rows}x{columns} is larger than the "
                f"{TAPS_MAX} taps that the kernel in 8 bits has: take a smaller one"
            )

    # names of things in C

    def at(self, buffer: str) -> str:
        """A pointer to a buffer of the arena."""
        return f"arena + {self.build.plan.offsets[buffer]}"

    def tensor(self, name: str) -> str:
        """A pointer to a tensor."""
        return self.at(INPUT if name == self.graph.input else name)

    def zero(self, tensor: str) -> int:
        """What stands for the real 0."""
        return self.graph.scales[tensor].zero_point

    def size(self, tensor: str) -> str:
        """Number of values in a tensor of the samples at hand."""
        return f"n * {self.graph.elements(tensor)}"

    # what is constant: numbered by its operation

    def constants(self, i: int, op: Int8Op) -> Lines:
        multipliers, shifts = self.graph.requant(op)
        if op.kind == "group_norm":
            yield from self.norm(i, op)
            multipliers, shifts = multipliers[2:], shifts[2:]
        elif op.weights:
            yield from self.weights(i, op)
        if "kernel" in op.attrs:
            yield self.window(i, op)
        if op.kind == "add":
            for k, name in enumerate(op.inputs):
                values = f"{multipliers[k]}, {shifts[k]}, {self.zero(name)}"
                yield f"static const struct int8_addend addend_{i}_{k} = {{{values}}};"
            multipliers, shifts = multipliers[2:], shifts[2:]
        if multipliers.size:
            low, high = self.graph.clamp(op)
            yield _array("int32_t", f"multiplier_{i}", multipliers)
            yield _array("int8_t", f"shift_{i}", shifts)
            yield (
                f"static const struct int8_output output_{i} = "
                f"{{multiplier_{i}, shift_{i}, {self.zero(op.name)}, {low}, {high}}};"
            )

    def weights(self, i: int, op: Int8Op) -> Lines:
        """Weights, and biases that have what the input's zero point makes of these."""
        weight, bias = (self.graph.weights[op.weights[role]] for role in ("weight", "bias"))
        axis = -1 if self.graph.depthwise(op) else 0
        sums = np.moveaxis(weight, axis, 0).reshape(len(bias), -1).sum(1, dtype=np.int64)
        folded = bias - self.zero(op.inputs[0]) * sums
        if np.abs(folded).max() > np.iinfo(np.int32).max:
            raise ModelError(f"{op.name}: its biases need more than 32 bits: train it to smaller")
        yield _array("int8_t", f"weight_{i}", weight)
        yield _array("int32_t", f"bias_{i}", folded)

    def norm(self, i: int, op: Int8Op) -> Lines:
        """What a group norm has in place of weights: floats exactly, as hexadecimal literals."""
        for role, name in op.weights.items():
            value = self.graph.weights[name]
            if value.dtype == np.int32:
                yield _array("int32_t", f"norm_{role}_{i}", value)
            else:
                literals = _values(map(_float, value), 6)
                yield f"static const float norm_{role}_{i}[] = {{\n    {literals}}};"
        multipliers, shifts = self.graph.requant(op)
        scales = [self.graph.scales[of(op.name)].scale for of in (of_means, of_squares)]
        values = [*multipliers[:2], *shifts[:2], *map(_float, scales)]
        values += [f"norm_{role}_{i}" for role in ("epsilon", "floor", "factor", "shift")]
        yield f"static const struct int8_norm norm_{i} = {{{_values(values)}}};"

    def window(self, i: int, op: Int8Op) -> str:
        """Channels come first here, as ``struct window`` of the firmware has them."""
        (in_h, in_w, in_c), (out_h, out_w, out_c) = (
            self.graph.shapes[name] for name in (op.inputs[0], op.name)
        )
        values = [in_c, in_h, in_w, out_c, out_h, out_w]
        values += [*op.attrs["kernel"], *op.attrs["stride"], *op.attrs["padding"]]
        return f"static const struct window window_{i} = {{{_values(values)}}};"

    # calls

    def call(self, i: int, op: Int8Op) -> str:
        y, x = self.tensor(op.name), self.tensor(op.inputs[0])
        return f"int8_{getattr(self, op.kind)(i, op, f'{y}, {x}')}"

    def conv2d(self, i: int, op: Int8Op, yx: str) -> str:
        rest = f"{self.zero(op.inputs[0])}, &output_{i}, n, {self.at(scratch(op))})"
        if self.graph.depthwise(op):
            return f"depthwise({yx}, weight_{i}, bias_{i}, &window_{i}, {rest}"
        groups = op.attrs["groups"]
        return f"conv2d({yx}, weight_{i}, bias_{i}, &window_{i}, {groups}, {rest}"

    def group_norm(self, i: int, op: Int8Op, yx: str) -> str:
        height, width, channels = self.graph.shapes[op.name]
        sizes = f"{channels}, {op.attrs['groups']}, {height * width}"
        own = f"(int32_t *)({self.at(scratch(op))})"
        return f"group_norm({yx}, &norm_{i}, {sizes}, &output_{i}, n, {own})"

    def linear(self, i: int, op: Int8Op, yx: str) -> str:
        inputs, outputs = (self.graph.elements(name) for name in (op.inputs[0], op.name))
        return f"linear({yx}, weight_{i}, bias_{i}, {inputs}, {outputs}, &output_{i}, n)"

    def add(self, i: int, op: Int8Op, yx: str) -> str:
        b = self.tensor(op.inputs[1])
        return f"add({yx}, &addend_{i}_0, {b}, &addend_{i}_1, &output_{i}, {self.size(op.name)})"

    def relu(self, i: int, op: Int8Op, yx: str) -> str:
        return f"rescale({yx}, {self.zero(op.inputs[0])}, &output_{i}, {self.size(op.name)})"

    def mean(self, i: int, op: Int8Op, yx: str) -> str:
        height, width, channels = self.graph.shapes[op.inputs[0]]
        return (
            f"mean({yx}, {channels}, {height * width}, {self.zero(op.inputs[0])}, &output_{i}, n)"
        )

    def max_pool(self, i: int, op: Int8Op, yx: str) -> str:
        return f"max_pool({yx}, &window_{i}, n)"

    def avg_pool(self, i: int, op: Int8Op, yx: str) -> str:
        return f"avg_pool({yx}, &window_{i}, {self.zero(op.inputs[0])}, n)"

    # the file

    def cases(self) -> Lines:
        for i, op in enumerate(self.graph.ops):
            yield f"    case {i}: // {op.kind} {op.name}"
            yield f"        {self.call(i, op)};"
            yield "        break;"

    def render(self) -> str:
        build, graph, plan = self.build, self.graph, self.build.plan
        end = len(graph.ops)
        lines = [
            "// Generated by splitee_exporters/c_int8.py: a client's segment up to "
            f"{build.cut}, in 8 bits; do not edit.",
            '#include "core/segment.h"',
            '#include "kernels/int8.h"',
            "",
            f"// {plan.size} bytes planned; {plan.lower_bound} are alive at once at most.",
            f"static _Alignas({ALIGNMENT}) int8_t arena[{plan.size}];",
            *(line for i, op in enumerate(graph.ops) for line in self.constants(i, op)),
            f"static const struct step steps[{end}] = {{{{0, STEP_TRUNK}}}}; // like all others",
            "static const struct stage stages[] = {",
            "    {",
            f"        .activation_size = {graph.elements(graph.cut)},",
            f"        .activations = {self.tensor(graph.cut)},",
            f"        .logits = {self.tensor(graph.logits)},",
            "    },",
            "};",
            "",
            "const struct segment segment = {",
            f"    .checksum = 0x{build.checksum:08x}u,",
            f"    .capacity = {build.capacity},",
            f"    .classes = {graph.classes},",
            "    .value_size = sizeof(int8_t),",
            "    .cuts = 1,",
            f"    .infer_end = {end},",
            f"    .forward_end = {end},",
            f"    .backward_end = {end},",
            f"    .step_end = {end},",
            f"    .channels = {graph.input_shape[-1]},",
            f"    .input_size = {graph.elements(graph.input)},",
            "    .arena_size = sizeof arena,",
            "    .steps = steps,",
            "    .stages = stages,",
            "    .arena = (uint8_t *)arena,",
            f"    .input = {self.at(INPUT)},",
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


def to_c(build: Int8Build) -> str:
    """The text of segment.c.

    Raises ModelError, naming the operation, for what has no kernel.
    """
    return _Writer(build).render()
