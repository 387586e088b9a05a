"""`splitee watch`: a run in another terminal, while it trains, when it is cut short, at its end."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from host_harness import splitee
from runs_harness import Terminal, ended, program
from splitee.runs import Run

FLEET = """\
name = "it"
rounds = 3
evaluate_every = 3
[model]
width = 2
[data]
samples = 80
[[client]]
name = "near"
cut = "layer1"
[[client]]
name = "far"
cut = "layer2"
"""

BATCHES = 3  # of each client in a round

# `splitee` with its arguments; its client "near" waits in its n-th batch until the input has a line
WAITS = """
import sys
count = int(sys.argv.pop(1))
from splitee.client import LocalClient
step, calls = LocalClient.step, []
def waiting(self):
    if self.name == "near":
        calls.append(self)
        if len(calls) == count:
            print("waits", flush=True)
            sys.stdin.readline()
    return step(self)
LocalClient.step = waiting
from splitee_host.cli import main
main()
"""


def fleet_file() -> Path:
    """The fleet above, in the current folder."""
    path = Path("it.toml")
    path.write_text(FLEET)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A run that has ended, and what `splitee train` said, without a terminal."""
    runs = tmp_path_factory.mktemp("runs")
    (runs / "it.toml").write_text(FLEET)
    said = ended(splitee("train", runs / "it.toml", "--runs", runs))
    return Run(runs / "it"), said


@contextmanager
def training(runs: Path, batch: int) -> Iterator[Any]:
    """A process that trains the fleet and stands still in that batch; a line lets it go on."""
    with program("-c", WAITS, str(batch), "train", fleet_file(), "--runs", runs) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "waits\n":
                break
        yield process


def rounds(said: str) -> list[str]:
    """The lines that tell of rounds."""
    return [line for line in said.splitlines() if line.startswith("round ")]


def test_a_run_that_has_ended_is_told_as_it_was_trained(whole: tuple[Run, str]) -> None:
    run, trained = whole
    said = ended(splitee("watch", run.folder))
    assert rounds(said) == rounds(trained)
    assert len(rounds(said)) == 3 * 2 + 2  # every client's pass, and its one test
    table = trained.splitlines()[-4:-1]
    assert [words.split()[0] for words in table] == ["client", "near", "far"]
    assert said.splitlines()[-4:-1] == table
    assert said.splitlines()[-1].startswith("3 rounds in ")


def test_a_test_behind_the_last_round_finds_what_the_one_at_the_end_does(
    whole: tuple[Run, str],
) -> None:
    run, _ = whole
    summary = run.summary()
    assert summary is not None
    at_the_end = {c.name: (c.exit_accuracy, c.server_accuracy) for c in summary[1]}
    tests = [r for r in run.metrics() if r["event"] == "Evaluated"]
    assert [r["round"] for r in tests] == [3, 3]
    found = {r["client"]: (r["exit_accuracy"], r["server_accuracy"]) for r in tests}
    assert found == at_the_end


def test_where_it_stands_is_shown_once(whole: tuple[Run, str]) -> None:
    run, _ = whole
    said = ended(splitee("watch", run.folder, "--once"))
    assert "3 of 3 rounds" in said
    lines = {words[0]: words for line in said.splitlines() if (words := line.split())}
    assert (lines["near"][1], lines["far"][1]) == ("done", "done")
    noted = json.loads(ended(splitee("watch", run.folder, "--json")))
    assert (noted["state"], noted["round"], noted["rounds"]) == ("ended", 4, 3)
    last = {r["client"]: r for r in run.metrics() if r["event"] == "ClientDone"}
    tested = {r["client"]: r for r in run.metrics() if r["event"] == "Evaluated"}
    for client in noted["clients"]:
        name = client["name"]
        assert client["exit_loss"] == last[name]["exit_loss"]
        assert client["bytes_up"] == sum(
            r["bytes_up"] for r in run.metrics() if r.get("client") == name and "bytes_up" in r
        )
        assert client["server_accuracy"] == tested[name]["server_accuracy"]


def test_a_run_that_was_cut_short_says_where_and_how_to_go_on(
    whole: tuple[Run, str], tmp_path: Path
) -> None:
    folder = tmp_path / "a run"
    shutil.copytree(whole[0].folder, folder)
    (folder / "summary.json").unlink()
    said = splitee("watch", folder)
    assert (said.code, said.err) == (1, "")
    words = " ".join(said.out.split())
    assert words.endswith(
        f"{folder}/: it stopped behind round 3 of 3, and nobody trains it: go on with "
        f"`splitee train --resume '{folder}'`"
    )
    assert json.loads(ended(splitee("watch", folder, "--json")))["state"] == "stopped"
    (folder / "checkpoint.safetensors").unlink()
    assert "it stopped in its first round" in ended(splitee("watch", folder, "--once"))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        said = splitee("watch", folder)
        assert said.code == 1
        assert " ".join(said.err.split()) == (
            f"error: {folder}/progress.json: No such file or directory: is {folder} the folder "
            "of a run?"
        )


def test_a_run_is_watched_in_two_terminals_until_its_end(workplace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it"
    with training(tmp_path, BATCHES + 2) as process:
        noted = json.loads(ended(splitee("watch", folder, "--json")))
        assert (noted["state"], noted["round"]) == ("training", 2)
        assert "training round 2 of 3" in ended(splitee("watch", folder, "--once"))
        refused = splitee("train", "--resume", folder)
        assert refused.code == 1
        assert f"{folder}: another process trains in it" in " ".join(refused.err.split())
        command = ("-m", "splitee_host.cli", "watch", folder)
        with Terminal(*command) as one, Terminal(*command) as other:
            for terminal in (one, other):
                terminal.read_until("of 3 rounds")
            process.stdin.write("go on\n")
            process.stdin.flush()
            process.stdout.read()
            assert process.wait() == 0
            for terminal in (one, other):
                assert terminal.end() == 0, terminal.said
                assert "3 rounds in " in terminal.words


def test_who_watches_a_run_that_is_killed_is_told(workplace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it"
    with training(tmp_path, BATCHES + 2) as process:
        with Terminal("-m", "splitee_host.cli", "watch", folder) as terminal:
            terminal.read_until("of 3 rounds")
            process.kill()
            assert terminal.end() == 1, terminal.said
        assert process.wait() == -signal.SIGKILL
    assert "it stopped behind round 1 of 3, and nobody trains it" in terminal.words


def test_ctrl_c_leaves_a_watch_and_the_run_alone(workplace: Path, tmp_path: Path) -> None:
    with training(tmp_path, 2) as process:
        with Terminal("-m", "splitee_host.cli", "watch", tmp_path / "it") as terminal:
            terminal.read_until("of 3 rounds")
            terminal.press(b"\x03")
            assert terminal.end() == 130
        assert "Traceback" not in terminal.words
        assert process.poll() is None


def test_watching_does_not_wait_for_torch(whole: tuple[Run, str]) -> None:
    code = (
        "import sys; from splitee_host.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print('heavy:', *{'torch', 'sklearn', 'matplotlib'} & set(sys.modules))"
    )
    with program("-c", code, "watch", whole[0].folder) as process:
        assert process.stdout is not None
        assert process.stdout.read().splitlines()[-1] == "heavy:"
        assert process.wait() == 0
