"""The exceptions of hetero-splitee; every message says what happened, where, and the cure.

SpliteeError
├── FleetError          the fleet file cannot be used (file, line, key)
├── DataError           a dataset cannot be read, or dealt out to the clients
├── ModelError          the network cannot be cut, captured or written
│   └── CutError        no such cut; lists those there are
├── FitError            a segment is larger than its board
├── BuildError          the firmware did not build
├── ExportError         an exported file does not compute what the network does
├── MissingTool         a program that is needed is not installed
├── CheckpointError     a run cannot be written or read
├── KeyFileError        keys are missing, or cannot be read or written
├── NotFinite           a gradient or a loss is infinite or no number: the step was not taken
├── StrategyError       a strategy of a user's own cannot be used
├── TooFewClients       fewer clients than min_clients completed a round
├── RankLost            another process of a training over several is gone
└── LinkError           a device cannot be reached
    ├── Timeout         no answer in time
    ├── Late            its pass of the round was not over at the deadline
    ├── LinkClosed      the other end is gone
    ├── Mismatch        the device runs another firmware than this host expects
    └── DeviceRefused   the device refused a request
"""

from __future__ import annotations

from collections.abc import Mapping


class SpliteeError(Exception):
    """Base of all errors that a user can cure; the command line prints them without a traceback."""


class FleetError(SpliteeError):
    """The fleet file cannot be used."""


class DataError(SpliteeError):
    """A dataset cannot be read, or dealt out to the clients."""


class ModelError(SpliteeError):
    """The network cannot be cut, captured or written."""


class CutError(ModelError):
    """There is no such cut."""


class FitError(SpliteeError):
    """A segment is larger than its board."""


class BuildError(SpliteeError):
    """The firmware did not build."""


class ExportError(SpliteeError):
    """An exported file does not compute what the network does."""


class MissingTool(SpliteeError):
    """A program that is needed is not installed."""


class CheckpointError(SpliteeError):
    """A run cannot be written or read."""


class KeyFileError(SpliteeError):
    """Keys are missing, or cannot be read or written."""


class NotFinite(SpliteeError):
    """A gradient or a loss is infinite or no number: the step was not taken."""

    def __init__(
        self,
        owner: str,
        tensor: str = "",
        place: int = 0,
        round: int = 0,
        *,
        taken_back: bool = False,
    ) -> None:
        """owner: whose step. tensor, and place in it: of the first such gradient; "": the loss.

        taken_back: whether it had learnt something, and is where the round began again.
        """
        what = f"the gradient of {tensor}" if tensor else "the loss"
        when = f" in round {round}" if round else ""
        outcome = "it is where the round began again" if taken_back else "nothing was changed"
        super().__init__(
            f"{owner}: {what} is not finite{when}: {outcome}; take a smaller learning_rate or clip"
        )
        self.owner, self.tensor, self.place, self.taken_back = owner, tensor, place, taken_back

    def in_round(self, round: int) -> NotFinite:
        """The same, which says when."""
        return NotFinite(self.owner, self.tensor, self.place, round, taken_back=self.taken_back)


class StrategyError(SpliteeError):
    """A strategy of a user's own cannot be used."""


class TooFewClients(SpliteeError):
    """Fewer clients than min_clients completed a round."""

    def __init__(self, round: int, needed: int, away: Mapping[str, str]) -> None:
        """needed: how many a round takes. away: who is, and why."""
        cure = "when they are back, go on with the run (splitee train --resume)"
        if not away:
            cure = "nobody is away: does the strategy let its clients train?"
        super().__init__(
            f"round {round}: fewer clients completed it than it takes (min_clients = {needed}), "
            f"twice: {'; '.join([*away.values(), cure])}"
        )


class RankLost(SpliteeError):
    """Another process of a training over several is gone."""


class LinkError(SpliteeError):
    """A device cannot be reached."""


class Timeout(LinkError):
    """No answer in time."""


class Late(LinkError):
    """Its pass of the round was not over at the deadline."""


class SessionLost(LinkError):
    """The device went on without this host: it was reset, or another host uses it."""


class LinkClosed(LinkError):
    """The other end is gone."""


class Mismatch(LinkError):
    """The device runs another firmware than this host expects."""


class DeviceRefused(LinkError):
    """The device refused a request."""
