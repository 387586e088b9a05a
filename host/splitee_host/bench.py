"""Measuring: what the kernels cost on a board, in instructions."""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from splitee.errors import SpliteeError, Timeout
from splitee_host import boards
from splitee_host.boards import Board

PARTS = ("forward", "dweight", "dinput", "update", "step", "step_without_dinput")
REPEATS = 8  # as in firmware/bench/kernels.c
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
    if board.qemu is None:
        raise SpliteeError(f"{board.name} cannot count instructions: take a qemu board")
    folder.mkdir(parents=True, exist_ok=True)
    program = boards.firmware_root() / "bench" / "kernels.c"
    shutil.copyfile(program, folder / "segment.c")
    sources = " ".join(
        str(p.relative_to(boards.firmware_root()))
        for p in sorted(boards.firmware_root().glob("kernels/**/*.c"))
    )
    # the emulator has more memory than the part that the board stands for
    roomy = replace(board, ram_bytes=MEMORY, flash_bytes=MEMORY)
    firmware = boards.build(roomy, folder, folder, overrides={"PROGRAM": sources})
    lines = _run(roomy, firmware)
    rows = []
    for line in lines:
        kernel, shape, macs, scratch, *micros = line.split()
        counts = [round(int(m) * 1000 / (1 << SHIFT) / REPEATS) for m in micros]
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


def _run(board: Board, firmware: boards.Firmware) -> list[str]:
    deadline = time.monotonic() + PATIENCE
    text = b""
    with boards.start(board, firmware, ["-icount", f"shift={SHIFT}"]) as running:
        while not text.endswith(b"end\n"):
            if time.monotonic() > deadline:
                raise Timeout(f"{board.name}: the kernels did not end within {PATIENCE:g} s")
            text += running.link.read(1.0)
    return text.decode().splitlines()[:-1]


def compiler(board: Board) -> str:
    """The compiler's version: figures of one are not those of another."""
    command = [f"{board.prefix}gcc", "-dumpfullversion"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return f"{board.prefix}gcc {said}"
