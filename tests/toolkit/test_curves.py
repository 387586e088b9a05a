"""A run's curves, as TensorBoard itself reads them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from splitee.client import Place, State
from splitee.curves import Curves
from splitee.errors import MissingTool
from splitee.events import ClientDone, ClientLost, Evaluated, Event, RoundDone, RoundFailed

STATE = State({}, {}, Place(samples=40, seed=0))
STATES = {"a": STATE, "b": STATE}


def done(client: str, number: int, loss: float, samples: int = 40, sent: int = 40) -> ClientDone:
    """A client's pass, of half a second."""
    server_loss = loss / 2 if sent else None
    return ClientDone(
        client, number, samples, sent, loss, 0.25, server_loss, 0.5, 4000, 80, 3900, STATE
    )


def written(folder: Path, first: int, *events: Event) -> None:
    """Takes in those events, and ends."""
    with Curves(folder, first) as curves:
        for event in events:
            curves.take(event)


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's scalars: by tag, rounds and values."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(s.step, s.value) for s in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_a_clients_figures_and_the_fleets_are_there_by_round(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    written(
        tmp_path, 1,
        done("a", 1, 2.0), done("b", 1, 1.0, samples=120, sent=0), RoundDone(1, STATES),
        done("b", 2, 0.5), ClientLost("a", 2, "unplugged"), RoundDone(2, STATES, {"a": "?"}),
    )  # fmt: skip
    found = read(tmp_path)
    rates = found.pop("fleet/samples_per_second")
    assert [number for number, _ in rates] == [1, 2]
    assert all(rate > 0 for _, rate in rates)
    assert found == {
        "exit_loss/a": [(1, 2.0)],
        "exit_loss/b": [(1, 1.0), (2, 0.5)],
        "exit_accuracy/a": [(1, 0.25)],
        "exit_accuracy/b": [(1, 0.25), (2, 0.25)],
        "server_loss/a": [(1, 1.0)],
        "server_loss/b": [(2, 0.25)],  # nothing was sent in the first round
        "ms_per_sample/a": [(1, 12.5)],
        "ms_per_sample/b": [(1, pytest.approx(500 / 120)), (2, 12.5)],
        "bytes_up/a": [(1, 4000)],
        "bytes_up/b": [(1, 4000), (2, 4000)],
        "bytes_down/a": [(1, 80)],
        "bytes_down/b": [(1, 80), (2, 80)],
        "fleet/exit_loss": [(1, 1.25), (2, 0.5)],  # 40 samples at 2.0, 120 at 1.0
        "fleet/server_loss": [(1, 1.0), (2, 0.25)],
        "fleet/clients": [(1, 2), (2, 1)],
        "fleet/bytes_up": [(1, 8000), (2, 4000)],
        "fleet/bytes_down": [(1, 160), (2, 80)],
    }


def test_tests_are_there_of_the_rounds_that_had_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    written(
        tmp_path, 1,
        done("a", 1, 2.0), RoundDone(1, STATES),
        done("a", 2, 2.0), Evaluated("a", 2, 0.5, 0.75), Evaluated("b", 2, 0.25, 0.25),
        RoundDone(2, STATES), done("a", 3, 2.0), RoundDone(3, STATES),
    )  # fmt: skip
    found = {tag: curve for tag, curve in read(tmp_path).items() if "test" in tag}
    assert found == {
        "test_exit_accuracy/a": [(2, 0.5)],
        "test_exit_accuracy/b": [(2, 0.25)],
        "test_server_accuracy/a": [(2, 0.75)],
        "test_server_accuracy/b": [(2, 0.25)],
        "fleet/test_exit_accuracy": [(2, 0.375)],
        "fleet/test_server_accuracy": [(2, 0.5)],
    }


def test_a_run_that_goes_on_has_no_round_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for first, losses in ((1, (4.0, 3.0, 2.0)), (3, (1.0, 0.5))):
        events = [
            event
            for number, loss in enumerate(losses, first)
            for event in (done("a", number, loss), RoundDone(number, STATES))
        ]
        written(tmp_path, first, *events)
    assert len(list(tmp_path.iterdir())) == 2
    assert read(tmp_path)["exit_loss/a"] == [(1, 4.0), (2, 3.0), (3, 1.0), (4, 0.5)]


def test_a_round_is_there_as_soon_as_it_is_complete_and_not_before(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Curves(tmp_path, 1) as curves:
        curves.take(done("a", 1, 2.0))
        curves.take(RoundDone(1, STATES))
        curves.take(done("a", 2, 2.0))
        assert read(tmp_path)["exit_loss/a"] == [(1, 2.0)]


def test_passes_that_are_undone_are_not_there(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    written(
        tmp_path, 1,
        done("a", 1, 9.0), RoundFailed(1, ["a"], 2),
        done("a", 1, 2.0), done("b", 1, 4.0), RoundDone(1, STATES),
    )  # fmt: skip
    found = read(tmp_path)
    assert found["exit_loss/a"] == [(1, 2.0)]
    assert found["fleet/exit_loss"] == [(1, 3.0)]
    assert found["fleet/bytes_up"] == [(1, 8000)]


def test_says_where_there_is_no_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    words = r"^tensorboard is not installed: pip install 'hetero-splitee\[host\]'$"
    with pytest.raises(MissingTool, match=words):
        Curves(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
