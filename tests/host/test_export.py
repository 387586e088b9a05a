"""`splitee export`: what it writes, what it refuses, and that nothing that is wrong is written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from host_harness import splitee
from splitee import data, edge
from splitee.assemble import Assembly
from splitee.fleet import read
from splitee.halves import Halves, of_fleet
from splitee.runs import Run
from splitee.train import evaluate
from splitee_host.boards import load_boards, look_up
from splitee_host.onnx_learner import OnnxLearner

ort: Any = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

FLEET = """\
name = "small"
rounds = 2
exits = "upto"
aggregate = "all"
[model]
width = 4
norm = "NORM"
batch_norm = "frozen"
[data]
samples = 96
[[client]]
name = "tiny"
board = "qemu-m4"
cut = "stem"
[[client]]
name = "edge"
board = "torch"
cut = "layer1"
bottleneck = 3
bottleneck_stride = 2
[[client]]
name = "big"
board = "torch"
cut = "layer2"
"""


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has the current folder to itself."""
    monkeypatch.chdir(tmp_path)


def fleet(norm: str = "batch", boards: str = "torch") -> Path:
    """A fleet file in the current folder, in which the small client is on that board."""
    path = Path("fleet.toml")
    path.write_text(FLEET.replace("NORM", norm).replace('"qemu-m4"', f'"{boards}"'))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run."""
    said = splitee("train", fleet())
    assert said.code == 0, said.err
    return tmp_path / "runs" / "small"


def exported(*words: str | Path) -> list[dict[str, Any]]:
    """What an export that worked says."""
    said = splitee("export", *words, "--json")
    assert (said.code, said.err) == (0, "")
    rows: list[dict[str, Any]] = json.loads(said.out)
    return rows


def refused(*words: str | Path) -> str:
    """What an export says that a user's mistake ends."""
    said = splitee("export", *words)
    assert said.code == 1
    assert said.err.startswith("error: ")
    return " ".join(said.err.split())


def answers(folder: Path, images: np.ndarray[Any, Any]) -> tuple[Any, Any, Any]:
    """Activations, logits and the server's logits, by the files alone."""
    segment = ort.InferenceSession(folder / "segment.onnx", providers=["CPUExecutionProvider"])
    activations, logits = segment.run(["activations", "logits"], {"images": images})
    tail = ort.InferenceSession(folder / "tail.onnx", providers=["CPUExecutionProvider"])
    return activations, logits, tail.run(["logits"], {"activations": activations})[0]


def test_a_run_is_exported_as_it_was_trained(run: Path) -> None:
    rows = exported(run, "--out", "out")
    assert {(r["client"], r["cut"], r["file"]) for r in rows} == {
        (client, cut, file)
        for client, cut in (("tiny", "stem"), ("edge", "layer1"), ("big", "layer2"))
        for file in ("segment.onnx", "tail.onnx")
    }
    assembly = Assembly(
        read(run / "fleet.toml"), lambda name: look_up(load_boards(), name).for_assembly
    )
    checkpoint = Run(run).load()
    test = assembly.dataset.test
    strategy = assembly.strategy([assembly.local(m) for m in assembly.members])
    strategy.load(checkpoint.servers)
    for member in assembly.members:
        client = assembly.local(member)
        client.start(checkpoint.states[member.name], member.images)
        expected = evaluate(client, strategy.server(member.name), test)
        _, logits, server = answers(Path("out") / member.name, test.x)
        assert float((logits.argmax(1) == test.y).mean()) == expected.exit_accuracy
        assert float((server.argmax(1) == test.y).mean()) == expected.server_accuracy


def test_the_manifest_says_what_each_file_is(run: Path) -> None:
    exported(run, "--client", "edge", "--out", "out")
    folder = Path("out/edge")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["model"], manifest["cut"]) == ("resnet8", "layer1")
    for file in manifest["files"]:
        data = (folder / file["file"]).read_bytes()
        assert file["sha256"] == hashlib.sha256(data).hexdigest()
        assert file["bytes"] == len(data)
        assert file["verified"]["error"] <= 1e-5
        assert file["verified"]["samples"] == 64
    assert {p.name for p in folder.iterdir()} == {"manifest.json", "segment.onnx", "tail.onnx"}
    trained = load_file(run / "checkpoint.safetensors")
    names = {n.split("/", 2)[2] for n in trained if n.startswith("client/edge/")}
    assert "bottleneck.weight" in names


