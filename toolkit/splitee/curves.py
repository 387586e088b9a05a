"""A run's curves for TensorBoard: scalars of each client and of the fleet, by round."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import mean
from types import TracebackType
from typing import TYPE_CHECKING

from splitee.errors import MissingTool
from splitee.events import ClientDone, Evaluated, Event, RoundDone, RoundFailed

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


class Curves:
    """TensorBoard's event files in a folder; close it, or use it as a context manager.

    A tag is a figure and a client's name, so that TensorBoard draws the clients' curves of a figure
    side by side; `fleet/` has those of all together.
    """

    def __init__(self, folder: Path, first: int) -> None:
        """first: the round that is about to begin; what is there of it and later ones is void.

        Raises MissingTool where there is no TensorBoard.
        """
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ModuleNotFoundError as missing:
            if missing.name != "tensorboard":
                raise
            raise MissingTool(
                "tensorboard is not installed: pip install 'hetero-splitee[host]'"
            ) from missing
        self._writer: SummaryWriter = SummaryWriter(folder, purge_step=first)
        self._began = time.monotonic()
        self._done: list[ClientDone] = []
        self._tests: list[Evaluated] = []

    def take(self, event: Event) -> None:
        """Notes an event; a round's are in the files when it is complete."""
        if isinstance(event, ClientDone):
            self._done.append(event)
        elif isinstance(event, Evaluated):
            self._tests.append(event)
        elif isinstance(event, RoundFailed):
            self._done.clear()
        elif isinstance(event, RoundDone):
            self._round(event)

    def _round(self, event: RoundDone) -> None:
        for d in self._done:
            self._add(f"exit_loss/{d.client}", d.exit_loss, d.round)
            self._add(f"exit_accuracy/{d.client}", d.exit_accuracy, d.round)
            self._add(f"server_loss/{d.client}", d.server_loss, d.round)
            self._add(f"ms_per_sample/{d.client}", 1000 * d.seconds / d.samples, d.round)
            self._add(f"bytes_up/{d.client}", d.bytes_up, d.round)
            self._add(f"bytes_down/{d.client}", d.bytes_down, d.round)
        for t in self._tests:
            self._add(f"test_exit_accuracy/{t.client}", t.exit_accuracy, t.round)
            self._add(f"test_server_accuracy/{t.client}", t.server_accuracy, t.round)
        self._fleet(event.round)
        self._done.clear()
        self._tests.clear()
        self._writer.flush()

    def _fleet(self, number: int) -> None:
        done, now = self._done, time.monotonic()
        samples, sent = sum(d.samples for d in done), sum(d.sent for d in done)
        seconds, self._began = now - self._began, now
        if samples:
            exit_loss = sum(d.exit_loss * d.samples for d in done) / samples
            self._add("fleet/exit_loss", exit_loss, number)
        if sent:
            server_loss = sum((d.server_loss or 0.0) * d.sent for d in done) / sent
            self._add("fleet/server_loss", server_loss, number)
        if self._tests:
            exits, servers = zip(
                *((t.exit_accuracy, t.server_accuracy) for t in self._tests), strict=True
            )
            self._add("fleet/test_exit_accuracy", mean(exits), number)
            self._add("fleet/test_server_accuracy", mean(servers), number)
        self._add("fleet/clients", len(done), number)
        self._add("fleet/bytes_up", sum(d.bytes_up for d in done), number)
        self._add("fleet/bytes_down", sum(d.bytes_down for d in done), number)
        self._add("fleet/samples_per_second", samples / seconds, number)

    def _add(self, tag: str, value: float | None, number: int) -> None:
        if value is not None:  # of a round in which nothing was sent there is no loss
            self._writer.add_scalar(tag, value, number)

    def close(self) -> None:
        """Writes what is left and ends."""
        self._writer.close()

    def __enter__(self) -> Curves:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
