"""torch -> Graph: reads a client's segment, or the server's half, layer by layer."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from splitee.bottleneck import PREFIX, Mirror
from splitee.errors import ModelError
from splitee.graph import Graph, Op
from splitee.model import Cut, Segment, Tail
from splitee.norms import FrozenBatchNorm2d
from splitee.ops import OPS, Shape

_FUNCTIONS: dict[Any, str] = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    torch.relu: "relu",
    F.relu: "relu",
    F.relu6: "relu6",
    F.adaptive_avg_pool2d: "adaptive_pool",
    torch.flatten: "flatten",
    "add": "add",
    "relu": "relu",
    "flatten": "flatten",
}


def _pair(value: Any) -> list[Any]:
    return [value, value] if isinstance(value, int | None) else list(value)


class _Capture:
    """Collects operations; knows the shape of every tensor as it goes."""

    def __init__(self, input_shape: Shape) -> None:
        self.ops: list[Op] = []
        self.shapes: dict[str, Shape] = {"input": input_shape}
        self.arrays: dict[str, Any] = {}

    def add(self, kind: str, name: str, inputs: list[str], attrs: Any, weights: Any) -> str:
        """Appends an operation; weights by role, each a (name, tensor) or None.

        Returns its name, with a number where a layer without weights or an addition runs again.
        """
        base, call = name, 1
        while name in self.shapes:
            call += 1
            name = f"{base}_{call}"
        present = {role: pair for role, pair in weights.items() if pair[1] is not None}
        for path, tensor in present.values():
            self.arrays[path] = tensor.detach().cpu().float().numpy().copy()
        op = Op(kind, name, tuple(inputs), attrs, {r: path for r, (path, _) in present.items()})
        shapes = {role: tuple(tensor.shape) for role, (_, tensor) in present.items()}
        self.shapes[name] = OPS[kind].shape(attrs, [self.shapes[i] for i in inputs], shapes)
        self.ops.append(op)
        return name

    def graph(
        self,
        ops: Sequence[Op],
        tensors: Mapping[str, Tensor],
        cut: str,
        exits: dict[str, str],
        classes: int,
    ) -> Graph:
        """The graph of these operations; tensors tells which of the weights are trained."""
        used = [name for op in ops for name in op.weights.values()]
        trained = {n for n, t in tensors.items() if isinstance(t, nn.Parameter)}
        return Graph(
            input="input",
            input_shape=self.shapes["input"],
            ops=tuple(ops),
            parameters={n: self.arrays[n] for n in used if n in trained},
            statistics={n: self.arrays[n] for n in used if n not in trained},
            cut=cut,
            exits=exits,
            classes=classes,
        )

    def module(self, module: nn.Module, path: str, x: str) -> str:
        """Appends the operation of a layer; returns the name of its output."""

        def weight(attribute: str) -> tuple[str, Any]:
            return f"{path}.{attribute}", getattr(module, attribute)

        match module:
            case nn.Identity() | nn.Dropout() | nn.Dropout2d():
                return x  # dropout is off on clients
            case nn.Flatten(start_dim=1, end_dim=-1):
                return x  # linear reads its input as one row per sample
            case nn.ReLU():
                return self.add("relu", path, [x], {}, {})
            case nn.ReLU6():
                return self.add("relu6", path, [x], {}, {})
            case nn.Conv2d():
                if _pair(module.dilation) != [1, 1] or module.padding_mode != "zeros":
                    raise ModelError(f"{path}: only convolutions without dilation, zero-padded")
                if isinstance(module.padding, str):
                    raise ModelError(f'{path}: padding = "{module.padding}": give it as numbers')
                attrs = {
                    "kernel": _pair(module.kernel_size),
                    "stride": _pair(module.stride),
                    "padding": _pair(module.padding),
                    "groups": module.groups,
                }
                weights = {"weight": weight("weight"), "bias": weight("bias")}
                return self.add("conv2d", path, [x], attrs, weights)
            case nn.Linear():
                if module.in_features != math.prod(self.shapes[x]):
                    raise ModelError(f"{path}: only linear layers behind a flatten of all features")
                weights = {"weight": weight("weight"), "bias": weight("bias")}
                return self.add("linear", path, [x], {}, weights)
            case nn.GroupNorm(affine=True):
                attrs = {"groups": module.num_groups, "epsilon": module.eps}
                weights = {"weight": weight("weight"), "bias": weight("bias")}
                return self.add("group_norm", path, [x], attrs, weights)
            case nn.BatchNorm2d(affine=True, track_running_stats=True):
                if module.momentum is None:
                    raise ModelError(
                        f"{path}: only batch norms with a momentum; a mean over all batches counts "
                        "them, which is no part of a client's state"
                    )
                attrs = {
                    "epsilon": module.eps,
                    "momentum": module.momentum,
                    "frozen": isinstance(module, FrozenBatchNorm2d),
                }
                weights = {
                    "weight": weight("weight"),
                    "bias": weight("bias"),
                    "mean": weight("running_mean"),
                    "variance": weight("running_var"),
                }
                return self.add("batch_norm", path, [x], attrs, weights)
            case nn.MaxPool2d() | nn.AvgPool2d():
                return self.pool(module, path, x)
            case nn.AdaptiveAvgPool2d():
                return self.adaptive_pool(module.output_size, path, x)
        raise ModelError(
            f"{path}: {type(module).__name__} has no operation here; the kinds are "
            f"{', '.join(OPS)}; cut above it or use another layer"
        )

    def pool(self, module: nn.MaxPool2d | nn.AvgPool2d, path: str, x: str) -> str:
        kernel = _pair(module.kernel_size)
        attrs = {
            "kernel": kernel,
            "stride": _pair(module.stride),
            "padding": _pair(module.padding),
        }
        if isinstance(module, nn.MaxPool2d):
            if module.ceil_mode or _pair(module.dilation) != [1, 1] or module.return_indices:
                raise ModelError(f"{path}: only max pools without ceil_mode, dilation, indices")
            return self.add("max_pool", path, [x], attrs, {})
        if module.ceil_mode or module.divisor_override or not module.count_include_pad:
            raise ModelError(f"{path}: only average pools that divide by the whole window")
        return self.add("avg_pool", path, [x], attrs, {})

    def adaptive_pool(self, output_size: Any, path: str, x: str) -> str:
        _, *size = self.shapes[x]
        cells = [s if c is None else c for s, c in zip(size, _pair(output_size), strict=True)]
        if any(s % c for s, c in zip(size, cells, strict=True)):
            raise ModelError(
                f"{path}: an image of {size[0]}x{size[1]} does not divide into "
                f"{cells[0]}x{cells[1]} equal cells; take a grid that divides it"
            )
        kernel = [s // c for s, c in zip(size, cells, strict=True)]
        attrs = {"kernel": kernel, "stride": kernel, "padding": [0, 0]}
        return self.add("avg_pool", path, [x], attrs, {})

    def widen(self, mirror: Mirror, path: str, x: str) -> str:
        """Appends a bottleneck's mirror."""
        layer = mirror.widen
        attrs = {
            "kernel": _pair(layer.kernel_size),
            "stride": _pair(layer.stride),
            "size": [mirror.height, mirror.width],
        }
        weights = {role: (f"{path}.{role}", getattr(layer, role)) for role in ("weight", "bias")}
        return self.add("conv_transpose2d", path, [x], attrs, weights)

    def graph_module(self, module: fx.GraphModule, prefix: str, x: str) -> list[str]:
        """Appends every node of a traced module; returns the names of its outputs."""
        names: dict[fx.Node, str] = {}
        for node in module.graph.nodes:
            inputs = [names[n] for n in node.all_input_nodes if n in names]
            if node.op == "placeholder":
                names[node] = x
            elif node.op == "call_module":
                path = str(node.target)
                names[node] = self.module(module.get_submodule(path), prefix + path, inputs[0])
            elif node.op in ("call_function", "call_method") and node.target in _FUNCTIONS:
                names[node] = self.function(node, prefix, inputs)
            elif node.op == "output":
                return [names[n] for n in node.all_input_nodes]
            else:
                raise ModelError(
                    f"{node.name}: {node.target} has no operation here; cut above it or write it "
                    "with layers"
                )
        raise AssertionError("a traced module ends with its output")

    def function(self, node: fx.Node, prefix: str, inputs: list[str]) -> str:
        kind = _FUNCTIONS[node.target]
        if kind == "flatten":
            if (*node.args[1:], *node.kwargs.items()) not in ((1,), (("start_dim", 1),)):
                raise ModelError(f"{node.name}: only flatten(x, 1), which keeps samples apart")
            return inputs[0]
        if kind == "add":
            same = len({self.shapes[i] for i in inputs}) == 1
            if node.all_input_nodes != list(node.args) or node.kwargs or not same:
                raise ModelError(
                    f"{node.name}: only additions of two different tensors of one shape"
                )
        scope = [path for path in node.meta.get("nn_module_stack", {}) if path]
        name = prefix + ".".join([*scope[-1:], kind])
        if kind == "adaptive_pool":
            (output_size,) = (*node.args[1:], *node.kwargs.values())
            return self.adaptive_pool(output_size, name, inputs[0])
        return self.add(kind, name, inputs, {}, {})


