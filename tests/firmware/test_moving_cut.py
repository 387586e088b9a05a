"""One firmware, many cuts: each step equals PyTorch's wherever the host has put the cut."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from splitee.client import Settings, trunk_weights
from splitee.data import draw_order
from splitee.errors import MissingTool
from splitee.model import Segment
from splitee.ops import Array
from splitee_exporters.c import to_c
from splitee_host.device import Device
from splitee_host.verify import TOLERANCE, names, relative_error, step_in_torch, step_on_device
from splitee_host.wire import messages as m
from step_harness import SETTINGS, case, device, norm_of_gradients, planted

BOARDS = ("posix", "qemu-m4")
COUNT = 4  # samples in a step: six steps are an epoch
CASE = case("resnet8", moves=True)
GRAPH = CASE.build.graph
BOTH = replace(SETTINGS, exit_weight=0.3, server_weight=0.7)

# the cut and whether all exits up to it learn, in each step of one run
WALK = (
    ("layer2", True),
    ("stem", True),
    ("layer1", False),
    ("layer2", False),
    ("layer1", True),
    ("stem", False),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("firmware")


@dataclass(frozen=True)
class Step:
    """One step of the run, and all weights and momenta around it."""

    mine: dict[str, Array]
    reference: dict[str, Array]
    before: dict[str, Array]
    after: dict[str, Array]


def everything(running: Device) -> dict[str, Array]:
    """What the firmware holds of every layer that is built in, whatever the cut."""
    weights = GRAPH.unflatten(running.floats(m.Region.WEIGHTS, GRAPH.weight_size))
    vector = running.floats(m.Region.MOMENTUM, GRAPH.parameter_size)
    momentum = GRAPH.unflatten_parameters(vector)
    return weights | {f"momentum of {n}": v for n, v in momentum.items()}


def holding(weights: dict[str, Array], cut: str, upto: bool) -> Segment:
    """The case's segment up to a cut, with these weights."""
    segment = copy.deepcopy(CASE.segment).at(cut, upto=upto)
    with torch.no_grad():
        for name, tensor in segment.tensors().items():
            tensor.copy_(torch.from_numpy(weights[name]))
    return segment


def steps(running: Device, settings: Settings) -> Iterator[Step]:
    """The run: every step starts from what the device holds, momentum included."""
    place = CASE.state.place
    for i, (cut, upto) in enumerate(WALK):
        running.move(cut, upto=upto)
        shape = running.graph.shapes[running.graph.cut]
        sent = torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(i)) / COUNT
        before = everything(running)
        velocity = {n: before[f"momentum of {n}"] for n in running.graph.parameters}
        part = CASE.images[draw_order(place.samples, place.seed, 0)[i * COUNT : (i + 1) * COUNT]]
        reference = step_in_torch(
            holding(before, cut, upto), CASE.build, part, settings, sent, velocity
        )
        mine = step_on_device(running, COUNT, sent)
        yield Step(mine, reference, before, everything(running))


@cache
def run_on(board: str, folder: Path) -> list[Step]:
    """All steps, on one running firmware."""
    try:
        with device(CASE, board, folder / board, BOTH) as running:
            return list(steps(running, BOTH))
    except MissingTool as missing:
        pytest.skip(str(missing))


LEGS = [f"{i} {cut} {'upto' if upto else 'own'}" for i, (cut, upto) in enumerate(WALK)]
TENSORS = [
    pytest.param(i, name, id=f"{leg}: {name}")
    for i, (leg, (cut, upto)) in enumerate(zip(LEGS, WALK, strict=True))
    for name in names(GRAPH.at(cut, upto=upto), momentum=True)
]


@pytest.mark.parametrize(("leg", "name"), TENSORS)
@pytest.mark.parametrize("board", BOARDS)
def test_a_step_equals_pytorch_wherever_the_cut_is(
    board: str, leg: int, name: str, folder: Path
) -> None:
    step = run_on(board, folder)[leg]
    assert relative_error(step.mine, step.reference, name) <= TOLERANCE


def still(step: Step) -> list[str]:
    """Names of what did not change in a step, of all layers that are built in."""
    return [n for n in step.before if np.array_equal(step.before[n], step.after[n])]


def inactive(cut: str, upto: bool) -> list[str]:
    """Names of what takes no part at a cut."""
    active = set(GRAPH.at(cut, upto=upto).weights)
    everyone = [*GRAPH.weights, *(f"momentum of {n}" for n in GRAPH.parameters)]
    return [n for n in everyone if n.removeprefix("momentum of ") not in active]


