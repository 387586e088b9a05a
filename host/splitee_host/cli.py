"""The command line: `splitee boards | plan | build | train | eval | export | verify | …`."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

# torch, rich and matplotlib take seconds to import: each command imports what it needs
if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from splitee.assemble import Assembly, Member
    from splitee.data import Images
    from splitee.fleet import Fleet
    from splitee.model import Cut
    from splitee.place import Build
    from splitee.place_int8 import Int8Build
    from splitee.runs import Checkpoint, ClientSummary, Run
    from splitee.server import Server
    from splitee.strategies import Averaging, Sequential
    from splitee_host.boards import Firmware
    from splitee_host.launch import Launched
    from splitee_host.learner import Learner
    from splitee_host.memory import Usage

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
_HOST_NEEDS = ("torch", "torchvision", "PIL", "safetensors", "matplotlib", "sklearn", "pydantic")


def main() -> None:
    """Runs the command line; errors that a user can cure are printed without a traceback."""
    from splitee.errors import SpliteeError

    try:
        try:
            app()
        except ModuleNotFoundError as missing:
            raise _missing(missing) from missing
    except SpliteeError as error:
        _console(stderr=True).print(f"[bold red]error:[/] {_plain(error)}", highlight=False)
        sys.exit(1)


def _missing(error: ModuleNotFoundError) -> Exception:
    """What a user can do about a module that is not there, where that is an extra's."""
    from splitee.errors import MissingTool

    package = (error.name or "").partition(".")[0]
    if package in _HOST_NEEDS:
        return MissingTool(f"{package} is not installed: pip install 'hetero-splitee[host]'")
    return error


def _plain(text: object) -> str:
    from rich.markup import escape

    return escape(str(text))


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    # a pipe or a file has no width of its own; without one, rich would fold tables at 80
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else 160
    return Console(emoji=False, stderr=stderr, width=width)


def _assembly(fleet: Fleet) -> Assembly:
    from splitee.assemble import Assembly
    from splitee_host.boards import load_boards, look_up

    known = load_boards()
    return Assembly(fleet, lambda name: look_up(known, name).for_assembly)


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
            _size(b.ram_bytes) + (f" + {_size(b.shard_bytes)}" if b.shard_bytes else ""),
            _size(b.flash_bytes),
            f"{b.title}: {b.status}",
        )  # fmt: skip
    _console().print(table)


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
        table.add_row(*(_plain(cell) for cell in cells))
    _console().print(table)


def _size(size: int) -> str:
    from splitee.place import kib

    return kib(size) if size else "-"


