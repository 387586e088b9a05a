"""What a run's folder tells another process: who trains in it, where it stands, what is new."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from splitee.client import Place, State
from splitee.errors import CheckpointError
from splitee.progress import Progress
from splitee.runs import Record, Run
from splitee.train import BatchDone, ClientDone, ClientLost, Evaluated, RoundDone

STATE = State({}, {}, Place(samples=8, seed=0))


def lost(number: int) -> ClientLost:
    """Client b is lost in that round."""
    return ClientLost("b", number, "unplugged")


def complete(number: int) -> RoundDone:
    """That round is."""
    return RoundDone(number, {"a": STATE, "b": STATE}, {"b": "unplugged"})


# ---- the progress ----


def moved() -> Progress:
    """One in which everything that there is to know is known."""
    progress = Progress({"a": 8, "b": 20}, 5, first=2, seconds=100.0)
    done = ClientDone("a", 2, 8, 8, 1.5, 0.5, 2.5, 0.25, 2048, 64, 2000, STATE)
    for event in (
        BatchDone("b", 4, 4, 1.0, 2, 0.5), done, lost(2), Evaluated("a", 2, 0.5, 0.25),
        complete(2), BatchDone("a", 4, 0, 0.75, 2, None),
    ):  # fmt: skip
        progress.take(event)
    return progress


def test_a_progress_comes_back_from_its_file_as_it_was(run: Run) -> None:
    run.note(moved(), now=True)
    noted = json.loads(run.progress_file.read_text())
    found = run.progress()
    assert found.to_json() == noted
    assert (found.rounds, found.round, found.share) == (5, 3, 0.5)
    a, b = found.clients["a"], found.clients["b"]
    assert (a.seen, a.rate, a.exit_loss, a.server_loss) == (4, 32.0, 0.75, 2.5)
    assert (a.exit_accuracy, a.server_accuracy, a.lost) == (0.5, 0.25, None)
    assert (b.seen, b.lost) == (0, "unplugged")


def test_time_stands_still_in_the_progress_of_a_run_that_nobody_trains(run: Run) -> None:
    run.note(moved(), now=True)
    stopped = run.progress()
    assert stopped.seconds == stopped.seconds
    with run.ours():
        going = run.progress()
        before, deadline = going.seconds, time.monotonic() + 10
        while going.seconds == before and time.monotonic() < deadline:
            pass
    assert going.seconds > before > stopped.seconds >= 100


def test_a_batch_is_noted_only_when_it_is_time_and_a_round_always(run: Run) -> None:
    progress = moved()
    run.note(progress, now=True)
    before = run.progress_file.read_bytes()
    progress.take(BatchDone("a", 4, 4, 0.25, 2, None))
    run.note(progress)
    assert run.progress_file.read_bytes() == before
    run.note(progress, now=True)
    assert run.progress().clients["a"].seen == 8


def test_a_progress_that_cannot_be_noted_costs_no_round(run: Run) -> None:
    (run.folder / "progress.json.new").symlink_to("/dev/full")
    run.note(moved(), now=True)
    assert not run.progress_file.exists()


@pytest.mark.parametrize("content", ["", "[]", '{"round": 3}', '{"noted": "?"}'])
def test_says_of_a_file_that_is_no_progress_of_ours(run: Run, content: str) -> None:
    run.progress_file.write_text(content)
    with pytest.raises(CheckpointError, match=r"progress.json: no progress of ours: "):
        run.progress()


def test_says_where_no_run_has_begun(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is .* the folder of a run\?$"):
        Run(tmp_path / "nothing").progress()


def test_a_run_that_begins_has_no_progress_of_the_one_before(run: Run) -> None:
    run.note(moved(), now=True)
    run.begin("")
    assert not run.progress_file.exists()


# ---- who trains ----

TRAINS = """
import sys
from pathlib import Path
from splitee.runs import Run
with Run(Path(sys.argv[1])).ours():
    print("trains", flush=True)
    sys.stdin.read()
"""


@contextmanager
def trainer(run: Run) -> Iterator[subprocess.Popen[str]]:
    """A process that trains in the folder until its input ends."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", TRAINS, str(run.folder)],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "trains\n"
        yield process


def ended(process: subprocess.Popen[str]) -> None:
    """It comes to its end."""
    assert process.stdin is not None
    process.stdin.close()


def killed(process: subprocess.Popen[str]) -> None:
    """It has no time for anything."""
    process.kill()


@pytest.mark.parametrize("end", [ended, killed], ids=lambda end: end.__name__)
def test_a_folder_is_that_of_a_training_for_as_long_as_its_process_lives(
    run: Run, end: Callable[[subprocess.Popen[str]], None]
) -> None:
    assert not run.is_training()
    with trainer(run) as process:
        assert run.is_training()
        words = f"^{run.folder}: another process trains in it: wait until it has ended"
        with pytest.raises(CheckpointError, match=words), run.ours():
            pass
        end(process)
        process.wait()
        assert not run.is_training()
    with run.ours():
        assert run.is_training()
    assert not run.is_training()


def test_a_folder_that_is_not_there_trains_nobody(tmp_path: Path) -> None:
    assert not Run(tmp_path / "nothing").is_training()


# ---- what is new ----


def rounds(records: Sequence[Record]) -> list[tuple[str, int]]:
    """What happened, and in which round."""
    return [(r["event"], r["round"]) for r in records]


def test_who_follows_is_told_everything_once_as_it_comes(run: Run) -> None:
    with closing(run.follow()) as news:
        assert next(news) == []
        run.log(lost(1))
        assert rounds(next(news)) == [("ClientLost", 1)]
        assert next(news) == []
        run.log(complete(1))
        run.log(lost(2))
        assert rounds(next(news)) == [("RoundDone", 1), ("ClientLost", 2)]
    with closing(run.follow()) as news:
        assert len(next(news)) == 3


def test_a_line_is_told_when_it_is_whole(run: Run) -> None:
    run.log(lost(1))
    whole = run.metrics_file.read_bytes()
    with closing(run.follow()) as news:
        run.metrics_file.write_bytes(whole[:20])
        assert next(news) == []
        with run.metrics_file.open("ab") as file:
            file.write(whole[20:])
        assert rounds(next(news)) == [("ClientLost", 1)]


def test_of_a_run_that_goes_on_only_what_comes_is_told(run: Run) -> None:
    for event in (lost(1), complete(1), lost(2)):
        run.log(event)
    with closing(run.follow()) as news:
        assert len(next(news)) == 3
        again = Run(run.folder)
        again.resume(1)
        again.log(lost(2))
        assert rounds(next(news)) == [("ClientLost", 2)]
        again.log(complete(2))
        assert rounds(next(news)) == [("RoundDone", 2)]


def test_a_new_run_in_the_same_folder_is_told_from_its_beginning(run: Run) -> None:
    for event in (complete(1), complete(2)):
        run.log(event)
    with closing(run.follow()) as news:
        assert len(next(news)) == 2
        run.begin("")
        assert next(news) == []
        run.log(complete(1))
        assert rounds(next(news)) == [("RoundDone", 1)]
