"""What the commands share: the application, its options, and how it prints."""

from __future__ import annotations

import shlex
import sys
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