@app.command()
def plan(fleet_file: FleetFile, as_json: Json = False) -> None:
    """Show what each client's segment takes at each cut, and whether it fits its board."""
    from rich.table import Table

    from splitee.errors import FitError
    from splitee.fleet import read
    from splitee.place import effects

    assembly = _assembly(read(fleet_file))
    console = _console()
    clients: list[dict[str, Any]] = []
    for client in assembly.fleet.client:
        room = assembly.boards[client.name].room
        chosen: tuple[Cut, Cut] | None = None
        with suppress(FitError):  # said below, once the table is there to look at
            chosen = assembly.choose(client)
        moves, unsure = client.deepest is not None, client.send == "unsure"
        narrow, coding = client.narrowing, client.coding
        single, every = (assembly.builds(client, moves=m) for m in (False, True))
        rows = []
        for i, cut in enumerate(assembly.cuts):
            build = every[i] if moves else single[i]
            forward, backward = single[i].graph.macs()
            why = assembly.bottleneck_fault(client, cut)
            why = why or (build.shortage(room) if room else None)
            rows.append(
                {
                    "cut": cut.name,
                    "number": cut.number,
                    "parameters": single[i].graph.parameter_size,
                    "arena_bytes": build.arena_bytes,
                    "arena_lower_bound": build.plan.lower_bound,
                    "ram_bytes": build.ram_bytes(room) if room else None,
                    "flash_bytes": build.flash_bytes(room) if room else None,
                    "shard_bytes": build.shard_bytes,
                    "samples": build.samples_max,
                    "samples_that_fit": build.samples_that_fit(room) if room else None,
                    "every_cut_arena_bytes": every[i].arena_bytes - single[i].arena_bytes,
                    "every_cut_flash_bytes": (
                        every[i].flash_bytes(room) - single[i].flash_bytes(room) if room else None
                    ),
                    "macs_forward": forward,
                    "macs_backward": backward,
                    "bytes_up_per_sample": build.bytes_up_per_sample(coding, unsure=unsure),
                    "bytes_up_sure": build.bytes_up_sure if unsure else None,
                    "bytes_up_wide": coding.up(cut.elements).size + 1 if narrow else None,
                    "fits": why is None,
                    "why": why,
                    "chosen": chosen is not None and cut == chosen[0],
                }
            )
        deepest = assembly.cuts.index(chosen[1]) if chosen else 0
        pulled = effects((every if moves else single)[deepest])
        levers = [asdict(e) for e in pulled] if assembly.boards[client.name].firmware else []
        clients.append(
            {
                "client": client.name,
                "board": client.board,
                "capacity": assembly.capacity(client),
                "bottleneck": asdict(narrow) if narrow else None,
                "deepest": chosen[1].name if chosen and moves else None,
                "cuts": rows,
                "levers": levers,
            }
        )
    if as_json:
        typer.echo(json.dumps(clients, indent=2))
    for entry in clients if not as_json else []:
        title = f"{entry['client']} on {entry['board']}, {entry['capacity']} samples at once"
        if entry["deepest"]:
            title += f", built with every cut up to {entry['deepest']}"
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        table.add_column("\n  cut", no_wrap=True)
        for name in (
            "para-\nmeters", "arena\nbytes", "lower\nbound", "RAM\nbytes", "flash\nbytes",
            "samples\nthat fit", "every\n+arena", "cut\n+flash", "MACs\nforward",
            "MACs\nbackward", "bytes up\na sample",
        ):  # fmt: skip
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("\nfits", no_wrap=True)
        for row in entry["cuts"]:
            table.add_row(
                f"{'>' if row['chosen'] else ' '} {row['number']} {row['cut']}",
                f"{row['parameters']:,}",
                f"{row['arena_bytes']:,}",
                f"{row['arena_lower_bound']:,}",
                f"{row['ram_bytes']:,}" if row["ram_bytes"] else "-",
                f"{row['flash_bytes']:,}" if row["flash_bytes"] else "-",
                f"{row['samples_that_fit']:,}" if row["flash_bytes"] else "-",
                f"{row['every_cut_arena_bytes']:+,}",
                f"{row['every_cut_flash_bytes']:+,}" if row["flash_bytes"] else "-",
                f"{row['macs_forward']:,}",
                f"{row['macs_backward']:,}",
                f"{row['bytes_up_per_sample']:,}",
                "yes" if row["fits"] else "no",
                style="bold" if row["chosen"] else "",
            )
        console.print(table)
        if entry["levers"]:
            console.print(_lever_table(entry))
        for line in _sending(entry):
            console.print(line, highlight=False)
        for row in entry["cuts"]:
            if row["why"]:
                console.print(f"{row['number']} {row['cut']} {row['why']}", highlight=False)
        console.print()
    if not as_json:
        console.print(
            "> the cut that is taken; samples that fit: the most that its shard could have there\n"
            "every cut: what is added where all cuts up to that one are built in (deepest = ...)",
            highlight=False,
        )
    for client in assembly.fleet.client:
        assembly.member(client.name)  # raises what keeps the fleet from training


