"""What happens in a training, as strategies tell it; numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from splitee.state import State


@dataclass(frozen=True)
class BatchDone:
    """One batch of one client. Losses are in nats, before the step.

    The exit's is the mean over the batch, the server's over the samples sent: None of none.
    """

    client: str
    samples: int
    sent: int  # of them to the server
    exit_loss: float
    exit_correct: int
    server_loss: float | None


@dataclass(frozen=True)
class ClientDone:
    """One client's pass of a round. Of what was replayed, only the bytes count."""

    client: str
    round: int
    samples: int
    sent: int  # of them to the server
    exit_loss: float
    exit_accuracy: float  # on the training samples as they came, at the exit at the cut
    server_loss: float | None  # mean over the samples sent; None: none was
    seconds: float
    bytes_up: int
    bytes_down: int
    activations_up: int  # the share of bytes_up that its batches sent, without what was replayed
    state: State


@dataclass(frozen=True)
class ClientLost:
    """A client that was lost, or late, and is away: the round goes on without it."""

    client: str
    round: int
    reason: str


@dataclass(frozen=True)
class ClientBack:
    """A client that was lost and is back. Batches of a pass that it had not finished are undone."""

    client: str
    round: int
    reason: str  # why it was lost


@dataclass(frozen=True)
class RoundDone:
    """A complete round, after aggregation."""

    round: int
    states: dict[str, State]  # of every client: what it holds now, or will when it is back
    missing: Mapping[str, str] = field(default_factory=dict)  # who was drawn in vain, and why
    idle: Set[str] = frozenset()  # who was not drawn

    @property
    def clients(self) -> list[str]:
        """Those whose passes count."""
        return [n for n in self.states if n not in self.missing and n not in self.idle]


@dataclass(frozen=True)
class RoundFailed:
    """A round that too few clients completed: it is undone."""

    round: int
    clients: list[str]  # those that did
    needed: int


@dataclass(frozen=True)
class Evaluated:
    """A client's half and its server's on the test images, as they are behind a round."""

    client: str
    round: int
    exit_accuracy: float  # at the exit at the client's cut, 0..1
    server_accuracy: float  # through the server, 0..1


Event = BatchDone | ClientDone | ClientLost | ClientBack | Evaluated | RoundDone | RoundFailed
