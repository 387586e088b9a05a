"""Capture: a graph means what torch computes, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from splitee.capture import capture
from splitee.graph import Graph
from splitee.model import Network, Segment
from splitee.norms import freeze
from splitee.ops import Array
from toolkit.layers import Layers, randomise, segment_of
from toolkit.mobilenet import MobileNetV2
from toolkit.networks import CLASSES, relative_errors, resnet, segment_at

SILENT = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten)  # they make no tensor of their own


class Recorder(fx.Interpreter):
    """Runs a traced module and keeps, in order, every tensor that an operation makes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.tensors: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        silent = n.op == "call_module" and isinstance(
            self.module.get_submodule(str(n.target)), SILENT
        )
        flatten = n.target in (torch.flatten, "flatten")
        if n.op.startswith("call") and not silent and not flatten:
            self.tensors.append(value)
        return value


def torch_tensors(segment: Segment, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What torch computes: the trunk's tensors in order, the exits' by name."""
    recorder = Recorder(segment.trunk)
    points = recorder.run(x)
    exits: dict[str, Tensor] = {}
    for name, head, point in zip(segment.exit_names, segment.exits, points, strict=True):
        value = exits[f"exits.{name}"] = point
        for child_name, child in head.named_children():
            value = child(value)
            if not isinstance(child, SILENT):
                exits[f"exits.{name}.{child_name}"] = value
    return recorder.tensors, exits


def errors(segment: Segment, graph: Graph) -> dict[str, float]:
    """Relative error of every tensor of the graph against torch, both in float64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *graph.input_shape, generator=generator, dtype=torch.float64)
    found = graph.run(x.numpy())
    trunk, expected = torch_tensors(segment.double().eval(), x)
    names = [op.name for op in graph.ops if not op.name.startswith("exits.")]
    expected |= dict(zip(names, trunk, strict=True))
    assert list(found) == [graph.input, *(op.name for op in graph.ops)]  # all names differ
    del found[graph.input]
    assert all(found[name].dtype == np.float64 for name in found)
    rows = {name: rows_of(tensor.detach().numpy()) for name, tensor in expected.items()}
    assert {name: graph.elements(name) for name in rows} == {n: r.shape[1] for n, r in rows.items()}
    return relative_errors({name: rows_of(array) for name, array in found.items()}, rows)


def rows_of(array: Array) -> Array:
    """One row per sample: a graph's flatten leaves the image's shape."""
    return array.reshape(len(array), -1)


LAYERS: dict[str, Callable[[], Layers]] = {
    "conv-1x1": partial(nn.Conv2d, 4, 6, 1),
    "conv-stride": partial(nn.Conv2d, 4, 6, 3, 2, 1),
    "conv-no-bias": partial(nn.Conv2d, 4, 6, 3, 1, 1, bias=False),
    "conv-oblong": partial(nn.Conv2d, 4, 6, (3, 2), (2, 1), (0, 1)),
    "conv-wide-padding": partial(nn.Conv2d, 4, 6, 2, 1, 2),
    "conv-groups": partial(nn.Conv2d, 4, 6, 3, 1, 1, groups=2),
    "conv-depthwise": partial(nn.Conv2d, 4, 8, 3, 2, 1, groups=4, bias=False),
    "group-norm": partial(nn.GroupNorm, 2, 4),
    "group-norm-one-group": partial(nn.GroupNorm, 1, 4, eps=0.1),
    "group-norm-each-channel": partial(nn.GroupNorm, 4, 4),
    "batch-norm": partial(nn.BatchNorm2d, 4),
    "batch-norm-epsilon": partial(nn.BatchNorm2d, 4, eps=0.5),
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "relu6-function": lambda: lambda a, b: F.relu6(a + b),
    "relu-function": lambda: lambda a, b: F.relu(a) + torch.relu(b),
    "relu-method": lambda: lambda a, b: a.relu() + b,
    "add-operator": lambda: lambda a, b: a + b,
    "add-function": lambda: lambda a, b: torch.add(b, a),
    "add-method": lambda: lambda a, b: a.add(b),
    "add-three-times": lambda: lambda a, b: (a + b) + (b + a),
    "max-pool": partial(nn.MaxPool2d, 2),
    "max-pool-overlapping": partial(nn.MaxPool2d, 3, 2, 1),
    "max-pool-oblong": partial(nn.MaxPool2d, (1, 3), (1, 2)),
    "avg-pool": partial(nn.AvgPool2d, 2),
    "avg-pool-padded": partial(nn.AvgPool2d, 3, 2, 1),
    "avg-pool-oblong": partial(nn.AvgPool2d, (3, 1), (2, 1)),
    "adaptive-one": partial(nn.AdaptiveAvgPool2d, 1),
    "adaptive-grid": partial(nn.AdaptiveAvgPool2d, (2, 3)),
    "adaptive-none": partial(nn.AdaptiveAvgPool2d, (None, 1)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(216, 5), nn.ReLU(), nn.Linear(5, 7)),
    "flatten-function": lambda: lambda a, b: torch.flatten(a, 1) + torch.flatten(b, start_dim=1),
    "flatten-method": lambda: lambda a, b: a.flatten(1).relu() + b.flatten(start_dim=1),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5), nn.ReLU()),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_an_operation_means_what_torch_computes(layer: str) -> None:
    torch.manual_seed(0)
    segment = segment_of(LAYERS[layer]())
    found = errors(segment, capture(segment, 3))
    assert max(found.values()) < 1e-12, found


