"""`splitee boards`: what a fleet file may name, and what is attached."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from splitee_host.cli.common import Json, app, new_console, plain, size_text

if TYPE_CHECKING:
    pass


@app.command()
def boards(
    connected: Annotated[
        bool, typer.Option("--connected", help="List the serial ports of this machine instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the boards that a fleet file may name."""
    from rich.table import Table

    from splitee_host.boards import load_boards

    if connected:
        _connected(as_json)
        return
    known = load_boards().values()
    if as_json:
        rows = [
            {
                "name": b.name,
                "title": b.title,
                "tier": b.tier,
                "core": b.core,
                "link": b.link,
                "ram_bytes": b.ram_bytes,
                "shard_bytes": b.shard_bytes,
                "flash_bytes": b.flash_bytes,
                "status": b.status,
            }
            for b in known
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table()
    for name in ("board", "tier", "core", "link"):
        table.add_column(name)
    table.add_column("RAM", justify="right")
    table.add_column("flash", justify="right")
    table.add_column("what it is, and how far it was run")
    for b in known:
        table.add_row(
            b.name, b.tier, b.core, b.link,
            size_text(b.ram_bytes) + (f" + {size_text(b.shard_bytes)}" if b.shard_bytes else ""),
            size_text(b.flash_bytes),
            f"{b.title}: {b.status}",
        )  # fmt: skip
    new_console().print(table)


def _connected(as_json: bool) -> None:
    """Lists what is attached to this machine, with the address that a fleet file names it by."""
    from rich.table import Table

    from splitee_host.ports import attached

    rows = [
        {
            "link": port.address,
            "device": port.device,
            "vid": None if port.vendor is None else f"{port.vendor:04x}",
            "pid": None if port.product is None else f"{port.product:04x}",
            "serial_number": port.serial_number,
            "title": port.title,
        }
        for port in attached()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo("no serial port is attached")
        return
    table = Table()
    for name in ("link", "device", "VID:PID", "serial number", "what it says that it is"):
        table.add_column(name)
    for row in rows:
        kind = f"{row['vid']}:{row['pid']}" if row["vid"] else "-"
        cells = (row["link"], row["device"], kind, row["serial_number"] or "-", row["title"] or "-")
        table.add_row(*(plain(cell) for cell in cells))
    new_console().print(table)
