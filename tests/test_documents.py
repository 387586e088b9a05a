"""README.md and DESIGN.md say what is so: commands, settings, boards, files and functions."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.main import get_group

from host_harness import splitee
from splitee import datasets
from splitee.assemble_int8 import of_model
from splitee.augment import Augmentation
from splitee.codec import KINDS
from splitee.data import Images
from splitee.fleet import BuiltIn, DataTable, Fleet, OptimizerTable
from splitee.steps import Levers
from splitee_exporters.c import to_c
from splitee_host import boards
from splitee_host.cli import app
from step_harness import case

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DESIGN = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
SOURCES = ("toolkit", "exporters", "host", "firmware", "examples", "tests", "benchmarks")


def section(text: str, title: str) -> str:
    """What stands under a heading of second order."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of the table in a text, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rule = next(i for i, line in enumerate(lines) if set(line) == set("|-"))
    return [line.strip("| ").split(" | ") for line in lines[rule + 1 :]]


def code(text: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


# ---- README.md ----


def test_the_fleet_file_of_the_readme_trains_and_leaves_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (fleet,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    Path("fleet.toml").write_text(fleet)
    said = splitee("train", "fleet.toml")
    assert (said.code, said.err) == (0, "")
    sentence = " ".join(README.split()).split("leaves `runs/demo/`:")[1].split("as run.")[0]
    promised = {*code(sentence), "fleet.toml"}
    if find_spec("tensorboard") is None:
        promised -= {"tb"}
    assert {p.name for p in Path("runs/two-clients").iterdir()} == promised


OWN = """\
name = "own"
rounds = 1
aggregate = "all"
strategy = "{strategy}"
period = {period}
[model]
width = 4
norm = "group"
[data]
samples = 48
""" + "".join(f'[[client]]\nname = "{n}"\ncut = "stem"\n' for n in "abc")


def test_the_strategy_of_the_readme_takes_medians(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert example.count("\n") < 30
    Path("median.py").write_text(example)
    trained = {}
    for strategy, period in (("median:Median", 1), ("averaging", 2)):  # of one round: no means
        Path("own.toml").write_text(OWN.format(strategy=strategy, period=period))
        said = splitee("train", "own.toml")
        assert (said.code, said.err) == (0, "")
        trained[strategy] = load_file("runs/own/checkpoint.safetensors")
    apart, together = trained["averaging"], trained["median:Median"]
    layers = [n.split("/", 2)[2] for n in apart if n.startswith("client/a/")]
    layers += [n.split("/", 2)[2] for n in apart if n.startswith("server/server.a/")]
    assert {"stem.0.weight", "fc.weight"} <= set(layers)
    for layer in layers:
        names = [n for n in apart if n.endswith(f"/{layer}") and "momentum" not in n]
        assert len(names) == 3
        median = np.sort([apart[n] for n in names], axis=0)[1]
        assert all(np.array_equal(together[n], median) for n in names)


def test_the_commands_of_the_readme_are_those_of_the_help() -> None:
    listed = [code(cells[0])[0].split() for cells in rows(section(README, "Commands"))]
    helped = re.findall(r"^. ([a-z]+) {2,}\w", splitee("--help").out, re.MULTILINE)
    assert [words[:2] for words in listed] == [["splitee", name] for name in helped]
    commands = get_group(app).commands
    for _, name, *given in listed:
        parameters = commands[name].params
        arguments = [p.metavar for p in parameters if p.param_type_name == "argument"]
        options = [p.opts[0] for p in parameters if p.param_type_name == "option" and p.required]
        assert given[: len(arguments)] == arguments
        assert given[len(arguments) :: 2] == options


SETTINGS = {code(c[0])[0]: c[1] for c in rows(section(README, "A fleet file"))}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_readme_has_all_values_and_the_default_first_of(name: str) -> None:
    outside = re.sub(r"\([^()]*\)", "", SETTINGS[name])
    field = Fleet.model_fields[name]
    values = BuiltIn if name == "strategy" else field.annotation
    assert code(outside) == list(get_args(values))
    assert code(outside)[0] == field.default


def test_the_readme_has_every_setting_that_is_a_choice() -> None:
    choices = [n for n, f in Fleet.model_fields.items() if "Literal" in str(f.annotation)]
    assert list(SETTINGS) == ["strategy", *choices]


def test_the_readme_names_every_setting_of_the_optimizer() -> None:
    named = {words.split(" = ")[0] for words in code(section(README, "A fleet file"))}
    assert set(OptimizerTable.model_fields) <= named


def test_the_readme_names_every_setting_of_the_data_and_its_values() -> None:
    named = {words.split(" = ")[0].strip('"') for words in code(section(README, "Data"))}
    assert set(DataTable.model_fields) <= named
    assert {*datasets.NAMES, *get_args(Augmentation)} <= named
    partitions = get_args(DataTable.model_fields["partition"].annotation)
    tables = section(README, "Data").split("| `partition` |")
    assert [code(cells[0])[0].strip('"') for cells in rows(tables[1])] == list(partitions)
    assert partitions[0] == DataTable().partition


def test_the_readme_names_every_lever() -> None:
    named = [code(cells[0])[0].split(" = ")[0] for cells in rows(section(README, "Less memory"))]
    assert named == ["capacity", *(f.name for f in fields(Levers))]


def test_the_readme_tells_of_every_board_how_far_it_was_run() -> None:
    told = {code(cells[0])[0]: cells for cells in rows(section(README, "What was run"))}
    assert set(told) == set(boards.load_boards())


# ---- DESIGN.md ----


def test_the_memory_of_a_first_stage_is_what_was_measured() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())
    measured: dict[str, list[str]] = {}
    for row in results["rows"]:
        measured.setdefault(row["levers"], []).append(f"{row['ram_bytes']:,}")
    again = {r["levers"]: f"{r['forward_macs_again']:.0%}" for r in results["rows"][::-1]}
    table = rows(section(DESIGN, "The memory of a first stage"))
    assert table == [[name, *sizes, again[name]] for name, sizes in measured.items()]


def test_the_arenas_in_8_bits_are_those_that_are_planned() -> None:
    text = section(DESIGN, "The memory of a first stage").split("In 8 bits")[1]
    planned = []
    for size, width in ((32, 16), (32, 8), (16, 8)):
        shape = (3, size, size)
        images = Images(np.zeros((6, *shape), np.uint8), np.zeros(6, np.uint8))
        images.x[:] = np.random.default_rng(0).integers(0, 256, images.x.shape)
        room = boards.load_boards()["qemu-m4"].for_assembly.room
        assert room is not None
        build = of_model("resnet8", "layer1", images, "qemu-m4", room, width=width)
        planned.append(f"{build.plan.size:,}")
    assert re.findall(r"\d+,\d+", text) == planned


def test_what_a_link_carries_is_what_was_measured() -> None:
    lost = {"clean": "none", "loss1": "1%", "loss5": "5%"}
    measured: dict[tuple[str, str], list[str]] = {}
    for file, key in (("link.json", ""), ("link_auth.json", " with a key")):
        results = json.loads((ROOT / "benchmarks" / "results" / file).read_text())
        for figure, form in (("goodput_ratio", ".1%"), ("overhead", ".2%")):
            for row in results:
                place = measured.setdefault((row["link"] + key, lost[row["case"]]), [])
                place.append(format(row[figure], form))
    table = rows(section(DESIGN, "What a link carries"))
    assert table == [[*place, *figures] for place, figures in measured.items()]


ENDS = ("exit", "server", "together")


def test_what_a_sample_sends_is_what_was_measured() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "codecs.json").read_text())
    measured = []
    for row in results["rows"]:
        sent = [f"{size:,}" for size in row["bytes_up"].values()]
        least, most = min(row["against_raw"].values()), max(row["against_raw"].values())
        accuracies = [f"{mean(row[f'{end}_accuracy']):.1%}" for end in ENDS]
        measured.append([row["codec"], *sent, f"{least:.2f} to {most:.2f} x", *accuracies])
    raw = results["raw"]
    size = str(raw["bytes_up"])
    measured.append(["raw images", size, size, size, "1", "-", f"{mean(raw['accuracy']):.1%}", "-"])
    assert rows(section(DESIGN, "What a sample sends")) == measured


