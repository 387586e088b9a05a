"""Ctrl-C while a fleet trains: the first ends the round and saves it, the second ends at once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from host_harness import splitee
from runs_harness import Terminal, assert_same_run, ended
from splitee.runs import Run
from splitee_host.interrupt import Interrupt

FLEET = """\
name = "it"
rounds = 3
strategy = "{strategy}"
gradient = "both"
aggregate = "all"
[model]
width = 2
norm = "group"
[data]
samples = 120
[[client]]
name = "firmware"
board = "posix"
cut = "stem"
[[client]]
name = "process"
board = "{board}"
cut = "layer1"
[[client]]
name = "local"
board = "torch"
cut = "layer2"
"""

BATCHES = 3  # of each client in a round

# `splitee` with its arguments; it asks for Ctrl-C in the n-th batch of the client "local",
# each time when the one before has come
ASKS = """
import os, signal, sys, threading
count, presses = int(sys.argv.pop(1)), int(sys.argv.pop(1))
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests
from splitee.client import LocalClient
from splitee_host.interrupt import Interrupt
taken, take = threading.Semaphore(0), Interrupt._take
def noting(self, number, frame):
    taken.release()
    take(self, number, frame)
Interrupt._take = noting
step, calls = LocalClient.step, []
def asking(self):
    calls.extend([self] * (self.name == "local"))
    if self.name == "local" and len(calls) == count:
        for press in range(1, presses + 1):
            os.write(1, b"<press %d>" % press)
            assert taken.acquire(timeout=60)
    return step(self)
LocalClient.step = asking
from splitee_host.cli import main
main()
"""


def fleet_file(strategy: str) -> Path:
    """The fleet above, in the current folder."""
    path = Path("it.toml")
    board = {"averaging": "python", "sequential": "torch"}[strategy]  # processes take their time
    path.write_text(FLEET.format(strategy=strategy, board=board))
    return path


@pytest.fixture(scope="module")
def wholes() -> dict[str, Run]:
    """Runs that nothing happened to."""
    return {}


def whole(wholes: dict[str, Run], strategy: str) -> Run:
    """The run that nothing happens to, trained once."""
    if strategy not in wholes:
        runs = Path.cwd() / f"whole-{strategy}"
        ended(splitee("train", fleet_file(strategy), "--runs", runs))
        wholes[strategy] = Run(runs / "it")
    return wholes[strategy]


@pytest.mark.parametrize(
    ("presses", "strategy", "complete"),
    [(1, "averaging", 2), (1, "sequential", 2), (2, "averaging", 1)],
    ids=["once-averaging", "once-sequential", "twice"],
)
def test_a_run_that_ctrl_c_ended_in_its_second_round_goes_on_to_the_same_weights(
    presses: int,
    strategy: str,
    complete: int,
    workplace: Path,
    tmp_path: Path,
    wholes: dict[str, Run],
) -> None:
    run = Run(tmp_path / "it")
    words = ("train", fleet_file(strategy), "--runs", tmp_path)
    with Terminal("-c", ASKS, str(BATCHES + 2), str(presses), *words) as terminal:
        for press in range(1, presses + 1):
            terminal.read_until(f"<press {press}>")
            terminal.press(b"\x03")
        assert terminal.end() == 130, terminal.said
    first = "finishing round 2, which is then saved; Ctrl-C again stops at once, and loses it"
    assert {1: first, 2: "stopping: round 2 is lost"}[presses] in terminal.words
    assert terminal.words.endswith(
        f"stopped behind round {complete} of 3: go on with `splitee train --resume {run.folder}`"
    )
    for trouble in ("Traceback", "lost in round", "back in round"):
        assert trouble not in terminal.words
    assert run.load().round == run.complete() == complete
    assert run.summary() is None
    assert not run.is_training()

    ended(splitee("train", "--resume", run.folder))
    assert_same_run(run, whole(wholes, strategy))


def test_ctrl_c_is_asked_for_once_and_raised_from_then_on() -> None:
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with Interrupt(lambda: said.append("ask"), lambda: said.append("abort")) as interrupt:
            before_and_after = [interrupt.asked]
            os.kill(os.getpid(), signal.SIGINT)
            before_and_after.append(interrupt.asked)
            assert before_and_after == [False, True]
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGINT)
        assert said == ["ask", "abort", "abort"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_stays_ignored_where_it_was() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupt(lambda: None, lambda: None) as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interrupt.asked
    finally:
        signal.signal(signal.SIGINT, before)
