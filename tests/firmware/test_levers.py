"""Firmware with levers, held to PyTorch: memory saved changes no result by more than it says."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from splitee.client import Settings
from splitee.data import draw_order
from splitee.errors import DeviceRefused, MissingTool, NotFinite
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
from splitee_host.wire import messages as m
from step_harness import SETTINGS, Case, case, device

COUNT = 5  # samples in the step: less than the capacity, and odd
MIXED = replace(SETTINGS, exit_weight=0.3, server_weight=0.7)
LOCAL = replace(SETTINGS, exit_weight=1.0, server_weight=0.0)

EXACT = {
    "relu_bits": Levers(relu_bits=True),
    "recompute": Levers(recompute=1.0),
    "both": Levers(relu_bits=True, recompute=1.0),
    "local_only": Levers(local_only=True),
    "all that are exact": Levers(relu_bits=True, recompute=1.0, local_only=True),
}
LEVERS = EXACT | {
    "float16": Levers(float16=True),
    "everything": Levers(relu_bits=True, float16=True, recompute=0.25, local_only=True),
}
FURTHER = ("resnet8-batch", "vgg-frozen", "mobilenet")
TOGETHER = ("all that are exact", "everything")
RUNS = [
    *(("resnet8", levers, "posix") for levers in LEVERS),
    *((kind, levers, "posix") for kind in FURTHER for levers in TOGETHER),
    *(("resnet8", levers, "qemu-m4") for levers in TOGETHER),
    ("resnet8", "everything", "qemu-m55"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("levers")


def settings_of(levers: Levers) -> Settings:
    return LOCAL if levers.local_only else MIXED


def sent_to(the_case: Case, settings: Settings) -> torch.Tensor | None:
    """The server's gradient, where there is one."""
    shape = the_case.build.graph.shapes[the_case.build.graph.cut]
    random = torch.Generator().manual_seed(1)
    sent = torch.randn(COUNT, *shape, generator=random) / COUNT / 10
    return sent if settings.wants_gradient else None


def in_torch(the_case: Case, settings: Settings) -> dict[str, Array]:
    """The step of the first COUNT samples of the case's data order."""
    place = the_case.state.place
    part = the_case.images[draw_order(place.samples, place.seed, 0)[:COUNT]]
    sent = sent_to(the_case, settings)
    return step_in_torch(the_case.segment, the_case.build, part, settings, sent)


