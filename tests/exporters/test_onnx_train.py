"""Training graphs: what plain ONNX Runtime learns by them is what PyTorch learns, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from host_harness import onnx_learner
from splitee import edge
from splitee.capture import capture
from splitee.client import LocalClient, Place, Settings, State, trunk_weights
from splitee.data import Images, draw_order
from splitee.errors import ModelError
from splitee.exits import Exit
from splitee.graph import Graph, Op
from splitee.model import Network, Segment
from splitee.norms import frozen_norms
from splitee.ops import OPS, SERVER_ONLY, Array
from splitee.place import Build
from splitee_host.torch_learner import TorchLearner
from splitee_host.verify import (
    TOLERANCE,
    compare_learner,
    relative_error,
    step_in_torch,
    step_of_learner,
)
from step_harness import SETTINGS, Case, case

onnx: Any = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from splitee_exporters.onnx_backward import Backward  # noqa: E402  it needs them
from splitee_exporters.onnx_train import training_graphs, write_client  # noqa: E402

WHOLE, PARTS = (8,), (5, 3)
BATCH_NORM = Backward.batch_norm  # as it is before a test spoils it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clients")


def settings_of(mode: str, clip: float = 0.0) -> Settings:
    exit_weight, server_weight = trunk_weights(mode, 0.3)
    return replace(SETTINGS, exit_weight=exit_weight, server_weight=server_weight, clip=clip)


def from_server(the_case: Case, settings: Settings, cut: str, count: int) -> torch.Tensor | None:
    """What the server could return, about as large as what the exits do."""
    if not settings.wants_gradient:
        return None
    shape = the_case.build.graph.shapes[cut]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *shape, generator=generator) / (10 * count)


@cache
def both_sides(
    kind: str,
    mode: str,
    sizes: tuple[int, ...],
    folder: Path,
    clip: float = 0.0,
    cut: str = "",
    upto: bool = True,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What goes in and out of one step: ONNX Runtime's tensors, and PyTorch's.

    cut: one of those of a segment that moves; "": the only one.
    """
    the_case, settings = case(kind, moves=bool(cut)), settings_of(mode, clip)
    learner = onnx_learner(the_case.build, folder)
    segment = the_case.segment.at(cut, upto=upto) if cut else the_case.segment
    graph = the_case.build.graph.at(cut, upto=upto) if cut else the_case.build.graph
    learner.move(cut or the_case.build.stages[-1].cut, upto=upto)
    learner.settings = settings
    place, count = the_case.state.place, sum(sizes)
    learner.begin(place, the_case.images)
    sent = from_server(the_case, settings, graph.cut, count)
    mine = step_of_learner(learner, sizes, sent)
    part = the_case.images[draw_order(place.samples, place.seed, 0)[:count]]
    return mine, step_in_torch(segment, the_case.build, part, settings, sent)


@cache
def graph_of(kind: str) -> Graph:
    return case(kind).build.graph


def learnt(kind: str) -> list[str]:
    """What a step changes or makes, each of which is compared by itself."""
    graph = graph_of(kind)
    return ["sent", "loss", *graph.parameters, *graph.statistics]


def tensors_of(name: str, graph: Graph) -> list[str]:
    """The tensors of a step by which something that is learnt is known."""
    if name in graph.parameters:
        return [f"{what} {name}" for what in ("gradient of", "updated", "momentum of")]
    return [f"updated {name}"] if name in graph.statistics else [name]


# batch norm by the samples held needs them at once; a bias below it has a gradient of 0 that is a
# sum of large numbers, and no two programs agree on what is left of them
STEPS = [
    *(("resnet8", mode, PARTS) for mode in ("local", "server", "both")),
    ("resnet8", "both", WHOLE),
    ("resnet8-batch", "both", WHOLE),
    ("resnet8-batch-frozen", "both", PARTS),
    ("pools", "both", PARTS),
    ("vgg", "both", WHOLE),
    ("vgg-frozen", "both", PARTS),
    ("mobilenet", "both", WHOLE),
    ("mobilenet-frozen", "local", PARTS),
]
VANISHING = {"vgg": ("0.bias", "3.bias", "7.bias")}
LEARNT = [
    pytest.param(kind, mode, sizes, name, id=f"{kind}-{mode}-{len(sizes)}-{name}")
    for kind, mode, sizes in STEPS
    for name in learnt(kind)
]


