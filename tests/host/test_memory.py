"""The memory of a device: what its ELF file and the plan say, and where its shard lies."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from splitee.client import Place, State
from splitee.data import Images, draw_order
from splitee.errors import FitError
from splitee.place import SHARD_GAP, Build, Memory
from splitee_exporters.c import to_c
from splitee_host import boards
from splitee_host.boards import Board, Firmware
from splitee_host.device import Device, records
from splitee_host.memory import Usage
from splitee_host.screen import memory_table
from splitee_host.wire import messages as m
from step_harness import SETTINGS, Case, case, local

BOARDS = boards.load_boards()
M4 = BOARDS["qemu-m4"]
# The machine that qemu-m4 is cut down from has PSRAM; the part that it stands for has none.
M4_PSRAM = replace(M4, shard_start=0x2100_0000, shard_bytes=16 << 20)
APART = [M4_PSRAM, BOARDS["qemu-rv32f"]]  # for each port that has a linker script
CASE = case("resnet8")


def need_for(board: Board) -> None:
    for tool in ("make", f"{board.prefix}gcc", *([board.qemu.program] if board.qemu else [])):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def name(board: Board) -> str:
    return board.name


def built(board: Board, build: Build, folder: Path) -> Firmware:
    need_for(board)
    folder.mkdir(exist_ok=True)
    (folder / "segment.c").write_text(to_c(build))
    return boards.build(board, folder, folder, overrides={"OPTIMIZE": "-O1"})  # is built sooner


def symbols(board: Board, firmware: Firmware) -> dict[str, tuple[int, int]]:
    """Address and size of every variable, as binutils tells them."""
    table = subprocess.check_output([f"{board.prefix}nm", "-S", firmware.elf], text=True)
    found = re.findall(r"^(\w+) (\w+) [bBdD] (\w+)$", table, re.MULTILINE)
    return {symbol: (int(address, 16), int(size, 16)) for address, size, symbol in found}


# ---- measured ----


@pytest.mark.parametrize("board", [BOARDS["posix"], M4, *APART], ids=["posix", "m4", "psram", "p4"])
def test_the_parts_of_a_firmware_are_those_that_binutils_counts(
    board: Board, tmp_path: Path
) -> None:
    firmware = built(board, CASE.build, tmp_path)
    variables, memory = symbols(board, firmware), firmware.memory
    for part in ("arena", "weights", "labels"):
        assert getattr(memory, part) == variables[part][1]
    assert memory.shard == variables["shard"][1] + variables["order"][1]
    assert memory.stack == (0 if board.port == "posix" else board.stack_bytes)
    size = subprocess.check_output([f"{board.prefix}size", firmware.elf], text=True).split()
    data, bss = map(int, size[7:9])
    apart = firmware.sections.get(".shard", 0)
    assert memory.ram == data + bss - apart
    # its order or its records may begin behind a gap
    assert apart == 0 or 0 <= apart - memory.shard <= SHARD_GAP
    assert memory.apart == (board in APART)


def test_a_larger_capacity_is_measured_where_it_is_planned(tmp_path: Path) -> None:
    small, large = (
        built(M4, case("resnet8", capacity=c).build, tmp_path / str(c)).memory for c in (2, 3)
    )
    changed = {k for k, v in vars(small).items() if v != vars(large)[k]}
    assert changed - {"static"} == {"arena", "labels"}  # static has the gaps between arrays
    assert abs(large.static - small.static) < 16


# ---- the shard's memory ----


def many(case: Case, samples: int) -> Build:
    """The case's build with room for more samples."""
    return replace(case.build, samples_max=samples)


