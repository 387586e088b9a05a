"""A board trains its half of a learned bottleneck: tensor by tensor as PyTorch does."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from splitee.bottleneck import Bottleneck
from splitee.client import trunk_weights
from splitee.data import draw_order
from splitee.errors import MissingTool
from splitee.ops import Array
from splitee.steps import Levers
from splitee_exporters.c import to_c
from splitee_host.verify import (
    TOLERANCE,
    TOLERANCE_FLOAT16,
    names,
    relative_error,
    step_in_torch,
    step_on_device,
)
from step_harness import SETTINGS, Case, case, device

COUNT = 5  # samples in the step: less than the capacity, and odd

# the network, channels sent and stride; at the cut there are 12x4x4 and 7x2x2 values
CASES = {
    "resnet8": ("resnet8", Bottleneck(5)),
    "resnet8-stride-2": ("resnet8", Bottleneck(3, 2)),
    "resnet8-stride-3": ("resnet8", Bottleneck(2, 3)),  # no fast kernel; the last rows are left
    "pools-wider": ("pools", Bottleneck(9, 2)),
    "resnet8-batch-frozen": ("resnet8-batch-frozen", Bottleneck(4, 2)),
}
GRADIENTS = ("local", "server", "both")
STEPS = [
    ("posix", title, mode)
    for title in CASES
    for mode in (GRADIENTS if title == "resnet8-stride-2" else ("both",))
] + [("qemu-m4", "resnet8-stride-2", "both")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bottleneck")


def built(title: str, levers: Levers | None = None) -> Case:
    kind, bottleneck = CASES[title]
    return case(kind, bottleneck=bottleneck, levers=levers or Levers())


def tensors(title: str) -> list[str]:
    return names(built(title).build.graph, momentum=True)


def steps(
    the_case: Case, board: str, mode: str, folder: Path, source: str | None = None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The tensors of one step: the board's and PyTorch's."""
    exit_weight, server_weight = trunk_weights(mode, 0.3)
    settings = replace(SETTINGS, exit_weight=exit_weight, server_weight=server_weight)
    graph = the_case.build.graph
    sent = None
    if settings.wants_gradient:
        sent = torch.randn(
            COUNT, *graph.shapes[graph.cut], generator=torch.Generator().manual_seed(1)
        )
        sent /= 10 * COUNT
    place = the_case.state.place
    part = the_case.images[draw_order(place.samples, place.seed, 0)[:COUNT]]
    try:
        with device(the_case, board, folder, settings, source=source) as running:
            mine = step_on_device(running, COUNT, sent)
    except MissingTool as missing:
        pytest.skip(str(missing))
    return mine, step_in_torch(the_case.segment, the_case.build, part, settings, sent)


@cache
def both_sides(
    board: str, title: str, mode: str, folder: Path
) -> tuple[dict[str, Array], dict[str, Array]]:
    return steps(built(title), board, mode, folder / f"{title}-{board}")


@pytest.mark.parametrize(
    ("board", "title", "mode", "name"),
    [
        pytest.param(board, title, mode, name, id=f"{board}-{title}-{mode}-{name}")
        for board, title, mode in STEPS
        for name in tensors(title)
    ],
)
def test_a_step_with_a_bottleneck_equals_pytorch(
    board: str, title: str, mode: str, name: str, folder: Path
) -> None:
    mine, reference = both_sides(board, title, mode, folder)
    assert relative_error(mine, reference, name) <= TOLERANCE


def test_the_bottlenecks_tensors_are_among_those_compared() -> None:
    assert {
        "bottleneck",
        "d(bottleneck)",
        "d(bottleneck.exit)",
        "gradient of bottleneck.weight",
        "updated bottleneck.bias",
        "momentum of bottleneck.weight",
        "gradient of bottleneck.exit.linear.weight",
    } <= set(tensors("resnet8-stride-2"))


@pytest.mark.parametrize(
    "levers",
    [
        Levers(relu_bits=True),
        Levers(recompute=1.0),
        Levers(local_only=True, recompute=1.0),
        Levers(float16=True),
    ],
    ids=str,
)
def test_levers_know_a_bottleneck(levers: Levers, folder: Path) -> None:
    the_case = built("resnet8-stride-2", levers)
    mode = "local" if levers.local_only else "both"
    mine, reference = steps(the_case, "posix", mode, folder / "levers")
    compared = [n for n in names(the_case.build.graph, momentum=True) if n in mine]
    worst = max((relative_error(mine, reference, n), n) for n in compared)
    assert worst[0] <= (TOLERANCE_FLOAT16 if levers.float16 else TOLERANCE), worst


# A fault in the generated code of one step, and a tensor that must notice it.
FAULTS = {
    "the server's gradient comes in below the bottleneck": (
        "weigh bottleneck", r"pass->server_weight", "0.0f", "gradient of bottleneck.weight",
    ),
    "what the bottleneck learns goes to its neighbour": (
        "backward_weight bottleneck", r"\) \+ (\d+)", r") + 1 + \1",
        "gradient of bottleneck.weight",
    ),
    "nothing passes below the bottleneck": (
        "backward_input bottleneck", r"fast_conv2d_backward\(.*\);", "",
        "gradient of stem.0.weight",
    ),
    "the bottleneck has no bias": (
        "forward bottleneck", r"weights \+ (\d+), (?=&)", "NULL, ", "bottleneck",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault: str, folder: Path) -> None:
    comment, pattern, replacement, tensor = FAULTS[fault]
    the_case = built("resnet8-stride-2")
    before, found, rest = to_c(the_case.build).partition(f": // {comment}\n")
    statements, end, after = rest.partition("break;")
    changed, count = re.subn(pattern, replacement, statements, count=1)
    assert count == 1, statements
    source = before + found + changed + end + after
    mine, reference = steps(the_case, "posix", "both", folder / "fault", source)
    assert relative_error(mine, reference, tensor) > TOLERANCE