@pytest.mark.parametrize(("kind", "mode", "sizes", "name"), LEARNT)
def test_a_step_equals_pytorch(
    kind: str, mode: str, sizes: tuple[int, ...], name: str, folder: Path
) -> None:
    mine, reference = both_sides(kind, mode, sizes, folder)
    compared = tensors_of(name, graph_of(kind))
    if name in VANISHING.get(kind, ()):
        compared = [f"updated {name}"]
    errors = {tensor: relative_error(mine, reference, tensor) for tensor in compared}
    assert {tensor: e for tensor, e in errors.items() if not e <= TOLERANCE} == {}


@pytest.mark.parametrize("bias", VANISHING["vgg"])
def test_what_vanishes_in_a_batch_norm_is_small(bias: str, folder: Path) -> None:
    mine, reference = both_sides("vgg", "both", WHOLE, folder)
    largest = max(np.abs(v).max() for n, v in reference.items() if n.startswith("gradient of "))
    assert np.abs(mine[f"gradient of {bias}"]).max() < 1e-6 * largest


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_a_clipped_step_equals_pytorch(clip: float, folder: Path) -> None:
    mine, reference = both_sides("resnet8", "both", PARTS, folder, clip)
    far = {n: relative_error(mine, reference, n) for n in mine}
    assert {n: e for n, e in far.items() if not e <= TOLERANCE} == {}
    unclipped, _ = both_sides("resnet8", "both", PARTS, folder)
    moved = [n for n in mine if not np.array_equal(mine[n], unclipped[n])]
    assert bool(moved) == (clip < 1)


CUTS = [("stem", True), ("layer1", True), ("layer1", False), ("layer2", True), ("layer2", False)]


@pytest.mark.parametrize(("cut", "upto"), CUTS)
def test_a_step_at_every_cut_equals_pytorch(cut: str, upto: bool, folder: Path) -> None:
    build = case("resnet8", moves=True).build
    mine, reference = both_sides("resnet8", "both", PARTS, folder, 0.0, cut, upto)
    graph = build.graph.at(cut, upto=upto)
    for name in graph.parameters:
        for what in ("gradient of", "updated", "momentum of"):
            assert relative_error(mine, reference, f"{what} {name}") <= TOLERANCE, name
    for name in set(build.graph.parameters) - set(graph.parameters):  # they take no part
        assert np.array_equal(mine[f"updated {name}"], build.graph.weights[name])
        assert not mine[f"gradient of {name}"].any()
        assert not mine[f"momentum of {name}"].any()


def through(layer: nn.Module, shape: tuple[int, int, int] = (4, 9, 8)) -> Case:
    """A layer between two others: what learns below it learns from its input's gradient."""
    torch.manual_seed(2)
    channels = shape[0]
    made = layer(torch.zeros(2, *shape)).shape[1]
    model = nn.Sequential(nn.Conv2d(channels, channels, 1), layer, nn.Conv2d(made, 3, 1))
    network = Network(model, shape)
    cut = network.cuts[-1]
    segment = Segment(network, cut, {cut.name: Exit((cut.shape[0], cut.shape[1], cut.shape[2]), 3)})
    graph = capture(segment, 3)
    build = Build(graph, 8, True, 8, (1 / 64,) * channels, (-2.0,) * channels)
    rng = np.random.default_rng(3)
    images = Images(rng.integers(0, 256, (8, *shape), np.uint8), rng.integers(0, 3, 8, np.uint8))
    return Case(segment, build, images, State(graph.weights, {}, Place(8, seed=0)))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "1x1": lambda: nn.Conv2d(4, 6, 1, bias=False),
    "1x1, stride 2": lambda: nn.Conv2d(4, 6, 1, 2),
    "3x3": lambda: nn.Conv2d(4, 6, 3),
    "3x3, stride 2": lambda: nn.Conv2d(4, 6, 3, 2),
    "3x3, stride 3, padded": lambda: nn.Conv2d(4, 6, 3, 3, 1),
    "2x5, stride 2x1": lambda: nn.Conv2d(4, 6, (2, 5), (2, 1), (0, 2)),
    "as large as the image": lambda: nn.Conv2d(4, 6, (9, 8)),
    "two groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "two groups, stride 2": lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "depthwise, stride 2": lambda: nn.Conv2d(4, 4, 5, 2, 2, groups=4),
    "depthwise, twice as many": lambda: nn.Conv2d(4, 8, 3, 2, groups=4),
    "max pool": lambda: nn.MaxPool2d(2, 2),
    "max pool, overlapping": lambda: nn.MaxPool2d(3, 1, 1),
    "max pool, with gaps": lambda: nn.MaxPool2d(2, 3),
    "average pool": lambda: nn.AvgPool2d(3, 2),
    "average pool, padded": lambda: nn.AvgPool2d((3, 2), (1, 2), 1),
    "average of all": lambda: nn.AdaptiveAvgPool2d(1),
    "group norm": lambda: nn.GroupNorm(2, 4, eps=1e-2),
    "batch norm": lambda: nn.BatchNorm2d(4, eps=1e-2, momentum=0.3),
    "ReLU6": nn.ReLU6,
}