ZOO_SEGMENTS = [
    pytest.param(norm, cut, exits == "upto", id=f"{norm}-{cut}-{exits}")
    for norm in ("group", "batch")
    for cut in ("stem", "layer1", "layer2", "layer3")
    for exits in ("own", "upto")
]


@pytest.mark.parametrize(("norm", "cut", "upto"), ZOO_SEGMENTS)
def test_every_tensor_of_a_captured_segment_is_torchs(norm: str, cut: str, upto: bool) -> None:
    segment = segment_at(Network(randomise(resnet(norm=norm, width=8)), (1, 8, 8)), cut, upto=upto)
    graph = capture(segment, CLASSES)
    found = errors(segment, graph)
    assert {n: e for n, e in found.items() if not e < 1e-12} == {}
    assert tuple(graph.exits) == segment.exit_names
    assert set(graph.weights) == set(segment.tensors())


def batch_norm(norm: nn.BatchNorm2d, *, frozen: bool) -> Mapping[str, Any]:
    """The attributes with which a batch norm is captured."""
    segment = segment_of(norm)
    if frozen:
        freeze(segment)
    graph = capture(segment, 3)
    return next(op.attrs for op in graph.ops if op.kind == "batch_norm")


def test_a_batch_norm_says_how_its_statistics_follow() -> None:
    assert batch_norm(nn.BatchNorm2d(4), frozen=False) == {
        "epsilon": 1e-5, "momentum": 0.1, "frozen": False,
    }  # fmt: skip
    assert batch_norm(nn.BatchNorm2d(4, 1e-3, 0.25), frozen=True) == {
        "epsilon": 1e-3, "momentum": 0.25, "frozen": True,
    }  # fmt: skip


@pytest.mark.parametrize("cut", ["features.0", "features.3", "features.7"])
def test_every_tensor_of_a_mobilenets_first_stages_is_torchs(cut: str) -> None:
    model = randomise(MobileNetV2(0.125, 4, channels=1, classes=CLASSES))
    segment = segment_at(Network(model, (1, 16, 16)), cut, upto=True)
    found = errors(segment, capture(segment, CLASSES))
    assert {n: e for n, e in found.items() if not e < 1e-12} == {}


def test_the_mobilenet_of_these_tests_is_the_one_that_is_known() -> None:
    model = MobileNetV2(channels=3, classes=1000)
    assert sum(p.numel() for p in model.parameters()) == 3_504_872  # torchvision's
    assert len(model.state_dict()) == 314
    assert {"features.1.conv.0.0.weight", "features.18.1.running_var", "classifier.1.bias"} < set(
        model.state_dict()
    )


def test_an_exit_runs_as_soon_as_its_tensor_is_there() -> None:
    graph = capture(segment_at(Network(resnet(), (1, 8, 8)), "layer1", upto=True), CLASSES)
    assert [(op.kind, op.name) for op in graph.ops] == [
        ("conv2d", "stem.0"), ("group_norm", "stem.1"), ("relu", "stem.2"),
        ("branch", "exits.stem"), ("avg_pool", "exits.stem.pool"), ("linear", "exits.stem.linear"),
        ("conv2d", "layer1.0.conv1"), ("group_norm", "layer1.0.norm1"), ("relu", "layer1.0.relu1"),
        ("conv2d", "layer1.0.conv2"), ("group_norm", "layer1.0.norm2"), ("add", "layer1.0.add"),
        ("relu", "layer1.0.relu2"),
        ("branch", "exits.layer1"), ("avg_pool", "exits.layer1.pool"),
        ("linear", "exits.layer1.linear"),
    ]  # fmt: skip
    assert graph.exits == {"stem": "exits.stem.linear", "layer1": "exits.layer1.linear"}
    assert (graph.cut, graph.logits) == ("layer1.0.relu2", "exits.layer1.linear")


class SharedReLU(nn.Module):
    """A residual block that calls its one ReLU twice, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, 1, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.relu(self.conv(x)) + x)  # type: ignore[no-any-return]


def test_a_layer_that_is_called_twice_makes_two_tensors() -> None:
    segment = segment_of(nn.Sequential(SharedReLU(), SharedReLU()))
    graph = capture(segment, 3)
    assert [op.name for op in graph.ops if op.kind == "relu"] == [
        "0.layer.0.relu", "0.layer.0.relu_2", "0.layer.1.relu", "0.layer.1.relu_2",
    ]  # fmt: skip
    assert max(errors(segment, graph).values()) < 1e-12


def test_the_graph_keeps_its_weights_when_the_network_learns_on() -> None:
    segment = segment_at(Network(resnet(), (1, 8, 8)), "stem")
    graph = capture(segment, CLASSES)
    before = {name: array.copy() for name, array in graph.weights.items()}
    with torch.no_grad():
        for tensor in segment.tensors().values():
            tensor.add_(1)
    assert all(np.array_equal(before[name], array) for name, array in graph.weights.items())
