"""`splitee plan`: what each client's segment takes at each cut."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from splitee_host.cli.common import (
    FleetFile,
    Json,
    app,
    assembly_of,
    new_console,
    plain,
    unaugmented,
)

if TYPE_CHECKING:
    from rich.table import Table

    from splitee.model import Cut


@app.command()
def plan(fleet_file: FleetFile, as_json: Json = False) -> None:
    """Show what each client's segment takes at each cut, and whether it fits its board."""
    from rich.table import Table

    from splitee.errors import FitError
    from splitee.fleet import read
    from splitee.place import effects

    assembly = assembly_of(read(fleet_file))
    console = new_console()
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
        for line in unaugmented(assembly.fleet):
            console.print(plain(line), highlight=False)
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