@pytest.mark.parametrize("title", LAYERS)
def test_a_layer_learns_and_lets_learn_as_in_pytorch(title: str, folder: Path) -> None:
    the = through(LAYERS[title]())
    learner = onnx_learner(the.build, folder)
    found = compare_learner(learner, the.segment, the.build, the.images, settings_of("both"), 7)
    names = [d.tensor for d in found]
    assert {"gradient of 0.weight", "gradient of 2.weight", "sent", "loss"} <= set(names)
    vanishing = ("gradient of 0.bias", "momentum of 0.bias") if title == "batch norm" else ()
    assert [d for d in found if not d.good and d.tensor not in vanishing] == []


def steps_in_torch(
    the_case: Case, settings: Settings, sent: torch.Tensor | None, count: int
) -> tuple[Segment, list[float]]:
    """The segment after so many steps on whole batches of eight, in float64, and their losses."""
    segment = copy.deepcopy(the_case.segment).double().train()
    optimizer = torch.optim.SGD(
        segment.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    scale, shift = the_case.build.scale[0], the_case.build.shift[0]  # all channels have the same
    place, losses = the_case.state.place, []
    for step in range(count):
        order = draw_order(place.samples, place.seed, step // 3)  # three batches an epoch
        part = the_case.images[order[step % 3 * 8 : step % 3 * 8 + 8]]
        labels = torch.from_numpy(part.y).long()
        optimizer.zero_grad()
        points = segment.trunk(torch.from_numpy(part.x).double() * scale + shift)
        entered = [point.detach().requires_grad_() for point in points]
        for head, x in zip(segment.exits, entered, strict=True):
            loss = F.cross_entropy(head(x), labels)
            torch.autograd.backward(loss)
        returned = [settings.exit_weight * x.grad for x in entered if x.grad is not None]
        if sent is not None:
            returned[-1] = returned[-1] + settings.server_weight * sent.double()
        torch.autograd.backward(points, returned)
        optimizer.step()
        for norm in frozen_norms(segment):
            norm.follow()
        losses.append(loss.item())
    return segment, losses


def twenty_steps(the_case: Case, folder: Path, sizes: tuple[int, ...]) -> dict[str, float]:
    """How far each loss and each tensor is from PyTorch's after twenty steps, relative."""
    settings = replace(settings_of("both"), learning_rate=0.02)
    learner = onnx_learner(the_case.build, folder)
    learner.settings = settings
    learner.begin(the_case.state.place, the_case.images)
    sent = from_server(the_case, settings, the_case.build.graph.cut, sum(sizes))
    segment, losses = steps_in_torch(the_case, settings, sent, 20)
    mine = [float(step_of_learner(learner, sizes, sent)["loss"]) for _ in range(20)]
    assert losses[-1] < 0.95 * losses[0]
    far = {f"loss {i}": abs(a / b - 1) for i, (a, b) in enumerate(zip(mine, losses, strict=True))}
    weights = learner.weights()
    for name, tensor in segment.tensors().items():
        theirs = tensor.detach().numpy()
        far[name] = np.abs(weights[name] - theirs).max() / np.abs(theirs).max()
    return far


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("resnet8", PARTS), ("resnet8-batch", WHOLE), ("vgg-frozen", PARTS), ("mobilenet", WHOLE)],
)
def test_twenty_steps_equal_pytorchs(kind: str, sizes: tuple[int, ...], folder: Path) -> None:
    far = twenty_steps(case(kind), folder, sizes)
    assert {name: error for name, error in far.items() if not error <= TOLERANCE} == {}


def half_a_shortcut(nodes: Backward, op: Op, d: str) -> None:
    """A sum whose second term learns half of what it should."""
    nodes._add(op.inputs[0], d)
    nodes._add(op.inputs[1], nodes.value("Mul", f"{op.name}.half", d, nodes.number(0.5)))


def all_of_it(nodes: Backward, op: Op, d: str) -> None:
    """A ReLU that stops nothing."""
    nodes._add(op.inputs[0], d)


