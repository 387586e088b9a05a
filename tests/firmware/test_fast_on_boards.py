"""The fast C kernels, held to the plain ones on chosen and random shapes, as they run on Arm cores.

There they load and store by assembly (Cortex-M4) or compute with vectors (Cortex-M55), which a
test on this machine cannot see. ``fast_check.c`` is the program; the plain kernels are held to
PyTorch by the tests beside this one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from splitee_host import boards
from splitee_host.boards import Board

PROGRAM = Path(__file__).parent / "fast_check.c"
# the emulators have more memory than the parts that the boards stand for
BOARDS = {
    name: replace(boards.load_boards()[name], ram_bytes=1 << 19, flash_bytes=1 << 19)
    for name in ("qemu-m4", "qemu-m55")
}
PATIENCE = 120.0  # seconds without a word; no test waits that long when all is well

BuildCheck = Callable[..., boards.Firmware]


@pytest.fixture
def check(tmp_path: Path) -> BuildCheck:
    """Builds a program with the kernels of the firmware's tree, at a level of optimization."""

    def check(board: Board, optimize: str, program: Path = PROGRAM) -> boards.Firmware:
        for tool in (f"{board.prefix}gcc", "qemu-system-arm"):
            if shutil.which(tool) is None:
                pytest.skip(f"{tool} is not installed")
        root = boards.firmware_root()
        sources = " ".join(str(path.relative_to(root)) for path in root.glob("kernels/**/*.c"))
        shutil.copy(program, tmp_path / "segment.c")
        overrides = {"PROGRAM": sources, "OPTIMIZE": optimize}
        return boards.build(board, tmp_path, tmp_path, overrides=overrides)

    return check


def run(board: Board, firmware: boards.Firmware) -> list[str]:
    """The lines that the program writes, up to its last one."""
    text = b""
    with boards.start(board, firmware) as running:
        while not text.endswith(b"end\n"):
            chunk = running.link.read(PATIENCE)
            assert chunk, f"nothing came any more after: {text.decode()}"
            text += chunk
    return text.decode().splitlines()[:-1]


@pytest.mark.parametrize("optimize", ["-O3", "-Os"])
@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_fast_kernels_agree_with_the_plain_ones(
    check: BuildCheck, board: Board, optimize: str
) -> None:
    said = run(board, check(board, optimize))
    assert said == ["chosen windows 32", "random windows 140", "layers 50"]


@dataclass(frozen=True)
class Fault:
    """One change of the kernels' text, and how a line of the report has to begin."""

    board: str
    file: str
    old: str
    new: str
    noticed: str


FAULTS = {
    "too few loaded": Fault(
        "qemu-m4",
        "wide.h",
        'LOAD9(v, p) WIDE_LOAD("{%0-%8}"',
        'LOAD9(v, p) WIDE_LOAD("{%0-%7}"',
        "conv2d dw",
    ),
    "too few stored": Fault(
        "qemu-m4",
        "wide.h",
        'PUT8(p, v) WIDE_PUT("{%2-%9}"',
        'PUT8(p, v) WIDE_PUT("{%2-%8}"',
        "linear dw",
    ),
    "stored behind the end": Fault(
        "qemu-m4", "tile.c", "size_t i = left;", "size_t i = 4;", "conv2d guard"
    ),
    "a lane that is not there": Fault(
        "qemu-m55", "mve.h", "(uint32_t)count - 1", "(uint32_t)count", "conv2d guard"
    ),
    "a pixel of a row": Fault(
        "qemu-m55",
        "mve_slide.c",
        "SEE(tap + 2, x2, x4, x6, x8)",
        "SEE(tap + 2, x2, x4, x6, x7)",
        "conv2d y",
    ),
    "a row turned round": Fault(
        "qemu-m55", "mve_slide.c", "turned ? 7 - (tap)", "turned ? 1 + (tap)", "conv2d dx"
    ),
    "a kernel spread": Fault(
        "qemu-m55", "mve_slide.c", "vfmaq_n_f32(d, g2, x1)", "vfmaq_n_f32(d, g2, x2)", "conv2d dx"
    ),
    "a strip": Fault(
        "qemu-m55", "mve_dot.c", "PIXEL(7, x7, x8, x9)", "PIXEL(7, x7, x8, x8)", "conv2d dw"
    ),
    "a strip of every second pixel": Fault(
        "qemu-m55", "mve_dot.c", "PIXEL(3, x6, x7, x8)", "PIXEL(3, x6, x7, x7)", "conv2d dw"
    ),
    "a pixel on its own": Fault(
        "qemu-m55",
        "mve_mix.c",
        "TAP_LANES(g, x0, x1, x2, x3)",
        "TAP_LANES(g, x0, x1, x2, x2)",
        "conv2d y",
    ),
    "the rest of the pixels": Fault(
        "qemu-m55", "mve_mix.c", "t->pixels % 3", "t->pixels % 2", "conv2d dw"
    ),
    "the rest of the inputs": Fault(
        "qemu-m55",
        "mve_linear.c",
        "vstrwq_p_f32(dx, sum, rest)",
        "vstrwq_f32(dx, sum)",
        "linear guard",
    ),
    "an output that is not there": Fault(
        "qemu-m55", "mve_linear.c", "o + i < out ? dy[row] : 0", "dy[row]", "linear dw"
    ),
    "momentum": Fault("qemu-m55", "mve_sgd.c", "v += 4;", "v += 0;", "linear velocity"),
    "a pixel seen": Fault(
        "qemu-m55",
        "mve_view.c",
        "SEE(LANES_GET, at2, w6, w7, w8)",
        "SEE(LANES_GET, at2, w6, w8, w7)",
        "depthwise y",
    ),
    "a gradient that is not there": Fault(
        "qemu-m55", "mve_view.c", "vctp32q(left)", "vctp32q(4)", "depthwise dw"
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_noticed(
    check: BuildCheck, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(boards.firmware_root(), tmp_path / "sources"))
    path = root / "kernels" / "fast" / fault.file
    text = path.read_text()
    assert text.count(fault.old) == 1, "the text to change is not there, or not alone"
    path.write_text(text.replace(fault.old, fault.new))
    monkeypatch.setattr(boards, "firmware_root", lambda: root)
    board = BOARDS[fault.board]
    assert any(line.startswith(fault.noticed) for line in run(board, check(board, "-O3")))
