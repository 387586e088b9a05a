"""What a run shows of clients that are lost, come back, or miss a round."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from splitee.client import Place, State
from splitee.train import (
    BatchDone,
    ClientBack,
    ClientDone,
    ClientLost,
    Event,
    RoundDone,
    RoundFailed,
)
from splitee_host.screen import Screen
from toolkit.rounds import clients

STATE = State({}, {}, Place(8, 0))
STATES = {"a": STATE, "b": STATE}


def batch(client: str) -> BatchDone:
    """A batch of four samples."""
    return BatchDone(client, 4, 4, 1.0, 2, 1.0)


@pytest.fixture
def screen() -> Screen:
    """A screen of two clients, in the third of five rounds."""
    console = Console(file=io.StringIO(), width=100)
    return Screen(console, clients("ab"), {"a": 8, "b": 20}, 5, first=3)


def said(screen: Screen, *events: Event) -> list[str]:
    """What stands below each other after those events, without a terminal."""
    for event in events:
        screen.show(event)
    file = screen._console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().splitlines()


def table(screen: Screen) -> dict[str, list[str]]:
    """The first cells of each client's line, as a terminal would show them."""
    console = Console(file=io.StringIO(), width=100)
    console.print(screen._render())
    file = console.file
    assert isinstance(file, io.StringIO)
    lines = [line.split() for line in file.getvalue().splitlines()]
    return {words[0]: words[1:3] for words in lines if words and words[0] in STATES}


def test_it_begins_with_the_round_that_is_next(screen: Screen) -> None:
    assert table(screen) == {"a": ["3", "0/8"], "b": ["3", "0/20"]}


def test_a_replayed_pass_is_counted_from_its_beginning(screen: Screen) -> None:
    lines = said(screen, batch("b"), batch("b"), ClientBack("b", 3, "no answer"), batch("b"))
    assert lines == ["back in round 3: b"]
    assert table(screen)["b"] == ["3", "4/20"]


def test_who_is_lost_misses_rounds_until_it_is_back(screen: Screen) -> None:
    lines = said(screen, batch("b"), ClientLost("b", 3, 'client "b": no answer'))
    assert table(screen)["b"][0] == "lost"
    missing = {"b": "no answer"}
    lines = said(screen, RoundDone(3, STATES, missing), RoundDone(4, STATES, missing))
    assert table(screen) == {"a": ["5", "0/8"], "b": ["lost", "0/20"]}
    lines = said(screen, ClientBack("b", 5, "no answer"))
    assert lines == [
        'lost in round 3: client "b": no answer',
        "round 3 is complete without b",
        "round 4 is complete without b",
        "back in round 5: b",
    ]
    assert table(screen)["b"] == ["5", "0/20"]


def test_a_round_that_does_not_count_is_told(screen: Screen) -> None:
    lines = said(screen, RoundFailed(3, ["a"], 2))
    assert lines == ["round 3 does not count: 1 of the 2 clients that it takes completed it"]


def test_who_was_not_drawn_is_not_missed(screen: Screen) -> None:
    assert said(screen, RoundDone(3, STATES, {}, {"a"})) == []


def test_a_round_with_everyone_says_no_more_than_their_passes(screen: Screen) -> None:
    done = ClientDone("a", 3, 8, 8, 1.5, 0.5, 2.5, 0.5, 2048, 0, 2000, STATE)
    (line,) = said(screen, done, RoundDone(3, STATES))
    assert line.startswith("round 3  a ")
