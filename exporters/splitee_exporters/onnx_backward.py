"""The backward pass of a segment as ONNX nodes, operation by operation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from splitee import edge
from splitee.graph import Graph, Op
from splitee_exporters.onnx import Nodes

# behind the exporter, which says by name what is not installed
from onnx import TensorProto, helper  # isort: skip

_FLOAT, _INT64 = TensorProto.FLOAT, TensorProto.INT64


class Backward(Nodes):
    """Every operation backward.

    What it reads of the forward pass is noted in ``kept``, by name, for that to give.
    """

    def __init__(
        self, graph: Graph, outputs: Mapping[str, str], input: str, *, distills: bool = False
    ) -> None:
        """distills: the exit at the cut can teach those below."""
        super().__init__(graph, outputs, input)
        self.distills = distills
        self.kept: dict[str, Any] = {}
        self._parts: dict[str, list[str]] = {}  # tensor -> what its gradient is the sum of

    def operations(self) -> None:
        """Writes everything, from the exits down."""
        graph = self.graph
        for name, logits in graph.exits.items():
            self._loss(name, logits)
        if graph.needs_gradient(graph.cut):
            server = self.value("Mul", "server.weighed", edge.SERVER_GRADIENT, "server_weight")
            self._add(graph.cut, server)
        for op in reversed(graph.ops):
            parts = self._parts.get(op.name, [])
            if len(parts) > 1:
                parts = [self.value("Sum", f"{op.name}.total", *parts)]
            if parts:
                getattr(self, op.kind)(op, parts[0])

    def inputs(self) -> list[Any]:
        """What it takes."""
        graph = self.graph
        scalars = (edge.BATCH, "exit_weight", "server_weight", "distill")
        return [
            *self.kept.values(),
            helper.make_tensor_value_info(edge.LABELS, _INT64, ["batch"]),
            self._image(edge.SERVER_GRADIENT, graph.shapes[graph.cut]),
            *(helper.make_tensor_value_info(name, _FLOAT, []) for name in scalars),
            *self._each(lambda name: name),
            *self._each(lambda name: edge.before(edge.gradient(name))),
        ]

    def outputs(self) -> list[Any]:
        """What it gives."""
        return self._each(edge.gradient)

    def _each(self, called: Callable[[str], str]) -> list[Any]:
        parameters = self.graph.parameters.items()
        return [helper.make_tensor_value_info(called(n), _FLOAT, p.shape) for n, p in parameters]

    def _image(self, name: str, shape: tuple[int, ...], kind: int = _FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, ["batch", *shape])

    # what goes in and out of an operation

    def _keep(self, name: str, shape: tuple[int, ...], kind: int = _FLOAT) -> str:
        self.kept[name] = self._image(name, shape, kind)
        return name

    def _tensor(self, name: str) -> str:
        """A tensor of the forward pass."""
        return self._keep(self.names[name], self.graph.shapes[name])

    def _wants(self, op: Op, number: int = 0) -> bool:
        return self.graph.needs_gradient(op.inputs[number])

    def _add(self, tensor: str, gradient: str) -> None:
        self._parts.setdefault(tensor, []).append(gradient)

    def _learn(self, op: Op, role: str, gradient: str) -> None:
        """Adds a gradient to what there is of a parameter's."""
        total = edge.gradient(op.weights[role])
        self.value("Add", total, edge.before(total), gradient)

    def _name(self, op: Op, what: str = "gradient") -> str:
        """Of what an operation hands down."""
        return f"{op.name}.input.{what}"

    # the operations, each with the gradient of its output

    def _loss(self, exit: str, logits: str) -> None:
        name = f"{logits}.loss"
        p = self._softmax(logits)
        classes = self.constant("classes", np.array(self.graph.classes, np.int64))
        off_on = self.constant("off and on", np.array([0, 1], np.float32))
        wanted = self.value("OneHot", f"{name}.wanted", edge.LABELS, classes, off_on)
        if self.distills and logits != self.graph.logits:
            apart = self.value("Sub", f"{name}.apart", self._softmax(self.graph.logits), wanted)
            share = self.value("Mul", f"{name}.share", apart, "distill")
            wanted = self.value("Add", f"{name}.softer", wanted, share)
        difference = self.value("Sub", f"{name}.difference", p, wanted)
        self._add(logits, self.value("Div", f"{name}.gradient", difference, edge.BATCH))

    def _softmax(self, logits: str) -> str:
        return self.once("Softmax", f"{logits}.loss.softmax", self._tensor(logits), axis=1)

    def branch(self, op: Op, d: str) -> None:
        if self._wants(op):
            zero = self.number(0)
            none = self.once("Equal", "exit_weight is 0", "exit_weight", zero)
            product = self.value("Mul", self._name(op, "product"), d, "exit_weight")
            # 0 * NaN would stay NaN
            self._add(op.inputs[0], self.value("Where", self._name(op), none, zero, product))

    def add(self, op: Op, d: str) -> None:
        for number, x in enumerate(op.inputs):
            if self._wants(op, number):
                self._add(x, d)

    def relu(self, op: Op, d: str) -> None:
        if self._wants(op):
            y = self._tensor(op.name)
            self._pass_where(op, d, self.value("Greater", self._name(op, "on"), y, self.number(0)))

    def relu6(self, op: Op, d: str) -> None:
        if self._wants(op):
            y = self._tensor(op.name)
            above = self.value("Greater", self._name(op, "above"), y, self.number(0))
            below = self.value("Less", self._name(op, "below"), y, self.number(6))
            self._pass_where(op, d, self.value("And", self._name(op, "on"), above, below))

    def _pass_where(self, op: Op, d: str, on: str) -> None:
        passed = self.value("Where", self._name(op), on, d, self.number(0))
        self._add(op.inputs[0], passed)

    def linear(self, op: Op, d: str) -> None:
        x = op.inputs[0]
        flat = self.value("Flatten", f"{op.name}.flat", self._tensor(x))
        weight = self.value("Gemm", f"{op.name}.weight.part", d, flat, transA=1)
        self._learn(op, "weight", weight)
        if "bias" in op.weights:
            bias = self.value("ReduceSum", f"{op.name}.bias.part", d, self.integers(0), keepdims=0)
            self._learn(op, "bias", bias)
        if self._wants(op):
            rows = self.value("MatMul", self._name(op, "rows"), d, op.weights["weight"])
            shape = self.integers(0, *self.graph.shapes[x])
            self._add(x, self.value("Reshape", self._name(op), rows, shape))

    def conv2d(self, op: Op, d: str) -> None:
        self._learn(op, "weight", self._filter(op, d))
        if "bias" in op.weights:
            over = self.integers(0, 2, 3)
            bias = self.value("ReduceSum", f"{op.name}.bias.part", d, over, keepdims=0)
            self._learn(op, "bias", bias)
        if self._wants(op):
            self._spread(op, d, op.weights["weight"], op.attrs["groups"])

    def _filter(self, op: Op, d: str) -> str:
        """The gradient of a convolution's weights."""
        return self._by_groups(op, d) if op.attrs["groups"] > 1 else self._by_rows(op, d)

    def _by_rows(self, op: Op, d: str) -> str:
        """That of one group: for each row of the filter, d times the pixels that it has met.

        Its columns stand side by side as further channels, and are copied once for all rows.
        """
        name, x = f"{op.name}.weight", self._tensor(op.inputs[0])
        (high, wide), (down, right) = op.attrs["kernel"], op.attrs["stride"]
        inputs, height, width = self.graph.shapes[op.inputs[0]]
        outputs, rows, columns = self.graph.shapes[op.name]
        if any(op.attrs["padding"]):
            above, before = op.attrs["padding"]
            around = self.integers(0, 0, above, before, 0, 0, above, before)
            x = self.value("Pad", f"{name}.padded", x, around)
            height, width = height + 2 * above, width + 2 * before
        met = [
            self._every(f"{name}.column.{j}", x, 3, j, right, columns, width) for j in range(wide)
        ]
        if wide > 1:
            met = [self.value("Concat", f"{name}.columns", *met, axis=1)]
        flat = self.value("Reshape", f"{name}.d", d, self.integers(0, outputs, -1))
        products = []
        for i in range(high):
            row = self._every(f"{name}.row.{i}", met[0], 2, i, down, rows, height)
            shape = self.integers(0, wide * inputs, -1)
            row = self.value("Reshape", f"{name}.row.{i}.flat", row, shape)
            row = self.value("Transpose", f"{name}.row.{i}.turned", row, perm=[0, 2, 1])
            products.append(self.value("MatMul", f"{name}.row.{i}.product", flat, row))
        whole = products[0]
        if high > 1:
            whole = self.value("Concat", f"{name}.products", *products, axis=2)
        total = self.value("ReduceSum", f"{name}.sum", whole, self.integers(0), keepdims=0)
        apart = self.integers(outputs, high * wide, inputs)
        total = self.value("Reshape", f"{name}.apart", total, apart)
        total = self.value("Transpose", f"{name}.turned", total, perm=[0, 2, 1])
        shape = self.integers(outputs, inputs, high, wide)
        return self.value("Reshape", f"{name}.part", total, shape)

    def _every(
        self, name: str, x: str, axis: int, start: int, step: int, count: int, size: int
    ) -> str:
        """So many of an axis' places, from one on; size: how many it has."""
        if step == 1 and count == size:
            return x
        ends = self.integers(start), self.integers(start + step * (count - 1) + 1)
        return self.value("Slice", name, x, *ends, self.integers(axis), self.integers(step))

    def _by_groups(self, op: Op, d: str) -> str:
        """That of several groups: a convolution of the input with d.

        There, channels of the input are samples, samples are channels, and the stride dilates.
        Behind the last row and column that the forward pass read there may be more: they are cut.
        """
        name, groups = f"{op.name}.weight", op.attrs["groups"]
        channels, *size = self.graph.shapes[op.inputs[0]]
        each = channels // groups
        apart = self.integers(0, groups, each, *size)
        x = self.value("Reshape", f"{name}.apart", self._tensor(op.inputs[0]), apart)
        x = self.value("Transpose", f"{name}.turned", x, perm=[2, 1, 0, 3, 4])
        x = self.value("Reshape", f"{name}.input", x, self.integers(each, -1, *size))
        filters = self.value("Transpose", f"{name}.filters", d, perm=[1, 0, 2, 3])
        (rows, columns), kernel = op.attrs["padding"], op.attrs["kernel"]
        found = self.value(
            "Conv", f"{name}.whole", x, filters,
            dilations=op.attrs["stride"], pads=[rows, columns, rows, columns], group=groups,
        )  # fmt: skip
        ends = self.integers(0, 0), self.integers(*kernel), self.integers(2, 3)
        part = self.value("Slice", f"{name}.sliced", found, *ends)
        return self.value("Transpose", f"{name}.part", part, perm=[1, 0, 2, 3])

    def _spread(self, op: Op, d: str, weight: str, groups: int) -> None:
        """Hands d down to every pixel of the windows that it belongs to."""
        x, window = op.inputs[0], self.window(op)
        padding, kernel, stride = (op.attrs[a] for a in ("padding", "kernel", "stride"))
        # pixels that no window reaches
        left = [
            (n + 2 * p - k) % s
            for n, p, k, s in zip(self.graph.shapes[x][1:], padding, kernel, stride, strict=True)
        ]
        spread = self.value(
            "ConvTranspose", self._name(op), d, weight,
            group=groups, output_padding=left, **window,
        )  # fmt: skip
        self._add(x, spread)

    def avg_pool(self, op: Op, d: str) -> None:
        if self._wants(op):
            kernel, channels = op.attrs["kernel"], self.graph.shapes[op.name][0]
            share = np.full((channels, 1, *kernel), 1 / math.prod(kernel), np.float32)
            self._spread(op, d, self.constant(f"{op.name}.share", share), channels)

    def max_pool(self, op: Op, d: str) -> None:
        if not self._wants(op):
            return
        x, flat = op.inputs[0], self.integers(-1)
        winner = self._keep(f"{op.name}.winner", self.graph.shapes[op.name], _INT64)
        winners = self.value("Reshape", self._name(op, "winners"), winner, flat)
        values = self.value("Reshape", self._name(op, "values"), d, flat)
        count = self.value("Reshape", self._name(op, "count"), self.count(), self.integers(1))
        size = self.value(
            "Mul", self._name(op, "size"), count, self.integers(self.graph.elements(x))
        )
        zeros = self.value("ConstantOfShape", self._name(op, "zeros"), size)
        # windows may share a pixel, which then wins more than once
        total = self.value(
            "ScatterElements", self._name(op, "sums"), zeros, winners, values, reduction="add"
        )
        shape = self.integers(-1, *self.graph.shapes[x])
        self._add(x, self.value("Reshape", self._name(op), total, shape))

    def batch_norm(self, op: Op, d: str) -> None:
        shape = self.graph.shapes[op.name]
        normalised = self._keep(f"{op.name}.normalised", shape)
        slope, level = self._affine(op, d, normalised)
        if not self._wants(op):
            return
        rstd = f"{op.name}.rstd"
        mean_of_images = [] if op.attrs["frozen"] else [1]
        dims = [*mean_of_images, shape[0], 1, 1]
        self.kept[rstd] = helper.make_tensor_value_info(rstd, _FLOAT, dims)
        weight = self.channels(op.weights["weight"], f"{op.name}.weight.channels")
        gain = self.value("Mul", f"{op.name}.gain", rstd, weight)
        if not op.attrs["frozen"]:
            # moving x moves mean and variance too: d loses its part along 1 and along x
            area = self.number(math.prod(shape[1:]))
            size = self.value("Mul", f"{op.name}.size", self.samples(), area)
            level = self.value("Div", f"{op.name}.level", level, size)
            slope = self.value("Div", f"{op.name}.slope", slope, size)
            d = self._rest(op, d, normalised, level, slope)
        self._add(op.inputs[0], self.value("Mul", self._name(op), d, gain))

    def group_norm(self, op: Op, d: str) -> None:
        shape, groups = self.graph.shapes[op.name], op.attrs["groups"]
        each = math.prod(shape) // groups
        normalised = self._keep(f"{op.name}.normalised", (groups, each))
        whole = self.integers(0, *shape)
        self._affine(op, d, self.value("Reshape", f"{op.name}.image", normalised, whole))
        if not self._wants(op):
            return
        weight = self.channels(op.weights["weight"], f"{op.name}.weight.channels")
        gained = self.value("Mul", f"{op.name}.gained", d, weight)
        grouped = self.value("Reshape", f"{op.name}.grouped", gained, self.integers(0, groups, -1))
        along = self.value("Mul", f"{op.name}.along", grouped, normalised)
        level = self.value("ReduceMean", f"{op.name}.level", grouped, self.integers(2))
        slope = self.value("ReduceMean", f"{op.name}.slope", along, self.integers(2))
        rest = self._rest(op, grouped, normalised, level, slope)
        rstd = self._keep(f"{op.name}.rstd", (groups, 1))
        scaled = self.value("Mul", self._name(op, "grouped"), rest, rstd)
        self._add(op.inputs[0], self.value("Reshape", self._name(op), scaled, whole))

    def _affine(self, op: Op, d: str, normalised: str) -> tuple[str, str]:
        """Weight and bias of a norm learn; the gradients of these, (1, channels, 1, 1)."""
        over = self.integers(0, 2, 3)
        products = self.value("Mul", f"{op.name}.products", d, normalised)
        sums = {
            "weight": self.value("ReduceSum", f"{op.name}.weight.sum", products, over),
            "bias": self.value("ReduceSum", f"{op.name}.bias.sum", d, over),
        }
        for role, total in sums.items():
            part = self.value("Reshape", f"{op.name}.{role}.part", total, self.integers(-1))
            self._learn(op, role, part)
        return sums["weight"], sums["bias"]

    def _rest(self, op: Op, d: str, normalised: str, level: str, slope: str) -> str:
        """What of d lies neither along 1 nor along the normalised input."""
        centred = self.value("Sub", f"{op.name}.centred", d, level)
        along = self.value("Mul", f"{op.name}.slanted", normalised, slope)
        return self.value("Sub", f"{op.name}.rest", centred, along)
