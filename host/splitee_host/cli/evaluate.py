"""`splitee eval`: what a run has learnt."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitee_host.cli.common import BUILD, Json, app, assembly_of, int8_of, new_console

if TYPE_CHECKING:
    from rich.table import Table

    from splitee.assemble import Assembly, Member
    from splitee.data import Images
    from splitee.runs import Checkpoint, Run
    from splitee.server import Server


@app.command("eval")
def evaluate_run(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    entropy: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="An exit answers up to this normalised entropy."),
    ] = None,
    device: Annotated[
        bool,
        typer.Option(
            "--device",
            help="Also on boards: those that run firmware answer with their segments in 8 bits.",
        ),
    ] = False,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many test images.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Test a run's checkpoint: each exit, the server, and early exits with the server's help."""
    from splitee.fleet import read
    from splitee.runs import Run
    from splitee.train import evaluate

    run = Run(folder)
    checkpoint = run.load()
    assembly = assembly_of(read(run.fleet_file))
    threshold = assembly.fleet.entropy if entropy is None else entropy
    images = assembly.dataset.test[:samples]
    rows: list[dict[str, Any]] = []
    members = [m for m in assembly.members if m.name in checkpoint.states]
    clients = [assembly.local(m) for m in members]
    strategy = assembly.strategy(clients)
    strategy.load(checkpoint.servers)
    for member, client in zip(members, clients, strict=True):
        client.start(checkpoint.states[member.name], member.images)
        server = strategy.server(member.name)
        answers = evaluate(client, server, images)
        share, accuracy = answers.early(threshold)
        rows.append(
            {
                "client": member.name,
                "cut": member.cut.name,
                "exit_accuracy": answers.exit_accuracy,
                "server_accuracy": answers.server_accuracy,
                "share_at_exit": share,
                "accuracy": accuracy,
            }
        )
        if device and assembly.boards[member.name].firmware:
            rows[-1]["device"] = _on_device(
                run, assembly, member, checkpoint, server, images, threshold
            )
    if as_json:
        typer.echo(
            json.dumps({"round": checkpoint.round, "entropy": threshold, "clients": rows}, indent=2)
        )
        return
    title = f"round {checkpoint.round}; exits answer up to an entropy of {threshold:g}"
    new_console().print(_eval_table(title, rows, where=device))


def _on_device(
    run: Run,
    assembly: Assembly,
    member: Member,
    checkpoint: Checkpoint,
    server: Server,
    images: Images,
    threshold: float,
) -> dict[str, Any]:
    """What a client's board and its server answer together, and where it ran."""
    from splitee_exporters.c_int8 import to_c
    from splitee_host import early, keys
    from splitee_host.boards import load_boards
    from splitee_host.launch import key_of

    known = keys.of_fleet(run.fleet_file, assembly.fleet.auth)
    running = early.running(
        member.name,
        int8_of(assembly, member, checkpoint),
        load_boards()[member.table.board],
        to_c,
        BUILD,
        link=member.table.link,
        key=key_of(member.table, known, assembly.fleet.auth, run.fleet_file),
        say=lambda text: typer.echo(text, err=True),
    )
    with running as (device, board):
        answered = early.answer(device, server, images, threshold)
        return {"board": board.name, "link": device.link.name, **asdict(answered)}


def _eval_table(title: str, rows: list[dict[str, Any]], *, where: bool) -> Table:
    """A line per client, and where it also answered on its board, one more."""
    from rich.table import Table

    figures = ("exit_accuracy", "server_accuracy", "share_at_exit", "accuracy")
    table = Table(title=title)
    for name in ("client", "cut", *(("where",) if where else ())):
        table.add_column(name)
    for name in ("exit", "server", "answered at the exit", "together"):
        table.add_column(name, justify="right")
    if where:
        table.add_column("bytes up a sample", justify="right")
    for row in rows:
        names, device = (row["client"], row["cut"]), row.get("device")
        here = [f"{100 * row[k]:.1f} %" for k in figures]
        table.add_row(*names, *(("here, float32",) if where else ()), *here, *(["-"] * where))
        if device is not None:
            there = [f"{100 * device[k]:.1f} %" if k in device else "-" for k in figures]
            sent = f"{device['bytes_up_per_sample']:,}"
            table.add_row(*names, f"{device['board']}, int8", *there, sent)
    return table
