"""A training step of the firmware equals PyTorch's, tensor by tensor, on every board that runs."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from splitee.client import Settings, trunk_weights
from splitee.data import draw_order
from splitee.errors import MissingTool
from splitee.ops import Array
from splitee_exporters.c import to_c
from splitee_host.boards import load_boards
from splitee_host.verify import TOLERANCE, names, relative_error, step_in_torch, step_on_device
from step_harness import SETTINGS, Case, case, case_on, device, local

BOARDS = [n for n, b in load_boards().items() if b.port == "posix" or b.qemu is not None]
GRADIENTS = ("local", "server", "both")
EVERY_MODE = ("posix", "qemu-m4")  # the others run "both", which has all that the two have
STEPS = [(b, g) for b in BOARDS for g in (GRADIENTS if b in EVERY_MODE else ("both",))]
COUNT = 5  # samples in the step: less than the capacity, and odd


def settings_of(mode: str) -> Settings:
    exit_weight, server_weight = trunk_weights(mode, 0.3)
    return replace(SETTINGS, exit_weight=exit_weight, server_weight=server_weight)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("firmware")


@cache
def both_sides(
    kind: str, board: str, mode: str, folder: Path
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The tensors of one step: the board's and PyTorch's."""
    the_case = case_on(board, kind)
    settings = settings_of(mode)
    shape = the_case.build.graph.shapes[the_case.build.graph.cut]
    sent = None
    if settings.wants_gradient:
        sent = torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(1)) / COUNT
    try:
        with device(the_case, board, folder / f"{kind}-{board}", settings) as running:
            mine = step_on_device(running, COUNT, sent)
    except MissingTool as missing:
        pytest.skip(str(missing))
    return mine, in_torch(the_case, settings, sent)


def in_torch(the_case: Case, settings: Settings, sent: torch.Tensor | None) -> dict[str, Array]:
    """The step of the first COUNT samples of the case's data order."""
    place = the_case.state.place
    part = the_case.images[draw_order(place.samples, place.seed, 0)[:COUNT]]
    return step_in_torch(the_case.segment, the_case.build, part, settings, sent)


@pytest.mark.parametrize("name", names(case("resnet8").build.graph, momentum=True))
@pytest.mark.parametrize(("board", "mode"), STEPS)
def test_a_resnet_step_equals_pytorch(board: str, mode: str, name: str, folder: Path) -> None:
    mine, reference = both_sides("resnet8", board, mode, folder)
    assert relative_error(mine, reference, name) <= TOLERANCE


@pytest.mark.parametrize("name", names(case("pools").build.graph, momentum=True))
@pytest.mark.parametrize("board", BOARDS)
def test_a_step_through_pools_equals_pytorch(board: str, name: str, folder: Path) -> None:
    mine, reference = both_sides("pools", board, "both", folder)
    assert relative_error(mine, reference, name) <= TOLERANCE


@pytest.mark.parametrize("board", EVERY_MODE)
def test_the_losses_of_fifty_steps_agree(board: str, folder: Path) -> None:
    the_case = case("resnet8")
    settings = replace(SETTINGS, learning_rate=0.01)
    reference = local(the_case, settings)
    try:
        with device(the_case, board, folder / f"resnet8-{board}", settings) as running:
            for _ in range(50):
                for client in (running, reference):
                    client.forward(8, 8)
                    client.backward(None)
                mine, theirs = running.step(), reference.step()
                assert mine.loss == pytest.approx(theirs.loss, rel=1e-3)
    except MissingTool as missing:
        pytest.skip(str(missing))


def test_a_batch_in_parts_is_the_whole_batch(folder: Path) -> None:
    settings = settings_of("local")
    whole, parts = case("resnet8", capacity=12), case("resnet8", capacity=5)
    with device(whole, "posix", folder / "whole", settings) as running:
        reference = step_on_device(running, 12, None)
    with device(parts, "posix", folder / "parts", settings) as running:
        for count in (5, 5, 2):
            running.forward(count, 12)
            running.backward(None)
        mine = {f"gradient of {n}": g for n, g in running.gradients().items()}
        running.step()
        mine |= {f"updated {n}": w for n, w in running.state().weights.items()}
    worst = max(mine, key=lambda name: relative_error(mine, reference, name))
    assert relative_error(mine, reference, worst) <= TOLERANCE, worst


# A fault in the generated code of one step, and a tensor that must notice it: (comment of the
# step's case, pattern, replacement, tensor).
FAULTS = {
    "the skip connection's gradient is lost": (
        "backward layer1.0.add",
        r"(add_backward\(\S+ \+ \d+\), )\S+ \+ \d+\)",
        r"\1NULL",
        "d(stem.2)",
    ),
    "an exit's gradient reaches the trunk in full": (
        "backward exits.stem",
        r"pass->exit_weight",
        "1.0f",
        "d(stem.2)",
    ),
    "a gradient is not cleared first": (
        "backward layer1.0.norm2",
        r"memset\(.*\);",
        "",
        "d(layer1.0.conv2)",
    ),
    "a norm reads its neighbour's weight": (
        "forward layer2.0.norm1",
        r"weights \+ (\d+)",
        r"weights + 1 + \1",
        "layer2.0.norm1",
    ),
    "the loss is not divided by the batch": (
        "loss_backward layer2",
        r"pass->inverse_batch",
        "1.0f",
        "gradient of exits.layer2.linear.bias",
    ),
    "the server's gradient is not weighted": (
        "weigh layer2.0.relu2",
        r"pass->server_weight",
        "1.0f",
        "d(layer2.0.relu2)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault: str, folder: Path) -> None:
    comment, pattern, replacement, tensor = FAULTS[fault]
    the_case, settings = case("resnet8"), settings_of("both")
    source = to_c(the_case.build)
    before, found, rest = source.partition(f": // {comment}\n")
    statements, end, after = rest.partition("break;")
    assert found, comment
    changed, count = re.subn(pattern, replacement, statements, count=1)
    assert count == 1, statements
    source = before + found + changed + end + after
    shape = the_case.build.graph.shapes[the_case.build.graph.cut]
    sent = torch.ones(COUNT, *shape) / COUNT
    with device(the_case, "posix", folder / "fault", settings, source=source) as running:
        mine = step_on_device(running, COUNT, sent)
    assert relative_error(mine, in_torch(the_case, settings, sent), tensor) > TOLERANCE
