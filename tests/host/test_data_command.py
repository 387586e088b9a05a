"""`splitee data`, and what commands say of augmentations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from host_harness import splitee
from splitee import data
from splitee.fleet import read
from splitee.runs import Run
from splitee_host.cli.common import assembly_of
from splitee_host.data_chart import draw

FLEET = """name = "uneven"
seed = 4
[model]
width = 2
[data]
samples = 900
test_samples = 200
partition = "dirichlet"
alpha = 0.2
{keys}
[[client]]
name = "a"
[[client]]
name = "b"
share = 2.0
[[client]]
name = "c"
{client}
"""


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fleet file in the folder at hand."""
    monkeypatch.chdir(tmp_path)
    return written()


def written(keys: str = "", client: str = "") -> Path:
    """The fleet, with further keys of the data and of its last client."""
    path = Path("fleet.toml")
    path.write_text(FLEET.format(keys=keys, client=client))
    return path


def counts(fleet_file: Path) -> dict[str, list[int]]:
    """How many of each class the members of a fleet are given to train on."""
    members = assembly_of(read(fleet_file)).members
    return {m.name: [int((m.images.y == label).sum()) for label in range(10)] for m in members}


def test_the_table_says_what_clients_train_on(fleet: Path) -> None:
    expected, digits = counts(fleet), data.load("digits")
    expected["all"] = [int((digits.train.y[:900] == label).sum()) for label in range(10)]
    expected["to test on"] = [int((digits.test.y[:200] == label).sum()) for label in range(10)]
    said = splitee("data", fleet)
    assert (said.code, said.err) == (0, "")
    about, head, *lines = (line.rstrip() for line in said.out.splitlines())
    assert about == (
        "digits: 900 images to train on, 200 to test on, of 1x8x8 bytes in 10 classes; dealt by "
        "Dirichlet(0.2)"
    )
    assert head.split() == ["client", "images", *map(str, range(10))]
    for line, (name, row) in zip(lines, expected.items(), strict=True):
        assert line.startswith(name)
        figures = [0 if f == "-" else int(f) for f in line.removeprefix(name).split()]
        assert figures == [sum(row), *row]


def test_json_has_the_same_figures(fleet: Path) -> None:
    said = json.loads(splitee("data", fleet, "--json").out)
    assert {c["client"]: c["counts"] for c in said["clients"]} == counts(fleet)
    assert [c["samples"] for c in said["clients"]] == [sum(c["counts"]) for c in said["clients"]]
    assert (said["train"], said["test"], said["shape"]) == (900, 200, [1, 8, 8])
    assert sum(said["test_counts"]) == 200
    assert said["classes"] == [str(digit) for digit in range(10)]


def test_many_classes_are_told_by_those_that_a_client_has_most_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("twenty.py").write_text(
        "import numpy as np\n"
        "x, y = np.zeros((200, 1, 4, 4), np.uint8), np.arange(20).repeat(10)\n"
        "def make():\n    return (x, y), (x, y)\n"
    )
    Path("f.toml").write_text(
        'name = "x"\n[data]\nname = "twenty:make"\npartition = "classes"\nclasses_per_client = 20\n'
        '[[client]]\nname = "a"\n'
    )
    said = splitee("data", "f.toml")
    assert said.err == ""
    row = next(line for line in said.out.splitlines() if line.startswith("a "))
    assert " ".join(row.split()) == "a 200 20 0: 5%, 1: 5%, 2: 5%, 3: 5%"


def pixels(png: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The colours of a picture."""
    with Image.open(png) as image:
        return np.asarray(image.convert("RGB"))


def test_the_command_draws_a_picture(fleet: Path) -> None:
    said = splitee("data", fleet, "--png", "data.png")
    assert (said.code, said.err) == (0, "")
    assert pixels(Path("data.png")).shape[1:] == (1200, 3)


def test_bars_have_each_class_in_its_colour_as_wide_as_it_is_large(tmp_path: Path) -> None:
    held = np.array([[100, 60], [200, 20]])
    (tmp_path / "bars.png").write_bytes(draw("bars", ["a", "b"], ["cat", "dog"], held))
    drawn = pixels(tmp_path / "bars.png")[:, :1050]  # without the legend
    for colour, column in (((0x1F, 0x77, 0xB4), held[:, 0]), ((0xFF, 0x7F, 0x0E), held[:, 1])):
        widths = (drawn == colour).all(2).sum(1)
        narrow, wide = sorted({int(width) for width in widths if width > 20})
        # but for the white edges
        assert wide / narrow == pytest.approx(column.max() / column.min(), rel=0.08)


def test_many_clients_are_drawn_as_a_map(tmp_path: Path) -> None:
    held = np.zeros((60, 30), int)
    held[:, :15] = 100
    names = [str(i) for i in range(60)]
    (tmp_path / "map.png").write_bytes(draw("map", names, names[:30], held))
    drawn = pixels(tmp_path / "map.png")
    assert drawn.shape == (1080, 1200, 3)
    middle = drawn[540, 100:1000]  # across all classes: dark where there are images, white behind
    dark = middle.sum(1) < 200
    assert dark[:350].all()
    assert (middle[500:] == 255).all()


def test_a_file_that_cannot_be_written_is_named(fleet: Path) -> None:
    said = splitee("data", fleet, "--png", "no/folder.png")
    assert said.code == 1
    assert "no/folder.png: No such file or directory: write where you may" in said.err


AUGMENT = 'augment = ["crop", "flip"]'


def test_who_trains_on_images_as_they_are_is_said(fleet: Path) -> None:
    assert "augment" not in splitee("data", fleet).out
    assert "augment" not in splitee("data", written(AUGMENT)).out  # all are in torch
    remote = 'board = "python"\nlink = "tcp://127.0.0.1:7071"'
    assert "\nc: where ONNX Runtime trains" in splitee("data", written(AUGMENT, remote)).out
    firmware = written(AUGMENT, 'board = "posix"')
    for command in ("data", "plan"):
        said = splitee(command, firmware).out
        assert "augment (crop, flip) is for clients in torch\nc: in firmware, so its" in said


def test_a_client_in_a_process_of_its_own_sees_what_one_in_this_process_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    learnt = {}
    for name, board, names in (
        ("here", "torch", '"crop", "trivial"'),
        ("there", "python", '"crop", "trivial"'),
        ("plain", "torch", ""),
    ):
        Path("f.toml").write_text(
            f'name = "{name}"\nrounds = 2\n[model]\nwidth = 2\n[data]\nsamples = 40\n'
            f'test_samples = 10\naugment = [{names}]\n[[client]]\nname = "a"\nboard = "{board}"\n'
            "cut = 1\n"
        )
        said = splitee("train", "f.toml")
        assert (said.code, said.err) == (0, "")
        learnt[name] = Run(Path("runs") / name).load().states["a"].weights
    for tensor, here in learnt["here"].items():
        assert learnt["there"][tensor] == pytest.approx(here, abs=1e-6)
    assert any(not np.allclose(learnt["plain"][t], w, atol=1e-3) for t, w in learnt["here"].items())
