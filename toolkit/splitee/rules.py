"""How the rounds of a fleet go, whatever its strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# the learning rate of a round, by its number: of the client of that name, or of the servers (None)
Rate = Callable[[int, str | None], float]


@dataclass(frozen=True)
class Rules:
    """What a fleet file says of its rounds; the defaults are the fleet file's."""

    batch: int
    local_steps: int | None = None  # batches of a pass; None: the client's whole shard
    aggregate: str = "server"  # server: server networks alone are averaged; all: clients', too
    period: int = 1  # rounds between two aggregations
    rate: Rate | None = None  # None: clients and servers stay at that of their settings
    rejoin_within: float = 30.0  # seconds that a lost client has to come back
    round_deadline: float | None = None  # seconds that passes which begin at once may take
    participation: float = 1.0  # share of the clients that is drawn for a round
    min_clients: int = 1  # that have to complete a round for it to count
    seed: int = 0  # of the draws

    def drawn(self, clients: int) -> int:
        """How many of so many clients are drawn for a round: at least one."""
        return max(1, round(self.participation * clients))
