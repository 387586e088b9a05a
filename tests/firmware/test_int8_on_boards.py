"""The kernels in 8 bits answer what LiteRT's reference kernels answer, on every board.

What multiplies several bytes at once there (Cortex-M4, M7, M33; the vectors of M55) a test on this
machine cannot see. ``int8_check.c`` is the program; its cases and their answers are compiled in.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

from firmware.int8_cases import CASES, case
from firmware.int8_firmware import cases_h
from splitee.errors import MissingTool
from splitee_host import boards
from splitee_host.boards import Board

PROGRAM = Path(__file__).parent / "int8_check.c"
EMULATED = ("qemu-m3", "qemu-m4", "qemu-m7", "qemu-m33", "qemu-m55", "qemu-rv32", "qemu-rv32f")
# the emulators have more memory than the parts that the boards stand for
BOARDS = {
    name: replace(boards.load_boards()[name], ram_bytes=1 << 19, flash_bytes=1 << 20)
    for name in EMULATED
} | {"posix": boards.load_boards()["posix"]}
PATIENCE = 60.0  # seconds without a word; no test waits that long when all is well


@cache
def cases(begin: str) -> str:
    """cases.h of those whose names begin so."""
    return cases_h({name: case(name) for name in CASES if name.startswith(begin)})


Build = Callable[..., boards.Firmware]


@pytest.fixture
def check(tmp_path: Path) -> Build:
    """Builds the program with some cases and the kernels of the firmware's tree."""

    def check(board: Board, optimize: str = "-O3", begin: str = "") -> boards.Firmware:
        root = boards.firmware_root()
        sources = root.glob("kernels/**/*int8*.c")
        shutil.copy(PROGRAM, tmp_path / "segment.c")
        (tmp_path / "cases.h").write_text(cases(begin))
        overrides = {
            "PROGRAM": " ".join(str(path.relative_to(root)) for path in sources),
            "OPTIMIZE": optimize,
        }
        try:
            return boards.build(
                board, tmp_path, tmp_path, sanitize=board.name == "posix", overrides=overrides
            )
        except MissingTool as missing:
            pytest.skip(str(missing))

    return check


def run(board: Board, firmware: boards.Firmware) -> list[str]:
    """The lines that the program writes, up to its last one."""
    text = b""
    with boards.start(board, firmware) as running:
        running.link.write(b"!")
        while not text.endswith(b"end\n"):
            chunk = running.link.read(PATIENCE)
            assert chunk, f"nothing came any more after: {text.decode()}"
            text += chunk
    return text.decode().splitlines()[:-1]


LEVELS = [(name, "-O3") for name in BOARDS] + [("qemu-m4", "-Os"), ("qemu-m55", "-Os")]


@pytest.mark.parametrize(("board", "optimize"), LEVELS, ids=map("".join, LEVELS))
def test_every_case_is_answered_as_by_litert(check: Build, board: str, optimize: str) -> None:
    assert run(BOARDS[board], check(BOARDS[board], optimize)) == [f"cases {len(CASES)}"]


# Ends of the PSRAM of one and of the DTCM of the other: behind them QEMU has nothing.
EDGES = {"qemu-m7": 0x6100_0000, "qemu-m55": 0x2008_0000}


@pytest.mark.parametrize("argument", [0, 1], ids=["inputs", "weights"])
@pytest.mark.parametrize("name", EDGES)
def test_nothing_is_read_behind_an_array(check: Build, name: str, argument: int) -> None:
    flags = (*BOARDS[name].cflags, f"-DEDGE={EDGES[name]:#x}u", f"-DAT_EDGE={argument}")
    board = replace(BOARDS[name], cflags=flags)
    assert run(board, check(board)) == [f"cases {len(CASES)}"]


# ---- the tests themselves ----


@dataclass(frozen=True)
class Fault:
    """One change of the kernels' text, and how the name of a case begins that has to notice it."""

    board: str
    file: str
    old: str
    new: str
    noticed: str