def _sending(entry: dict[str, Any]) -> list[str]:
    """What its bottleneck saves at a client's cut, and what a sample that is not sent on takes."""
    lines = []
    for row in (r for r in entry["cuts"] if r["chosen"]):
        sent, sure, wide = (row[f"bytes_up_{k}"] for k in ("per_sample", "sure", "wide"))
        coded = sent - (sure or 1) + 1  # activations and label
        if narrow := entry["bottleneck"]:
            saved = f"{1 - coded / wide:.0%} less" if coded < wide else "it saves nothing"
            lines.append(
                f"its bottleneck of {narrow['channels']} channels, stride {narrow['stride']}: "
                f"{coded:,} bytes up a sample, {wide:,} without: {saved}"
            )
        if sure:
            lines.append(f"a sample that its exit is sure of takes {sure:,} bytes up")
    return lines


def _lever_table(entry: dict[str, Any]) -> Table:
    """What each lever does to the arena, beside that of the client's cut."""
    from rich.table import Table

    chosen = [row for row in entry["cuts"] if row["cut"] == entry["deepest"] or row["chosen"]]
    arena = (chosen or entry["cuts"])[-1]["arena_bytes"]
    table = Table(title="its levers", title_justify="left", box=None)
    for name in ("setting", "is", "could be", "arena then", "change", "price of saving"):
        table.add_column(name, justify="right" if name in ("arena then", "change") else "left")
    for e in entry["levers"]:
        change = e["arena_bytes"] - arena
        table.add_row(
            e["setting"], e["now"], e["other"], f"{e['arena_bytes']:,}", f"{change:+,}", e["price"],
            style="" if change < 0 else "dim",
        )  # fmt: skip
    return table


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
    assembly = _assembly(read(fleet_file))
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
            build8 = _int8_of(assembly, member, checkpoint)
            firmware = build_firmware(build8, on, to_c_int8, out, key)
        else:
            firmware = build_firmware(member.build, on, to_c, out, key)
        typer.echo(_built(table.name, firmware))
        usages.append(usage(table.name, on, firmware))
    if usages:
        _console().print(memory_table(usages))


def _built(name: str, firmware: Firmware) -> str:
    return (
        f"{name}: {firmware.elf}: {firmware.flash_bytes:,} bytes of flash, "
        f"{firmware.ram_bytes:,} of RAM"
    )


def _int8_of(assembly: Assembly, member: Member, checkpoint: Checkpoint | None) -> Int8Build:
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
    images = samples.load(data, _shape(shape))
    build8 = of_model(model, cut, images, on.name, room, width=width)
    firmware = build_firmware(build8, on, to_c, out)
    typer.echo(_built(on.name, firmware))
    _console().print(memory_table([usage(on.name, on, firmware)]))


