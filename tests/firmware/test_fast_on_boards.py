"""The fast C kernels, held to the plain ones on random shapes, as they run on an Arm core.

There they load and store by assembly, which a test on this machine cannot see. ``fast_check.c`` is
the program; the plain kernels are held to PyTorch by ``test_kernels.py``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from splitee_host import boards

PROGRAM = Path(__file__).parent / "fast_check.c"
M4 = boards.load_boards()["qemu-m4"]
# the emulator has more memory than the part that the board stands for
ROOMY = replace(M4, ram_bytes=1 << 19, flash_bytes=1 << 19)
PATIENCE = 120.0  # seconds without a word; no test waits that long when all is well

BuildCheck = Callable[[str], boards.Firmware]


@pytest.fixture
def check(tmp_path: Path) -> BuildCheck:
    """Builds the program with the kernels of the firmware's tree, at a level of optimization."""
    for tool in (f"{M4.prefix}gcc", "qemu-system-arm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")

    def check(optimize: str) -> boards.Firmware:
        root = boards.firmware_root()
        sources = " ".join(str(path.relative_to(root)) for path in root.glob("kernels/**/*.c"))
        shutil.copy(PROGRAM, tmp_path / "segment.c")
        overrides = {"PROGRAM": sources, "OPTIMIZE": optimize}
        return boards.build(ROOMY, tmp_path, tmp_path, overrides=overrides)

    return check


def run(firmware: boards.Firmware) -> list[str]:
    """The lines that the program writes, up to its last one."""
    text = b""
    with boards.start(ROOMY, firmware) as running:
        while not text.endswith(b"end\n"):
            chunk = running.link.read(PATIENCE)
            assert chunk, f"nothing came any more after: {text.decode()}"
            text += chunk
    return text.decode().splitlines()[:-1]


@pytest.mark.parametrize("optimize", ["-O3", "-Os"])
def test_fast_kernels_agree_with_the_plain_ones(check: BuildCheck, optimize: str) -> None:
    assert run(check(optimize)) == ["windows 140", "layers 50"]


FAULTS = {  # of the assembly, but for the last: file, text, its change, what has to be reported
    "too few loaded": (
        *("wide.h", 'LOAD9(v, p) WIDE_LOAD("{%0-%8}"', 'LOAD9(v, p) WIDE_LOAD("{%0-%7}"'),
        "conv2d dw",
    ),
    "too few stored": (
        *("wide.h", 'PUT8(p, v) WIDE_PUT("{%2-%9}"', 'PUT8(p, v) WIDE_PUT("{%2-%8}"'),
        "linear dw",
    ),
    "stored behind the end": ("tile.c", "size_t i = left;", "size_t i = 4;", "conv2d guard"),
}


@pytest.mark.parametrize(("file", "old", "new", "noticed"), list(FAULTS.values()), ids=list(FAULTS))
def test_a_planted_fault_is_noticed(
    check: BuildCheck,
    file: str,
    old: str,
    new: str,
    noticed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = Path(shutil.copytree(boards.firmware_root(), tmp_path / "sources"))
    path = root / "kernels" / "fast" / file
    text = path.read_text()
    assert text.count(old) == 1, "the text to change is not there, or not alone"
    path.write_text(text.replace(old, new))
    monkeypatch.setattr(boards, "firmware_root", lambda: root)
    assert any(line.startswith(noticed) for line in run(check("-O3")))
