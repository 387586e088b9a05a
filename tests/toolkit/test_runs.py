"""A run's folder: a checkpoint is whole, or it is the one before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from splitee.client import Place, State
from splitee.errors import CheckpointError
from splitee.runs import Run
from splitee.train import RoundDone, train_batch
from toolkit.networks import arrays, local_client, random_images, resnet, server_for, unequal
from toolkit.rounds import SETTINGS

SMALL = State(
    {"layer.0.weight": np.array([[1 / 3, -0.0], [1e-42, np.nan]], np.float32)},
    {"layer.0.weight": np.zeros((2, 2), np.float32)},
    Place(samples=300, seed=2**32 - 1, epoch=7, position=299, steps=133),
)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_checkpoint_gives_back_every_bit(run: Run, norm: str) -> None:
    model = resnet(norm=norm)
    client = local_client(model, "layer1", SETTINGS, random_images(8), capacity=4)
    server = server_for(model, ["layer1"], SETTINGS)
    train_batch(client, server, 4)
    states = {"a": client.state(), "b": SMALL}
    run.save(12, states, {"server.a": server})
    read = run.load()
    assert read.round == 12
    assert list(read.states) == ["a", "b"]
    for name, state in states.items():
        assert read.states[name].place == state.place
        for part in ("weights", "momentum"):
            found, expected = getattr(read.states[name], part), getattr(state, part)
            assert {k: v.tobytes() for k, v in found.items()} == {
                k: v.tobytes() for k, v in expected.items()
            }
            assert {k: v.shape for k, v in found.items()} == {
                k: v.shape for k, v in expected.items()
            }
    assert unequal(read.servers["server.a"], arrays(server.tensors())) == []
    assert unequal(read.server_momentum["server.a"], arrays(server.momentum())) == []


def test_a_state_without_momentum_comes_back_without(run: Run) -> None:
    run.save(1, {"a": State(SMALL.weights, {}, SMALL.place)}, {})
    assert run.load().states["a"].momentum == {}


def folder_in_the_way(temporary: Path) -> None:
    """The temporary file cannot be opened."""
    temporary.mkdir()


def full_disk(temporary: Path) -> None:
    """The temporary file can be opened, and not written: no space is left."""
    temporary.symlink_to("/dev/full")


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [(folder_in_the_way, "Is a directory"), (full_disk, "No space left on device")],
    ids=["folder-in-the-way", "full-disk"],
)
def test_a_write_that_fails_leaves_the_checkpoint_before(
    run: Run, obstacle: Callable[[Path], None], reason: str
) -> None:
    run.save(1, {"a": SMALL}, {})
    before = run.checkpoint_file.read_bytes()
    obstacle(run.folder / "checkpoint.safetensors.new")
    with pytest.raises(CheckpointError, match=f"{reason}: free some space or choose a folder"):
        run.save(2, {"a": SMALL}, {})
    assert run.checkpoint_file.read_bytes() == before
    assert run.load().round == 1


def test_a_checkpoint_replaces_the_one_before_and_leaves_nothing_else(run: Run) -> None:
    for number in (1, 2):
        run.save(number, {"a": SMALL}, {})
        assert run.load().round == number
    assert sorted(p.name for p in run.folder.iterdir()) == ["checkpoint.safetensors", "fleet.toml"]


def test_the_same_round_is_the_same_file_byte_for_byte(run: Run) -> None:
    client = local_client(resnet(), "layer1", SETTINGS, random_images(8), capacity=4)
    files = []
    for _ in range(8):
        run.save(1, {"a": client.state(), "b": SMALL}, {})
        files.append(run.checkpoint_file.read_bytes())
    assert len(set(files)) == 1


def torn(path: Path) -> None:
    """The last byte is missing."""
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    """No byte is left."""
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    """Tensors of somebody else."""
    save_file({"weight": np.zeros(2, np.float32)}, path)


def no_tensors(path: Path) -> None:
    """A good file that holds nothing."""
    save_file({}, path)


def clients_without_weights(path: Path) -> None:
    """Places of a client, and no weights."""
    save_file({}, path, {"run": '{"round": 1, "places": {"a": {"samples": 1, "seed": 2}}}'})


def another_kind_of_place(path: Path) -> None:
    """A place with a key of another version."""
    run = '{"round": 1, "places": {"a": {"samples": 1, "seed": 2, "lap": 3}}}'
    save_file({"client/a/w": np.zeros(2, np.float32)}, path, {"run": run})


def a_folder(path: Path) -> None:
    """A folder of that name."""
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [torn, emptied, foreign, no_tensors, clients_without_weights, another_kind_of_place, a_folder],
    ids=lambda damage: damage.__name__,
)
def test_says_of_a_file_that_is_no_checkpoint_of_ours(
    run: Run, damage: Callable[[Path], None]
) -> None:
    run.save(1, {"a": SMALL}, {})
    damage(run.checkpoint_file)
    with pytest.raises(CheckpointError) as error:
        run.load()
    assert str(error.value).startswith(f"{run.checkpoint_file}: not a checkpoint of ours: ")


def test_says_where_no_checkpoint_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint: is .* the folder of a run\?$"):
        Run(tmp_path).load()


def test_a_run_begins_in_place_of_the_one_before(run: Run) -> None:
    run.save(1, {"a": SMALL}, {})
    run.log(RoundDone(1, {"a": SMALL}))
    assert run.metrics()
    run.begin('name = "again"\n')
    assert [p.name for p in run.folder.iterdir()] == ["fleet.toml"]
    assert run.fleet_file.read_text(encoding="utf-8") == 'name = "again"\n'


def test_says_where_a_run_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(CheckpointError, match=r"Not a directory: free some space or choose"):
        Run(file / "run").begin("")
