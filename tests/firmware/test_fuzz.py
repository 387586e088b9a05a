"""Fuzzing the firmware: the decoder of frames, and the device behind it, under sanitizers.

The tests run the inputs that are known. With FUZZ_SECONDS set, as `make fuzz` does, each target
looks for new ones for that long; an input that is a finding lies under build/fuzz/ then.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fuzz_harness import FOUND, TARGETS, build, corpus, fill, fuzz
from splitee.errors import MissingTool
from step_harness import planted

SECONDS = int(os.environ.get("FUZZ_SECONDS", "0"))


def program(name: str, root: Path | None = None) -> Path:
    try:
        return build(name, root)
    except MissingTool as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("name", TARGETS)
def test_fuzzing_finds_nothing(name: str, tmp_path: Path) -> None:
    known = fill(tmp_path / "known", corpus(name))
    outcome = fuzz(program(name), [known], FOUND / name / "findings", "-runs=0")
    assert not outcome.finding, outcome.finding
    assert outcome.inputs >= len(corpus(name))
    if SECONDS:
        new = fill(FOUND / name / "found", [])
        limits = (f"-max_total_time={SECONDS}", f"-max_len={TARGETS[name].longest}")
        outcome = fuzz(program(name), [new, known], FOUND / name / "findings", *limits)
        assert not outcome.finding, outcome.finding
        sys.stdout.write(f"{name}: {outcome.inputs:,} inputs in {SECONDS} s, and no finding\n")


FAULTS = {
    "a frame longer than the memory": (
        "frame",
        "protocol/frame.c",
        "reader->length == reader->capacity",
        "reader->length > reader->capacity",
    ),
    "a block that is not whole": (
        "frame",
        "protocol/frame.c",
        "!reader->broken && reader->block == 0",
        "!reader->broken",
    ),
    "no checksum": (
        "frame",
        "protocol/seal.c",
        "return bytes_get_u32(a) == bytes_get_u32(b);",
        "return a != NULL && b != NULL;",
    ),
    "a read behind the end": (
        "device",
        "core/device.c",
        "length > found->size - offset",
        "length > found->size - offset + 1024",
    ),
    "more samples than there is room for": (
        "device",
        "core/device.c",
        "m.count == 0 || m.count > segment.capacity || m.count > m.batch",
        "m.count == 0 || m.count > m.batch",
    ),
    "a label that is none": (
        "device",
        "core/device.c",
        "record[0] >= segment.classes",
        "record[0] == 255",
    ),
    "a late request": ("device", "core/session.c", "ahead > 1", "ahead > 0x8000"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize(("name", "file", "old", "new"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_noticed(
    name: str, file: str, old: str, new: str, folder: Path, tmp_path: Path
) -> None:
    with planted(folder, file, old, new):
        faulty = program(name, folder)
    known = fill(tmp_path / "known", corpus(name))
    assert fuzz(faulty, [known], tmp_path / "findings", "-runs=0").finding