@app.command()
def train(
    fleet_file: Annotated[
        Path | None, typer.Argument(help="The fleet file (TOML).", metavar="FLEET")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with the run in this folder, behind its last complete round, in place of "
            "training a fleet from the beginning.",
            metavar="RUN",
        ),
    ] = None,
) -> None:
    """Train a fleet; leaves metrics, checkpoint and summary in runs/<name>/."""
    import torch

    from splitee.errors import CheckpointError, FleetError, LinkError
    from splitee.fleet import read
    from splitee.runs import Run, check
    from splitee_exporters.c import to_c
    from splitee_host import keys
    from splitee_host.launch import Launcher
    from splitee_host.screen import final_table, memory_table

    torch.set_num_threads(1)  # sums in one order: a second run is bit-identical
    began = time.perf_counter()
    console = _console()

    def say(text: str) -> None:
        console.print(_plain(text), highlight=False)

    checkpoint: Checkpoint | None = None
    if (fleet_file is None) == (resume is None):
        raise FleetError(
            "train takes a fleet file, or --resume with the folder of a run, whose own copy of the "
            "fleet file it then uses: give one of the two"
        )
    if resume is not None:
        run = Run(resume)
        fleet_file = run.fleet_file
        if not fleet_file.exists():
            raise CheckpointError(f"{fleet_file}: no such file: is {resume} the folder of a run?")
        fleet = read(fleet_file)
        if run.checkpoint_file.exists():
            checkpoint = run.load()
        say(_goes_on(run, checkpoint, fleet.rounds))
    else:
        assert fleet_file is not None
        fleet = read(fleet_file)
        run = Run(runs / fleet.name)
    assembly = _assembly(fleet)
    if checkpoint is not None:
        held = {name: state.weights for name, state in checkpoint.states.items()}
        check(held, {m.name: m.state.weights for m in assembly.members})
    elif resume is None and (unfinished := _unfinished(run)):
        say(unfinished)
    with Launcher(assembly, fleet_file, to_c, BUILD, say) as launcher:
        launched = [launcher.launch(member) for member in assembly.members]
        strategy = _strategy(assembly, launched, checkpoint)
        complete = checkpoint.round if checkpoint is not None else 0
        if resume is not None:
            run.resume(complete)
        else:
            run.begin(fleet_file.read_text(encoding="utf-8"))
            keys.lend(fleet_file, run.fleet_file)
        earlier = run.seconds()
        summaries, usages = _train(console, assembly, run, launched, strategy, complete + 1)
    console.print(final_table(summaries))
    if usages:
        console.print(memory_table(usages))
    run.finish(earlier + time.perf_counter() - began, summaries)
    rounds = run.took_part()
    for summary in summaries:
        there = sum(summary.name in r["clients"] for r in rounds)
        if there < len(rounds):
            say(f"{summary.name} took part in {there} of {len(rounds)} rounds")
    console.print(
        f"{len(rounds)} rounds in {earlier + time.perf_counter() - began:.0f} s; curves, metrics "
        f"and checkpoint in {run.folder}/",
        highlight=False,
    )
    if all(summary.lost for summary in summaries):
        raise LinkError(
            "every client was lost; the table shows what was kept of each: when they are back, go "
            f"on with `splitee train --resume {run.folder}`"
        )


def _goes_on(run: Run, checkpoint: Checkpoint | None, rounds: int) -> str:
    """What resuming a run begins with, in words."""
    if checkpoint is None:
        return f"{run.folder}/: no round is complete yet: beginning with the first"
    if checkpoint.round >= rounds:
        return f"{run.folder}/: all {rounds} rounds are complete: only testing"
    return f"{run.folder}/: going on behind round {checkpoint.round} of {rounds}"


def _unfinished(run: Run) -> str | None:
    """What a new run of the same name is about to replace, where that could have gone on."""
    from splitee.errors import SpliteeError
    from splitee.fleet import read

    with suppress(SpliteeError):  # none, or none that we can go on with
        done, rounds = run.load().round, read(run.fleet_file).rounds
        if done < rounds:
            return (
                f"{run.folder}/ holds a run that ended behind round {done} of {rounds}; this one "
                f"takes its place (`splitee train --resume {run.folder}` goes on with it instead)"
            )
    return None


def _strategy(
    assembly: Assembly, launched: list[Launched], checkpoint: Checkpoint | None
) -> Averaging | Sequential:
    """The fleet's strategy; where there is a checkpoint, all clients and servers are at it."""
    from splitee.runs import check
    from splitee_host.launch import torch_device

    clients, device = [entry.client for entry in launched], torch_device()
    if checkpoint is None:
        return assembly.strategy(clients, device)
    strategy = assembly.strategy(clients, device, states=checkpoint.states)
    check(checkpoint.servers, {n: s.tensors() for n, s in strategy.servers().items()})
    strategy.load(checkpoint.servers, checkpoint.server_momentum)
    for entry in launched:
        entry.client.start(checkpoint.states[entry.client.name], entry.member.images)
    return strategy


