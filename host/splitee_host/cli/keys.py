"""`splitee keys`: who may speak for whom."""

from __future__ import annotations

from typing import Annotated

import typer

from splitee_host.cli.common import FleetFile, app


@app.command("keys")
def make_keys(
    fleet_file: FleetFile,
    renew: Annotated[bool, typer.Option(help="Also for those that have one.")] = False,
) -> None:
    """Draw a key for each device of a fleet: nobody else can then speak for it, or for the host."""
    from splitee.fleet import read
    from splitee_host import keys

    path = keys.file_of(fleet_file)
    names = [c.name for c in read(fleet_file).client if c.board != "torch"]
    new = keys.create(path, names, renew=renew)
    drawn = ", ".join(new) if new else "nobody: all have one"
    typer.echo(f"{path}: a new key for {drawn}")
    if new:
        typer.echo(
            "keep it secret; build and load their firmware anew, bring Python clients their line"
        )
