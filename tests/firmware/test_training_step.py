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
from step_harness import SETTINGS, Case, case, case_on, device, local, norm_of_gradients

# but for those that differ from another in their link (test_ethernet.py)
BOARDS = [
    n
    for n, b in load_boards().items()
    if b.port == "posix" or (b.qemu is not None and b.link == "serial")
]
GRADIENTS = ("local", "server", "both")
EVERY_MODE = ("posix", "qemu-m4")  # the others run "both", which has all that the two have
STEPS = [(b, g) for b in BOARDS for g in (GRADIENTS if b in EVERY_MODE else ("both",))]
COUNT = 5  # samples in the step: less than the capacity, and odd
CLIP = 0.5  # norm of the gradients, where they are clipped: far below what it is without


def settings_of(mode: str) -> Settings:
    exit_weight, server_weight = trunk_weights(mode, 0.3)
    return replace(SETTINGS, exit_weight=exit_weight, server_weight=server_weight)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("firmware")


@cache
def both_sides(
    kind: str, board: str, mode: str, folder: Path, clip: float = 0.0
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The tensors of one step: the board's and PyTorch's."""
    the_case = case_on(board, kind)
    settings = replace(settings_of(mode), clip=clip)
    shape = the_case.build.graph.shapes[the_case.build.graph.cut]
    sent = None
    if settings.wants_gradient:
        sent = torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(1)) / COUNT
        sent /= 10  # about what the exits send: nothing of theirs may vanish beside it
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


LEARNT = [
    n
    for n in names(case("resnet8").build.graph, momentum=True)
    if n.startswith(("updated ", "momentum of "))
]


@pytest.mark.parametrize("name", LEARNT)
@pytest.mark.parametrize("board", BOARDS)
def test_a_clipped_step_equals_pytorch(board: str, name: str, folder: Path) -> None:
    mine, reference = both_sides("resnet8", board, "both", folder, CLIP)
    assert norm_of_gradients(reference) > 4 * CLIP  # before it was clipped
    assert relative_error(mine, reference, name) <= TOLERANCE


@pytest.mark.parametrize("name", names(case("pools").build.graph, momentum=True))
@pytest.mark.parametrize("board", BOARDS)
def test_a_step_through_pools_equals_pytorch(board: str, name: str, folder: Path) -> None:
    mine, reference = both_sides("pools", board, "both", folder)
    assert relative_error(mine, reference, name) <= TOLERANCE


# batch norm by the samples held and frozen, inverted residuals, a chain with max pools
FURTHER = ("resnet8-batch", "resnet8-batch-frozen", "mobilenet", "vgg-frozen")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(k, n, id=f"{k}-{n}")
        for k in FURTHER
        for n in names(case(k).build.graph, momentum=True)
    ],
)
@pytest.mark.parametrize("board", EVERY_MODE)
def test_a_step_of_further_networks_equals_pytorch(
    board: str, kind: str, name: str, folder: Path
) -> None:
    mine, reference = both_sides(kind, board, "both", folder)
    assert relative_error(mine, reference, name) <= TOLERANCE


@pytest.mark.parametrize(
    "kind", ["resnet18", "resnet18-batch-frozen", "resnet20", "resnet20-batch", "mobilenet-frozen"]
)
def test_the_first_stages_of_deeper_networks_fit_a_board_and_train(kind: str, folder: Path) -> None:
    room = load_boards()["qemu-m4"].for_assembly.room
    assert room is not None
    assert case(kind).build.shortage(room) is None
    mine, reference = both_sides(kind, "qemu-m4", "both", folder)
    tensors = names(case(kind).build.graph, momentum=True)
    worst = max((relative_error(mine, reference, name), name) for name in tensors)
    assert worst[0] <= TOLERANCE, worst


@pytest.mark.parametrize("kind", ["resnet8", "mobilenet", "vgg-frozen"])
@pytest.mark.parametrize("board", EVERY_MODE)
def test_the_losses_of_fifty_steps_agree(board: str, kind: str, folder: Path) -> None:
    the_case = case(kind)
    # frozen norms let the loss jump at ten times that, where float32 parts from float64 in torch
    settings = replace(SETTINGS, learning_rate=0.003)
    reference = local(the_case, settings)
    try:
        with device(the_case, board, folder / f"{kind}-{board}", settings) as running:
            for _ in range(50):
                for client in (running, reference):
                    client.forward(8, 8)
                    client.backward(None)
                mine, theirs = running.step(), reference.step()
                assert mine.loss == pytest.approx(theirs.loss, rel=1e-3)
    except MissingTool as missing:
        pytest.skip(str(missing))


def worst_of_parts(kind: str, folder: Path, source: str | None = None) -> tuple[float, str]:
    """A batch in parts against the same as a whole: the largest error of a tensor, and its name."""
    settings = settings_of("local")
    whole, parts = case(kind, capacity=12), case(kind, capacity=5)
    with device(whole, "posix", folder / f"{kind}-whole", settings) as running:
        reference = step_on_device(running, 12, None)
    with device(parts, "posix", folder / f"{kind}-parts", settings, source=source) as running:
        for count in (5, 5, 2):
            running.forward(count, 12)
            running.backward(None)
        mine = {f"gradient of {n}": g for n, g in running.gradients().items()}
        running.step()
        mine |= {f"updated {n}": w for n, w in running.state().weights.items()}
    return max((relative_error(mine, reference, name), name) for name in mine)


@pytest.mark.parametrize("kind", ["resnet8", "vgg-frozen"])
def test_a_batch_in_parts_is_the_whole_batch(kind: str, folder: Path) -> None:
    worst = worst_of_parts(kind, folder)
    assert worst[0] <= TOLERANCE, worst


def test_statistics_of_the_last_part_alone_are_noticed(folder: Path) -> None:
    source = to_c(case("vgg-frozen", capacity=5).build)
    forgets = source.replace("pass->seen, n)", "0, n)", 1)
    assert forgets != source
    worst, name = worst_of_parts("vgg-frozen", folder, forgets)
    assert worst > TOLERANCE
    assert name in ("updated 1.running_mean", "updated 1.running_var")


# A fault in the generated code of one step, and a tensor that must notice it: (network, comment of
# the step's case, pattern, replacement, tensor).
FAULTS = {
    "the skip connection's gradient is lost": (
        "resnet8",
        "backward_input layer1.0.conv1",
        r"fast_conv2d_backward\((\(arena \+ \d+\)),",
        r"memset(\1, 0, n * 384 * sizeof(float)); \g<0>",
        "d(stem.2)",
    ),
    "the residual's gradient is lost": (
        "resnet8",
        "pass layer1.0.add",
        r"memcpy\(.*\);",
        "",
        "d(layer1.0.norm2)",
    ),
    "an exit's gradient reaches the trunk in full": (
        "resnet8",
        "backward exits.stem",
        r"pass->exit_weight",
        "1.0f",
        "d(stem.2)",
    ),
    "a gradient is not cleared first": (
        "resnet8",
        "backward_input layer1.0.conv2",
        r"memset\(.*\);",
        "",
        "d(layer1.0.relu1)",
    ),
    "a norm reads its neighbour's weight": (
        "resnet8",
        "forward layer2.0.norm1",
        r"weights \+ (\d+)",
        r"weights + 1 + \1",
        "layer2.0.norm1",
    ),
    "the loss is not divided by the batch": (
        "resnet8",
        "loss_backward layer2",
        r"pass->inverse_batch",
        "1.0f",
        "gradient of exits.layer2.linear.bias",
    ),
    "the server's gradient is not weighted": (
        "resnet8",
        "weigh layer2.0.relu2",
        r"pass->server_weight",
        "1.0f",
        "d(layer2.0.relu2)",
    ),
    "a norm takes the running statistics while it learns": (
        "resnet8-batch",
        "forward stem.1",
        r"pass->learns \? ",
        "0 ? ",
        "stem.1",
    ),
    "a norm's statistics do not move with its input": (
        "resnet8-batch",
        "backward stem.1",
        "batch_norm_backward",
        "batch_norm_frozen_backward",
        "d(stem.0)",
    ),
    "a frozen norm's statistics move with its input": (
        "vgg-frozen",
        "backward 4",
        "batch_norm_frozen_backward",
        "batch_norm_backward",
        "d(3)",
    ),
    "a norm's running statistics do not follow": (
        "vgg-frozen",
        "follow 1",
        r"batch_norm_follow\(.*\);",
        "",
        "updated 1.running_mean",
    ),
    "a group's gradient goes to its neighbour": (
        "vgg-frozen",
        "backward_weight 3",
        r"\) \+ (\d+)",
        r") + 9 + \1",
        "gradient of 3.weight",
    ),
    "what is above six passes a gradient": (
        "mobilenet",
        "backward features.1.conv.0.2",
        "relu6_backward",
        "relu_backward",
        "d(features.1.conv.0.1)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault: str, folder: Path) -> None:
    kind, comment, pattern, replacement, tensor = FAULTS[fault]
    the_case, settings = case(kind), settings_of("both")
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