def _train(
    console: Console,
    assembly: Assembly,
    run: Run,
    launched: list[Launched],
    strategy: Averaging | Sequential,
    first: int,
) -> tuple[list[ClientSummary], list[Usage]]:
    """Rounds from the first, then the test; a summary and the firmware's memory for each client."""
    from splitee.errors import LinkError
    from splitee.runs import ClientSummary
    from splitee.train import RoundDone, evaluate, fit
    from splitee_host.screen import Screen

    clients = [entry.client for entry in launched]
    samples = {m.name: len(m.images) for m in assembly.members}
    with Screen(console, clients, samples, assembly.fleet.rounds, first) as screen:
        for event in fit(strategy, assembly.fleet.rounds, first):
            screen.show(event)
            run.log(event)
            if isinstance(event, RoundDone):
                run.save(event.round, event.states, strategy.servers())
    lost = dict(strategy.away)
    passes = [r for r in run.metrics() if r["event"] == "ClientDone"]
    console.print("testing: every client answers the test images itself", highlight=False)
    summaries = []
    usages = []
    for entry in launched:
        member, client, usage = entry.member, entry.client, entry.memory
        mine = [r for r in passes if r["client"] == member.name]
        trained = max(1, sum(r["samples"] for r in mine))
        up = sum(r["activations_up"] for r in mine) / trained
        if member.name not in lost:
            try:
                answers = evaluate(client, strategy.server(member.name), assembly.dataset.test)
                usage = entry.usage()
            except LinkError as error:
                lost[member.name] = str(error)
        if member.name in lost:
            # what it had learnt by its last complete round is kept, and tested here
            client = assembly.local(member)
            client.start(strategy.states[member.name], member.images)
            answers = evaluate(client, strategy.server(member.name), assembly.dataset.test)
        summaries.append(
            ClientSummary(
                name=member.name,
                tier=entry.tier,
                board=entry.board,
                link=entry.link,
                cut=member.cut.name,
                parameters=member.graph.parameter_size,
                arena_bytes=member.build.arena_bytes,
                flash_bytes=entry.flash_bytes,
                bytes_up_per_sample=round(up, 1),
                ms_per_sample=round(1000 * sum(r["seconds"] for r in mine) / trained, 3),
                exit_accuracy=answers.exit_accuracy,
                server_accuracy=answers.server_accuracy,
                lost=lost.get(member.name),
                memory=usage.figures() if usage else None,
            )
        )
        if usage:
            usages.append(usage)
    return summaries, usages


@app.command("eval")
def evaluate_run(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    entropy: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="An exit answers up to this normalised entropy."),
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
    as_json: Json = False,
) -> None:
    """Test a run's checkpoint: each exit, the server, and early exits with the server's help."""
    from splitee.fleet import read
    from splitee.runs import Run
    from splitee.train import evaluate

    run = Run(folder)
    checkpoint = run.load()
    assembly = _assembly(read(run.fleet_file))
    threshold = assembly.fleet.entropy if entropy is None else entropy
    images = assembly.dataset.test[:samples]
    rows: list[dict[str, Any]] = []
    members = [m for m in assembly.members if m.name in checkpoint.states]
    clients = [assembly.local(m) for m in members]
    strategy = assembly.strategy(clients)
    strategy.load(checkpoint.servers)
    for member, client in zip(members, clients, strict=True):
        client.start(checkpoint.states[member.name], member.images)
        server = strategy.server(member.name)
        answers = evaluate(client, server, images)
        share, accuracy = answers.early(threshold)
        rows.append(
            {
                "client": member.name,
                "cut": member.cut.name,
                "exit_accuracy": answers.exit_accuracy,
                "server_accuracy": answers.server_accuracy,
                "share_at_exit": share,
                "accuracy": accuracy,
            }
        )
        if device and assembly.boards[member.name].firmware:
            rows[-1]["device"] = _on_device(
                run, assembly, member, checkpoint, server, images, threshold
            )
    if as_json:
        typer.echo(
            json.dumps({"round": checkpoint.round, "entropy": threshold, "clients": rows}, indent=2)
        )
        return
    title = f"round {checkpoint.round}; exits answer up to an entropy of {threshold:g}"
    _console().print(_eval_table(title, rows, where=device))


