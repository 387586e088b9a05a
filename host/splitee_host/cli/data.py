"""`splitee data`: which client holds how many images of which class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitee_host.cli.common import FleetFile, Json, app, new_console, plain, unaugmented

if TYPE_CHECKING:
    from rich.table import Table

    from splitee.data import Dataset
    from splitee.fleet import Fleet
    from splitee.ops import Array

COLUMNS = 12  # classes that have a column each


@app.command("data")
def show_data(
    fleet_file: FleetFile,
    as_json: Json = False,
    png: Annotated[
        Path | None, typer.Option(help="Draw it into this file, too.", show_default=False)
    ] = None,
) -> None:
    """Show a fleet's dataset, and which client holds how many images of which class."""
    import numpy as np

    from splitee import datasets, partition
    from splitee.errors import DataError
    from splitee.fleet import read
    from splitee_host.data_chart import draw

    fleet = read(fleet_file)
    dataset = datasets.load(fleet.data)
    shares = {c.name: c.share for c in fleet.client}
    held = partition.places(dataset, fleet.data, shares, fleet.seed)
    labels, classes = dataset.train.y, _classes(dataset)
    counts = np.array([np.bincount(labels[p], minlength=len(classes)) for p in held.values()])
    tested = np.bincount(dataset.test.y, minlength=len(classes))
    if png is not None:
        title = f"{fleet.name}: {len(labels):,} images of {dataset.name}, {_dealt(fleet)}"
        try:
            png.write_bytes(draw(title, list(held), classes, counts))
        except OSError as error:
            raise DataError(f"{png}: {error.strerror}: write where you may") from error
    if as_json:
        typer.echo(json.dumps(_as_json(fleet, dataset, classes, counts, tested), indent=2))
        return
    console = new_console()
    channels, height, width = dataset.shape
    console.print(
        f"{plain(dataset.name)}: {len(labels):,} images to train on, {len(dataset.test):,} to test "
        f"on, of {channels}x{height}x{width} bytes in {len(classes)} classes; {_dealt(fleet)}",
        highlight=False,
    )
    console.print(_table(list(held), classes, counts, tested))
    for line in unaugmented(fleet):
        console.print(plain(line), highlight=False)


def _classes(dataset: Dataset) -> list[str]:
    return list(dataset.class_names) or [str(number) for number in range(dataset.classes)]


def _dealt(fleet: Fleet) -> str:
    """How they are dealt out."""
    match fleet.data.partition:
        case "iid":
            return "dealt at random"
        case "dirichlet":
            return f"dealt by Dirichlet({fleet.data.alpha:g})"
        case "classes":
            return f"dealt by {fleet.data.classes_per_client} classes a client"
        case "folder":
            return "dealt by their folders"


def _as_json(
    fleet: Fleet, dataset: Dataset, classes: list[str], counts: Array, tested: Array
) -> dict[str, Any]:
    return {
        "data": dataset.name,
        "shape": list(dataset.shape),
        "classes": classes,
        "partition": fleet.data.partition,
        "train": len(dataset.train),
        "test": len(dataset.test),
        "test_counts": tested.tolist(),
        "clients": [
            {"client": client.name, "samples": int(row.sum()), "counts": row.tolist()}
            for client, row in zip(fleet.client, counts, strict=True)
        ],
    }


def _table(clients: list[str], classes: list[str], counts: Array, tested: Array) -> Table:
    """A row for each client, and for all of them."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("client", no_wrap=True)
    table.add_column("images", justify="right")
    wide = len(classes) > COLUMNS
    for name in ["classes", "most of"] if wide else classes:
        table.add_column(plain(name), justify="left" if name == "most of" else "right")
    rows = [*zip(clients, counts, strict=True), ("all", counts.sum(0)), ("to test on", tested)]
    for name, row in rows:
        figures = [f"{count:,}" if count else "-" for count in row]
        if wide:
            figures = [str(int((row > 0).sum())), _most(classes, row)]
        style = "" if name in clients else "bold"
        table.add_row(plain(name), f"{row.sum():,}", *figures, style=style)
    return table


def _most(classes: list[str], row: Array) -> str:
    """The four classes that a client has most of, and their shares."""
    largest = (-row).argsort(kind="stable")[:4]
    return ", ".join(f"{plain(classes[i])}: {row[i] / row.sum():.0%}" for i in largest if row[i])