FAULTS = {
    "halves below 0": Fault(
        "qemu-m3", "int8_scale.h", "adds %0, %1, %1, asr #31", "adds %0, %1, #0", "conv2d 3 to 16"
    ),
    "one rounding less": Fault(
        "qemu-m3", "int8_scale.h", "add %0, %0, %1, lsr #31", "", "conv2d 3 to 16"
    ),
    "a pair of bytes": Fault(
        "qemu-m4",
        "fast/dsp_int8_rows.c",
        "smlad %[s11], %[o1], %[go], %[s11]",
        "smlad %[s11], %[o0], %[go], %[s11]",
        "conv2d 3 to 16",
    ),
    "bytes that have been there before": Fault(
        "qemu-m4",
        "fast/dsp_int8_rows.c",
        "8 * (4 - size % 4)",
        "8 * (3 - size % 4)",
        "conv2d 17 to 5",
    ),
    "a channel that is not there": Fault(
        "qemu-m4",
        "fast/dsp_int8_rows.c",
        "channel + 1 < m->channels ? channel + 1 : channel",
        "channel + 1",
        "linear 10 to 5",
    ),
    "two channels that change places": Fault(
        "qemu-m4",
        "fast/dsp_int8_taps.c",
        "s2 = __smlatt(x02, g02, s2)",
        "s2 = __smlatt(x13, g13, s2)",
        "depthwise 3x3",
    ),
    "an addend's zero": Fault(
        "qemu-m4",
        "fast/dsp_int8_add.c",
        "zero_b = of_b->zero",
        "zero_b = of_a->zero",
        "add unequal scales",
    ),
    "a rounding of the product": Fault(
        "qemu-m4", "fast/dsp_int8_add.c", "smmulr", "smmul", "add unequal scales"
    ),
    "bytes that have been there before, of a vector": Fault(
        "qemu-m55",
        "fast/mve_int8_quads.c",
        "(int8_t)(32 - size)",
        "(int8_t)(31 - size)",
        "conv2d 3 to 16",
    ),
    "two rows that change places": Fault(
        "qemu-m55", "fast/mve_int8_quads.c", "%[s0], %[s2]", "%[s2], %[s0]", "conv2d 17 to 5"
    ),
    "halves below 0, of four rows": Fault(
        "qemu-m55",
        "fast/mve_int8_quads.c",
        "vshr.s32 q0, %q[s0], #31",
        "vmov.i32 q0, #0",
        "conv2d 3 to 16",
    ),
    "shifts that grow": Fault(
        "qemu-m55",
        "fast/mve_int8_rows.c",
        "return most < 0",
        "return 1",
        "conv2d 3 to 16, factors above 1",
    ),
    "a channel that makes no pair": Fault(
        "qemu-m55",
        "fast/mve_int8_rows.c",
        "m->channels % 2 > 0",
        "m->channels == 0",
        "conv2d 17 to 5",
    ),
    "channels that change places, of a vector": Fault(
        "qemu-m55",
        "fast/mve_int8_taps.c",
        "vmovltq_s16(even)",
        "vmovlbq_s16(even)",
        "depthwise 3x3",
    ),
    "the end of a row, of a vector": Fault(
        "qemu-m55",
        "int8_bytes.h",
        "vctp8q(size)",
        "vctp8q(16)",
        "conv2d 3 to 16",
    ),
    "channels that are not there, of a vector": Fault(
        "qemu-m55",
        "fast/mve_int8_rows.c",
        "vctp32q(m->channels - first)",
        "vctp32q(4)",
        "conv2d 17 to 5",
    ),
    "halves below 0, of a vector": Fault(
        "qemu-m55",
        "fast/mve_int8_scale.h",
        "vandq_s32(high, f.right)",
        "vdupq_n_s32(0)",
        "conv2d 3 to 16",
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_noticed(
    check: Build, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(boards.firmware_root(), tmp_path / "sources"))
    path = root / "kernels" / fault.file
    text = path.read_text()
    assert text.count(fault.old) == 1, "the text to change is not there, or not alone"
    path.write_text(text.replace(fault.old, fault.new))
    monkeypatch.setattr(boards, "firmware_root", lambda: root)
    board = BOARDS[fault.board]
    said = run(board, check(board, begin=fault.noticed))
    assert any(line.startswith(fault.noticed) for line in said)