@pytest.mark.parametrize("board", APART, ids=name)
def test_a_shard_larger_than_ram_trains_from_a_memory_of_its_own(
    board: Board, tmp_path: Path
) -> None:
    samples = board.ram_bytes // CASE.build.record_size + 1
    build = many(CASE, samples)
    firmware = built(board, build, tmp_path)
    end = board.shard_start + board.shard_bytes
    for part in ("shard", "order"):
        address, size = symbols(board, firmware)[part]
        assert board.shard_start <= address < address + size <= end
    # samples from all over it: those that the data order begins with; the others are not sent
    first = draw_order(samples, 5, 0)[:8]
    assert first.max() - first.min() > samples / 2
    images = Images(
        np.zeros((samples, *CASE.images.x.shape[1:]), np.uint8), np.zeros(samples, np.uint8)
    )
    images.x[first], images.y[first] = CASE.images.x[:8], CASE.images.y[:8]
    state = State(CASE.state.weights, {}, Place(samples, seed=5))
    reference = local(replace(CASE, build=build, images=images, state=state), SETTINGS)
    with boards.start(board, firmware) as running:
        device = Device("it", running.link, build, SETTINGS)
        assert device.hello().samples_max == samples
        for i, place in enumerate(first):
            content = records(CASE.images[i : i + 1])
            device.write(m.Region.SHARD, content, int(place) * build.record_size)
        device.settings = SETTINGS
        device.load_state(state)
        assert device.forward(8, 8).labels.tolist() == CASE.images.y[:8].tolist()
        device.backward(None)
        mine = device.step()
    reference.forward(8, 8)
    reference.backward(None)
    theirs = reference.step()
    assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert mine.correct == theirs.correct


@pytest.mark.parametrize("board", APART, ids=name)
def test_without_that_memory_the_same_shard_does_not_fit(board: Board, tmp_path: Path) -> None:
    build = many(CASE, board.ram_bytes // CASE.build.record_size + 1)
    inside = replace(board, shard_start=0, shard_bytes=0)
    room = inside.for_assembly.room
    assert room is not None
    fitting = build.samples_that_fit(room)
    shortage = build.shortage(room)
    assert shortage is not None
    assert shortage.endswith(f" (of its {build.samples_max:,} samples {fitting:,} fit)")
    with pytest.raises(FitError, match=f"does not fit {board.name}.* bytes more RAM than the "):
        built(inside, build, tmp_path / "all")
    built(inside, many(CASE, fitting), tmp_path / "fitting")


@pytest.mark.parametrize("samples", [24, 25])
def test_a_shard_that_fills_its_memory_fits_and_one_sample_more_does_not(
    samples: int, tmp_path: Path
) -> None:
    build = many(CASE, samples)
    exact = replace(M4_PSRAM, shard_bytes=build.shard_bytes + SHARD_GAP)
    room = exact.for_assembly.room
    assert room is not None
    assert build.samples_that_fit(room) == samples
    built(exact, build, tmp_path)
    more = many(CASE, samples + 1)
    shortage = more.shortage(room)
    assert shortage is not None
    assert re.match(r"needs .* of memory for its shard, 0\.1 KB more than the ", shortage)
    there = f"{exact.shard_bytes:,}"
    with pytest.raises(FitError, match=rf" 6\d bytes more memory for its shard than the {there} "):
        built(exact, more, tmp_path)


# ---- shown ----

PARTS = Memory(arena=50_000, weights=4_000, labels=8, shard=6_000, static=3_500, stack=4_096)


@pytest.mark.parametrize(
    ("usage", "line"),
    [
        (
            Usage("a", "qemu-m4", PARTS, 262_144, stack_used=800),
            "a qemu-m4 3,508 4,000 50,000 800 of 4,096 6,000 67,604 of 262,144",
        ),
        (
            Usage("a", "qemu-rv32f", replace(PARTS, apart=True), 786_432, 1 << 25),
            "a qemu-rv32f 3,508 4,000 50,000 ? of 4,096 apart: 6,000 61,604 of 786,432",
        ),
        (
            Usage("a", "posix", replace(PARTS, stack=0), 0),
            "a posix 3,508 4,000 50,000 - 6,000 63,508",
        ),
    ],
    ids=["in RAM", "apart", "without stack and limit"],
)
def test_a_client_takes_a_line_of_a_terminal_of_100_columns(usage: Usage, line: str) -> None:
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(memory_table([usage]))
    lines = capture.get().splitlines()
    assert len(lines) == 3  # two of them are the head
    assert " ".join(lines[2].split()) == line


def test_all_parts_are_there_for_programs_too() -> None:
    usage = Usage("a", "qemu-rv32f", replace(PARTS, apart=True), 786_432, 1 << 25, 800)
    assert usage.figures() == {
        "arena_bytes": 50_000,
        "weights_bytes": 4_000,
        "labels_bytes": 8,
        "shard_bytes": 6_000,
        "static_bytes": 3_500,
        "stack_bytes": 4_096,
        "stack_used_bytes": 800,
        "shard_apart": True,
        "ram_bytes": 61_604,
        "board_ram_bytes": 786_432,
        "board_shard_bytes": 1 << 25,
    }
