"""What the commands share: the application, its options, and how it prints."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

# torch, rich and matplotlib take seconds to import: each command imports what it needs
if TYPE_CHECKING:
    from rich.console import Console

    from splitee.assemble import Assembly, Member
    from splitee.fleet import Fleet
    from splitee.place_int8 import Int8Build
    from splitee.runs import Checkpoint, Run
    from splitee_host.int8_device import Int8Device

app = typer.Typer(
    help="Train one neural network on microcontrollers, edge computers and GPUs together.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

bench_app = typer.Typer(help="Measure a board.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

FleetFile = Annotated[Path, typer.Argument(help="The fleet file (TOML).", metavar="FLEET")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
BUILD = Path("build") / "firmware"


def plain(text: object) -> str:
    """The text without any meaning for rich."""
    from rich.markup import escape

    return escape(str(text))


def new_console(*, stderr: bool = False) -> Console:
    """Where a command prints."""
    from rich.console import Console

    # a pipe or a file has no width of its own; without one, rich would fold tables at 80
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else 160
    return Console(emoji=False, stderr=stderr, width=width)


def assembly_of(fleet: Fleet) -> Assembly:
    """A fleet on the boards that we know."""
    from splitee.assemble import Assembly
    from splitee_host.boards import load_boards, look_up

    known = load_boards()
    return Assembly(fleet, lambda name: look_up(known, name).for_assembly)


def going_on(run: Run) -> str:
    """The command that goes on with a run."""
    return f"`splitee train --resume {shlex.quote(str(run.folder))}`"


def ended(run: Run, seconds: float) -> str:
    """What a run that is over has left, in words."""
    return (
        f"{len(run.took_part())} rounds in {seconds:.0f} s; curves, metrics and checkpoint in "
        f"{run.folder}/"
    )


def size_text(size: int) -> str:
    """A number of bytes, or that there is none."""
    from splitee.place import kib

    return kib(size) if size else "-"


def int8_of(assembly: Assembly, member: Member, checkpoint: Checkpoint | None) -> Int8Build:
    """A client's segment in 8 bits, as a checkpoint has it, or as it begins."""
    from splitee.assemble_int8 import of_member
    from splitee.errors import CheckpointError

    if checkpoint is None:
        return of_member(assembly, member, member.state.weights)
    if member.name not in checkpoint.states:
        raise CheckpointError(
            f'client "{member.name}": the checkpoint has nothing of it: train the fleet with it'
        )
    return of_member(assembly, member, checkpoint.states[member.name].weights)


@contextmanager
def on_board(
    run: Run, assembly: Assembly, member: Member, checkpoint: Checkpoint
) -> Iterator[tuple[Int8Device, str]]:
    """A client's board with its segment in 8 bits, as a checkpoint has it, and what it really is.

    It is started, or spoken to where it runs.
    """
    from splitee_exporters.c_int8 import to_c
    from splitee_host import int8_boards, keys
    from splitee_host.boards import load_boards
    from splitee_host.launch import key_of

    known = keys.of_fleet(run.fleet_file, assembly.fleet.auth)
    running = int8_boards.running(
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
        yield device, board.name


def image_shape(text: str) -> tuple[int, int, int]:
    """Channels, height and width of --input. Raises SpliteeError for another form."""
    from splitee.errors import SpliteeError

    parts = text.split("x")
    if (
        len(parts) != 3
        or not all(p.isdecimal() and int(p) > 0 for p in parts)
        or (parts[0] not in ("1", "3"))
    ):
        raise SpliteeError(f"--input {text}: give 1 or 3 channels, height and width as 3x32x32")
    channels, height, width = (int(p) for p in parts)
    return channels, height, width


def unaugmented(fleet: Fleet) -> list[str]:
    """Which clients of a fleet with augmentations use their images as they are, for people."""
    from splitee_host.boards import load_boards, look_up

    if not fleet.data.augment:
        return []
    known = load_boards()
    firmware = [c.name for c in fleet.client if look_up(known, c.board).firmware]
    remote = [c.name for c in fleet.client if c.board == "python" and c.link is not None]
    lines = []
    if firmware:
        lines.append(f"{', '.join(firmware)}: in firmware, so its images stay as they are")
    if remote:
        lines.append(f"{', '.join(remote)}: where ONNX Runtime trains, images stay as they are")
    names = ", ".join(fleet.data.augment)
    return [f"augment ({names}) is for clients in torch", *lines] if lines else []


def listening_address(url: str) -> tuple[str, int]:
    """Host and port of a tcp:// URL to listen on."""
    from urllib.parse import urlsplit

    from splitee.errors import LinkError

    with suppress(ValueError):  # a port that is none
        parts = urlsplit(url)
        if parts.scheme == "tcp" and parts.hostname and parts.port is not None and not parts.path:
            return parts.hostname, parts.port
    raise LinkError(f"cannot listen on {url!r}: take the form tcp://host:port")


def client_key(
    name: str | None, asked: Path | None, place: Path | None, listen: str
) -> bytes | None:
    """A client's key: that of its name, or the only one there is; None where it needs none.

    asked: the file that must have it. place: that file, or one that may.
    """
    from splitee.errors import KeyFileError
    from splitee_host import keys

    known = keys.read(place) if place else {}
    if name is None and len(known) > 1:
        raise KeyFileError(f"{place}: --name says whose key it is: there are {', '.join(known)}")
    key = known.get(name) if name is not None else next(iter(known.values()), None)
    if key is None and asked:
        whose = f'no key of client "{name}"' if name else "no key"
        raise KeyFileError(f"{asked}: there is {whose}: bring its line of the host's file of keys")
    if key is None and keys.is_open_to_others(listen):
        where = f"bring {place} here" if place else "name a file with its key by --keys"
        raise KeyFileError(
            f"{listen}: others are on that network, too: run `splitee keys` where the host is, "
            f'{where}, or say auth = "none" in the fleet file, and --auth none here'
        )
    return key
