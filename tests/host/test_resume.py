"""Runs whose host is killed go on behind their last complete round, bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from host_harness import splitee
from runs_harness import assert_same_run, ended, program, summary_of, without_times
from splitee.runs import Run

ROUNDS = 3
BATCHES = 5  # of each client in a round

FLEET = """\
name = "it"
rounds = 3
strategy = "{strategy}"
gradient = "both"
aggregate = "{aggregate}"
[model]
width = 2
norm = "group"
[data]
samples = 160
[optimizer]
schedule = "cosine"
[[client]]
name = "process"
board = "posix"
cut = "layer1"
[[client]]
name = "local"
board = "torch"
cut = "layer2"
"""

# `splitee` with its arguments, killed in the n-th call of a function
KILLED = """
import importlib, os, signal, sys
place, count = sys.argv.pop(1), int(sys.argv.pop(1))
module, _, path = place.partition(":")
owner = importlib.import_module(module)
*parts, name = path.split(".")
for part in parts:
    owner = getattr(owner, part)
function, calls = getattr(owner, name), []
def counting(*arguments, **named):
    calls.append(name)
    if len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **named)
setattr(owner, name, counting)
from splitee_host.cli import main
main()
"""


def killed_in(place: str, call: int, *words: str | Path) -> str:
    """Runs `splitee words...`, which is killed in that call of a function; what it had said."""
    with program("-c", KILLED, place, str(call), *words) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait() == -signal.SIGKILL, said
    return said


def fleet_file(strategy: str = "averaging", aggregate: str = "all") -> Path:
    """The fleet above, in the current folder."""
    path = Path("it.toml")
    path.write_text(FLEET.format(strategy=strategy, aggregate=aggregate))
    return path


@pytest.fixture(scope="module")
def wholes() -> dict[tuple[str, str], Run]:
    """Runs that nothing happened to."""
    return {}


def whole(
    wholes: dict[tuple[str, str], Run], strategy: str = "averaging", aggregate: str = "all"
) -> Run:
    """The run that nothing happens to, trained once."""
    key = (strategy, aggregate)
    if key not in wholes:
        runs = Path.cwd() / f"whole-{strategy}-{aggregate}"
        ended(splitee("train", fleet_file(*key), "--runs", runs))
        wholes[key] = Run(runs / "it")
        kinds = {name.split("/")[0] for name in load_file(wholes[key].checkpoint_file)}
        assert kinds == {"client", "client-momentum", "server", "server-momentum"}
    return wholes[key]


IN_THE_SECOND = BATCHES + 3  # a client's call in its second round's third batch

# Where the host is killed, and how many rounds are complete by then.
DEATHS = {
    "in-a-batch": ("splitee.client:LocalClient.step", IN_THE_SECOND, 1),
    "first-round": ("splitee.client:LocalClient.step", 3, 0),
    "records-there-checkpoint-not": ("splitee.runs:Run.save", 2, 1),
    # the fleet file is the first that is replaced, the first round's checkpoint the second
    "checkpoint-written-not-renamed": ("os:replace", 3, 1),
    "in-the-test": ("splitee.train:evaluate", 2, 3),
}


@pytest.mark.parametrize(
    ("death", "strategy", "aggregate"),
    [
        ("in-a-batch", "averaging", "all"),
        ("in-a-batch", "averaging", "server"),
        ("in-a-batch", "sequential", "all"),
        ("in-a-batch", "sequential", "server"),
        *[(d, "averaging", "all") for d in DEATHS if d != "in-a-batch"],
    ],
)
def test_a_run_whose_host_was_killed_goes_on_to_the_same_weights(
    death: str,
    strategy: str,
    aggregate: str,
    workplace: Path,
    tmp_path: Path,
    wholes: dict[tuple[str, str], Run],
) -> None:
    expected = whole(wholes, strategy, aggregate)
    place, call, complete = DEATHS[death]
    run = Run(tmp_path / "it")
    killed_in(place, call, "train", fleet_file(strategy, aggregate), "--runs", tmp_path)
    assert run.checkpoint_file.exists() == (complete > 0)
    if complete:
        assert run.load().round == complete
    before = run.checkpoint_file.read_bytes() if complete == ROUNDS else b""
    if death == "records-there-checkpoint-not":
        assert max(r["round"] for r in run.metrics()) == complete + 1

    said = ended(splitee("train", "--resume", run.folder))
    begins = {
        0: "no round is complete yet: beginning with the first",
        ROUNDS: f"all {ROUNDS} rounds are complete: only testing",
    }.get(complete, f"going on behind round {complete} of {ROUNDS}")
    assert said.startswith(f"{run.folder}/: {begins}")
    shown = {line.split()[1] for line in said.splitlines() if line.startswith("round ")}
    assert shown == {str(number) for number in range(complete + 1, ROUNDS + 1)}
    assert_same_run(run, expected)
    if complete == ROUNDS:
        assert run.checkpoint_file.read_bytes() == before


def test_a_run_is_killed_from_outside_twice_and_still_ends_with_the_same_weights(
    workplace: Path, tmp_path: Path, wholes: dict[tuple[str, str], Run]
) -> None:
    expected = whole(wholes)
    run = Run(tmp_path / "it")
    for number, words in (
        (2, ("train", fleet_file(), "--runs", tmp_path)),
        (3, ("train", "--resume", run.folder)),
    ):
        with program("-m", "splitee_host.cli", *words) as process:
            assert process.stdout is not None
            for line in process.stdout:  # a client's pass of that round is done, another's may be
                if line.startswith(f"round {number} "):
                    process.kill()
                    break
            process.stdout.read()
            assert process.wait() == -signal.SIGKILL
        assert run.load().round in (number - 1, number)
    seconds = run.seconds()
    ended(splitee("train", "--resume", run.folder))
    assert_same_run(run, expected)
    assert summary_of(run)["wall_s"] > run.seconds() >= seconds > 0
    rounds = [r["at_seconds"] for r in run.metrics() if r["event"] == "RoundDone"]
    assert rounds == sorted(rounds)


def test_adamw_and_the_draws_of_clients_go_on_bit_for_bit(workplace: Path, tmp_path: Path) -> None:
    text = FLEET.format(strategy="averaging", aggregate="all")
    text = text.replace("[model]", "seed = 2\nparticipation = 0.67\nmin_clients = 2\n[model]")
    text = text.replace("[optimizer]", '[optimizer]\nkind = "adamw"\nwarmup = 2')
    text = text.replace('"posix"', '"posix"\noptimizer = "sgd"\nlearning_rate = 0.05')
    text += '[[client]]\nname = "third"\ncut = "stem"\n'
    path = Path("it.toml")
    path.write_text(text)
    whole, run = Run(tmp_path / "whole" / "it"), Run(tmp_path / "it")
    ended(splitee("train", path, "--runs", whole.folder.parent))
    killed_in("splitee.attendance:train_pass", 4, "train", path, "--runs", tmp_path)
    assert run.load().round == 1
    ended(splitee("train", "--resume", run.folder))
    assert_same_run(run, whole)
    assert [len(r["clients"]) for r in run.took_part()] == [2] * ROUNDS
    memory = load_file(run.checkpoint_file)
    assert "client-momentum/local/stem.0.weight.exp_avg_sq" in memory


def test_a_run_that_is_complete_is_only_tested(
    workplace: Path, tmp_path: Path, wholes: dict[tuple[str, str], Run]
) -> None:
    run = whole(wholes)
    before, summary = run.checkpoint_file.read_bytes(), summary_of(run)
    (run.folder / "summary.json").unlink()
    metrics = run.metrics()  # in the file, a round's come as they were told
    said = ended(splitee("train", "--resume", run.folder))
    assert said.startswith(f"{run.folder}/: all 3 rounds are complete: only testing")
    assert run.checkpoint_file.read_bytes() == before
    assert run.metrics() == metrics
    again = summary_of(run)
    assert without_times(again["clients"]) == without_times(summary["clients"])
    for figure in ("ms_per_sample", "bytes_up_per_sample"):  # of all rounds, which went before
        assert [c[figure] for c in again["clients"]] == [c[figure] for c in summary["clients"]]


def test_a_new_run_says_that_it_replaces_one_that_could_go_on(
    workplace: Path, tmp_path: Path
) -> None:
    path = fleet_file()
    killed_in("splitee.client:LocalClient.step", IN_THE_SECOND, "train", path, "--runs", tmp_path)
    folder = tmp_path / "it"
    said = " ".join(ended(splitee("train", path, "--runs", tmp_path)).split())
    assert said.startswith(
        f"{folder}/ holds a run that ended behind round 1 of 3; this one takes its place "
        f"(`splitee train --resume {folder}` goes on with it instead)"
    )
    assert "takes its place" not in ended(splitee("train", path, "--runs", tmp_path))


# ---- what is refused ----


def refused(*words: str | Path) -> str:
    """What is said by a command that a user's mistake ends."""
    said = splitee(*words)
    assert said.code == 1
    return " ".join(said.err.split()).removeprefix("error: ")


