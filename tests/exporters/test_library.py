"""A segment as a C library: it compiles with nothing else of ours, and trains as PyTorch does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import step_harness
from splitee import data, zoo
from splitee.capture import capture
from splitee.client import LocalClient, Place, Settings, State
from splitee.data import Images, draw_order
from splitee.errors import ExportError
from splitee.exits import Exit
from splitee.model import Network, Segment
from splitee.ops import Array
from splitee.place import Build
from splitee.steps import NO_LEVERS, Levers
from splitee_exporters import library, manifest
from splitee_exporters.library_train import Library, to_library, verify
from splitee_host.boards import firmware_root
from splitee_host.verify import step_in_torch
from toolkit import networks

RATE = 0.125
WARNINGS = ("-Wall", "-Wextra", "-Werror")


@dataclass(frozen=True)
class Case:
    """A library, and what PyTorch computes and learns."""

    library: Library
    images: Images
    expected: dict[str, Array]
    learnt: dict[str, Array]

    def verify(self, made: Library | None = None) -> manifest.Verified:
        """Holds it, or another, to PyTorch."""
        args = (self.images, self.expected, self.learnt, RATE, "PyTorch")
        return verify(made or self.library, *args)


@cache
def case(kind: str, levers: Levers = NO_LEVERS, capacity: int = 8) -> Case:
    """The digits' network of that kind up to its second cut."""
    torch.manual_seed(3)
    make = {
        "group": lambda: zoo.build("resnet8", width=4, norm="group", channels=1),
        "batch": lambda: zoo.build("resnet8", width=4, norm="batch", channels=1),
        "vgg": networks.vgg,
    }[kind]
    digits = data.load("digits")
    network = Network(make(), digits.shape)
    cut = network.cut(2)
    channels, height, width = cut.shape
    segment = Segment(network, cut, {cut.name: Exit((channels, height, width), 10)})
    build = Build(
        capture(segment, 10), capacity, True, 0, digits.scale, digits.shift, levers=levers
    )
    client = LocalClient(
        "one", segment, Settings(RATE), capacity=capacity, scale=digits.scale, shift=digits.shift
    )
    images = digits.test[:24]
    activations, logits = client.infer(images.x)
    # PyTorch is given the first images as its batch, whatever order it draws
    order = draw_order(capacity, 0, 0)
    first = Images(images.x[:capacity].copy(), images.y[:capacity].copy())
    first.x[order], first.y[order] = images.x[:capacity], images.y[:capacity]
    client.start(State(client.state().weights, {}, Place(capacity, 0)), first)
    client.forward(capacity, capacity)
    client.backward(None)
    client.step()
    made = to_library(build, firmware_root(), digits.train)
    expected = {"activations": activations.numpy(), "logits": logits.numpy()}
    return Case(made, images, expected, dict(client.state().weights))


@pytest.mark.parametrize("kind", ["group", "batch", "vgg"])
def test_it_answers_and_learns_as_pytorch_does(kind: str) -> None:
    found = case(kind).verify()
    assert found.error <= 1e-5
    assert found.samples == 24
    assert found.same_class == 1


def test_it_does_so_where_layers_learn_at_once() -> None:
    assert case("group", Levers(fused_update=True, relu_bits=True)).verify().error <= 1e-5


def distilled(distill: float) -> manifest.Verified:
    """Holds a library that learns with that share to PyTorch, which does with a half."""
    the_case = step_harness.case("resnet8", distills=True, momentum=False)
    build, first = the_case.build, the_case.images[:8]
    settings = Settings(RATE, distill=0.5)
    step = step_in_torch(the_case.segment, build, first, settings, None)
    learnt = {name: step[f"updated {name}"] for name in build.graph.weights}
    values = build.graph.run(first.x * np.float32(build.scale[0]) + np.float32(build.shift[0]))
    expected = {"activations": values[build.graph.cut], "logits": values[build.graph.logits]}
    made = to_library(build, firmware_root(), the_case.images, distill=0.5)
    assert b".distill = 0.5f" in made.files["examples/train/main.c"]
    return verify(made, first, expected, learnt, RATE, "PyTorch", distill=distill)


def test_its_exits_learn_from_the_deepest_as_in_pytorch() -> None:
    assert distilled(0.5).error <= 1e-5
    with pytest.raises(ExportError, match=r"^src/segment.c: learnt .*: off by"):
        distilled(0.25)


@pytest.mark.parametrize(
    ("old", "new", "tensor"),
    [
        ("relu_forward", "memcpy_relu", "activations"),
        ("avg_pool_backward", "avg_pool_nowhere", "learnt stem.0.weight"),
    ],
)
def test_a_planted_fault_is_named(old: str, new: str, tensor: str) -> None:
    made = case("group").library
    text = made.files["src/segment.c"].decode()
    call = re.search(rf"^ +{old}\(.*;$", text, re.MULTILINE)
    assert call
    spoilt = {**made.files, "src/segment.c": text.replace(call.group(), "").encode()}
    with pytest.raises(ExportError, match=f"^src/segment.c: {tensor}: off by"):
        case("group").verify(replace(made, files=spoilt))


