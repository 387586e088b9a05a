"""Measuring: what the kernels, and the hashes of frames, cost on a board, in instructions."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from splitee.errors import SpliteeError, Timeout
from splitee_host import boards
from splitee_host.boards import Board
from splitee_host.memory import Elf

PARTS = ("forward", "dweight", "dinput", "update", "step", "step_without_dinput")
REPEATS = 8  # as in firmware/bench/kernels.c, int8.c and hash.c
MEMORY = 1 << 19  # bytes of RAM, and of flash
PATIENCE = 300.0  # seconds for the whole program

# QEMU's -icount shift: nanoseconds of virtual time that an instruction takes, as a power of two.
# The port's clock counts microseconds of that time.
SHIFT = 6


def kernels(board: Board, folder: Path) -> list[dict[str, Any]]:
    """Instructions of every kernel and shape of firmware/bench/kernels.c, a row each.

    The program is built in folder and runs in QEMU with one instruction a fixed time; waits are
    not in what is counted. Raises SpliteeError for a board that cannot count.
    """
    root = boards.firmware_root()
    sources = [str(p.relative_to(root)) for p in sorted(root.glob("kernels/**/*.c"))]
    lines = _measure(board, folder, "kernels.c", sources)
    rows = []
    for line in lines:
        kernel, shape, macs, scratch, *micros = line.split()
        counts = [_instructions(m) for m in micros]
        rows.append(
            {
                "board": board.name,
                "kernel": kernel,
                "shape": shape,
                "macs": int(macs),
                "scratch_bytes": int(scratch),
                "compiler": compiler(board),
                "instructions": dict(zip(PARTS, counts, strict=True)),
            }
        )
    return rows


def int8_kernels(board: Board, folder: Path) -> list[dict[str, Any]]:
    """Instructions of every kernel and shape of firmware/bench/int8.c, a row each.

    Built and run as those of training are. Raises SpliteeError for a board that cannot count.
    """
    root = boards.firmware_root()
    sources = [str(p.relative_to(root)) for p in sorted(root.glob("kernels/**/*int8*.c"))]
    rows = []
    for line in _measure(board, folder, "int8.c", sources):
        kernel, shape, macs, scratch, micros = line.split()
        rows.append(
            {
                "board": board.name,
                "kernel": kernel,
                "shape": shape,
                "macs": int(macs),
                "scratch_bytes": int(scratch),
                "compiler": compiler(board),
                "instructions": _instructions(micros),
            }
        )
    return rows


def hashes(board: Board, folder: Path) -> list[dict[str, Any]]:
    """Instructions of checking messages of several sizes, and the flash that it takes, a row each.

    Raises SpliteeError for a board that cannot count.
    """
    sources = {"crc32": "protocol/seal.c", "blake2s": "protocol/blake2s.c"}
    lines = _measure(board, folder, "hash.c", [*sources.values()])
    rows = []
    for line in lines:
        name, size, micros = line.split()
        compiled = Elf((folder / sources[name]).with_suffix(".o"))
        rows.append(
            {
                "board": board.name,
                "hash": name,
                "bytes": int(size),
                "compiler": compiler(board),
                "flash_bytes": sum(s.size for s in compiled.sections if s.flashed),
                "instructions": _instructions(micros),
            }
        )
    return rows


def _instructions(micros: str) -> int:
    """What was executed in one of the repetitions that took so long."""
    return round(int(micros) * 1000 / (1 << SHIFT) / REPEATS)


def _measure(board: Board, folder: Path, program: str, sources: Sequence[str]) -> list[str]:
    """What a program of firmware/bench writes, built with these files of the firmware."""
    if board.qemu is None:
        raise SpliteeError(f"{board.name} cannot count instructions: take a qemu board")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(boards.firmware_root() / "bench" / program, folder / "segment.c")
    # the emulator has more memory than the part that the board stands for
    roomy = replace(board, ram_bytes=MEMORY, flash_bytes=MEMORY)
    firmware = boards.build(roomy, folder, folder, overrides={"PROGRAM": " ".join(sources)})
    return _run(roomy, firmware)


def _run(board: Board, firmware: boards.Firmware) -> list[str]:
    deadline = time.monotonic() + PATIENCE
    text = b""
    with boards.start(board, firmware, ["-icount", f"shift={SHIFT}"]) as running:
        while not text.endswith(b"end\n"):
            if time.monotonic() > deadline:
                raise Timeout(f"{board.name}: the program did not end within {PATIENCE:g} s")
            text += running.link.read(1.0)
    return text.decode().splitlines()[:-1]


def compiler(board: Board) -> str:
    """The compiler's version: figures of one are not those of another."""
    command = [f"{board.prefix}gcc", "-dumpfullversion"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return f"{board.prefix}gcc {said}"