def test_each_client_has_the_format_of_its_tier() -> None:
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
    rows = exported(fleet(boards="qemu-m4"), "--no-tail")
    assert [(r["client"], r["file"]) for r in rows] == [
        ("tiny", "segment-int8.tflite"),
        ("edge", "segment.onnx"),
        ("big", "segment.onnx"),
    ]


def test_c_that_trains_is_a_folder_that_compiles(run: Path) -> None:
    (row,) = exported(run, "--format", "c", "--client", "big")
    assert row["error"] <= 1e-5
    folder = Path("exported/big")
    sources = [str(p.relative_to(folder)) for p in folder.glob("**/*.c")]
    subprocess.run(["gcc", "-Isrc", *sources, "-lm", "-o", "example"], cwd=folder, check=True)
    said = subprocess.run([folder / "example"], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1].endswith("right")
    beside = json.loads((folder / "manifest.json").read_text())["beside"]
    for path, digest in beside.items():
        assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == digest


def test_a_python_client_can_train_in_onnx_runtime() -> None:
    path = fleet(boards="python")
    rows = exported(path, "--client", "tiny")
    assert [r["file"] for r in rows] == ["segment.onnx", "client.json", "tail.onnx"]
    assert rows[1]["error"] <= 1e-5
    (member, *_) = Assembly(
        read(path), lambda name: look_up(load_boards(), name).for_assembly
    ).members
    assert edge.read(Path("exported/tiny")).checksum == member.build.checksum
    assert OnnxLearner(Path("exported/tiny")).weights().keys() == member.state.weights.keys()