def capture(segment: Segment, classes: int) -> Graph:
    """The graph of a client's trunk and exits, with the values of its weights.

    Raises ModelError, naming the layer, for one that has no operation.
    """
    capture = _Capture(segment.input_shape)
    points = capture.graph_module(segment.trunk, "", "input")
    exits: dict[str, str] = {}
    exit_ops: dict[str, list[Op]] = {}
    names = zip(segment.exit_names, segment.exit_prefixes, strict=True)
    for (name, prefix), head, point in zip(names, segment.exits, points, strict=True):
        start = len(capture.ops)
        x = capture.add("branch", prefix, [point], {}, {})
        for child_name, child in head.named_children():
            x = capture.module(child, f"{prefix}.{child_name}", x)
        exits[name] = x
        # an exit runs as soon as its tensor is there: fewer tensors are alive at once
        exit_ops.setdefault(point, []).extend(capture.ops[start:])
        del capture.ops[start:]
    ordered: list[Op] = []
    for op in capture.ops:
        ordered += [op, *exit_ops.get(op.name, [])]
    return capture.graph(ordered, segment.tensors(), points[-1], exits, classes)


def capture_tail(tail: Tail, cut: Cut, classes: int, client: str = "") -> Graph:
    """The graph of the server's half entered at a cut, to be run and written, not to be trained.

    client: whose bottleneck's mirror comes first, if it has one. Its input is what arrives, which
    is its cut, too; its only exit is the network's output. Raises ModelError, naming the layer, for
    one that has no operation.
    """
    mirror = tail.mirror(client)
    capture = _Capture(mirror.sent if mirror else cut.shape)
    x = "input"
    if mirror:
        x = capture.widen(mirror, f"{PREFIX}{client}.widen", x)
    for stage in tail.behind(cut.name):
        assert isinstance(stage, fx.GraphModule)
        (x,) = capture.graph_module(stage, "", x)
    return capture.graph(capture.ops, tail.tensors(), "input", {"output": x}, classes)
