"""`splitee watch`: a run's fleet table, live or as it ended."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitee_host.cli.common import app, ended, going_on, new_console, plain

if TYPE_CHECKING:
    from splitee.progress import Progress
    from splitee.runs import Run

_AGAIN = 0.5  # seconds between two looks


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    once: Annotated[bool, typer.Option(help="Show where it stands, and end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print where it stands as JSON, and end.")
    ] = False,
) -> None:
    """Show a run as it trains, in any terminal; ends with it (status 1 if it was cut short)."""
    from splitee.runs import Run
    from splitee_host.screen import Screen, final_table, live_table

    run, console = Run(folder), new_console()
    trains, progress = run.is_training(), run.progress()
    if as_json:
        typer.echo(json.dumps({"state": _state(run, trains), **progress.to_json()}, indent=2))
        return
    if once:
        console.print(live_table(progress))
        console.print(plain(_verdict(run, trains, progress)), highlight=False)
        return
    with closing(run.follow()) as records, Screen(console, progress) as screen:
        while True:
            trains = run.is_training()  # first: what is read behind its end is all there is
            screen.progress = run.progress()
            for record in next(records):
                screen.tell(record)
            if not trains:
                break
            time.sleep(_AGAIN)
    summary = run.summary()
    console.print(final_table(summary[1]) if summary else live_table(screen.progress))
    console.print(plain(_verdict(run, trains, screen.progress)), highlight=False)
    if not summary:
        raise typer.Exit(1)


def _state(run: Run, trains: bool) -> str:
    if trains:
        return "training"
    return "stopped" if run.summary() is None else "ended"


def _verdict(run: Run, trains: bool, progress: Progress) -> str:
    """How the run fares, in words."""
    summary = run.summary()
    if trains:
        over = progress.round > progress.rounds
        return "testing" if over else f"training round {progress.round} of {progress.rounds}"
    if summary is not None:
        return ended(run, summary[0])
    complete = run.complete()
    behind = f"behind round {complete} of {progress.rounds}" if complete else "in its first round"
    return f"{run.folder}/: it stopped {behind}, and nobody trains it: go on with {going_on(run)}"
