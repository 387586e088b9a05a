"""What a training shows: a bar, a line per client as it goes, and the table at the end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from splitee.place import kib
from splitee.progress import Progress, Standing
from splitee.runs import ClientSummary, Record
from splitee_host.memory import Usage

_FRAME = 8  # lines of a terminal that are not a client's: the bar, the head, reasons, a prompt


class Screen:
    """Shows a training live on a terminal; where there is none, a line for each client and round.

    Nothing of it is the training's own: a progress and the records of a run's metrics are all that
    it takes, wherever they come from.
    """

    def __init__(self, console: Console, progress: Progress) -> None:
        """progress: shown as it is at each moment; may be replaced."""
        self.progress = progress
        self._console = console
        self._notice = ""
        self._said = ""
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

    def notice(self, text: str) -> None:
        """Shows a line below the table from now on; prints nothing itself, as signals need it."""
        self._notice = text

    def tell(self, record: Record | None) -> None:
        """Prints what a record says to people, if anything; None: there is no news."""
        if self._notice != self._said and not self._console.is_terminal:
            self._said = self._notice
            self._console.print(Text(self._notice, "yellow"))
        line = None if record is None else line_of(record, everything=not self._console.is_terminal)
        if line is not None:
            self._console.print(line)

    def _render(self) -> RenderableType:
        rows = self._console.height - _FRAME if self._console.is_terminal else None
        shown = live_table(self.progress, rows)
        return Group(shown, Text(self._notice, "yellow")) if self._notice else shown


def line_of(record: Record, *, everything: bool) -> Text | None:
    """What a record of a run's metrics says to people; None: nothing.

    everything: also what a live table shows anyway.
    """
    when = f"in round {record['round']}"
    match record["event"]:
        case "ClientDone":
            return Text(_pass(record)) if everything else None
        case "Evaluated":
            return Text(_test(record)) if everything else None
        case "ClientLost":
            return Text(f"lost {when}: {record['reason']}", "red")
        case "ClientBack":
            return Text(f"back {when}: {record['client']}", "green")
        case "RoundDone":
            missing = ", ".join(record.get("missing", {}))
            without = f"round {record['round']} is complete without {missing}"
            return Text(without, "yellow") if missing else None
        case "RoundFailed":
            of = f"{len(record['clients'])} of the {record['needed']} clients that it takes"
            return Text(f"round {record['round']} does not count: {of} completed it", "red")
        case other:
            known = ("event", "round", "client", "at_seconds")
            what = ", ".join(f"{k} {v}" for k, v in record.items() if k not in known)
            return Text(f"{other} {when}: {record.get('client', 'all')}: {what}", "yellow")


def _pass(record: Record) -> str:
    server = "-" if record["server_loss"] is None else f"{record['server_loss']:.3f}"
    return (
        f"round {record['round']}  {record['client']:<10} "
        f"{record['samples'] / record['seconds']:6.0f} samples/s  "
        f"up {kib(record['bytes_up'])}  down {kib(record['bytes_down'])}  "
        f"exit loss {record['exit_loss']:.3f}  server loss {server}"
    )


def _test(record: Record) -> str:
    return (
        f"round {record['round']}  {record['client']:<10} on test images: exit "
        f"{record['exit_accuracy']:.1%}  server {record['server_accuracy']:.1%}"
    )


def live_table(progress: Progress, rows: int | None = None) -> RenderableType:
    """The rounds as a bar, a line per client, and why those are away that are.

    rows: clients shown at most, those who are away and those who are furthest behind; None: all.
    """
    clients = list(progress.clients.values())
    left_out = 0
    if rows is not None and len(clients) > max(rows, 1):
        behind = sorted(clients, key=lambda c: (c.lost is None, c.share))[: max(rows - 1, 1)]
        names = {c.name for c in behind}
        left_out = len(clients) - len(behind)
        clients = [c for c in clients if c.name in names]
    tested = any(c.exit_accuracy is not None for c in progress.clients.values())
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("client")
    table.add_column("state", min_width=len("training"))
    for name in ("samples", "samples\n/s", "up", "down", "exit\nloss", "server\nloss"):
        table.add_column(name, justify="right", vertical="bottom", min_width=6)
    for name in ("exit\ntest", "server\ntest") if tested else ():
        table.add_column(name, justify="right", min_width=6)
    for c in clients:
        cells = [
            c.name,
            _state(c, progress),
            f"{c.seen}/{c.samples}",
            _figure(c.rate, ".0f"),
            _traffic(c.bytes_up),
            _traffic(c.bytes_down),
            _figure(c.exit_loss, ".3f"),
            _figure(c.server_loss, ".3f"),
        ]
        if tested:
            cells += [_figure(c.exit_accuracy, ".1%"), _figure(c.server_accuracy, ".1%")]
        table.add_row(*cells, style="dim" if c.lost else "")
    parts: list[RenderableType] = [_rounds(progress), table]
    if left_out:
        parts.append(Text(f"and {left_out} clients that are further on", "dim"))
    parts += [Text(f"{c.name} is away: {c.lost}", "red", no_wrap=True, overflow="ellipsis")
              for c in clients if c.lost]  # fmt: skip
    return Group(*parts)


def _state(client: Standing, progress: Progress) -> str:
    if client.lost:
        return "lost"
    if progress.round > progress.rounds or client.share == 1:
        return "done"
    return "training" if client.seen else "waiting"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _traffic(size: int) -> str:
    return kib(size) if size < 10 << 20 else f"{size / (1 << 20):,.0f} MB"


def _rounds(progress: Progress) -> RenderableType:
    """A bar of the rounds, how long they took, and how long those take that are left."""
    complete = min(progress.round, progress.rounds + 1) - 1
    words = [f"{complete} of {progress.rounds} rounds", duration(progress.seconds)]
    if complete < progress.rounds:
        if progress.round_seconds is not None:
            words.append(f"{duration(progress.round_seconds)} a round")
        if progress.seconds_left is not None:
            words.append(f"{duration(progress.seconds_left)} left")
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    line.add_row(
        "training",
        ProgressBar(total=progress.rounds, completed=complete + progress.share),
        " · ".join(words),
    )
    return line


def duration(seconds: float) -> str:
    """A time for people: 0.4 s, 12 s, 3:05, 2:03:05."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


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