def _on_device(
    run: Run,
    assembly: Assembly,
    member: Member,
    checkpoint: Checkpoint,
    server: Server,
    images: Images,
    threshold: float,
) -> dict[str, Any]:
    """What a client's board and its server answer together, and where it ran."""
    from splitee_exporters.c_int8 import to_c
    from splitee_host import early, keys
    from splitee_host.boards import load_boards
    from splitee_host.launch import key_of

    known = keys.of_fleet(run.fleet_file, assembly.fleet.auth)
    running = early.running(
        member.name,
        _int8_of(assembly, member, checkpoint),
        load_boards()[member.table.board],
        to_c,
        BUILD,
        link=member.table.link,
        key=key_of(member.table, known, assembly.fleet.auth, run.fleet_file),
        say=lambda text: typer.echo(text, err=True),
    )
    with running as (device, board):
        answered = early.answer(device, server, images, threshold)
        return {"board": board.name, "link": device.link.name, **asdict(answered)}


def _eval_table(title: str, rows: list[dict[str, Any]], *, where: bool) -> Table:
    """A line per client, and where it also answered on its board, one more."""
    from rich.table import Table

    figures = ("exit_accuracy", "server_accuracy", "share_at_exit", "accuracy")
    table = Table(title=title)
    for name in ("client", "cut", *(("where",) if where else ())):
        table.add_column(name)
    for name in ("exit", "server", "answered at the exit", "together"):
        table.add_column(name, justify="right")
    if where:
        table.add_column("bytes up a sample", justify="right")
    for row in rows:
        names, device = (row["client"], row["cut"]), row.get("device")
        here = [f"{100 * row[k]:.1f} %" for k in figures]
        table.add_row(*names, *(("here, float32",) if where else ()), *here, *(["-"] * where))
        if device is not None:
            there = [f"{100 * device[k]:.1f} %" if k in device else "-" for k in figures]
            sent = f"{device['bytes_up_per_sample']:,}"
            table.add_row(*names, f"{device['board']}, int8", *there, sent)
    return table


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
    from splitee_exporters.export import TIERS, Format, Options, summary
    from splitee_exporters.export import export as write
    from splitee_host.boards import firmware_root, load_boards, look_up

    if (source is None) == (model is None):
        raise SpliteeError("give either a fleet file or the folder of a run, or --model")
    known = load_boards()
    halves: list[tuple[Halves, str, Path]] = []  # with their board, and the folder for their files
    if model is not None:
        shape = _shape(input)
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
        for made in of_fleet(_assembly(fleet), run.load() if run else None):
            if client in (None, made.name):
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
            ram=known[name].ram_bytes if name else 0,
        )
        files = write(made, chosen, folder, options)
        place = {"client": made.name, "cut": made.cut_name, "folder": str(folder)}
        rows += [place | summary(file) for file in files]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    _console().print(_export_table(rows))
    typer.echo("beside them, manifest.json says what they are and how they were verified")


def _shape(text: str) -> tuple[int, int, int]:
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
    assembly = _assembly(fleet)
    if not assembly.boards["verify"].firmware:
        raise FleetError(f"{board} runs no firmware: there is nothing to verify on it")
    (member,) = assembly.members
    with Launcher(assembly, Path(), to_c, BUILD, lambda text: None) as launcher:
        launched = launcher.launch(member)
        device = launched.client
        assert isinstance(device, Device)
        found = compare(device, member.segment, member.images, fleet.settings, count, member.seed)
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
        _console().print(table)
        typer.echo(f"{len(found) - len(bad)} of {len(found)} tensors within {bar:g} of PyTorch")
        if usage:
            _console().print(memory_table([usage]))
    if bad:
        raise typer.Exit(1)


