"""A device compared with PyTorch: agreement, a planted difference, and what the user sees."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from host_harness import splitee
from splitee_host import boards
from splitee_host.verify import Difference, compare, names
from step_harness import SETTINGS, case, device

CASE = case("resnet8")
PLACE = CASE.state.place


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verify")


def compared(folder: Path, *, planted: str = "", by: float = 0.0) -> list[Difference]:
    """The case on posix against torch, with a difference planted in one of torch's weights."""
    segment = copy.deepcopy(CASE.segment)
    with torch.no_grad():
        for name, tensor in segment.tensors().items():
            if name == planted:
                tensor.view(-1)[0] += by
    with device(CASE, "posix", folder, SETTINGS) as running:
        return compare(running, segment, CASE.images, SETTINGS, 5, PLACE.seed)


def test_every_tensor_agrees_the_worst_first(folder: Path) -> None:
    found = compared(folder)
    assert {d.tensor for d in found} == set(names(CASE.build.graph, momentum=True))
    assert [d.error for d in found] == sorted((d.error for d in found), reverse=True)
    assert all(d.good for d in found)


def test_a_different_weight_is_seen_from_its_layer_on(folder: Path) -> None:
    found = {d.tensor: d for d in compared(folder, planted="layer1.0.norm2.weight", by=0.01)}
    assert found["layer1.0.conv2"].good
    assert not found["layer1.0.norm2"].good
    assert not found["updated layer1.0.norm2.weight"].good
    assert not found["gradient of stem.0.weight"].good


def test_a_clip_is_compared_too(folder: Path) -> None:
    clipped = replace(SETTINGS, clip=0.05)
    for told, good in ((clipped, True), (SETTINGS, False)):
        with device(CASE, "posix", folder, clipped) as running:
            found = compare(running, CASE.segment, CASE.images, told, 5, PLACE.seed)
        assert all(d.good for d in found) == good


def test_nan_is_the_worst_of_all(folder: Path) -> None:
    found = compared(folder, planted="exits.layer2.linear.bias", by=math.nan)
    assert math.isnan(found[0].error)
    assert not found[0].good
    assert replace(found[0], error=0.0).good


def test_the_command_shows_the_worst_tensors() -> None:
    said = splitee("verify", "--board", "posix", "--width", "2", "--rows", "2")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0] == "resnet8 of width 2 up to layer3 on posix, the worst first"
    assert len(lines) == 5 + 3
    count, whole = lines[4].split(" tensors")[0].split(" of ")
    assert count == whole
    assert lines[4].endswith("within 1e-05 of PyTorch")
    assert lines[-1].split()[:2] == ["verify", "posix"]


def test_the_command_says_what_memory_a_firmware_takes_that_was_built_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("verify", "--board", "posix", "--width", "2", "--cut", "stem", "--json")
    started = json.loads(splitee(*words).out)["memory"]
    assert started["arena_bytes"] > 0
    assert started["stack_used_bytes"] is None
    (elf,) = Path("build").glob("firmware/*/device.elf")
    posix = boards.load_boards()["posix"]
    with boards.start(posix, boards.read_elf(elf)) as running:
        attached = [json.loads(splitee(*words, "--port", running.link.name).out)["memory"]]
        elf.unlink()
        attached += [json.loads(splitee(*words, "--port", running.link.name).out)["memory"]]
    assert attached == [started, None]


def test_the_command_clips_and_distils_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def noting(*arguments: Any) -> list[Difference]:
        given.append(arguments[3])
        return compare(*arguments)

    monkeypatch.setattr("splitee_host.verify.compare", noting)
    words = ("verify", "--board", "posix", "--width", "2", "--json")
    for clip, distill in (("0.01", "0"), ("0", "0.5")):
        said = splitee(*words, "--clip", clip, "--distill", distill)
        assert (said.code, said.err) == (0, "")
        assert all(t["good"] for t in json.loads(said.out)["tensors"])
    assert [(s.clip, s.distill) for s in given] == [(0.01, 0.0), (0.0, 0.5)]


def test_the_command_fails_beyond_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitee_host.verify.TOLERANCE", 1e-12)
    said = splitee("verify", "--board", "posix", "--width", "2", "--cut", "stem", "--json")
    assert said.code == 1
    tensors = json.loads(said.out)["tensors"]
    assert not tensors[0]["good"]


def test_a_board_without_firmware_is_refused() -> None:
    said = splitee("verify", "--board", "torch")
    assert said.code == 1
    assert "torch runs no firmware" in said.err
