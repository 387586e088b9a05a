"""What a training run shows: a bar, a line per client as it goes, and the table at the end."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from splitee.client import Client
from splitee.place import kib
from splitee.runs import ClientSummary
from splitee.train import (
    BatchDone,
    ClientBack,
    ClientDone,
    ClientLost,
    Event,
    RoundDone,
    RoundFailed,
)
from splitee_host.memory import Usage


@dataclass
class _Line:
    client: Client
    samples: int  # in a round
    round: int
    seen: int = 0
    rate: float = 0.0  # samples/s in this round
    exit_loss: float = float("nan")
    server_loss: float = float("nan")
    began: float = field(default_factory=time.perf_counter)
    lost: str = ""

    def begin(self) -> None:
        """Its pass begins, or begins again."""
        self.seen, self.began = 0, time.perf_counter()

    def take(self, event: BatchDone | ClientDone) -> None:
        """Notes losses; where nothing was sent, the server's stays what it was."""
        self.exit_loss = event.exit_loss
        if event.server_loss is not None:
            self.server_loss = event.server_loss


class Screen:
    """Shows events live on a terminal; where there is none, a line for each client and round."""

    def __init__(
        self,
        console: Console,
        clients: Sequence[Client],
        samples: dict[str, int],
        rounds: int,
        first: int = 1,
    ) -> None:
        """first: the round that the clients are about to begin."""
        self._console = console
        self._lines = {c.name: _Line(c, samples[c.name], first) for c in clients}
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("rounds"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=rounds, completed=first - 1)
        self._live = Live(
            get_renderable=self._render, console=console, refresh_per_second=4, transient=True
        )

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, event: Event) -> None:
        """Takes in one event."""
        if isinstance(event, RoundDone):
            self._progress.update(self._task, completed=event.round)
            for line in self._lines.values():
                line.round = event.round + 1
                line.begin()
            if event.missing:
                without = f"round {event.round} is complete without {', '.join(event.missing)}"
                self._console.print(Text(without, "yellow"))
            return
        if isinstance(event, RoundFailed):
            of = f"{len(event.clients)} of the {event.needed} clients that it takes completed it"
            self._console.print(Text(f"round {event.round} does not count: {of}", "red"))
            return
        line = self._lines[event.client]
        match event:
            case BatchDone():
                line.seen += event.samples
                line.rate = line.seen / (time.perf_counter() - line.began)
                line.take(event)
            case ClientDone():
                line.take(event)
                if not self._console.is_terminal:
                    self._console.print(_plain(event), highlight=False)
            case ClientLost():
                line.lost = event.reason
                self._console.print(Text(f"lost in round {event.round}: {event.reason}", "red"))
            case ClientBack():
                line.lost = ""
                line.begin()
                self._console.print(Text(f"back in round {event.round}: {event.client}", "green"))

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        table.add_column("client")
        for name in ("round", "samples", "samples/s", "up", "down", "exit loss", "server loss"):
            table.add_column(name, justify="right", min_width=len(name))
        for name, line in self._lines.items():
            traffic = line.client.traffic
            table.add_row(
                name,
                "lost" if line.lost else str(line.round),
                f"{line.seen}/{line.samples}",
                f"{line.rate:.0f}",
                kib(traffic.up),
                kib(traffic.down),
                f"{line.exit_loss:.3f}",
                f"{line.server_loss:.3f}",
                style="dim" if line.lost else "",
            )
        return Group(self._progress, table)


def _plain(event: ClientDone) -> str:
    server = "-" if event.server_loss is None else f"{event.server_loss:.3f}"
    return (
        f"round {event.round}  {event.client:<10} {event.samples / event.seconds:6.0f} samples/s  "
        f"up {kib(event.bytes_up)}  down {kib(event.bytes_down)}  "
        f"exit loss {event.exit_loss:.3f}  server loss {server}"
    )


def final_table(clients: Sequence[ClientSummary]) -> Table:
    """The table at the end of a run; a link is shown by its kind."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("client", "tier", "board", "link", "cut"):
        table.add_column(name, overflow="fold")
    for name in (
        "para-\nmeters", "arena\nbytes", "flash\nbytes", "bytes up\na sample", "ms a\nsample",
        "exit\naccuracy", "server\naccuracy",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for c in clients:
        table.add_row(
            c.name,
            c.tier,
            c.board,
            re.split(r"\W", c.link)[0],
            c.cut,
            f"{c.parameters:,}",
            f"{c.arena_bytes:,}",
            f"{c.flash_bytes:,}" if c.flash_bytes else "-",
            f"{c.bytes_up_per_sample:,.0f}",
            f"{c.ms_per_sample:.2f}",
            f"{100 * c.exit_accuracy:.1f} %",
            f"{100 * c.server_accuracy:.1f} %",
            style="dim" if c.lost else "",
        )
    return table


def memory_table(usages: Sequence[Usage]) -> Table:
    """What firmware takes of its board's memory, a line per client; figures() has all of it."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("memory,\nbytes", "\nboard"):
        table.add_column(name, overflow="fold")
    for name in ("static", "weights", "arena", "stack used", "shard", "all in RAM"):
        table.add_column(f"\n{name}", justify="right", no_wrap=True)
    for usage in usages:
        memory = usage.memory
        used = "?" if usage.stack_used is None else f"{usage.stack_used:,}"
        table.add_row(
            usage.client,
            usage.board,
            f"{memory.static + memory.labels:,}",
            f"{memory.weights:,}",
            f"{memory.arena:,}",
            f"{used} of {memory.stack:,}" if memory.stack else "-",
            f"apart: {memory.shard:,}" if memory.apart else f"{memory.shard:,}",
            f"{memory.ram:,}" + (f" of {usage.ram_bytes:,}" if usage.ram_bytes else ""),
        )
    return table
