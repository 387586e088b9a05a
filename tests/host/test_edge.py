"""An edge client: what its folder is, what keeps it from starting, and a fleet without torch."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

import splitee as toolkit_package
import splitee_host
from host_harness import splitee
from splitee import data, edge
from splitee.assemble import Assembly
from splitee.errors import CutError, ExportError, NotFinite
from splitee.fleet import Fleet, parse
from splitee.runs import Checkpoint, Run
from splitee_host import boards, keys
from step_harness import SETTINGS, case

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from splitee_exporters.onnx_train import write_client
from splitee_host.onnx_learner import OnnxLearner

# ---- the folder ----


@pytest.mark.parametrize("kind", ["resnet8", "resnet8-batch-frozen", "pools", "mobilenet"])
@pytest.mark.parametrize("moves", [False, True])
def test_a_folder_is_the_build_that_was_written(kind: str, moves: bool, tmp_path: Path) -> None:
    build = case(kind, moves=moves).build
    for name, content in edge.files(build).items():
        (tmp_path / name).write_bytes(content)
    found = edge.read(tmp_path)
    assert found.checksum == build.checksum  # what the host compares
    assert (found.record_size, found.samples_max) == (build.record_size, build.samples_max)
    assert found.graph.ops == build.graph.ops
    assert list(found.graph.weights) == list(build.graph.weights)
    for name, value in build.graph.weights.items():
        assert np.array_equal(found.graph.weights[name], value)


def test_a_folder_has_what_runs_at_every_cut() -> None:
    build = case("resnet8", moves=True).build
    found = [(v.folder, list(v.graph.exits), list(v.exit.exits)) for v in edge.variants(build)]
    assert found == [
        ("1-upto", ["stem"], ["stem"]),
        ("2-upto", ["stem", "layer1"], ["layer1"]),
        ("2-own", ["layer1"], ["layer1"]),
        ("3-upto", ["stem", "layer1", "layer2"], ["layer2"]),
        ("3-own", ["layer2"], ["layer2"]),
    ]
    stays = list(edge.variants(case("resnet8").build))
    assert [(v.folder, list(v.graph.exits)) for v in stays] == [
        ("1-upto", ["stem", "layer1", "layer2"])
    ]
    with pytest.raises(CutError, match="not for layer3"):
        edge.variant(build, "layer3", upto=True)


def edited(key: str, value: object) -> Callable[[Path], None]:
    """Another value of a key of client.json."""

    def edit(folder: Path) -> None:
        path = folder / "client.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return edit


def without(name: str) -> Callable[[Path], None]:
    """A file less."""
    return lambda folder: (folder / name).unlink()


def cut_short(name: str) -> Callable[[Path], None]:
    """The first bytes of a file."""

    def cut(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:90])

    return cut


STEP = "1-upto/step.onnx"
SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (without("client.json"), "client.json: No such file or directory: export the"),
    "no JSON": (cut_short("client.json"), "client.json: not what was exported"),
    "an older format": (edited("format", 0), "it has format 0, and this program reads 2: export"),
    "another capacity": (edited("capacity", 9), "client.json: it was changed after it was"),
    "no graph": (edited("graph", None), "client.json: not what was exported"),
    "no weights": (without("weights.npy"), "weights.npy: No such file or directory"),
    "weights cut short": (cut_short("weights.npy"), "client.json: not what was exported"),
    "too few weights": (
        lambda folder: np.save(folder / "weights.npy", np.zeros(3, np.float32)),
        "weights.npy has 3 values",
    ),
    "a pass less": (without(STEP), "step.onnx: no such file: export the client again (`splitee"),
    "a pass cut short": (cut_short(STEP), "step.onnx: ONNX Runtime cannot load it"),
}


@pytest.mark.parametrize("title", SPOILED)
def test_a_folder_is_refused_with(title: str, tmp_path: Path) -> None:
    spoil, words = SPOILED[title]
    write_client(case("pools").build, tmp_path)
    spoil(tmp_path)
    said = splitee("client", tmp_path, "--runtime", "onnx", "--listen", "tcp://127.0.0.1:0")
    assert said.code == 1
    assert words in " ".join(said.err.split())


def test_a_graph_of_another_export_is_refused(tmp_path: Path) -> None:
    write_client(case("pools").build, tmp_path / "a")
    write_client(case("vgg").build, tmp_path / "b")
    (tmp_path / "b/1-upto/step.onnx").replace(tmp_path / "a/1-upto/step.onnx")
    with pytest.raises(ExportError, match=r"step\.onnx: it belongs to another export than client"):
        OnnxLearner(tmp_path / "a")


# ---- the learner ----


def test_it_begins_with_the_values_that_were_exported(tmp_path: Path) -> None:
    build = case("resnet8").build
    write_client(build, tmp_path)
    weights = OnnxLearner(tmp_path).weights()
    assert all(np.array_equal(weights[n], value) for n, value in build.graph.weights.items())


def test_what_it_gives_stays_when_it_learns_on(tmp_path: Path) -> None:
    the = case("resnet8")
    write_client(the.build, tmp_path)
    learner = OnnxLearner(tmp_path)
    learner.settings = SETTINGS
    learner.begin(the.state.place, the.images)
    before = learner.weights()
    for _ in range(3):
        learner.forward(8, 8)
        learner.backward(None)
        learner.step()
    del learner
    assert all(np.array_equal(before[n], value) for n, value in the.build.graph.weights.items())


def test_it_names_the_first_gradient_that_is_no_number(tmp_path: Path) -> None:
    the = case("resnet8")
    write_client(the.build, tmp_path)
    learner = OnnxLearner(tmp_path)
    learner.settings = replace(SETTINGS, exit_weight=0.0)
    learner.begin(the.state.place, the.images)
    spoilt = {n: v.copy() for n, v in the.build.graph.weights.items()}
    spoilt["exits.stem.linear.weight"][2, 1] = np.inf
    learner.load_weights(spoilt)
    learner.forward(8, 8)
    learner.backward(None)
    with pytest.raises(NotFinite, match=r"the gradient of exits\.stem\.linear\.weight") as caught:
        learner.step()
    assert caught.value.tensor == "exits.stem.linear.weight"
    assert not any(g.any() for g in learner.gradients().values())
    assert all(np.array_equal(v, spoilt[n]) for n, v in learner.weights().items())


# ---- keys ----


def test_the_key_that_was_asked_for_has_to_be_there(tmp_path: Path) -> None:
    write_client(case("pools").build, tmp_path / "client")
    words = ("client", tmp_path / "client", "--runtime", "onnx", "--listen", "tcp://127.0.0.1:0")
    path = tmp_path / "keys.toml"
    said = splitee(*words, "--keys", path)
    assert f"{path}: there is no key: bring its line" in said.err
    keys.create(path, ["a", "b"])
    assert "--name says whose key it is: there are a, b" in splitee(*words, "--keys", path).err
    said = splitee(*words, "--keys", path, "--name", "c")
    assert f'{path}: there is no key of client "c"' in said.err


def test_a_client_in_torch_may_have_its_key_elsewhere_too(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET.format("python", ""))
    keys.create(tmp_path / "keys.toml", ["here"])
    words = ("--name", "far", "--listen", "tcp://127.0.0.1:0", "--keys", tmp_path / "keys.toml")
    said = splitee("client", path, *words)
    assert f'{tmp_path / "keys.toml"}: there is no key of client "far"' in said.err


def test_where_others_are_it_needs_a_key_or_a_word(tmp_path: Path) -> None:
    write_client(case("pools").build, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "is_open_to_others", lambda link: True)
        said = splitee("client", tmp_path, "--runtime", "onnx", "--listen", "tcp://127.0.0.1:0")
    assert "others are on that network, too: run `splitee keys` where the host is" in said.err
    assert "name a file with its key by --keys" in said.err


# ---- where there is no torch ----

FLEET = """
name = "with-edge"
rounds = 2
gradient = "both"
aggregate = "all"
exits = "upto"
[data]
samples = 96
[model]
width = 4
[[client]]
name = "far"
cut = "layer1"
board = "{}"
{}
[[client]]
name = "here"
cut = "layer2"
"""


def needed(extra: str) -> Iterator[importlib.metadata.Distribution]:
    """What pip would install with the project and one of its extras."""
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    left = [*project["dependencies"], *project["optional-dependencies"][extra]]
    seen: set[str] = set()
    while left:
        wanted = Requirement(left.pop())
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = importlib.metadata.distribution(wanted.name)
        if found.name not in seen:
            seen.add(found.name)
            yield found
            left += found.requires or []


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has what `hetero-splitee[edge]` brings, no more."""
    folder = tmp_path_factory.mktemp("edge")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    packages = folder / "packages"
    packages.mkdir()
    for distribution in needed("edge"):
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            (packages / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    for package in (toolkit_package, splitee_host):
        (packages / package.__name__).symlink_to(package.__path__[0])
    (site,) = (folder / "venv/lib").glob("python3*/site-packages")
    (site / "edge.pth").write_text(f"{packages}\n")
    return folder / "venv/bin/python"


def command(python: Path, *words: str | Path) -> list[str]:
    return [str(python), "-m", "splitee_host.cli", *map(str, words)]


def clean() -> dict[str, str]:
    """Without what would let it find packages elsewhere."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_without_torch_a_command_says_how_to_get_it(python: Path, tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(FLEET.format("python", ""))
    for words in (["plan", "fleet.toml"], ["client", "fleet.toml", "--name", "far"]):
        said = subprocess.run(
            command(python, *words), env=clean(), cwd=tmp_path, capture_output=True, text=True
        )
        assert said.returncode == 1
        assert said.stderr.strip().endswith(
            "torch is not installed: pip install 'hetero-splitee[host]'"
        )


def assembled(fleet: Fleet) -> Assembly:
    known = boards.load_boards()
    return Assembly(fleet, lambda name: boards.look_up(known, name).for_assembly)


def trained(folder: Path, fleet: str) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    (folder / "fleet.toml").write_text(fleet)
    said = splitee("train", folder / "fleet.toml", "--runs", folder / "runs")
    assert said.code == 0, said.err
    return Run(folder / "runs" / "with-edge").load()


@contextmanager
def running(python: Path, *words: str | Path) -> Iterator[str]:
    """A `splitee client` that ends with its host: its address."""
    with subprocess.Popen(
        command(python, "client", *words, "--listen", "tcp://127.0.0.1:0", "--once"),
        env=clean(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
            assert process.wait() == 0
        finally:
            process.kill()


def test_a_client_without_torch_joins_a_fleet_and_learns_what_torch_does(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    missing = subprocess.run(
        [python, "-c", "import numpy, onnxruntime, torch"], env=clean(), capture_output=True
    )
    assert b"No module named 'torch'" in missing.stderr
    build = assembled(parse(FLEET.format("python", ""))).member("far").build
    assert "batch_norm" in {op.kind for op in build.graph.ops}
    write_client(build, tmp_path / "client")
    (tmp_path / "edge").mkdir()
    keys.create(tmp_path / "edge" / "fleet.keys.toml", ["far"])
    client = ("client", "--runtime", "onnx", "--keys", "edge/fleet.keys.toml")
    with running(python, *client) as address:
        found = trained(tmp_path / "edge", FLEET.format("python", f'link = "{address}"'))
    expected = trained(tmp_path / "torch", FLEET.format("torch", ""))

    far = {}
    for name, state in expected.states.items():
        assert found.states[name].place == state.place
        for what, mine, theirs in (
            ("weights", found.states[name].weights, state.weights),
            ("momentum", found.states[name].momentum, state.momentum),
        ):
            assert list(mine) == list(theirs)
            largest = max(np.abs(v).max() for v in theirs.values())
            for tensor, value in theirs.items():
                scale = max(np.abs(value).max(), 1e-3 * largest)
                far[f"{name}: {what} of {tensor}"] = np.abs(mine[tensor] - value).max() / scale
    assert {tensor: error for tensor, error in far.items() if not error <= 1e-5} == {}
    assert found.states["far"].place.steps == 6


# ---- a client without torch that answers ----


def test_a_client_without_torch_answers_and_asks_the_server_as_one_with_torch_does(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained(tmp_path, FLEET.format("torch", 'codec = "int8"').replace("rounds = 2", "rounds = 1"))
    run = Path("runs/with-edge")
    fleet_file = run / "fleet.toml"
    fleet_file.write_text(fleet_file.read_text().replace('"torch"', '"python"'))
    assert splitee("export", run, "--client", "far").code == 0
    images = data.load("digits").test[:40]
    np.savez("images.npz", x=images.x, y=images.y)
    words = ("--infer", "--images", "images.npz", "--json")
    alone = json.loads(splitee("client", run, "--name", "far", *words).out)["answers"]
    middle = sorted(a["entropy"] for a in alone)[10:30]
    gap = max(range(19), key=lambda i: middle[i + 1] - middle[i])
    threshold = str((middle[gap] + middle[gap + 1]) / 2)
    serve = [sys.executable, "-m", "splitee_host.cli", "serve", str(run)]
    with subprocess.Popen(
        [*serve, "--listen", "tcp://127.0.0.1:0"], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            asked = (*words, "--entropy", threshold, "--server", server.stdout.readline().strip())
            said = subprocess.run(
                command(python, "client", "exported/far", "--runtime", "onnx", *asked),
                env=clean(), capture_output=True, text=True,
            )  # fmt: skip
            assert said.returncode == 0, said.stderr
            there = splitee("client", run, "--name", "far", *asked)
        finally:
            server.kill()
    assert there.code == 0, there.err
    found, expected = json.loads(said.stdout), json.loads(there.out)
    assert 0 < expected["at_server"] < 40
    for name in ("class", "answered"):
        assert [a[name] for a in found["answers"]] == [a[name] for a in expected["answers"]]
    near, far = ([a["entropy"] for a in told["answers"]] for told in (found, expected))
    np.testing.assert_allclose(near, far, atol=1e-4)
    assert found["accuracy"] == expected["accuracy"]


def test_only_a_client_of_a_run_can_answer(tmp_path: Path) -> None:
    write_client(case("pools").build, tmp_path)
    said = splitee("client", tmp_path, "--runtime", "onnx", "--infer", "--images", "digits")
    assert said.code == 1
    words = " ".join(said.err.split())
    assert "deployed.json: no such file: to answer, a client has to be exported of a run" in words
    said = splitee("client", tmp_path, "--runtime", "onnx", "--infer")
    assert "an exported client has no images: name some (--images)" in " ".join(said.err.split())