def test_train_takes_a_fleet_file_or_a_run(workplace: Path, tmp_path: Path) -> None:
    for words in ((), (fleet_file(), "--resume", tmp_path)):
        assert refused("train", *words) == (
            "train takes a fleet file, or --resume with the folder of a run, whose own copy of the "
            "fleet file it then uses: give one of the two"
        )


def test_resume_refuses_a_folder_that_is_no_run(workplace: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        said = refused("train", "--resume", folder)
        assert said == f"{folder}/fleet.toml: no such file: is {folder} the folder of a run?"


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (
            'name = "local"',
            'name = "other"',
            "the checkpoint is of local, process, the fleet file asks for other, process",
        ),
        (
            'cut = "layer2"',
            'cut = "layer1"',
            "the checkpoint's local has other layers than the fleet file asks for "
            "(exits.layer1.linear.bias)",
        ),
        (
            'strategy = "averaging"',
            'strategy = "sequential"',
            "the checkpoint is of server.local, server.process, the fleet file asks for server",
        ),
    ],
    ids=["clients", "cut", "strategy"],
)
def test_resume_refuses_a_checkpoint_of_another_fleet(
    before: str,
    after: str,
    reason: str,
    workplace: Path,
    tmp_path: Path,
    wholes: dict[tuple[str, str], Run],
) -> None:
    folder = tmp_path / "it"
    folder.mkdir()
    for name in ("checkpoint.safetensors", "metrics.jsonl", "summary.json"):
        (folder / name).write_bytes((whole(wholes).folder / name).read_bytes())
    text = whole(wholes).fleet_file.read_text()
    (folder / "fleet.toml").write_text(text.replace(before, after))
    said = refused("train", "--resume", folder)
    assert said == f"{reason}: take the fleet file that it was trained with"
    for name in ("checkpoint.safetensors", "metrics.jsonl", "summary.json"):
        assert (folder / name).read_bytes() == (whole(wholes).folder / name).read_bytes()


def test_resume_refuses_a_checkpoint_that_is_none(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(fleet_file().read_text())
    (tmp_path / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    assert "not a checkpoint of ours" in refused("train", "--resume", tmp_path)
