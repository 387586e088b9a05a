"""`splitee serve`: a run's server halves, for clients that answer by early exits."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from splitee_host.cli.common import app, assembly_of, listening_address, new_console, size_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from splitee.trained import Trained
    from splitee_host.answering import Half


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    listen: Annotated[
        str, typer.Option(help="Address that clients connect to.")
    ] = "tcp://127.0.0.1:7071",
    auth: Annotated[
        Literal["auto", "none"] | None,
        typer.Option(
            help="none: without keys, also where others are on the network; without this option "
            "as the fleet file says.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Answer what exits are unsure of, for `splitee client --infer`: prints its address, waits."""
    import torch
    from rich.table import Table

    from splitee.fleet import read
    from splitee.runs import Run
    from splitee.trained import numbers, of_run
    from splitee_host import keys
    from splitee_host.answering import AnsweringServer
    from splitee_host.launch import torch_device
    from splitee_host.link import serve_tcp

    torch.set_num_threads(1)  # a second server says the same, to the bit
    host, port = listening_address(listen)
    run = Run(folder)
    checkpoint = run.load()
    fleet = read(run.fleet_file)
    assembly = assembly_of(fleet)
    trained = of_run(assembly, checkpoint, torch_device())
    nobody = (auth or fleet.auth) == "none"
    known = {} if nobody else keys.read(keys.file_of(run.fleet_file))
    if not nobody and keys.is_open_to_others(listen):
        trained = _with_keys(trained, known, listen, run.fleet_file)
    number = numbers(checkpoint)
    halves = [_half(one, number[one.member.name], known) for one in trained]
    server = AnsweringServer(halves, run.fingerprint(), say=lambda text: typer.echo(text, err=True))
    with serve_tcp(host, port) as listener, suppress(KeyboardInterrupt):
        typer.echo(listener.url)
        server.serve(listener)
    table = Table(box=None)
    table.add_column("client")
    for name in ("samples answered", "came up", "went down"):
        table.add_column(name, justify="right")
    for name, asked in server.asked.items():
        sizes = size_text(asked.bytes_up), size_text(asked.bytes_down)
        table.add_row(name, f"{asked.samples:,}", *sizes)
    new_console().print(table)


def _with_keys(
    trained: list[Trained], known: Mapping[str, bytes], listen: str, fleet_file: Path
) -> list[Trained]:
    """Those that may be answered where others are on the network: who has a key."""
    from splitee.errors import KeyFileError

    there = [one for one in trained if one.member.name in known]
    if not there:
        raise KeyFileError(
            f"{listen}: others are on that network, too: run `splitee keys {fleet_file}` and bring "
            "each client its line, or say --auth none here and at the clients"
        )
    left_out = [one.member.name for one in trained if one.member.name not in known]
    if left_out:
        typer.echo(f"without a key, and so not answered: {', '.join(left_out)}", err=True)
    return there


def _half(one: Trained, number: int, known: Mapping[str, bytes]) -> Half:
    """What completes a client's answers."""
    import torch

    from splitee_host import keys
    from splitee_host.answering import Half

    graph, name = one.member.graph, one.member.name
    key = known.get(name)

    def infer(values: Any) -> Any:
        activations = torch.from_numpy(values.reshape(-1, *graph.shapes[graph.cut]))
        return one.server.infer(activations, one.client.cut, name).cpu().numpy()

    return Half(
        client=name,
        number=number,
        key=keys.for_answers(key) if key else None,
        elements=graph.elements(graph.cut),
        infer=infer,
    )
