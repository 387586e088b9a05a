"""What a run shows of its rounds, and of clients that are lost, come back, or miss a round."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from splitee.client import Place, State
from splitee.progress import Progress
from splitee.runs import Run
from splitee.train import (
    BatchDone,
    ClientBack,
    ClientDone,
    ClientLost,
    Evaluated,
    Event,
    RoundDone,
    RoundFailed,
)
from splitee_host.screen import Screen, duration, line_of, live_table

STATE = State({}, {}, Place(8, 0))
STATES = {"a": STATE, "b": STATE}


def batch(client: str) -> BatchDone:
    """A batch of four samples."""
    return BatchDone(client, 4, 4, 1.0, 2, 1.0)


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(clock: Clock) -> Progress:
    """Two clients, in the third of five rounds."""
    return Progress({"a": 8, "b": 20}, 5, first=3, clock=clock)


@pytest.fixture
def screen(progress: Progress) -> Screen:
    """What shows it."""
    return Screen(Console(file=io.StringIO(), width=100), progress)


@pytest.fixture
def run(tmp_path: Any) -> Run:
    """The folder of a run that has begun."""
    run = Run(tmp_path)
    run.begin("")
    return run


def said(screen: Screen, run: Run, *events: Event) -> list[str]:
    """What stands below each other after those events, without a terminal."""
    for event in events:
        screen.progress.take(event)
        screen.tell(run.log(event))
    file = screen._console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().splitlines()


def shown(progress: Progress, rows: int | None = None, width: int = 100) -> list[str]:
    """The lines of the table, as a terminal would show them."""
    console = Console(file=io.StringIO(), width=width)
    console.print(live_table(progress, rows))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().splitlines()


def table(progress: Progress) -> dict[str, list[str]]:
    """The first cells of each client's line."""
    lines = [line.split() for line in shown(progress)]
    return {words[0]: words[1:3] for words in lines if words[0] in STATES and words[1] != "is"}


def test_it_begins_with_the_round_that_is_next(progress: Progress) -> None:
    assert table(progress) == {"a": ["waiting", "0/8"], "b": ["waiting", "0/20"]}
    assert "2 of 5 rounds" in shown(progress)[0]


def test_a_replayed_pass_is_counted_from_its_beginning(screen: Screen, run: Run) -> None:
    events = (batch("b"), batch("b"), ClientBack("b", 3, "no answer"), batch("b"))
    assert said(screen, run, *events) == ["back in round 3: b"]
    assert table(screen.progress)["b"] == ["training", "4/20"]


def test_who_is_lost_misses_rounds_until_it_is_back(screen: Screen, run: Run) -> None:
    said(screen, run, batch("b"), ClientLost("b", 3, 'client "b": no answer'))
    assert table(screen.progress)["b"][0] == "lost"
    missing = {"b": "no answer"}
    said(screen, run, RoundDone(3, STATES, missing), RoundDone(4, STATES, missing))
    assert table(screen.progress) == {"a": ["waiting", "0/8"], "b": ["lost", "0/20"]}
    assert shown(screen.progress)[-1] == 'b is away: client "b": no answer'
    assert said(screen, run, ClientBack("b", 5, "no answer")) == [
        'lost in round 3: client "b": no answer',
        "round 3 is complete without b",
        "round 4 is complete without b",
        "back in round 5: b",
    ]
    assert table(screen.progress)["b"] == ["waiting", "0/20"]


def test_a_round_that_does_not_count_is_told(screen: Screen, run: Run) -> None:
    lines = said(screen, run, batch("a"), RoundFailed(3, ["a"], 2))
    assert lines == ["round 3 does not count: 1 of the 2 clients that it takes completed it"]
    assert table(screen.progress)["a"] == ["waiting", "0/8"]  # and begins again


def test_who_was_not_drawn_is_not_missed(screen: Screen, run: Run) -> None:
    assert said(screen, run, RoundDone(3, STATES, {}, {"a"})) == []


def test_a_round_with_everyone_says_no_more_than_their_passes(screen: Screen, run: Run) -> None:
    done = ClientDone("a", 3, 8, 8, 1.5, 0.5, 2.5, 0.5, 2048, 0, 2000, STATE)
    (line,) = said(screen, run, done, RoundDone(3, STATES))
    assert line.startswith("round 3  a ")


def test_a_client_that_has_finished_its_pass_is_done_until_the_next_round(
    progress: Progress,
) -> None:
    progress.take(ClientDone("a", 3, 8, 8, 1.5, 0.5, None, 0.5, 2048, 0, 2000, STATE))
    assert table(progress)["a"] == ["done", "8/8"]
    assert shown(progress)[3].split()[3:] == ["16", "0.0", "KB", "0.0", "KB", "1.500", "-"]
    progress.take(RoundDone(3, STATES))
    assert table(progress)["a"] == ["waiting", "0/8"]


def test_the_table_has_columns_for_tests_once_there_was_one(progress: Progress) -> None:
    before = shown(progress)
    assert not any("test" in line for line in before)
    progress.take(Evaluated("b", 2, 0.125, 0.5))
    lines = shown(progress)
    assert lines[2].split()[-2:] == ["test", "test"]
    assert lines[3].split()[-2:] == ["-", "-"]
    assert lines[4].split()[-2:] == ["12.5%", "50.0%"]