@bench_app.command("kernels")
def bench_kernels(
    board: Annotated[str, typer.Option(help="An emulated board.")] = "qemu-m4",
    int8: Annotated[bool, typer.Option("--int8", help="Of inference in 8 bits.")] = False,
    as_json: Json = False,
) -> None:
    """Count the instructions that each kernel takes in one training step of one sample."""
    from rich.table import Table

    from splitee_host.bench import PARTS, int8_kernels, kernels
    from splitee_host.boards import load_boards, look_up

    known = look_up(load_boards(), board)
    if int8:
        _print_int8(int8_kernels(known, BUILD / f"{known.name}-int8-kernels"), as_json=as_json)
        return
    rows = kernels(known, BUILD / f"{known.name}-kernels")
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    typer.echo(f"instructions on {board}, {rows[0]['compiler']}; a step is forward to update")
    table = Table(box=None)
    table.add_column("kernel")
    table.add_column("shape")
    for name in (*PARTS, "a MAC", "scratch bytes"):
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        counts = row["instructions"]
        per_mac = f"{counts['step'] / 3 / row['macs']:.2f}" if row["macs"] else ""
        table.add_row(
            row["kernel"],
            row["shape"],
            *(f"{counts[part]:,}" for part in PARTS),
            per_mac,
            f"{row['scratch_bytes']:,}",
        )
    _console().print(table)


