"""What exits learn from the one at the cut is PyTorch's: on boards, with levers, at every cut."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from splitee.client import Settings
from splitee.data import draw_order
from splitee.errors import DeviceRefused, MissingTool
from splitee.ops import Array
from splitee.steps import NO_LEVERS, Levers
from splitee_exporters.c import to_c
from splitee_host.device import Device
from splitee_host.verify import (
    TOLERANCE,
    names,
    relative_error,
    step_in_torch,
    step_on_device,
    tolerance,
)
from step_harness import SETTINGS, Case, case, device

COUNT = 5  # samples in the step: less than the capacity, and odd
LOCAL = replace(SETTINGS, distill=0.3)
BOTH = replace(LOCAL, exit_weight=0.3, server_weight=0.7)
LEVERS = {
    "none": NO_LEVERS,
    "every": Levers(relu_bits=True, float16=True, recompute=0.25, local_only=True),
}
RUNS = [
    ("resnet8", "none", "posix"),
    ("pools", "none", "posix"),
    ("resnet8", "every", "posix"),
    ("resnet8", "none", "qemu-m4"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distill")


def settings_of(levers: str) -> Settings:
    return LOCAL if LEVERS[levers].local_only else BOTH


def sent_to(the_case: Case, settings: Settings) -> torch.Tensor | None:
    """The server's gradient, where there is one: about as large as what the exits send."""
    shape = the_case.build.graph.shapes[the_case.build.graph.cut]
    sent = torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(1)) / COUNT / 10
    return sent if settings.wants_gradient else None


def in_torch(the_case: Case, settings: Settings, count: int = COUNT) -> dict[str, Array]:
    """The step of the first samples of the case's data order."""
    place = the_case.state.place
    part = the_case.images[draw_order(place.samples, place.seed, 0)[:count]]
    sent = sent_to(the_case, settings)
    return step_in_torch(the_case.segment, the_case.build, part, settings, sent)


