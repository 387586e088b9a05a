"""`splitee verify`: a board held to PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from splitee_host.cli.common import BUILD, Json, app, assembly_of, new_console

if TYPE_CHECKING:
    pass


@app.command()
def verify(
    board: Annotated[str, typer.Option(help="The board to check.")],
    cut: Annotated[
        str, typer.Option(help="Where its segment ends: path, number or auto.")
    ] = "auto",
    port: Annotated[
        str | None,
        typer.Option(help="Address of a board that runs already.", envvar="SPLITEE_PORT"),
    ] = None,
    width: Annotated[int, typer.Option(min=1, help="Of resnet8's first stage.")] = 8,
    gradient: Annotated[
        Literal["local", "server", "both"], typer.Option(help="What its trunk learns from.")
    ] = "both",
    clip: Annotated[
        float, typer.Option(min=0, help="Largest norm of the gradients; 0: any.")
    ] = 0.0,
    distill: Annotated[
        float, typer.Option(min=0, max=1, help="What the exits below learn from the deepest.")
    ] = 0.0,
    relu_bits: Annotated[bool, typer.Option("--relu-bits", help="With this lever.")] = False,
    float16: Annotated[bool, typer.Option("--float16", help="With this lever.")] = False,
    recompute: Annotated[float, typer.Option(min=0, max=10, help="With this lever.")] = 0.0,
    rows: Annotated[int, typer.Option(min=0, help="Tensors shown, the worst first.")] = 12,
    as_json: Json = False,
) -> None:
    """Train one batch on a board and in PyTorch, and compare them tensor by tensor."""
    from rich.table import Table

    from splitee.errors import FleetError
    from splitee.fleet import Fleet
    from splitee_exporters.c import to_c
    from splitee_host.device import Device
    from splitee_host.launch import Launcher
    from splitee_host.screen import memory_table
    from splitee_host.verify import compare, tolerance

    count = 5  # less than the capacity, and odd: loops end in the middle of their blocks
    fleet = Fleet.model_validate(
        {
            "name": "verify",
            "gradient": gradient,
            "exit_weight": 0.3,
            "exits": "upto",
            "distill": distill,
            "optimizer": {
                "learning_rate": 0.1,
                "momentum": 0.9,
                "weight_decay": 0.01,
                "clip": clip or None,
            },
            "model": {"name": "resnet8", "width": width, "norm": "group"},
            "data": {"samples": count},
            "client": [
                {
                    "name": "verify",
                    "board": board,
                    "link": port,
                    "cut": cut,
                    "relu_bits": relu_bits,
                    "float16": float16,
                    "recompute": recompute,
                }
            ],
        }
    )
    assembly = assembly_of(fleet)
    if not assembly.boards["verify"].firmware:
        raise FleetError(f"{board} runs no firmware: there is nothing to verify on it")
    (member,) = assembly.members
    with Launcher(assembly, Path(), to_c, BUILD, lambda text: None) as launcher:
        launched = launcher.launch(member)
        device = launched.client
        assert isinstance(device, Device)
        settings = fleet.settings(member.table)
        found = compare(device, member.segment, member.images, settings, count, member.seed)
        usage = launched.usage()
    bad, bar = [d for d in found if not d.good], tolerance(member.build)
    where = f"resnet8 of width {width} up to {member.cut.name} on {board}"
    if as_json:
        tensors = [{"tensor": d.tensor, "error": d.error, "good": d.good} for d in found]
        memory = usage.figures() if usage else None
        answer = {"board": board, "cut": member.cut.name, "memory": memory, "tensors": tensors}
        typer.echo(json.dumps(answer, indent=2))
    else:
        typer.echo(f"{where}, the worst first")
        table = Table(box=None)
        table.add_column("tensor")
        table.add_column("relative error", justify="right")
        for d in found[:rows]:
            table.add_row(d.tensor, f"{d.error:.1e}", style="" if d.good else "red")
        new_console().print(table)
        typer.echo(f"{len(found) - len(bad)} of {len(found)} tensors within {bar:g} of PyTorch")
        if usage:
            new_console().print(memory_table([usage]))
    if bad:
        raise typer.Exit(1)