def _print_int8(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    from rich.table import Table

    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    typer.echo(f"instructions on {rows[0]['board']}, {rows[0]['compiler']}; inference in 8 bits")
    table = Table(box=None)
    table.add_column("kernel")
    table.add_column("shape")
    for name in ("instructions", "a MAC", "scratch bytes"):
        table.add_column(name, justify="right")
    for row in rows:
        count = row["instructions"]
        per_mac = f"{count / row['macs']:.2f}" if row["macs"] else ""
        scratch = f"{row['scratch_bytes']:,}"
        table.add_row(row["kernel"], row["shape"], f"{count:,}", per_mac, scratch)
    _console().print(table)


@bench_app.command("hash")
def bench_hash(
    board: Annotated[str, typer.Option(help="An emulated board.")] = "qemu-m4",
    as_json: Json = False,
) -> None:
    """Count the instructions that checking a frame takes: by CRC-32, or by BLAKE2s with a key."""
    from rich.table import Table

    from splitee_host.bench import hashes
    from splitee_host.boards import load_boards, look_up

    known = look_up(load_boards(), board)
    rows = hashes(known, BUILD / f"{known.name}-hash")
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    typer.echo(f"instructions on {board}, {rows[0]['compiler']}")
    table = Table(box=None)
    table.add_column("hash")
    for name in ("bytes", "instructions", "a byte", "flash bytes of its file"):
        table.add_column(name, justify="right")
    for row in rows:
        count, size = row["instructions"], row["bytes"]
        flash = f"{row['flash_bytes']:,}"
        table.add_row(row["hash"], f"{size:,}", f"{count:,}", f"{count / size:.1f}", flash)
    _console().print(table)


@bench_app.command("link")
def bench_link(
    only: Annotated[
        list[str] | None, typer.Option("--link", help="Only this link; may be repeated.")
    ] = None,
    auth: Annotated[bool, typer.Option("--auth", help="With frames under a key.")] = False,
    as_json: Json = False,
) -> None:
    """Measure what share of a link's rate the exchange with a device leaves to tensors."""
    from rich.table import Table

    from splitee.errors import SpliteeError
    from splitee_exporters.c import to_c
    from splitee_host.goodput import LINKS, links

    names = tuple(only or LINKS)
    for name in names:
        if name not in LINKS:
            raise SpliteeError(f'no link "{name}" is measured: there are {", ".join(LINKS)}')
    rows = list(links(BUILD, to_c, names, auth=auth))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table(box=None)
    for name in ("link", "case", "direction"):
        table.add_column(name)
    for name in ("goodput", "overhead"):
        table.add_column(name, justify="right")
    for row in rows:
        goodput, overhead = (f"{100 * row[k]:.1f}%" for k in ("goodput_ratio", "overhead"))
        table.add_row(row["link"], row["case"], row["direction"], goodput, overhead)
    _console().print(table)
    typer.echo(
        "goodput: of tensors of 64 KiB, against that of bytes without any exchange\n"
        "overhead: bytes on the line beside the payload, 1,400 bytes at a time"
    )


@app.command()
def client(
    source: Annotated[
        Path,
        typer.Argument(
            help="The fleet file (TOML); with --runtime onnx, the folder that `splitee export` "
            "wrote for the client.",
            metavar="FLEET",
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="Which of the fleet's clients this is.", show_default=False)
    ] = None,
    runtime: Annotated[
        Literal["torch", "onnx"], typer.Option(help="What computes; onnx needs no torch.")
    ] = "torch",
    listen: Annotated[
        str, typer.Option(help="Address that the host connects to.")
    ] = "tcp://127.0.0.1:7070",
    key_file: Annotated[
        Path | None,
        typer.Option(
            "--keys",
            help="The file with its key; without it, the one beside the fleet file.",
            show_default=False,
        ),
    ] = None,
    auth: Annotated[
        Literal["auto", "none"] | None,
        typer.Option(
            help="none: without a key, also where others are on the network; without this option "
            "as the fleet file says.",
            show_default=False,
        ),
    ] = None,
    once: Annotated[bool, typer.Option(help="End when the host leaves.")] = False,
) -> None:
    """Be one of the fleet's clients, in this process: prints its address and waits for the host."""
    from splitee_host import keys
    from splitee_host.link import serve_tcp
    from splitee_host.serve import serve

    host, port = _address(listen)
    if runtime == "onnx":
        learner, segment = _of_folder(source)
        key = None if auth == "none" else _client_key(name, key_file, key_file, listen)
    else:
        learner, segment, fleet_auth = _of_fleet(source, name)
        beside = key_file or keys.file_of(source)
        nobody = (auth or fleet_auth) == "none"
        key = None if nobody else _client_key(name, key_file, beside, listen)
    with serve_tcp(host, port) as listener, suppress(BrokenPipeError):
        typer.echo(listener.url)
        while True:  # a host that left may come back, or another
            with listener.accept() as link:
                serve(link, learner, segment, key)
            if once:
                return


def _of_folder(folder: Path) -> tuple[Learner, Build]:
    """A client that was exported, in ONNX Runtime, and what it is built as."""
    from splitee_host.onnx_learner import OnnxLearner

    learner = OnnxLearner(folder)
    return learner, learner.build


def _of_fleet(fleet_file: Path, name: str | None) -> tuple[Learner, Build, str]:
    """A fleet's client in torch, what it is built as, and the fleet's auth."""
    import torch

    from splitee.errors import FleetError
    from splitee.fleet import read
    from splitee_host.torch_learner import TorchLearner

    torch.set_num_threads(1)
    if fleet_file.is_dir():
        raise FleetError(
            f"{fleet_file}: a folder: add --runtime onnx if it is one that was exported, or name "
            "the fleet file"
        )
    fleet = read(fleet_file)
    names = [c.name for c in fleet.client]
    if name not in names:
        which = f'no client "{name}"' if name else "--name says which of its clients this is"
        raise FleetError(f"{fleet_file}: {which}: there are {', '.join(names)}")
    assembly = _assembly(fleet)
    member = assembly.member(name)
    return TorchLearner(assembly.local(member)), member.build, fleet.auth


def _client_key(
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


def _address(url: str) -> tuple[str, int]:
    """Host and port of a tcp:// URL to listen on."""
    from urllib.parse import urlsplit

    from splitee.errors import LinkError

    with suppress(ValueError):  # a port that is none
        parts = urlsplit(url)
        if parts.scheme == "tcp" and parts.hostname and parts.port is not None and not parts.path:
            return parts.hostname, parts.port
    raise LinkError(f"cannot listen on {url!r}: take the form tcp://host:port")


if __name__ == "__main__":
    main()
