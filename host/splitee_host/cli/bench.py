"""`splitee bench`: what boards and links can do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitee_host.cli.common import BUILD, Json, bench_app, new_console

if TYPE_CHECKING:
    pass


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
    new_console().print(table)


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
    new_console().print(table)


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
    new_console().print(table)


@bench_app.command("host")
def bench_host(
    only: Annotated[
        list[str] | None, typer.Option("--case", help="Only this case; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what splitting costs the host, against the same network trained in one place."""
    from rich.table import Table

    from splitee_host.bench_host import CASES, rows

    found = list(rows(tuple(only or CASES)))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    table = Table(box=None)
    table.add_column("case")
    table.add_column("ratio", justify="right")
    table.add_column("detail")
    for row in found:
        detail = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in row["detail"].items())
        table.add_row(row["case"], f"{row['ratio']:.3f}", detail)
    new_console().print(table)


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
    new_console().print(table)
    typer.echo(
        "goodput: of tensors of 64 KiB, against that of bytes without any exchange\n"
        "overhead: bytes on the line beside the payload, 1,400 bytes at a time"
    )