@pytest.mark.parametrize("leg", range(len(WALK)), ids=LEGS)
@pytest.mark.parametrize("board", BOARDS)
def test_layers_that_take_no_part_stay_bit_for_bit(board: str, leg: int, folder: Path) -> None:
    step = run_on(board, folder)[leg]
    assert still(step) == inactive(*WALK[leg])


# A fault in the generated code and a step of the run that must notice it: (pattern, replacement,
# step, a tensor that differs from PyTorch's or that should have stayed).
FAULTS = {
    "a stage takes a parameter of the next for its own": (
        r"(// stem\n.*\n +\.parameters_end = )(\d+)",
        lambda found: f"{found[1]}{int(found[2]) + 1}",
        1,
        "layer1.0.conv1.weight",
    ),
    "a shallow cut takes the gradient of the deepest": (
        r"(// weigh stem\.2\n +gradient_weigh\(\(arena \+ )(\d+)",
        lambda found: f"{found[1]}{int(found[2]) + 4}",
        1,
        "d(stem.2)",
    ),
    "an exit below the cut learns though it should not": (
        r"\{1, STEP_EXIT\}",
        lambda found: "{1, STEP_TRUNK}",
        3,
        "d(layer1.0.add)",
    ),
    "the loss is that of the deepest exit": (
        r"pass->cut == 1 \? &pass->loss",
        lambda found: "pass->cut == 2 ? &pass->loss",
        2,
        "loss",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault: str, folder: Path) -> None:
    pattern, replacement, leg, name = FAULTS[fault]
    source, count = re.subn(pattern, replacement, to_c(CASE.build))
    assert count > 0
    with device(CASE, "posix", folder / "fault", BOTH, source=source) as running:
        step = list(steps(running, BOTH))[leg]
    if name in step.reference:
        assert not relative_error(step.mine, step.reference, name) <= TOLERANCE
    else:
        assert name in inactive(*WALK[leg])
        assert name not in still(step)


CLIPPED = replace(BOTH, clip=0.3)


def clipped(board: str, folder: Path) -> list[Step]:
    """The run with a clip that acts in each of its steps."""
    try:
        with device(CASE, board, folder, CLIPPED) as running:
            return list(steps(running, CLIPPED))
    except MissingTool as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("board", BOARDS)
def test_gradients_are_clipped_together_wherever_the_cut_is(board: str, folder: Path) -> None:
    for step, (cut, upto) in zip(clipped(board, folder / board), WALK, strict=True):
        assert norm_of_gradients(step.reference) > 2 * CLIPPED.clip
        assert still(step) == inactive(cut, upto)
        for name in names(GRAPH.at(cut, upto=upto), momentum=True):
            assert relative_error(step.mine, step.reference, name) <= TOLERANCE, (cut, name)


# A fault in how gradients are clipped, and a step and a tensor that must notice it.
CLIP_FAULTS = {
    "the norm is that of the last stage": (
        "squares += s->clip > 0",
        "squares = s->clip > 0",
        (0, "updated stem.0.weight"),
    ),
    "a stage is left as it is": (
        "segment.gradients + r.first, factor, s,",
        "segment.gradients + r.first, i == 1 ? 1 : factor, s,",
        (4, "momentum of layer1.0.conv2.weight"),
    ),
    "exits that do not learn learn too": (
        "step_exit_learns(stage, cut, upto) ?",
        "upto || stage <= cut ?",
        (2, "exits.stem.linear.weight"),
    ),
    "the square of the norm is taken": (
        "sqrtf(squares)",
        "squares",
        (1, "updated exits.stem.linear.bias"),
    ),
}


@pytest.mark.parametrize("fault", CLIP_FAULTS)
def test_a_fault_planted_in_the_step_is_noticed(fault: str, folder: Path) -> None:
    old, new, (leg, name) = CLIP_FAULTS[fault]
    with planted(folder, "core/step.c", old, new):
        step = clipped("posix", folder / "planted")[leg]
    if name in step.reference:
        assert not relative_error(step.mine, step.reference, name) <= TOLERANCE
    else:
        assert name in inactive(*WALK[leg])
        assert name not in still(step)


@pytest.mark.parametrize("mode", ["local", "server"])
def test_a_moved_cut_learns_in_every_gradient_mode(mode: str, folder: Path) -> None:
    exit_weight, server_weight = trunk_weights(mode)
    settings = replace(SETTINGS, exit_weight=exit_weight, server_weight=server_weight)
    with device(CASE, "posix", folder / "posix", settings) as running:
        for step, (cut, upto) in zip(steps(running, settings), WALK, strict=True):
            for name in names(GRAPH.at(cut, upto=upto), momentum=True):
                assert relative_error(step.mine, step.reference, name) <= TOLERANCE, (cut, name)