@pytest.mark.parametrize("weight", ["stem.0.weight", "exits.stem.linear.bias"])
def test_a_weight_that_does_not_learn_as_in_pytorch_is_named(
    weight: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Halves.learnt

    def planted(self: Halves, *, exact: bool = False) -> dict[str, np.ndarray[Any, Any]]:
        found = honest(self, exact=exact)
        return {**found, weight: found[weight] * 1.001}

    monkeypatch.setattr(Halves, "learnt", planted)
    path = fleet(boards="python")
    assert f"what {weight} learns: off by 1.0e-03" in refused(path, "--client", "tiny")
    assert f"learnt {weight}: off by 1.0e-03" in refused(path, "--format", "c")
    assert not Path("exported").exists()


def test_a_folder_without_its_runtime_is_named() -> None:
    Path("exported").mkdir()
    said = splitee("client", "exported", "--name", "tiny")
    assert said.code == 1
    assert "exported: a folder: add --runtime onnx" in " ".join(said.err.split())


def test_a_run_is_exported_as_c_of_8_bits(run: Path) -> None:
    rows = exported(run, "--format", "c", "--int8")
    assert {(r["client"], r["file"]) for r in rows} == {
        (client, "src/segment.c") for client in ("tiny", "edge", "big")
    }
    for client in ("tiny", "edge", "big"):
        (file,) = json.loads(Path(f"exported/{client}/manifest.json").read_text())["files"]
        assert file["trains"] is False
        assert file["input"]["type"] == "int8"


def test_what_does_not_fit_its_board_is_refused() -> None:
    pytest.importorskip("tflite_micro", reason="tflite-micro is not installed")
    said = refused("--model", "resnet8", "--width", "300", "--cut", "1", "--format", "tflite",
                   "--board", "qemu-m4")  # fmt: skip
    assert "segment-int8.tflite needs an arena of" in said
    assert "qemu-m4 has 256 KB of RAM: cut earlier, or take a narrower network" in said


@pytest.mark.parametrize("bits", [(), ("--int8",)], ids=["float32", "int8"])
def test_c_that_does_not_fit_its_board_is_refused(bits: tuple[str, ...]) -> None:
    said = refused("--model", "resnet8", "--width", "200", "--cut", "layer1", "--format", "c",
                   "--board", "qemu-m4", *bits)  # fmt: skip
    assert re.search(
        r"the segment needs [\d.,]+ \w+ of (RAM|flash), .* on qemu-m4: cut earlier", said
    )
    assert not Path("exported").exists()


def test_a_network_with_fresh_weights_needs_no_fleet() -> None:
    rows = exported("--model", "resnet20", "--width", "4", "--cut", "layer2.0", "--int8")
    assert [r["file"] for r in rows] == ["segment.onnx", "segment-int8.onnx", "tail.onnx"]
    assert rows[1]["error"] <= rows[1]["tolerance"]
    images = data.load("digits").test.x[:3].repeat(3, 1).repeat(4, 2).repeat(4, 3)
    activations, logits, server = answers(Path("exported"), images)
    assert (activations.shape, logits.shape, server.shape) == ((3, 8, 16, 16), (3, 10), (3, 10))


def test_other_images_calibrate(tmp_path: Path) -> None:
    x = np.random.default_rng(3).integers(0, 256, (40, 3, 16, 16), np.uint8)
    np.savez(tmp_path / "own.npz", x=x, y=np.arange(40) % 4)
    rows = exported("--model", "resnet8", "--width", "4", "--input", "3x16x16", "--classes", "4",
                    "--data", tmp_path / "own.npz", "--int8", "--no-tail")  # fmt: skip
    assert [r["samples"] for r in rows] == [8, 8]  # a fifth is held out


def test_what_cannot_be_exported_is_refused_in_words(run: Path) -> None:
    one = "give either a fleet file or the folder of a run, or --model"
    assert one in refused()
    assert one in refused(run, "--model", "resnet8")
    assert 'there is no cut "layer9": take one of 1 stem' in refused(
        "--model", "resnet8", "--cut", "layer9"
    )
    assert "--input 3x32: give 1 or 3 channels" in refused("--model", "resnet8", "--input", "3x32")
    assert 'no client "nobody": there are tiny, edge, big' in refused(run, "--client", "nobody")
    assert "there is no board" in refused("--model", "resnet8", "--board", "none")
    assert "the images have class 9, and the network 3 classes" in refused(
        "--model", "resnet8", "--classes", "3"
    )
    assert 'data "mnist" is unknown' in refused("--model", "resnet8", "--data", "mnist")
    assert not Path("exported").exists()


def test_a_file_that_does_not_compute_what_pytorch_does_is_not_written(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(run, "--client", "big", "--out", "out")
    before = {p.name: p.read_bytes() for p in Path("out/big").iterdir()}
    honest = Halves.answers

    def planted(
        self: Halves, images: np.ndarray[Any, Any], *, exact: bool = False
    ) -> dict[str, np.ndarray[Any, Any]]:
        found = honest(self, images, exact=exact)
        return {**found, "logits": found["logits"] * 1.0001}

    monkeypatch.setattr(Halves, "answers", planted)
    said = refused(run, "--client", "big", "--out", "out")
    assert "segment.onnx: logits: off by" in said
    assert {p.name: p.read_bytes() for p in Path("out/big").iterdir()} == before


FULL = """
import resource, sys
from splitee_host.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.argv = ["splitee", *sys.argv[1:]]
main()
"""


def test_a_full_disk_leaves_what_was_there() -> None:
    words = ("--model", "resnet8", "--width", "8", "--cut", "2", "--out", "out")
    exported(*words)
    before = {p.name: p.read_bytes() for p in Path("out").iterdir()}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    wider = ["export", *(w if w != "8" else "32" for w in words)]
    done = subprocess.run(
        [sys.executable, "-c", FULL, *wider], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "out: File too large: free some space or choose a folder" in done.stderr
    assert {p.name: p.read_bytes() for p in Path("out").iterdir()} == before


def test_weights_that_nothing_trained_are_those_that_training_begins_with() -> None:
    path = fleet()
    assembly = Assembly(read(path), lambda name: look_up(load_boards(), name).for_assembly)
    for halves, member in zip(of_fleet(assembly), assembly.members, strict=True):
        for name, value in member.state.weights.items():
            assert np.array_equal(halves.build.graph.weights[name], value)
        torch.testing.assert_close(
            dict(halves.segment.tensors()), member.segment.tensors(), rtol=0, atol=0
        )


def test_without_a_compiler_c_is_not_called_done(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no C compiler to check the library with: install gcc" in refused(run, "--format", "c")
