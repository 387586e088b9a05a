"""`splitee build`: firmware with segments in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitee_host.cli.common import BUILD, app, assembly_of, image_shape, int8_of, new_console

if TYPE_CHECKING:
    from splitee.runs import Checkpoint
    from splitee_host.boards import Firmware


@app.command()
def build(
    fleet_file: Annotated[
        Path | None,
        typer.Argument(help="The fleet file (TOML), or the folder of a run.", metavar="FLEET"),
    ] = None,
    client: Annotated[str | None, typer.Option(help="Only this client.")] = None,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Segments of 8 bits, which answer images and learn nothing; of a run, its "
            "checkpoint's.",
        ),
    ] = False,
    board: Annotated[
        str | None, typer.Option(help="With --int8 in place of a fleet: a board alone.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="With --board: the network, as a fleet file names it.")
    ] = "resnet8",
    width: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="With --board: of the network's first stage."),
    ] = None,
    cut: Annotated[
        str, typer.Option(help="With --board: where the segment ends: path, number or auto.")
    ] = "auto",
    shape: Annotated[
        str, typer.Option("--input", help="With --board: of an image, channels first.")
    ] = "1x8x8",
    data: Annotated[
        str,
        typer.Option(help="With --board: images that calibrate: digits, .npz or a folder of them."),
    ] = "digits",
    out: Annotated[Path, typer.Option(help="Folder for what is built.")] = BUILD,
) -> None:
    """Build the firmware of the fleet's boards, with each client's segment in it."""
    from splitee.errors import FleetError
    from splitee.fleet import read
    from splitee.runs import Run
    from splitee_exporters.c import to_c
    from splitee_exporters.c_int8 import to_c as to_c_int8
    from splitee_host import keys
    from splitee_host.boards import load_boards
    from splitee_host.launch import build_firmware, usage
    from splitee_host.screen import memory_table

    if (fleet_file is None) == (board is None):
        raise FleetError("build takes a fleet file, or --board with --int8: give one of the two")
    if fleet_file is None:
        assert board is not None
        if not int8:
            raise FleetError(
                "a board alone gets a segment of 8 bits: add --int8; what trains needs its fleet "
                "file"
            )
        _build_alone(board, model, width, cut, shape, data, out)
        return
    checkpoint: Checkpoint | None = None
    if fleet_file.is_dir():
        run = Run(fleet_file)
        fleet_file, checkpoint = run.fleet_file, run.load()
    assembly = assembly_of(read(fleet_file))
    names = [c.name for c in assembly.fleet.client]
    if client is not None and client not in names:
        raise FleetError(f'{fleet_file}: no client "{client}": there are {", ".join(names)}')
    known = load_boards()
    known_keys = keys.of_fleet(fleet_file, assembly.fleet.auth)
    usages = []
    for table in assembly.fleet.client:
        on = known[table.board]
        if client not in (None, table.name) or not on.firmware:
            continue
        member, key = assembly.member(table.name), known_keys.get(table.name)
        if int8:
            build8 = int8_of(assembly, member, checkpoint)
            firmware = build_firmware(build8, on, to_c_int8, out, key)
        else:
            firmware = build_firmware(member.build, on, to_c, out, key)
        typer.echo(_built(table.name, firmware))
        usages.append(usage(table.name, on, firmware))
    if usages:
        new_console().print(memory_table(usages))


def _built(name: str, firmware: Firmware) -> str:
    return (
        f"{name}: {firmware.elf}: {firmware.flash_bytes:,} bytes of flash, "
        f"{firmware.ram_bytes:,} of RAM"
    )


def _build_alone(
    board: str, model: str, width: int | None, cut: str, shape: str, data: str, out: Path
) -> None:
    """Builds a network's segment of 8 bits for a board; its weights have learnt nothing."""
    from splitee import samples
    from splitee.assemble_int8 import of_model
    from splitee.errors import FleetError
    from splitee_exporters.c_int8 import to_c
    from splitee_host.boards import load_boards, look_up
    from splitee_host.launch import build_firmware, usage
    from splitee_host.screen import memory_table

    on = look_up(load_boards(), board)
    room = on.for_assembly.room
    if room is None:
        raise FleetError(f"{board} runs no firmware: there is nothing to build for it")
    images = samples.load(data, image_shape(shape))
    build8 = of_model(model, cut, images, on.name, room, width=width)
    firmware = build_firmware(build8, on, to_c, out)
    typer.echo(_built(on.name, firmware))
    new_console().print(memory_table([usage(on.name, on, firmware)]))