def test_the_table_fits_a_terminal_of_80_columns(clock: Clock) -> None:
    class Count:
        up = down = 9999 << 20

    progress = Progress({"process": 1437}, 12, traffic={"process": Count()}, clock=clock)
    done = ClientDone("process", 1, 1437, 0, 9.5, 0.5, 9.5, 0.1, 0, 0, 0, STATE)
    progress.take(done)
    progress.take(Evaluated("process", 1, 1.0, 1.0))
    line = shown(progress, width=80)[3]
    assert line.split() == [
        "process", "done", "1437/1437", "14370", "9,999", "MB", "9,999", "MB", "9.500", "9.500",
        "100.0%", "100.0%",
    ]  # fmt: skip


def test_a_large_fleet_shows_who_is_away_and_who_is_behind(clock: Clock) -> None:
    progress = Progress({f"c{i:02}": 8 for i in range(40)}, 2, clock=clock)
    for i in range(40):
        if i not in (7, 30):
            progress.take(batch(f"c{i:02}"))
    progress.take(ClientLost("c21", 1, "unplugged"))
    lines = shown(progress, rows=4)
    assert [line.split()[0] for line in lines[3:6]] == ["c07", "c21", "c30"]
    assert lines[6:] == ["and 37 clients that are further on", "c21 is away: unplugged"]


# ---- what takes how long ----


def test_a_rate_is_that_of_the_pass_also_where_it_does_not_begin_with_the_round(
    progress: Progress, clock: Clock
) -> None:
    rates = []
    for passed in (60, 2, 3):  # another client's turn comes first
        clock.now += passed
        progress.take(batch("b"))
        rates.append(progress.clients["b"].rate)
    assert rates == [None, 4 / 2, 8 / 5]
    progress.take(ClientDone("b", 3, 20, 20, 1.5, 0.5, 2.5, 8.0, 2048, 0, 2000, STATE))
    assert progress.clients["b"].rate == 20 / 8


def test_the_time_left_is_told_by_what_is_done_of_the_first_round(
    progress: Progress, clock: Clock
) -> None:
    assert (progress.round_seconds, progress.seconds_left) == (None, None)
    clock.now += 6
    progress.take(batch("a"))
    assert progress.share == 0  # the other one has done nothing yet
    progress.take(batch("b"))  # a fifth of its pass: 30 seconds a round, of three rounds
    assert progress.round_seconds == pytest.approx(30)
    assert progress.seconds_left == pytest.approx(84)


def test_the_time_left_is_told_by_the_last_five_rounds(clock: Clock) -> None:
    progress = Progress({"a": 8}, 10, clock=clock)
    for number, lasted in enumerate((1000, 10, 20, 30, 40, 50), 1):
        clock.now += lasted
        progress.take(RoundDone(number, {"a": STATE}))
    assert progress.round_seconds == 30
    assert progress.seconds_left == 4 * 30
    clock.now += 12
    assert progress.seconds_left == 4 * 30 - 12
    clock.now += 100  # longer than the others took
    assert progress.seconds_left == 3 * 30


def test_the_time_of_a_run_that_goes_on_has_that_of_its_rounds_before(clock: Clock) -> None:
    progress = Progress({"a": 8}, 10, first=7, seconds=3600.0, clock=clock)
    clock.now += 5
    assert progress.seconds == 3605


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (12.3, "12 s"), (59.9, "60 s"), (60, "1:00"), (185, "3:05"),
     (7385, "2:03:05")],
)  # fmt: skip
def test_a_time_is_written_as(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---- records ----


RECORDS: list[tuple[Mapping[str, Any], str | None, str | None]] = [
    (
        {"event": "ClientDone", "client": "a", "round": 2, "samples": 40, "sent": 0,
         "exit_loss": 2.0, "exit_accuracy": 0.5, "server_loss": None, "seconds": 0.5,
         "bytes_up": 2048, "bytes_down": 102400, "activations_up": 0, "at_seconds": 1.0},
        "round 2  a              80 samples/s  up 2.0 KB  down 100 KB  exit loss 2.000  "
        "server loss -",
        None,
    ),
    (
        {"event": "Evaluated", "client": "a", "round": 2, "exit_accuracy": 0.75,
         "server_accuracy": 1.0, "at_seconds": 1.0},
        "round 2  a          on test images: exit 75.0%  server 100.0%",
        None,
    ),
    ({"event": "RoundDone", "round": 2, "clients": ["a"], "at_seconds": 1.0}, None, None),
    (
        {"event": "CutMoved", "client": "a", "round": 2, "cut": "layer2", "was": "stem",
         "at_seconds": 1.0},
        "CutMoved in round 2: a: cut layer2, was stem",
        "CutMoved in round 2: a: cut layer2, was stem",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("record", "plain", "live"), RECORDS, ids=lambda r: str(r)[:24])
def test_a_record_is_told_as(
    record: Mapping[str, Any], plain: str | None, live: str | None
) -> None:
    for everything, expected in ((True, plain), (False, live)):
        line = line_of(record, everything=everything)
        assert (line.plain if line else None) == expected


def test_a_notice_is_told_once_with_what_happens_next(screen: Screen, run: Run) -> None:
    screen.notice("finishing")
    assert said(screen, run) == []
    assert said(screen, run, batch("a"), batch("a")) == ["finishing"]
