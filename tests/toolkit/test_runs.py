"""A run's folder: a checkpoint is whole, or it is the one before."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from splitee.client import Place, State
from splitee.errors import CheckpointError
from splitee.runs import Run
from splitee.train import ClientLost, RoundDone, train_batch
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


# A process that saves a second round, larger than the first, in the folder that it is given.
SECOND = """
import os, resource, signal, sys
from pathlib import Path
import numpy as np
from splitee.client import Place, State
from splitee.errors import CheckpointError
from splitee.runs import Run
from splitee.train import RoundDone
run = Run(Path(sys.argv[1]))
states = {"a": State({"w": np.zeros(100_000, np.float32)}, {}, Place(1, 0))}
%s
try:
    run.log(RoundDone(2, states))
    run.save(2, states, {})
except CheckpointError as error:
    print(error)
"""
LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
DEATH = "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"


def second_round(run: Run, trouble: str) -> subprocess.CompletedProcess[str]:
    """Saves it in a process of its own that has this trouble; a first one is there."""
    run.log(RoundDone(1, {"a": SMALL}))
    run.save(1, {"a": SMALL}, {})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SECOND % trouble, str(run.folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_second_round_is_saved_where_there_is_no_trouble(run: Run) -> None:
    done = second_round(run, "")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert run.load().round == 2


def test_a_disk_that_is_full_in_the_midst_of_a_write_leaves_the_checkpoint_before(run: Run) -> None:
    done = second_round(run, LIMIT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"{run.folder}/checkpoint.safetensors.new: File too large: free some space or choose a "
        "folder that you may write to; what was saved before is untouched\n"
    )
    assert run.load().round == 1
    assert not (run.folder / "checkpoint.safetensors.new").exists()


def test_a_kill_before_the_checkpoint_has_its_name_leaves_the_one_before(run: Run) -> None:
    done = second_round(run, DEATH)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL, "", "")
    assert (run.folder / "checkpoint.safetensors.new").stat().st_size > 400_000
    assert run.load().round == 1
    assert [r["round"] for r in run.metrics()] == [1, 2]
    again = Run(run.folder)
    again.resume(1)
    assert [r["round"] for r in again.metrics()] == [1]
    again.save(2, {"a": SMALL}, {})
    assert again.load().round == 2
    assert not (run.folder / "checkpoint.safetensors.new").exists()


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_then_its_name_is(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def syncing(file: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
        fsync(file)

    def renaming(source: Path, target: Path) -> None:
        calls.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", renaming)
    run.log(RoundDone(1, {"a": SMALL}))
    run.save(1, {"a": SMALL}, {})
    # the metrics first: what is noted of a round without its checkpoint is dropped again
    assert calls == ["file", "file", "checkpoint.safetensors", "folder"]


def test_metrics_that_cannot_be_written_say_so(run: Run) -> None:
    run.metrics_file.symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: No space left on device: free some"):
        run.log(RoundDone(1, {"a": SMALL}))


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


# ---- going on ----


def records(run: Run, rounds: int) -> list[bytes]:
    """Notes two records a round; the lines that are there then."""
    for number in range(1, rounds + 1):
        run.log(ClientLost("b", number, "no answer"))
        run.log(RoundDone(number, {"a": SMALL, "b": SMALL}, {"b": "no answer"}))
    return run.metrics_file.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("complete", [0, 1, 2, 3])
def test_what_is_noted_of_rounds_that_are_not_complete_is_dropped(run: Run, complete: int) -> None:
    lines = records(run, 3)
    assert len(lines) == 6
    (run.folder / "summary.json").write_text("{}")
    again = Run(run.folder)
    again.resume(complete)
    assert run.metrics_file.read_bytes().splitlines(keepends=True) == lines[: 2 * complete]
    assert not (run.folder / "summary.json").exists()  # of a run that has not ended yet
    again.log(RoundDone(complete + 1, {"a": SMALL}))
    assert [r["round"] for r in again.took_part()] == list(range(1, complete + 2))


def test_a_record_that_was_cut_short_is_dropped(run: Run) -> None:
    lines = records(run, 2)
    run.metrics_file.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert [r["round"] for r in run.metrics()] == [1, 1]  # the second is not known to be complete
    Run(run.folder).resume(1)
    assert run.metrics_file.read_bytes() == b"".join(lines[:2])


def test_time_goes_on_where_the_last_complete_round_ended(run: Run) -> None:
    line = {"event": "RoundDone", "round": 1, "clients": ["a"], "at_seconds": 1000.0}
    run.metrics_file.write_text(json.dumps(line) + "\n")
    again = Run(run.folder)
    again.resume(1)
    again.log(RoundDone(2, {"a": SMALL}))
    assert 1000.0 <= again.seconds() < 2000.0