def folder_of(made: Library, folder: Path) -> Path:
    """The library in a folder outside of the project."""
    library.write(made.files, folder)
    return folder


def test_the_example_learns_its_images(tmp_path: Path) -> None:
    folder = folder_of(case("group").library, tmp_path)
    read_me = (folder / "README.md").read_text()
    command = re.search(r"`(cc .*)`", read_me)
    assert command
    environment = {"PATH": os.environ["PATH"]}
    said = subprocess.run(
        command.group(1), shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert said.stderr == ""
    lines = said.stdout.splitlines()
    losses = [float(line.split()[-1]) for line in lines[:-1]]
    assert losses[-1] < 0.5 < 2 < losses[0]
    assert lines[-1] == "16 of 16 right"


@pytest.mark.parametrize(
    ("kind", "levers"),
    [("vgg", Levers()), ("group", Levers(fused_update=True))],
    ids=["plain", "fused"],
)
@pytest.mark.parametrize(
    "compiler",
    [
        ("gcc", "-std=c11"),
        ("arm-none-eabi-gcc", "-std=c11", "-mcpu=cortex-m4", "-mfloat-abi=hard", "-mthumb",
         "--specs=picolibc.specs"),
        ("arm-none-eabi-gcc", "-std=gnu11", "-mcpu=cortex-m55", "-mfloat-abi=hard",
         "--specs=picolibc.specs"),
    ],
    ids=lambda c: " ".join(c[::2]) if isinstance(c, tuple) else None,
)  # fmt: skip
def test_each_file_compiles_without_warnings(
    compiler: tuple[str, ...], kind: str, levers: Levers, tmp_path: Path
) -> None:
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"needs {compiler[0]}")
    folder = folder_of(case(kind, levers).library, tmp_path)
    sources = [str(p.relative_to(folder)) for p in folder.glob("**/*.c")]
    command = [*compiler, *WARNINGS, "-Os", "-Isrc", "-c", *sources]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (0, "")


def test_it_runs_on_an_emulated_board(tmp_path: Path) -> None:
    for tool in ("arm-none-eabi-gcc", "qemu-system-arm"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    folder = folder_of(case("group").library, tmp_path)
    sources = [str(p.relative_to(folder)) for p in folder.glob("**/*.c")]
    # no file of ours: the C library starts the program, and its printf is QEMU's semihosting
    target = ["-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"]
    c_library = ["--specs=picolibc.specs", "--oslib=semihost", "--crt0=hosted"]
    places = ("flash=0x00000000", "flash_size=0x400000", "ram=0x20000000", "ram_size=0x400000")
    defined = [f"-Wl,--defsym=__{place}" for place in places]
    command = ["arm-none-eabi-gcc", *target, *c_library, *defined, "-O2", "-Isrc", *sources]
    said = subprocess.run(
        [*command, "-lm", "-o", "main.elf"], cwd=folder, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    qemu = ["qemu-system-arm", "-M", "mps2-an386", "-display", "none", "-monitor", "none",
            "-serial", "none", "-semihosting-config", "enable=on,target=native",
            "-kernel", "main.elf"]  # fmt: skip
    ran = subprocess.run(qemu, cwd=folder, capture_output=True, text=True, timeout=60)
    assert (ran.stdout + ran.stderr).splitlines()[-1] == "16 of 16 right"


def test_a_cpp_program_can_call_it(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = folder_of(case("group").library, tmp_path)
    (folder / "sketch.cpp").write_text(
        '#include "core/trainer.h"\n#include "protocol/messages.h"\n'
        "int main() { struct pass pass = {}; trainer_infer(&pass, 1); return 0; }\n"
    )
    sources = [str(p.relative_to(folder)) for p in folder.glob("src/**/*.c")]
    for command in (
        ["gcc", "-O1", "-Isrc", "-r", "-nostdlib", *sources, "-o", "library.o"],
        ["g++", *WARNINGS, "-Isrc", "sketch.cpp", "library.o", "-lm", "-o", "sketch"],
    ):
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert (said.returncode, said.stderr) == (0, "")


def test_it_has_what_the_tools_of_others_look_for(tmp_path: Path) -> None:
    made = case("group").library
    about = json.loads(made.files["library.json"])
    assert about["name"] == "splitee-segment"
    properties = dict(
        line.split("=", 1) for line in made.files["library.properties"].decode().splitlines()
    )
    assert {"name", "version", "author", "maintainer", "sentence", "paragraph", "category", "url",
            "architectures"} <= set(properties)  # fmt: skip
    assert b"Apache License" in made.files["LICENSE"]


def test_only_kernels_that_are_called_are_in_it() -> None:
    paths = set(case("group").library.files)
    assert {"src/segment.c", "src/core/segment.h", "src/kernels/group_norm.c"} <= paths
    assert not paths & {"src/kernels/batch_norm.c", "src/kernels/grouped_conv2d.c"}
    assert not {p for p in paths if p.endswith(("device.c", "frame.c", "port.h"))}
