"""What a run leaves for people and curves: metrics as they come, a summary, a picture."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from matplotlib import image

from splitee.client import Place, State
from splitee.errors import CheckpointError
from splitee.runs import ClientSummary, Run
from splitee.train import BatchDone, ClientDone, ClientLost, Event, RoundDone

STATE = State({}, {}, Place(samples=40, seed=0))


def done(client: str, number: int, loss: float) -> ClientDone:
    """A client's pass."""
    return ClientDone(client, number, 40, 40, loss, 0.5, loss / 2, 1.25, 4000, 80, 3900, STATE)


def test_metrics_are_an_object_a_line_and_leave_states_out(run: Run) -> None:
    run.log(BatchDone("a", 4, 4, 1.0, 2, 1.0))  # too many: curves are drawn by rounds
    run.log(done("a", 1, 2.0))
    run.log(RoundDone(1, {"b": STATE, "a": STATE}))
    lines = [json.loads(line) for line in run.metrics_file.read_text(encoding="utf-8").splitlines()]
    assert lines == run.metrics()
    assert all(line.pop("at_seconds") >= 0 for line in lines)
    assert lines == [
        {"event": "ClientDone", "client": "a", "round": 1, "samples": 40, "sent": 40,
         "exit_loss": 2.0, "exit_accuracy": 0.5, "server_loss": 1.0, "seconds": 1.25,
         "bytes_up": 4000, "bytes_down": 80, "activations_up": 3900},
        {"event": "RoundDone", "round": 1, "clients": ["a", "b"]},
    ]  # fmt: skip


def test_what_happens_is_written_at_once_and_read_by_round_and_client(run: Run) -> None:
    events: tuple[Event, ...] = (
        ClientLost("b", 1, "no answer"),
        done("c", 1, 2.0),
        done("a", 1, 2.0),
        RoundDone(1, {"a": STATE, "b": STATE, "c": STATE}, {"b": "no answer"}),
        done("a", 2, 2.0),
    )
    for number, event in enumerate(events, 1):
        assert run.log(event) == json.loads(run.metrics_file.read_text().splitlines()[-1])
        assert len(run.metrics_file.read_text().splitlines()) == number
    found = [(r["event"], r.get("client"), r.get("reason")) for r in run.metrics()]
    assert found == [  # of complete rounds alone
        ("ClientDone", "a", None),
        ("ClientLost", "b", "no answer"),
        ("ClientDone", "c", None),
        ("RoundDone", None, None),
    ]


MEMORY: dict[str, int | bool | None] = {"ram_bytes": 9_000, "stack_used_bytes": None}


def summary(name: str, lost: str | None = None) -> ClientSummary:
    """A client's line."""
    return ClientSummary(name, "microcontroller", "qemu-m4", "serial", "stem", 694, 8192, 30_000,
                         1025.5, 2.5, 0.75, 0.875, lost, MEMORY if lost else None)  # fmt: skip


def test_the_summary_has_a_row_for_each_client_with_the_fields_of_its_class(run: Run) -> None:
    run.log(done("a", 1, 2.0))
    run.log(RoundDone(1, {"a": STATE, "b": STATE}))
    run.log(RoundDone(2, {"a": STATE, "b": STATE}, {"b": "no answer"}))
    run.finish(12.5, [summary("a"), summary("b", lost="no answer")])
    assert run.summary() == (12.5, [summary("a"), summary("b", lost="no answer")])
    written = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    assert list(written) == ["wall_s", "rounds", "clients", "took_part"]
    assert (written["wall_s"], written["rounds"]) == (12.5, 2)
    assert written["took_part"] == [
        {"round": 1, "clients": ["a", "b"]},
        {"round": 2, "clients": ["a"], "missing": {"b": "no answer"}},
    ]
    names = [f.name for f in fields(ClientSummary)]
    assert [list(row) for row in written["clients"]] == [names[:-2], names]
    assert written["clients"][1] == {
        "name": "b", "tier": "microcontroller", "board": "qemu-m4", "link": "serial",
        "cut": "stem", "parameters": 694, "arena_bytes": 8192, "flash_bytes": 30_000,
        "bytes_up_per_sample": 1025.5, "ms_per_sample": 2.5, "exit_accuracy": 0.75,
        "server_accuracy": 0.875, "lost": "no answer", "memory": MEMORY,
    }  # fmt: skip


def test_a_run_that_goes_on_has_no_summary_until_it_ends(run: Run) -> None:
    assert run.summary() is None
    run.log(done("a", 1, 2.0))
    run.log(RoundDone(1, {"a": STATE}))
    run.finish(12.5, [summary("a")])
    run.resume(1)
    assert run.summary() is None


@pytest.mark.parametrize("content", ["", "[]", '{"wall_s": 1, "clients": [{"name": "a"}]}'])
def test_says_of_a_file_that_is_no_summary_of_ours(run: Run, content: str) -> None:
    run.summary_file.write_text(content)
    with pytest.raises(CheckpointError, match=r"summary.json: no summary of ours: "):
        run.summary()


def test_the_summarys_picture_shows_every_clients_curve(run: Run) -> None:
    for number in (1, 2, 3):
        for name, loss in (("a", 2.0), ("b", 1.0)):
            run.log(done(name, number, loss / number))
        run.log(RoundDone(number, {}))
        run.log(RoundDone(number, {"a": STATE, "b": STATE}))
    pictures = []
    for names in ("ab", "a"):
        run.finish(12.5, [summary(n) for n in names])
        path = run.folder / "summary.png"
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pictures.append(image.imread(path))
    both, one = pictures
    assert both.shape == one.shape == (780, 1320, 4)
    colours = {tuple(c) for c in (both[::2, ::2, :3].reshape(-1, 3) * 255).round().astype(int)}
    for first_of_matplotlib in ((31, 119, 180), (255, 127, 14)):  # C0 and C1
        assert first_of_matplotlib in colours
    assert (both != one).any()
    assert [p.name for p in run.folder.iterdir() if ".new" in p.name] == []
