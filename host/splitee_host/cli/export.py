"""`splitee export`: segments for other runtimes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from splitee_host.cli.common import Json, app, assembly_of, image_shape, new_console

if TYPE_CHECKING:
    from rich.table import Table

    from splitee.edge import Deployed


@app.command()
def export(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="The fleet file (TOML), or the folder of a run: each client, as its tier wants.",
            metavar="FLEET",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="In place of a fleet, a network with fresh weights: resnet8, resnet18, resnet20, "
            "torchvision:NAME or MODULE:FUNCTION."
        ),
    ] = None,
    cut: Annotated[str, typer.Option(help="Where its segment ends: path or number.")] = "1",
    format: Annotated[
        Literal["onnx", "tflite", "c"] | None,
        typer.Option(help="In which form.", show_default="what the client's tier wants"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for what is made.")] = Path("exported"),
    data: Annotated[
        str,
        typer.Option(
            help="Images to calibrate with and check on: digits, a .npz file, a folder.",
            show_default="the fleet's; with --model the digits, resized",
        ),
    ] = "",
    input: Annotated[
        str, typer.Option(help="What --model takes: CHANNELSxHEIGHTxWIDTH.")
    ] = "3x32x32",
    norm: Annotated[
        Literal["batch", "group"], typer.Option(help="The normalisation of --model.")
    ] = "batch",
    width: Annotated[int | None, typer.Option(min=1, help="Of its first stage.")] = None,
    classes: Annotated[int, typer.Option(min=2, help="Of --model.")] = 10,
    capacity: Annotated[
        int, typer.Option(min=1, help="Samples that --model's segment in C holds at once.")
    ] = 8,
    board: Annotated[
        str | None, typer.Option(help="A board that --model's segment has to fit.")
    ] = None,
    client: Annotated[str | None, typer.Option(help="Only this client.")] = None,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="onnx: also in 8 bits; c: in 8 bits, which does not train."),
    ] = False,
    tail: Annotated[
        bool | None,
        typer.Option(
            "--tail/--no-tail",
            help="The server's half, too, as ONNX.",
            show_default="with onnx",
        ),
    ] = None,
    train: Annotated[
        bool | None,
        typer.Option(
            "--train/--no-train",
            help="What `splitee client --runtime onnx` trains by, too.",
            show_default="for clients on the board python",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write clients' segments as ONNX, int8 TFLite or C, each run and held to PyTorch first."""
    from dataclasses import replace

    from splitee import samples
    from splitee.errors import FleetError, SpliteeError
    from splitee.fleet import read
    from splitee.halves import CALIBRATED, Halves, of_fleet, of_model
    from splitee.runs import Run
    from splitee.trained import deployed, of_run
    from splitee_exporters.export import TIERS, Format, Options, summary
    from splitee_exporters.export import export as write
    from splitee_host.boards import firmware_root, load_boards, look_up

    if (source is None) == (model is None):
        raise SpliteeError("give either a fleet file or the folder of a run, or --model")
    known = load_boards()
    halves: list[tuple[Halves, str, Path]] = []  # with their board, and the folder for their files
    if model is not None:
        shape = image_shape(input)
        images = samples.load(data or "digits", shape)
        settings: dict[str, Any] = {"norm": norm, "width": width, "classes": classes}
        made = of_model(model, cut, shape, images, capacity=capacity, **settings)
        halves.append((made, look_up(known, board).name if board else "", out))
    else:
        assert source is not None
        run = Run(source) if source.is_dir() else None
        fleet_file = run.fleet_file if run else source
        fleet = read(fleet_file)
        boards = {c.name: c.board for c in fleet.client}
        if client is not None and client not in boards:
            raise FleetError(f'{fleet_file}: no client "{client}": there are {", ".join(boards)}')
        assembly, checkpoint = assembly_of(fleet), run.load() if run else None
        ways: dict[str, Deployed] = {}
        if run is not None and checkpoint is not None:
            ways = deployed(run, assembly, checkpoint, of_run(assembly, checkpoint))
        for made in of_fleet(assembly, checkpoint):
            if client in (None, made.name):
                made = replace(made, deployed=ways.get(made.name))
                if data:
                    channels, height, line = made.build.graph.input_shape
                    images = samples.load(data, (channels, height, line))
                    made = replace(made, calibration=images[:CALIBRATED])
                halves.append((made, boards[made.name], out / made.name))
    rows: list[dict[str, Any]] = []
    for made, name, folder in halves:
        default: Format = TIERS[known[name].tier] if name else "onnx"
        chosen: Format = format or default
        options = Options(
            firmware=firmware_root(),
            int8=int8,
            tail=chosen == "onnx" if tail is None else tail,
            train=name == "python" if train is None else train,
            board=name,
            room=known[name].for_assembly.room if name else None,
        )
        files = write(made, chosen, folder, options)
        place = {"client": made.name, "cut": made.cut_name, "folder": str(folder)}
        rows += [place | summary(file) for file in files]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    new_console().print(_export_table(rows))
    typer.echo("beside them, manifest.json says what they are and how they were verified")


def _export_table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(box=None)
    for name in ("file", "cut"):
        table.add_column(name)
    table.add_column("bytes", justify="right")
    table.add_column("ran in")
    for name in ("samples", "error", "allowed", "same class"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(Path(row["folder"]) / row["file"]),
            row["cut"],
            f"{row['bytes']:,}",
            row["runtime"].partition(";")[0],
            f"{row['samples']:,}",
            f"{row['error']:.1e}",
            f"{row['tolerance']:.0e}",
            "-" if row["same_class"] is None else f"{100 * row['same_class']:.1f} %",
        )
    return table
