"""`splitee eval`: what a run has learnt, and what its exits' threshold decides."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitee_host.cli.common import Json, app, assembly_of, new_console, on_board

if TYPE_CHECKING:
    from rich.table import Table

    from splitee.assemble import Assembly
    from splitee.edge import Deployed
    from splitee.runs import Checkpoint, Run
    from splitee.sweep import Point
    from splitee.train import Answers
    from splitee.trained import Trained


@app.command("eval")
def evaluate_run(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    entropy: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="An exit answers up to this normalised entropy; without it all are tried, and "
            "eval.csv and eval.png go to the run's folder.",
        ),
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
    rate: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Bits per second of the clients' links to the server, for the time that answers "
            "take; without it only computing counts.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Test a run's checkpoint: each exit, the server, and early exits with the server's help."""
    import torch

    from splitee import calibrate
    from splitee.fleet import read
    from splitee.runs import Run
    from splitee.sweep import Cost, sweep, table
    from splitee.sweep_plot import draw
    from splitee.train import evaluate
    from splitee.trained import deployed, of_run
    from splitee_host import keys
    from splitee_host.asking import sent_bytes

    torch.set_num_threads(1)  # as in training
    run = Run(folder)
    checkpoint = run.load()
    assembly = assembly_of(read(run.fleet_file))
    images = assembly.dataset.test[:samples]
    known = keys.of_fleet(run.fleet_file, assembly.fleet.auth)
    rows: list[dict[str, Any]] = []
    points: dict[str, list[Point]] = {}
    trained = of_run(assembly, checkpoint)
    ways = deployed(run, assembly, checkpoint, trained, entropy)
    for one in trained:
        name = one.member.name
        way = ways[name]
        answers = evaluate(one.client, one.server, images)
        rows.append(_figures(way, answers))
        if way.temperature != 1:
            before, after = (
                calibrate.error(answers.exit_logits, answers.labels, t)
                for t in (1.0, way.temperature)
            )
            rows[-1] |= {"calibration_error_before": before, "calibration_error": after}
        if entropy is None:
            cost = Cost(sent_bytes(way.codec, way.classes, keyed=name in known), rate)
            points[name] = sweep(answers, cost, temperature=way.temperature)
            rows[-1]["sweep"] = [asdict(point) for point in points[name]]
        if device and assembly.boards[name].firmware:
            rows[-1]["device"] = _on_device(run, assembly, one, checkpoint, images, way)
    threshold = assembly.fleet.entropy if entropy is None else entropy
    if points:
        run.write("eval.csv", table(points).encode())
        cuts = {one.member.name: one.client.cut for one in trained}
        run.write("eval.png", draw(points, cuts, threshold, math.prod(assembly.dataset.shape)))
    if as_json:
        found = {"round": checkpoint.round, "entropy": threshold, "clients": rows}
        typer.echo(json.dumps(found, indent=2))
        return
    console = new_console()
    title = f"round {checkpoint.round}; exits answer up to an entropy of {threshold:g}"
    console.print(_eval_table(title, rows, where=device))
    if all(way.temperature == 1 for way in ways.values()):
        console.print(
            "exits are not calibrated: no training images are held out for that (held_out in the "
            "fleet file's [data])",
            highlight=False,
        )
    if points:
        console.print(_sweep_table(points))
        console.print(f"all thresholds: {folder}/eval.csv and eval.png", highlight=False)


def _figures(way: Deployed, answers: Answers) -> dict[str, Any]:
    """A client's line, at its threshold."""
    share, accuracy = answers.early(way.entropy, way.temperature)
    return {
        "client": way.client,
        "cut": way.cut,
        "exit_accuracy": answers.exit_accuracy,
        "server_accuracy": answers.server_accuracy,
        "share_at_exit": share,
        "accuracy": accuracy,
        "temperature": way.temperature,
    }


def _on_device(
    run: Run,
    assembly: Assembly,
    one: Trained,
    checkpoint: Checkpoint,
    images: Any,
    way: Deployed,
) -> dict[str, Any]:
    """What a client's board and its server answer together, and where it ran."""
    import torch

    from splitee_host import early

    def ask(activations: Any) -> Any:
        sent = torch.from_numpy(activations)
        return one.server.infer(sent, one.client.cut, one.client.name).cpu().numpy()

    with on_board(run, assembly, one.member, checkpoint) as (board, name):
        before = board.traffic.up
        parts = early.answer(board, ask, images.x, way.entropy, way.temperature)
        answered = early.joined(list(parts))
        return {
            "board": name,
            "link": board.link.name,
            "samples": len(images),
            "exit_accuracy": float((answered.exit_classes == images.y).mean()),
            "share_at_exit": answered.share_at_exit,
            "accuracy": float((answered.classes == images.y).mean()),
            "bytes_up_per_sample": round((board.traffic.up - before) / len(images), 1),
        }


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _eval_table(title: str, rows: list[dict[str, Any]], *, where: bool) -> Table:
    """A line per client, and where it also answered on its board, one more."""
    from rich.table import Table

    figures = ("exit_accuracy", "server_accuracy", "share_at_exit", "accuracy")
    table = Table(title=title)
    for name in ("client", "cut", *(("where",) if where else ())):
        table.add_column(name)
    for name in ("exit", "server", "answered at the exit", "together"):
        table.add_column(name, justify="right")
    for name in ("bytes up a sample",) if where else ("temperature", "calibration error"):
        table.add_column(name, justify="right")
    for row in rows:
        names, device = (row["client"], row["cut"]), row.get("device")
        here = [_percent(row[k]) for k in figures]
        if where:
            table.add_row(*names, "here, float32", *here, "-")
        else:
            error = "-"
            if "calibration_error" in row:
                before, after = row["calibration_error_before"], row["calibration_error"]
                error = f"{100 * before:.1f} → {100 * after:.1f} %"
            table.add_row(*names, *here, f"{row['temperature']:.2f}", error)
        if device is not None:
            there = [_percent(device.get(k)) for k in figures]
            sent = f"{device['bytes_up_per_sample']:,}"
            table.add_row(*names, f"{device['board']}, int8", *there, sent)
    return table


def _sweep_table(points: dict[str, list[Point]]) -> Table:
    """The thresholds of each client that say most; the most accurate in bold."""
    from rich.table import Table

    from splitee.sweep import best, telling

    table = Table(title="what the threshold decides")
    table.add_column("client")
    for name in (
        "entropy up to", "answered at the exit", "right there", "right at the server",
        "together", "bytes sent a sample", "ms a sample",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for client, mine in points.items():
        for i, point in enumerate(shown := telling(mine)):
            table.add_row(
                client if i == 0 else "",
                f"{point.threshold:g}",
                _percent(point.share_at_exit),
                _percent(point.accuracy_at_exit),
                _percent(point.accuracy_at_server),
                _percent(point.accuracy),
                f"{point.bytes_sent:,.0f}",
                f"{point.ms:.2f}",
                style="bold" if point is best(mine) else "",
                end_section=i == len(shown) - 1,
            )
    return table
