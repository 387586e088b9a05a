"""Where a training stands: what its table shows, here and in any other terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any, Protocol

from splitee.events import (
    BatchDone,
    ClientBack,
    ClientDone,
    ClientLost,
    Evaluated,
    Event,
    RoundDone,
    RoundFailed,
)

_RECENT = 5  # rounds whose mean says how long the next ones take


class Bytes(Protocol):
    """What counts the bytes that cross a client's link."""

    up: int
    down: int


@dataclass
class Standing:
    """One client in the round that is under way. None: not known yet."""

    name: str
    samples: int  # of its pass
    seen: int = 0  # of them so far
    rate: float | None = None  # samples/s
    bytes_up: int = 0  # since the process began
    bytes_down: int = 0
    exit_loss: float | None = None  # nats
    server_loss: float | None = None
    exit_accuracy: float | None = None  # on test images, 0..1, when it was last tested
    server_accuracy: float | None = None
    lost: str | None = None  # why it is away; None: it is not

    @property
    def share(self) -> float:
        """How much of its pass is done, 0..1."""
        return min(1.0, self.seen / self.samples)


class Progress:
    """A run's rounds and clients; events bring it on, and JSON takes it to another process."""

    def __init__(
        self,
        samples: Mapping[str, int],
        rounds: int,
        first: int = 1,
        *,
        seconds: float = 0.0,
        traffic: Mapping[str, Bytes] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """samples: of each client's pass. first: the round that is about to begin.

        seconds: that went into the rounds before. traffic: who counts a client's bytes. clock:
        seconds, the same ones in every process.
        """
        self.rounds = rounds
        self.round = first  # under way; rounds + 1: all are complete
        self.clients = {name: Standing(name, count) for name, count in samples.items()}
        self._traffic = traffic or {}
        self._clock = clock
        self._round_began = clock()
        self._began = self._round_began - seconds
        self._lasted: list[float] = []  # seconds, of the last rounds
        # when a client's first batch of this pass was done, and the samples that were seen then
        self._first: dict[str, tuple[float, int]] = {}

    # what happens

    def take(self, event: Event) -> None:
        """Follows an event; what does not move the table is passed over."""
        match event:
            case BatchDone():
                self._batch(event)
            case ClientDone():
                standing = self._standing(event)
                standing.seen = standing.samples = event.samples
                standing.rate = event.samples / event.seconds
            case ClientLost():
                self.clients[event.client].lost = event.reason
            case ClientBack():
                self.clients[event.client].lost = None
                self._begin(event.client)
            case Evaluated():
                standing = self.clients[event.client]
                standing.exit_accuracy = event.exit_accuracy
                standing.server_accuracy = event.server_accuracy
            case RoundFailed():
                self._begin_all()
            case RoundDone():
                now = self._clock()
                self._lasted = [*self._lasted, now - self._round_began][-_RECENT:]
                self.round, self._round_began = event.round + 1, now
                if event.round < self.rounds:
                    self._begin_all()

    def _begin_all(self) -> None:
        for name in self.clients:
            self._begin(name)

    def _begin(self, name: str) -> None:
        """A client's pass begins, or begins again."""
        self.clients[name].seen = 0
        self._first.pop(name, None)

    def _batch(self, event: BatchDone) -> None:
        standing, now = self._standing(event), self._clock()
        standing.seen += event.samples
        # from the first batch's end on: in turns, a pass does not begin with its round
        began, before = self._first.setdefault(event.client, (now, standing.seen))
        if now > began:
            standing.rate = (standing.seen - before) / (now - began)

    def _standing(self, event: BatchDone | ClientDone) -> Standing:
        """The client's, with losses and bytes as of now."""
        standing = self.clients[event.client]
        standing.exit_loss = event.exit_loss
        if event.server_loss is not None:  # nothing was sent: it stays what it was
            standing.server_loss = event.server_loss
        if event.client in self._traffic:
            traffic = self._traffic[event.client]
            standing.bytes_up, standing.bytes_down = traffic.up, traffic.down
        return standing

    # what is shown

    @property
    def share(self) -> float:
        """How much of the round under way is done, by the slowest client that is there, 0..1."""
        if self.round > self.rounds:
            return 0.0
        shares = [s.share for s in self.clients.values() if s.lost is None]
        return min(shares, default=0.0)

    @property
    def seconds(self) -> float:
        """How long training has taken so far, with the sittings before."""
        return max(0.0, self._clock() - self._began)

    @property
    def round_seconds(self) -> float | None:
        """What a round takes: the mean of the last few, or by what is done of the first one."""
        if self._lasted:
            return mean(self._lasted)
        if self.share == 0:
            return None
        return (self._clock() - self._round_began) / self.share

    @property
    def seconds_left(self) -> float | None:
        """What the rounds that are left will take about; None: there is nothing to tell it by."""
        each = self.round_seconds
        if each is None:
            return None
        spent = self._clock() - self._round_began
        return max(0.0, (self.rounds - self.round) * each + max(0.0, each - spent))

    # to other processes

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {
            "rounds": self.rounds,
            "round": self.round,
            "began": self._began,
            "round_began": self._round_began,
            "lasted": self._lasted,
            "noted": self._clock(),
            "clients": [asdict(standing) for standing in self.clients.values()],
        }

    @classmethod
    def from_json(
        cls, noted: Mapping[str, Any], *, clock: Callable[[], float] | None = None
    ) -> Progress:
        """What another process noted. clock: None takes it as it was when that did.

        Raises LookupError or TypeError for what is none.
        """
        then = float(noted["noted"])
        progress = cls({}, noted["rounds"], noted["round"], clock=clock or (lambda: then))
        progress._began, progress._round_began = noted["began"], noted["round_began"]
        progress._lasted = list(noted["lasted"])
        standings: Sequence[Standing] = [Standing(**line) for line in noted["clients"]]
        progress.clients = {standing.name: standing for standing in standings}
        return progress