def constant_moments(nodes: Backward, op: Op, d: str) -> None:
    """A batch norm that takes its mean and variance for constants."""
    BATCH_NORM(nodes, replace(op, attrs={**op.attrs, "frozen": True}), d)
    shape = [1, nodes.graph.shapes[op.name][0], 1, 1]
    rstd = f"{op.name}.rstd"
    nodes.kept[rstd] = onnx.helper.make_tensor_value_info(rstd, onnx.TensorProto.FLOAT, shape)


FAULTS: dict[str, tuple[str, str, Callable[[Backward, Op, str], None], set[str]]] = {
    "a shortcut with half of its gradient": (
        "resnet8", "add", half_a_shortcut,
        {"gradient of stem.0.weight", "gradient of layer2.0.shortcut.0.weight"},
    ),
    "a ReLU that lets all pass": (
        "pools", "relu", all_of_it,
        {"gradient of 0.weight", "gradient of 1.weight", "gradient of 4.weight"},
    ),
    "a batch norm without its statistics": (
        "resnet8-batch", "batch_norm", constant_moments, {"gradient of stem.0.weight"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("title", FAULTS)
def test_a_wrong_gradient_is_named(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, method, wrong, named = FAULTS[title]
    monkeypatch.setattr(Backward, method, wrong)
    the = case(kind)
    learner = onnx_learner(the.build, tmp_path)
    found = compare_learner(learner, the.segment, the.build, the.images, settings_of("local"), 8)
    bad = {d.tensor for d in found if not d.good}
    assert named <= bad
    assert {"sent", "loss", f"gradient of {the.build.graph.logits}.weight"}.isdisjoint(bad)


def test_torch_is_held_to_the_same() -> None:
    the = case("resnet8")
    b = the.build
    client = LocalClient(
        "it", copy.deepcopy(the.segment), SETTINGS, capacity=8, scale=b.scale, shift=b.shift
    )
    found = compare_learner(TorchLearner(client), the.segment, b, the.images, SETTINGS, 12)
    assert [d for d in found if not d.good] == []


@pytest.mark.parametrize("kind", [kind for kind in OPS if kind not in SERVER_ONLY])
def test_every_kind_of_operation_has_its_backward_nodes(kind: str) -> None:
    assert kind in vars(Backward)


def test_refuses_what_has_no_node_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(OPS, "silu", OPS["relu"])
    build = case("pools").build
    ops = [replace(op, kind="silu") if op.name == "2" else op for op in build.graph.ops]
    with pytest.raises(ModelError, match=r"^2: the ONNX exporter has no silu"):
        write_client(replace(build, graph=replace(build.graph, ops=tuple(ops))), tmp_path)


def shapes(values: Any) -> dict[str, list[Any]]:
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values
    }


def test_graphs_take_weights_by_their_names_and_any_batch() -> None:
    build = case("resnet8-batch").build
    (variant,) = edge.variants(build)
    graphs = training_graphs(build, variant)
    models = {name: onnx.load_model_from_string(data) for name, data in graphs.items()}
    assert list(models) == list(edge.PASSES)
    for model in models.values():
        onnx.checker.check_model(model, full_check=True)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    forward, step = (shapes(models[name].graph.input) for name in ("forward", "step"))
    assert forward["images"] == ["batch", 1, 8, 8]
    assert forward["labels"] == ["batch"]
    assert forward["stem.0.weight"] == [6, 1, 3, 3]
    given = shapes(models["forward"].graph.output)
    assert given["activations"] == ["batch", 12, 4, 4]
    assert given["stem.1.running_mean.batch"] == [6]
    assert {*build.graph.weights, "learning_rate", "clip"} <= set(step)
    for name in build.graph.weights:
        assert shapes(models["step"].graph.output)[f"{name}.after"] == step[name]


def test_without_momentum_none_is_kept(folder: Path) -> None:
    build = case("pools", momentum=False).build
    (variant,) = edge.variants(build)
    model = onnx.load_model_from_string(training_graphs(build, variant)["step"])
    assert not [v.name for v in (*model.graph.input, *model.graph.output) if "momentum." in v.name]
    assert onnx_learner(build, folder).momentum() == {}


def test_the_same_segment_is_the_same_folder(tmp_path: Path) -> None:
    build = case("resnet8", moves=True).build
    first, second = (write_client(build, tmp_path / name) for name in ("a", "b"))
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second]
    names = [str(f.relative_to(tmp_path / "a")) for f in first]
    cuts = ("1-upto", "2-upto", "2-own", "3-upto", "3-own")
    graphs = [f"{cut}/{name}.onnx" for cut in cuts for name in edge.PASSES]
    assert names == ["client.json", "weights.npy", *graphs]
