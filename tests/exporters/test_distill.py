"""What the exits of an exported client learn from its deepest in ONNX Runtime is PyTorch's."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from host_harness import onnx_learner
from splitee import edge
from splitee.client import Settings
from splitee.data import draw_order
from splitee.model import Segment
from splitee.norms import frozen_norms
from splitee.ops import Array
from splitee_host.verify import TOLERANCE, relative_error, step_in_torch, step_of_learner
from step_harness import SETTINGS, Case, case

onnx: Any = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from splitee_exporters.onnx_backward import Backward  # noqa: E402  it needs them
from splitee_exporters.onnx_train import training_graphs  # noqa: E402

BOTH = replace(SETTINGS, exit_weight=0.3, server_weight=0.7, distill=0.3)
PARTS = (5, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clients")


def from_server(the_case: Case, cut: str) -> torch.Tensor:
    """What the server could return for a batch, about as large as what the exits do."""
    shape = the_case.build.graph.shapes[cut]
    return torch.randn(8, *shape, generator=torch.Generator().manual_seed(1)) / 80


@cache
def both_sides(cut: str, upto: bool, folder: Path) -> tuple[dict[str, Array], dict[str, Array]]:
    """What goes in and out of one step at a cut: ONNX Runtime's tensors, and PyTorch's."""
    the_case = case("resnet8", moves=True, distills=True)
    learner = onnx_learner(the_case.build, folder)
    learner.move(cut, upto=upto)
    learner.settings, place = BOTH, the_case.state.place
    learner.begin(place, the_case.images)
    sent = from_server(the_case, the_case.build.graph.at(cut, upto=upto).cut)
    part = the_case.images[draw_order(place.samples, place.seed, 0)[:8]]
    segment = the_case.segment.at(cut, upto=upto)
    reference = step_in_torch(segment, the_case.build, part, BOTH, sent)
    return step_of_learner(learner, PARTS, sent), reference


CUTS = [("stem", True), ("layer1", True), ("layer1", False), ("layer2", True), ("layer2", False)]


@pytest.mark.parametrize(
    ("cut", "upto", "name"),
    [
        pytest.param(cut, upto, name, id=f"{cut}-{'upto' if upto else 'own'}-{name}")
        for cut, upto in CUTS
        for name in case("resnet8").build.graph.at(cut, upto=upto).parameters
    ],
)
def test_a_step_at_every_cut_equals_pytorch(cut: str, upto: bool, name: str, folder: Path) -> None:
    mine, reference = both_sides(cut, upto, folder)
    for tensor in ("loss", *(f"{w} {name}" for w in ("gradient of", "updated", "momentum of"))):
        assert relative_error(mine, reference, tensor) <= TOLERANCE, tensor


def steps_in_torch(the_case: Case, settings: Settings, count: int) -> tuple[Segment, list[float]]:
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
    sent = from_server(the_case, the_case.build.graph.cut).double()
    for step in range(count):
        order = draw_order(place.samples, place.seed, step // 3)  # three batches an epoch
        part = the_case.images[order[step % 3 * 8 : step % 3 * 8 + 8]]
        labels = torch.from_numpy(part.y).long()
        optimizer.zero_grad()
        points = segment.trunk(torch.from_numpy(part.x).double() * scale + shift)
        entered = [point.detach().requires_grad_() for point in points]
        logits = [head(x) for head, x in zip(segment.exits, entered, strict=True)]
        teacher, loss = logits[-1].detach().log_softmax(1), F.cross_entropy(logits[-1], labels)
        total = loss
        for z in logits[:-1]:
            apart = F.kl_div(z.log_softmax(1), teacher, reduction="batchmean", log_target=True)
            by_label = F.cross_entropy(z, labels)
            total = total + (1 - settings.distill) * by_label + settings.distill * apart
        torch.autograd.backward(total)
        returned = [settings.exit_weight * x.grad for x in entered if x.grad is not None]
        returned[-1] = returned[-1] + settings.server_weight * sent
        torch.autograd.backward(points, returned)
        optimizer.step()
        for norm in frozen_norms(segment):
            norm.follow()
        losses.append(loss.item())
    return segment, losses


def ten_steps(kind: str, folder: Path) -> dict[str, float]:
    """How far each loss and each tensor is from PyTorch's after ten steps, relative."""
    the_case, settings = case(kind, distills=True), replace(BOTH, learning_rate=0.02)
    learner = onnx_learner(the_case.build, folder)
    learner.settings = settings
    learner.begin(the_case.state.place, the_case.images)
    segment, losses = steps_in_torch(the_case, settings, 10)
    sent = from_server(the_case, the_case.build.graph.cut)
    mine = [float(step_of_learner(learner, PARTS, sent)["loss"]) for _ in range(10)]
    far = {f"loss {i}": abs(a / b - 1) for i, (a, b) in enumerate(zip(mine, losses, strict=True))}
    weights = learner.weights()
    for name, tensor in segment.tensors().items():
        theirs = tensor.detach().numpy()
        far[name] = np.abs(weights[name] - theirs).max() / np.abs(theirs).max()
    return far


@pytest.mark.parametrize("kind", ["resnet8", "vgg-frozen"])
def test_ten_steps_equal_pytorchs(kind: str, folder: Path) -> None:
    far = ten_steps(kind, folder)
    assert {name: error for name, error in far.items() if not error <= TOLERANCE} == {}


def test_a_shallower_exit_that_teaches_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Backward._softmax

    def planted(nodes: Backward, logits: str) -> str:
        return honest(nodes, next(iter(nodes.graph.exits.values())))

    monkeypatch.setattr(Backward, "_softmax", planted)
    assert ten_steps("resnet8", tmp_path)["exits.layer1.linear.weight"] > TOLERANCE


def test_a_client_that_was_exported_without_knows_no_share() -> None:
    for distills in (False, True):
        build = case("resnet8", distills=distills).build
        (backward,) = (
            onnx.load_from_string(training_graphs(build, variant)["backward"])
            for variant in edge.variants(build)
        )
        assert ("distill" in {value.name for value in backward.graph.input}) == distills