@cache
def both_sides(
    kind: str, levers: str, board: str, folder: Path
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The tensors of one step: the board's and PyTorch's."""
    the_case = case(kind, levers=LEVERS[levers])
    settings = settings_of(LEVERS[levers])
    where = folder / f"{kind}-{board}-{levers.replace(' ', '-')}"
    try:
        with device(the_case, board, where, settings) as running:
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
def test_a_step_with_levers_equals_pytorch(
    kind: str, levers: str, board: str, name: str, folder: Path
) -> None:
    mine, reference = both_sides(kind, levers, board, folder)
    tolerance = TOLERANCE if levers in EXACT else TOLERANCE_FLOAT16
    assert relative_error(mine, reference, name) <= tolerance


def test_float16_is_used_and_is_noticed(folder: Path) -> None:
    mine, reference = both_sides("resnet8", "float16", "posix", folder)
    gradients = [name for name in mine if name.startswith("gradient of ")]
    assert max(relative_error(mine, reference, name) for name in gradients) > TOLERANCE


# A fault in the generated code of one step, and a tensor that must notice it: (network, levers,
# comment of the step's case and how often it comes before that, pattern, replacement, tensor).
FAULTS = {
    "the bits of another relu": (
        "resnet8", "relu_bits", "backward layer1.0.relu1", 0,
        r"\(const uint8_t \*\)\(arena \+ (\d+)\)", r"(const uint8_t *)(arena + 8 + \1)",
        "d(layer1.0.norm1)",
    ),
    "a tensor is made again of another's weights": (
        "resnet8", "recompute", "forward stem.1", 1, r"weights \+ (\d+)", r"weights + 1 + \1",
        "gradient of layer1.0.conv1.weight",
    ),
    "a sample is not unpacked": (
        "resnet8", "float16", "unpack layer1.0.relu1", 0, r", n \* ", ", (n - 1) * ",
        "gradient of layer1.0.conv2.weight",
    ),
    "a gradient that is made again is not weighted again": (
        "resnet8", "local_only", "backward exits.layer1", 0, r"gradient_weigh\(.*\);", "",
        "d(layer1.0.relu2)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault: str, folder: Path) -> None:
    kind, levers, comment, before, pattern, replacement, tensor = FAULTS[fault]
    the_case = case(kind, levers=LEVERS[levers])
    settings = replace(settings_of(LEVERS[levers]), exit_weight=0.3)
    pieces = re.split(rf"(?m)^(    case \d+: // {re.escape(comment)}$)", to_c(the_case.build))
    assert len(pieces) > 2 * (before + 1), comment
    statements, end, after = pieces[2 * (before + 1)].partition("break;")
    changed, count = re.subn(pattern, replacement, statements, count=1)
    assert count == 1, statements
    pieces[2 * (before + 1)] = changed + end + after
    source = "".join(pieces)
    with device(the_case, "posix", folder / "fault", settings, source=source) as running:
        mine = step_on_device(running, COUNT, sent_to(the_case, settings))
    tolerance = TOLERANCE if levers in EXACT else TOLERANCE_FLOAT16
    assert relative_error(mine, in_torch(the_case, settings), tensor) > tolerance


# ---- the update behind each layer's gradient ----

PLAIN = replace(MIXED, momentum=0.0)
FUSED = {
    "fused": Levers(fused_update=True),
    "fused and exact": Levers(fused_update=True, relu_bits=True, recompute=1.0),
}


def fused(kind: str, levers: str = "fused") -> Case:
    return case(kind, levers=FUSED[levers], momentum=False)


@pytest.mark.parametrize(
    ("kind", "levers", "board"),
    [
        ("resnet8", "fused", "posix"),
        ("resnet8", "fused and exact", "qemu-m4"),
        *((kind, "fused and exact", "posix") for kind in FURTHER),
    ],
)
def test_a_fused_update_learns_the_same(kind: str, levers: str, board: str, folder: Path) -> None:
    the_case = fused(kind, levers)
    where = folder / f"{kind}-{board}-{levers.replace(' ', '-')}"
    try:
        with device(the_case, board, where, PLAIN) as running:
            running.forward(COUNT, COUNT)
            running.backward(sent_to(the_case, PLAIN))
            running.step()
            mine = {f"updated {n}": w for n, w in running.state().weights.items()}
    except MissingTool as missing:
        pytest.skip(str(missing))
    reference = in_torch(the_case, PLAIN)
    errors = {name: relative_error(mine, reference, name) for name in mine}
    assert not {name: e for name, e in errors.items() if e > TOLERANCE}


def test_a_fused_update_needs_no_memory_for_all_gradients() -> None:
    sizes = case("resnet8", momentum=False).build.schedule.sizes
    own = fused("resnet8").build.schedule
    assert "gradients" not in own.lasting
    assert max(s for n, s in own.sizes.items() if n.endswith(":gradients")) < sizes["gradients"]
    assert fused("resnet8").build.arena_bytes < case("resnet8", momentum=False).build.arena_bytes


def test_a_fused_update_refuses_what_it_cannot_do(folder: Path) -> None:
    with device(fused("resnet8"), "posix", folder / "refuses", PLAIN) as running:
        with pytest.raises(DeviceRefused, match="a batch is one part of at most 8 samples"):
            running.forward(5, 12)
        with pytest.raises(DeviceRefused, match="it cannot clip"):
            running.settings = replace(PLAIN, clip=1.0)
        with pytest.raises(DeviceRefused, match="built without momentum"):
            running.settings = replace(PLAIN, momentum=0.9)


def test_a_segment_without_room_for_the_servers_gradient_refuses_it(folder: Path) -> None:
    the_case = case("resnet8", levers=EXACT["local_only"])
    with device(the_case, "posix", folder / "local", LOCAL) as running:
        with pytest.raises(DeviceRefused, match="no room for the server's gradient"):
            running.settings = MIXED
        with pytest.raises(DeviceRefused, match="the most it takes there is 0 bytes"):
            running.write(m.Region.GRADIENT, b"\0" * 4)


@pytest.mark.parametrize("tensor", ["stem.0.weight", "layer2.0.norm1.bias"])
def test_a_fused_update_of_what_is_not_finite_is_taken_back(tensor: str, folder: Path) -> None:
    the_case = fused("resnet8")
    with device(the_case, "posix", folder / "nan", PLAIN) as running:
        good = running.state()
        spoilt = {n: w.copy() for n, w in good.weights.items()}
        spoilt[tensor].flat[0] = np.inf
        vector = running.graph.flatten(spoilt)
        running.write(m.Region.WEIGHTS, vector.astype("<f4").tobytes())
        running.forward(COUNT, COUNT)
        running.backward(sent_to(the_case, PLAIN))
        with pytest.raises(NotFinite, match="where the round began again"):
            running.step()
        after = running.state()
        assert after.place == good.place
        for name, weights in good.weights.items():
            np.testing.assert_array_equal(after.weights[name], weights)
        running.forward(COUNT, COUNT)  # and it can learn
        running.backward(sent_to(the_case, PLAIN))
        running.step()
        mine = {f"updated {n}": w for n, w in running.state().weights.items()}
    reference = in_torch(the_case, PLAIN)
    assert max(relative_error(mine, reference, name) for name in mine) <= TOLERANCE