@cache
def both_sides(
    kind: str, levers: str, board: str, folder: Path
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The tensors of one step: the board's and PyTorch's."""
    the_case = case(kind, distills=True, levers=LEVERS[levers])
    settings = settings_of(levers)
    try:
        with device(the_case, board, folder / f"{kind}-{board}-{levers}", settings) as running:
            mine = step_on_device(running, COUNT, sent_to(the_case, settings))
    except MissingTool as missing:
        pytest.skip(str(missing))
    return mine, in_torch(the_case, settings)


@pytest.mark.parametrize(
    ("kind", "levers", "board", "name"),
    [
        pytest.param(*run, name, id="-".join((*run, name)))
        for run in RUNS
        for name in names(case(run[0]).build.graph, momentum=True)
    ],
)
def test_a_step_equals_pytorch(kind: str, levers: str, board: str, name: str, folder: Path) -> None:
    mine, reference = both_sides(kind, levers, board, folder)
    bar = tolerance(case(kind, levers=LEVERS[levers]).build)
    assert relative_error(mine, reference, name) <= bar


@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_one_firmware_serves_every_share(distill: float, folder: Path) -> None:
    the_case, settings = case("resnet8", distills=True), replace(BOTH, distill=distill)
    with device(the_case, "posix", folder / "share", settings) as running:
        mine = step_on_device(running, COUNT, sent_to(the_case, settings))
    reference = in_torch(the_case, settings)
    errors = {n: relative_error(mine, reference, n) for n in names(running.graph, momentum=True)}
    assert {n: error for n, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize("levers", [NO_LEVERS, Levers(fused_update=True)], ids=["parts", "fused"])
def test_whole_batches_learn_the_same(levers: Levers, folder: Path) -> None:
    """In parts, and by layers that learn before the one below has its gradient."""
    the_case = case("resnet8", distills=True, momentum=False, levers=levers)
    settings = replace(LOCAL, momentum=0.0)
    with device(the_case, "posix", folder / "whole", settings) as running:
        for part in (8,) if levers.fused_update else (3, 3, 2):
            running.forward(part, 8)
            running.backward(None)
        stepped = running.step()
        mine = {f"updated {n}": w for n, w in running.state().weights.items()}
    reference = in_torch(the_case, settings, 8)
    errors = {n: relative_error(mine, reference, n) for n in mine}
    assert {n: error for n, error in errors.items() if not error <= TOLERANCE} == {}
    assert stepped.loss == pytest.approx(float(reference["loss"]), rel=1e-5)


# ---- one firmware, many cuts ----

MOVING = case("resnet8", moves=True, distills=True)
# the cut and whether all exits up to it learn, in each step of one run
WALK = (("layer2", True), ("layer1", True), ("stem", True), ("layer2", False), ("layer1", False))


def steps(running: Device) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
    """The tensors of each step, on the device and in PyTorch; it has the same weights in each."""
    place = MOVING.state.place
    part = MOVING.images[draw_order(place.samples, place.seed, 0)[:COUNT]]
    for cut, upto in WALK:
        running.start(MOVING.state, MOVING.images)
        running.move(cut, upto=upto)
        shape = running.graph.shapes[running.graph.cut]
        sent = torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(2)) / COUNT
        active = MOVING.segment.at(cut, upto=upto)
        yield (
            step_on_device(running, COUNT, sent),
            step_in_torch(active, MOVING.build, part, BOTH, sent),
        )


@cache
def walk(folder: Path) -> list[tuple[dict[str, Array], dict[str, Array]]]:
    with device(MOVING, "posix", folder / "walk", BOTH) as running:
        return list(steps(running))


@pytest.mark.parametrize(
    ("leg", "name"),
    [
        pytest.param(leg, name, id=f"{cut} {'upto' if upto else 'own'}: {name}")
        for leg, (cut, upto) in enumerate(WALK)
        for name in names(MOVING.build.graph.at(cut, upto=upto), momentum=True)
    ],
)
def test_a_step_equals_pytorch_wherever_the_cut_is(leg: int, name: str, folder: Path) -> None:
    mine, reference = walk(folder)[leg]
    assert relative_error(mine, reference, name) <= TOLERANCE


# ---- what it costs, and what is refused ----


@pytest.mark.parametrize("moves", [False, True], ids=["fixed", "moves"])
@pytest.mark.parametrize("levers", LEVERS)
def test_it_takes_no_memory_of_the_arena_and_a_step_for_each_exit_below_a_cut(
    levers: str, moves: bool
) -> None:
    # a cut that moves has room for the server's gradient
    pulled = replace(LEVERS[levers], local_only=LEVERS[levers].local_only and not moves)
    without, with_it = (
        case("pools", moves=moves, distills=distills, levers=pulled).build
        for distills in (False, True)
    )
    assert with_it.arena_bytes == without.arena_bytes
    found = [s for s in with_it.schedule.steps if s.action == "distill"]
    assert len(found) == len(without.graph.exits) - 1 == 1
    assert tuple(s for s in with_it.schedule.steps if s not in found) == without.schedule.steps


def test_an_exit_that_is_alone_has_no_such_step() -> None:
    build = case("resnet8", distills=True).build
    alone = replace(build, graph=build.graph.at("layer2", upto=False))
    assert "distill" not in {step.action for step in alone.schedule.steps}


def test_a_segment_that_was_built_without_is_another_and_refuses_it(folder: Path) -> None:
    the_case = case("resnet8")
    assert case("resnet8", distills=True).build.checksum != the_case.build.checksum
    with (
        device(the_case, "posix", folder / "without", SETTINGS) as running,
        pytest.raises(DeviceRefused, match="built without distill: run `splitee build` with"),
    ):
        running.settings = LOCAL


# ---- the tests themselves ----


def noticed(the_case: Case, source: str, folder: Path, tensor: str) -> bool:
    with device(the_case, "posix", folder / "fault", BOTH, source=source) as running:
        mine = step_on_device(running, COUNT, sent_to(the_case, BOTH))
    return not relative_error(mine, in_torch(the_case, BOTH), tensor) <= TOLERANCE


# pattern in the generated step, replacement, and a tensor that must notice it
FAULTS = {
    "a shallower exit teaches": (
        r"softmax_distill\((\(arena \+ \d+\)), \(arena \+ \d+\)",
        r"softmax_distill(\1, \1",
        "gradient of exits.stem.linear.weight",
    ),
    "one exit is left out": (
        r"softmax_distill\((?=[\s\S]*softmax_distill)",
        "if (0) softmax_distill(",
        "d(exits.stem.linear)",
    ),
    "the other weight's share": (
        "pass->settings->distill",
        "pass->settings->exit_weight / 2",
        "d(exits.layer1.linear)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault: str, folder: Path) -> None:
    pattern, replacement, tensor = FAULTS[fault]
    the_case = case("resnet8", distills=True)
    source, count = re.subn(pattern, replacement, to_c(the_case.build))
    assert count
    assert noticed(the_case, source, folder, tensor)


def test_a_step_that_runs_at_another_cut_is_noticed(folder: Path) -> None:
    text = to_c(MOVING.build)
    assert text.count("{1, STEP_UPTO}") == 1
    source = text.replace("{1, STEP_UPTO}", "{0, STEP_UPTO}")
    with device(MOVING, "posix", folder / "elsewhere", BOTH, source=source) as running:
        _, (mine, reference), *_ = steps(running)
    assert relative_error(mine, reference, "gradient of exits.stem.linear.weight") > TOLERANCE