def test_the_codecs_of_that_table_are_all_there_are() -> None:
    coded = [cells[0] for cells in rows(section(DESIGN, "What a sample sends"))]
    ways = [way for way in coded if not way.startswith(("bottleneck ", "unsure"))]
    assert ways == [*KINDS, "raw images"]
    assert set(KINDS) <= {word.strip('"') for word in code(section(README, "A fleet file"))}


# ---- both ----


@pytest.mark.parametrize("text", [README, DESIGN], ids=["README.md", "DESIGN.md"])
def test_every_file_and_folder_exists_that_is_named_in(text: str) -> None:
    named = {
        name
        for name in code(text)
        if re.fullmatch(r"[\w./-]+(\.(py|c|h|toml|md)|/)", name) and not name.startswith("runs/")
    }
    assert named
    assert {name for name in named - {"segment.c", "fleet.keys.toml"} if not found(name)} == set()


@pytest.mark.parametrize("text", [README, DESIGN], ids=["README.md", "DESIGN.md"])
def test_every_make_target_exists_that_is_named_in(text: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def found(name: str) -> list[Path]:
    """The files or folders of the project that a document may mean."""
    if (ROOT / name).exists():
        return [ROOT / name]
    return [p for folder in SOURCES for p in (ROOT / folder).rglob(name)]


# ---- the walk of DESIGN.md ----


def walk() -> dict[str, tuple[str, ...]]:
    """The functions of the walk, each with the files that stand right behind it."""
    steps: dict[str, tuple[str, ...]] = {}
    for _, functions, happens in rows(section(DESIGN, "The walk of one batch")):
        for name, files in re.findall(r"`([\w.]+)`(?: \(([^)]*)\))?", functions):
            steps[name] = tuple(code(files)) or steps.get(name, ())
        for name in re.findall(r"`(on_\w+)`", happens):
            steps.setdefault(name, ())
    return steps


WALK = walk()
WALKED = sorted({file for files in WALK.values() for file in files})


@cache
def source(name: str) -> str:
    """The text of a C file; segment.c is generated, so one is."""
    if name == "segment.c":
        return to_c(case("pools").build)
    (path,) = found(name)
    return path.read_text(encoding="utf-8")


def defines(file: str, name: str) -> bool:
    """Whether a file of Python or C defines a function of that name."""
    if file.endswith(".c"):
        pattern = rf"^\w[\w *]*\b{name}\([^;{{]*\)\s*\{{"
        return bool(re.search(pattern, source(file), re.MULTILINE))
    (path,) = found(file)
    package = path.relative_to(ROOT).with_suffix("").parts[1:]
    value: object = importlib.import_module(".".join(package))
    for part in name.split("."):
        value = getattr(value, part, None)
    return callable(value)


def test_the_walk_goes_from_the_loop_to_the_kernels_and_back() -> None:
    assert len(WALK) > 25
    assert {"splitee/train.py", "device.py", "device.c", "server.py", "strategies.py"} <= set(
        WALKED
    )


@pytest.mark.parametrize("name", WALK)
def test_the_walk_names_a_function_where_it_is(name: str) -> None:
    files = WALK[name]
    # right behind its name, or else in a file that the walk has for another name
    assert any(defines(file, name) for file in files or WALKED)
