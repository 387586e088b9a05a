"""Segments of 8 bits from the command line: built for boards, and asked by eval."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("ai_edge_litert")  # the oracle

from host_harness import splitee
from splitee.assemble import Assembly
from splitee.assemble_int8 import of_member
from splitee.errors import MissingTool
from splitee.fleet import read
from splitee.runs import Run
from splitee_exporters.tflite import ACTIVATIONS, LOGITS, segment_to_tflite
from splitee_exporters.tflite_run import litert
from splitee_host import boards

TINY = """\
name = "tiny"
rounds = 2
exits = "upto"
[model]
width = 4
norm = "group"
[data]
samples = 128
held_out = 200
[[client]]
name = "board"
board = "posix"
cut = "layer1"
capacity = 16
[[client]]
name = "here"
cut = "layer2"
"""
SAMPLES = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run, which is the current one."""
    folder = tmp_path_factory.mktemp("int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("fleet.toml").write_text(TINY)
        assert splitee("train", "fleet.toml").code == 0
        yield folder


def assembled(fleet_file: Path) -> Assembly:
    known = boards.load_boards()
    return Assembly(read(fleet_file), lambda name: boards.look_up(known, name).for_assembly)


def said_as_json(*arguments: str | Path) -> Any:
    said = splitee(*arguments, "--json")
    assert said.code == 0, said.err
    return json.loads(said.out)


# ---- eval --device ----


@dataclass(frozen=True)
class Expected:
    """What the board should answer: the same numbers in LiteRT, entropy and choice by hand."""

    threshold: float  # of entropy; with it some samples are answered by the exit, some are not
    temperature: float  # of the exit, as eval fits it
    exit_accuracy: float
    share_at_exit: float
    accuracy: float


def by_litert(run: Run) -> Expected:
    assembly, checkpoint = assembled(run.fleet_file), run.load()
    made = assembly.member("board").build
    graph = made.graph.at("layer1", upto=False).holding(checkpoint.states["board"].weights)
    file = segment_to_tflite(replace(made, graph=graph), assembly.dataset.train.x[:128])
    test = assembly.dataset.test[:SAMPLES]
    found = litert(file, file.graph.image(test.x), reference=True)
    logits = file.graph.dequantize(file.graph.logits, found[LOGITS]).astype(np.float64)
    temperature = said_as_json("eval", run.folder)["clients"][0]["temperature"]
    assert abs(temperature - 1) > 0.1
    p = np.exp(logits / temperature) / np.exp(logits / temperature).sum(1, keepdims=True)
    entropies = -(p * np.log(p)).sum(1) / math.log(10)
    middle = np.sort(entropies)[SAMPLES // 4 : -SAMPLES // 4]
    widest = int(np.argmax(np.diff(middle)))
    threshold = float(middle[widest : widest + 2].mean())
    strategy = assembly.strategy([assembly.local(m) for m in assembly.members])
    strategy.load(checkpoint.servers)
    activations = file.graph.dequantize(file.graph.cut, found[ACTIVATIONS])
    served = strategy.server("board").infer(torch.from_numpy(activations), "layer1").numpy()
    unsure = entropies > threshold
    chosen = np.where(unsure, served.argmax(1), logits.argmax(1))
    return Expected(
        threshold,
        temperature,
        exit_accuracy=float((logits.argmax(1) == test.y).mean()),
        share_at_exit=float(1 - unsure.mean()),
        accuracy=float((chosen == test.y).mean()),
    )


def test_eval_asks_the_board_and_the_server_for_what_it_is_unsure_of(place: Path) -> None:
    expected = asdict(by_litert(Run(Path("runs/tiny"))))
    temperature = expected.pop("temperature")
    options = ("--samples", str(SAMPLES), "--entropy", str(expected.pop("threshold")))
    plain = said_as_json("eval", "runs/tiny", *options)
    found = said_as_json("eval", "runs/tiny", *options, "--device")
    board, here = found["clients"]
    assert board["temperature"] == temperature
    answered = board.pop("device")
    assert found == plain  # what runs here is as without boards
    assert "device" not in here
    assert {name: answered[name] for name in expected} == pytest.approx(expected)
    assert (answered["board"], answered["samples"]) == ("posix", SAMPLES)
    # logits of every sample, activations of those that are unsure, and frames around them
    payload = 10 + (1 - answered["share_at_exit"]) * 4 * 8 * 8
    assert payload < answered["bytes_up_per_sample"] < payload + 3 * 32


def test_a_board_s_images_are_answered_there_or_by_a_server_behind_a_link(place: Path) -> None:
    words = ("--samples", "24", "--entropy", "0.6", "--device")
    (board, _) = said_as_json("eval", "runs/tiny", *words)["clients"]
    command = [sys.executable, "-m", "splitee_host.cli", "serve", "runs/tiny"]
    with subprocess.Popen(
        [*command, "--listen", "tcp://127.0.0.1:0"], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            client = ("client", "runs/tiny", "--infer", "--name", "board", "--server", url)
            found = said_as_json(*client, *words)
        finally:
            process.kill()
    assert 0 < found["at_server"] < 24
    for key in ("accuracy", "share_at_exit"):
        assert found[key] == pytest.approx(board["device"][key])


def test_the_table_says_where_each_client_ran(place: Path) -> None:
    said = splitee("eval", "runs/tiny", "--samples", "8", "--device", "--entropy", "0.5")
    assert said.code == 0
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in said.out.splitlines()
        if line.startswith("│")
    ]
    where = [(row[0], row[2]) for row in rows]
    assert where == [
        ("board", "here, float32"),
        ("board", "posix, int8"),
        ("here", "here, float32"),
    ]
    assert [row[4] == "-" for row in rows] == [False, True, False]
    assert "board: building firmware of 8 bits for posix, cut layer1" in said.err


def test_at_entropy_1_nothing_but_logits_goes_up(place: Path) -> None:
    options = ("--samples", "20", "--entropy", "1", "--device")
    (answered,) = [
        c["device"] for c in said_as_json("eval", "runs/tiny", *options)["clients"] if "device" in c
    ]
    assert answered["share_at_exit"] == 1
    assert answered["accuracy"] == answered["exit_accuracy"]
    assert answered["bytes_up_per_sample"] < 10 + 3 * 32


def linked(name: str, link: str) -> Path:
    """A copy of the run whose board is at an address."""
    shutil.copytree("runs/tiny", name)
    text = (Path(name) / "fleet.toml").read_text()
    (Path(name) / "fleet.toml").write_text(
        text.replace('board = "posix"', f'board = "posix"\nlink = "{link}"')
    )
    return Path(name)


def elf_of(*arguments: str | Path) -> Path:
    said = splitee("build", *arguments)
    assert said.code == 0, said.err
    return Path(said.out.split(": ")[1])


def test_a_board_that_runs_already_is_asked_where_it_is(place: Path) -> None:
    posix = boards.load_boards()["posix"]
    firmware = boards.read_elf(elf_of("runs/tiny", "--int8"))
    with boards.start(posix, firmware) as running:
        run = linked("attached", running.link.name)
        words = ("--samples", str(SAMPLES), "--entropy", "0.5", "--device")
        found = said_as_json("eval", run, *words)
        assert found["clients"][0]["device"]["link"] == running.link.name
    here = said_as_json("eval", "runs/tiny", *words)
    for answered in (found, here):
        answered["clients"][0]["device"].pop("link")
    assert found == here


def test_a_board_with_the_firmware_that_trains_is_told_what_to_load(place: Path) -> None:
    posix = boards.load_boards()["posix"]
    with boards.start(posix, boards.read_elf(elf_of("fleet.toml"))) as running:
        said = splitee("eval", linked("trains", running.link.name), "--device")
    assert said.code == 1
    words = " ".join(said.err.split())
    assert (
        "is what the checkpoint is in 8 bits (cut layer1): run `splitee build RUN --int8`" in words
    )


def test_without_the_emulator_a_process_answers(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require = boards._require

    def without(*tools: str) -> None:
        if any("arm" in tool for tool in tools):
            raise MissingTool(f"{tools[0]} is not installed")
        require(*tools)

    monkeypatch.setattr(boards, "_require", without)
    shutil.copytree("runs/tiny", "emulated")
    text = Path("emulated/fleet.toml").read_text().replace('"posix"', '"qemu-m4"')
    Path("emulated/fleet.toml").write_text(text)
    said = splitee("eval", "emulated", "--samples", "4", "--device", "--json")
    assert said.code == 0, said.err
    assert "is not installed; running the same firmware as a process instead" in said.err
    assert json.loads(said.out)["clients"][0]["device"]["board"] == "posix"


# ---- build --int8 ----


def test_a_checkpoint_is_another_segment_than_the_fleet_begins_with(place: Path) -> None:
    begun, learnt = elf_of("fleet.toml", "--int8"), elf_of("runs/tiny", "--int8")
    assert begun != learnt
    assert elf_of("runs/tiny", "--int8", "--client", "board") == learnt


def test_a_board_alone_gets_the_deepest_segment_that_fits(place: Path) -> None:
    if shutil.which("arm-none-eabi-gcc") is None:
        pytest.skip("no arm-none-eabi-gcc")
    said = splitee("build", "--board", "qemu-m4", "--int8", "--model", "resnet8", "--width", "64")
    assert said.code == 0, said.err
    firmware = boards.read_elf(Path(said.out.split(": ")[1]))
    sizes = f"{firmware.flash_bytes:,} bytes of flash, {firmware.ram_bytes:,} of RAM"
    assert said.out.startswith(f"qemu-m4: {firmware.elf}: {sizes}\n")
    segment = firmware.elf.with_name("segment.c").read_text()
    assert "up to layer2, in 8 bits" in segment  # layer3 has 1.4 MB of weights there
    named = splitee("build", "--board", "qemu-m4", "--int8", "--width", "64", "--cut", "layer2")
    assert named.out == said.out


def test_a_firmware_takes_what_was_planned(place: Path) -> None:
    if shutil.which("arm-none-eabi-gcc") is None:
        pytest.skip("no arm-none-eabi-gcc")
    Path("m4.toml").write_text(TINY.replace('"posix"', '"qemu-m4"'))
    assembly = assembled(Path("m4.toml"))
    member, room = assembly.member("board"), assembly.boards["board"].room
    assert room is not None
    build = of_member(assembly, member, member.state.weights)
    firmware = boards.read_elf(elf_of("m4.toml", "--int8"))
    planned, measured = asdict(build.memory(room)), asdict(firmware.memory)
    assert measured.pop("static") <= planned.pop("static")
    assert measured == planned
    assert build.weight_bytes < firmware.flash_bytes <= build.flash_bytes(room)


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing to build": ((), "build takes a fleet file, or --board with --int8"),
    "both": (("fleet.toml", "--board", "posix", "--int8"), "give one of the two"),
    "a board alone that trains": (("--board", "posix"), "add --int8"),
    "a board that there is not": (("--board", "z80", "--int8"), 'there is no board "z80"'),
    "a board without firmware": (("--board", "torch", "--int8"), "torch runs no firmware"),
    "a cut that there is not": (
        ("--board", "posix", "--int8", "--cut", "layer9"),
        'there is no cut "layer9": take one of 1 stem, 2 layer1, 3 layer2, 4 layer3',
    ),
    "a network that there is not": (
        ("--board", "posix", "--int8", "--model", "vgg99"),
        "vgg99",
    ),
    "an input of two sizes": (
        ("--board", "posix", "--int8", "--input", "3x32"),
        "give 1 or 3 channels, height and width as 3x32x32",
    ),
    "a network of other channels": (
        ("--board", "posix", "--int8", "--model", "torchvision:mobilenet_v2"),
        "takes images of 3 channels",
    ),
    "more than the board has": (
        ("--board", "qemu-m4", "--int8", "--width", "64", "--cut", "layer3"),
        "resnet8: its segment up to layer3 in 8 bits needs ",
    ),
    "a folder that is no run": (("empty", "--int8"), "is empty the folder of a run?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_build_refuses(case: str, place: Path) -> None:
    Path("empty").mkdir(exist_ok=True)
    arguments, words = REFUSED[case]
    said = splitee("build", *arguments)
    assert said.code == 1
    assert words in " ".join(said.err.split())
