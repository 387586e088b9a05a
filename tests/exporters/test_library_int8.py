"""A segment of 8 bits as a C library: it answers alone, here and on an emulated board."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from splitee import samples
from splitee.errors import ExportError
from splitee.halves import Halves, of_model
from splitee.place_int8 import Int8Build
from splitee.quantize import quantize
from splitee_exporters import library
from splitee_exporters.library_int8 import Library, to_library, verify
from splitee_host.boards import firmware_root

WARNINGS = ("-Wall", "-Wextra", "-Werror")
M4 = ("-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16")
M55 = ("-mcpu=cortex-m55", "-mthumb", "-mfloat-abi=hard")


@cache
def case(name: str = "resnet8", cut: str = "layer2") -> tuple[Halves, Library]:
    """A network cut there, in floats and as a library of 8 bits."""
    shape = (3, 32, 32) if name.startswith("torchvision") else (3, 12, 12)
    width = None if name.startswith("torchvision") else 6
    the = of_model(name, cut, shape, samples.load("digits", shape)[:200], width=width)
    b = the.build
    build = Int8Build(quantize(b.graph, the.calibration.x, b.scale, b.shift), cut)
    return the, to_library(build, firmware_root(), the.samples)


def sources(folder: Path, main: str = "examples/answer/main.c") -> list[str]:
    """The library's files, and a program's."""
    return [main, *(str(p.relative_to(folder)) for p in sorted(folder.glob("src/**/*.c")))]


@pytest.mark.parametrize(
    ("name", "cut"), [("resnet8", "layer2"), ("torchvision:mobilenet_v2", "features.3")]
)
def test_its_answers_are_those_of_the_graph_bit_for_bit(name: str, cut: str) -> None:
    the, made = case(name, cut)
    images = the.samples.x[:24]
    found = verify(made, images, the.answers(images, exact=True), "PyTorch")
    assert found.samples == 24
    assert found.error <= 0.1


@pytest.mark.parametrize(
    ("file", "old", "new", "output"),
    [
        ("src/quantized.c", "input[i * channels + c] =", "input[i * channels] =", "activations"),
        ("src/segment.c", r"(int8_linear\(.*), n\);", r"\1, n * 0);", "logits"),
    ],
)
def test_a_planted_fault_is_named(file: str, old: str, new: str, output: str) -> None:
    the, made = case()
    text = made.files[file].decode()
    pattern = old if file == "src/segment.c" else re.escape(old)
    changed, count = re.subn(pattern, new, text)
    assert count == 1
    spoilt = replace(made, files={**made.files, file: changed.encode()})
    images = the.samples.x[:8]
    with pytest.raises(ExportError, match=f"^src/segment.c: its {output} are not those that"):
        verify(spoilt, images, the.answers(images), "PyTorch")


def test_answers_far_from_pytorchs_are_refused() -> None:
    the, made = case()
    images = the.samples.x[:8]
    expected = the.answers(images)
    wrong = {**expected, "logits": -expected["logits"]}
    with pytest.raises(ExportError, match=r"logits: off by 2\.0e\+00 from PyTorch"):
        verify(made, images, wrong, "PyTorch")


def said_by_numpy(the: Halves, made: Library) -> list[str]:
    """What the example has to print."""
    graph = made.build.graph
    shown = the.samples[:16]
    logits = graph.run(graph.image(shown.x))[graph.logits].reshape(len(shown), -1)
    scale = graph.scales[graph.logits]
    best = logits.argmax(1)
    lines = [
        f"image {i}: class {k}, logit {scale.scale * (int(logits[i, k]) - scale.zero_point):.2f}, "
        f"label {shown.y[i]}"
        for i, k in enumerate(best)
    ]
    return [*lines, f"{int(np.sum(best == shown.y))} of {len(shown)} right"]


def test_the_example_answers_its_images(tmp_path: Path) -> None:
    the, made = case()
    library.write(made.files, tmp_path)
    command = re.search(r"`(cc .*)`", (tmp_path / "README.md").read_text())
    assert command
    said = subprocess.run(
        command.group(1), shell=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert (said.stderr, said.stdout.splitlines()) == ("", said_by_numpy(the, made))


@pytest.mark.parametrize(
    ("machine", "target"), [("mps2-an386", M4), ("mps3-an547", M55)], ids=["m4", "m55"]
)
def test_it_answers_so_on_an_emulated_board(
    machine: str, target: tuple[str, ...], tmp_path: Path
) -> None:
    for tool in ("arm-none-eabi-gcc", "qemu-system-arm"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    the, made = case()
    library.write(made.files, tmp_path)
    # no file of ours: the C library starts the program, and its printf is QEMU's semihosting
    c_library = ["--specs=picolibc.specs", "--oslib=semihost", "--crt0=hosted"]
    places = ("flash=0x00000000", "flash_size=0x80000", "ram=0x20000000", "ram_size=0x80000")
    defined = [f"-Wl,--defsym=__{place}" for place in places]
    command = ["arm-none-eabi-gcc", *target, *c_library, *defined, "-O2", *WARNINGS, "-Isrc"]
    made_it = subprocess.run(
        [*command, *sources(tmp_path), "-o", "main.elf"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (made_it.returncode, made_it.stderr) == (0, "")
    qemu = ["qemu-system-arm", "-M", machine, "-display", "none", "-monitor", "none",
            "-serial", "none", "-semihosting-config", "enable=on,target=native",
            "-kernel", "main.elf"]  # fmt: skip
    ran = subprocess.run(qemu, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ran.stdout + ran.stderr).splitlines() == said_by_numpy(the, made)


def test_it_has_nothing_that_trains() -> None:
    paths = set(case()[1].files)
    assert {"src/segment.c", "src/quantized.h", "src/kernels/int8.h"} <= paths
    assert not {p for p in paths if p.startswith(("src/core/trainer", "src/protocol"))}
    assert "src/kernels/conv2d.c" not in paths
