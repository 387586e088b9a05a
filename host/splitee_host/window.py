"""How long to wait for an answer, and how many requests may be under way: found by measuring."""

from __future__ import annotations

from dataclasses import dataclass

_FIRST = 1.0  # seconds to wait while nothing is measured (RFC 6298, section 2.1)
_LONGEST = 60.0


class RoundTrip:
    """How long answers take, and when one is overdue (Jacobson's estimator, RFC 6298)."""

    def __init__(self, shortest: float) -> None:
        """shortest: seconds before which nothing is overdue."""
        self._shortest = shortest
        self._mean: float | None = None
        self._deviation = 0.0

    def measured(self, seconds: float) -> None:
        """One answer took so long; not of a request that was sent twice (Karn's rule)."""
        if self._mean is None:
            self._mean, self._deviation = seconds, seconds / 2
        else:
            self._deviation += (abs(seconds - self._mean) - self._deviation) / 4
            self._mean += (seconds - self._mean) / 8

    @property
    def timeout(self) -> float:
        """Seconds after which an answer is overdue."""
        if self._mean is None:
            return _FIRST
        return min(max(self._shortest, self._mean + 4 * self._deviation), _LONGEST)


@dataclass(frozen=True)
class Manner:
    """What a kind of link asks for."""

    frames: int  # under way at first
    frames_max: int  # more than at first: the window is found by what is lost
    overtaken: int  # frames that are answered in front of a lost one
    piece: int  # largest body of a frame that carries a piece of a tensor, bytes
    shortest: float  # seconds before which no answer is overdue


MANNERS = {
    # A line spoils what it likes, but never changes the order; short frames lose little at once.
    "serial": Manner(frames=4, frames_max=4, overtaken=1, piece=1444, shortest=0.05),
    # A network loses what comes too fast, and now and then lets one datagram pass another.
    "udp": Manner(frames=4, frames_max=64, overtaken=3, piece=1444, shortest=0.02),
    # A whole tensor in a piece: each costs a round trip through two Pythons.
    "tcp": Manner(frames=4, frames_max=4, overtaken=1, piece=1 << 22, shortest=0.2),
    "memory": Manner(frames=4, frames_max=4, overtaken=1, piece=1 << 16, shortest=0.2),
}
"""By the kind of a link."""


class Window:
    """How many requests may be under way at once.

    Where a network loses what is too much, it grows until that happens, shrinks, grows again by a
    frame in each round trip, and stays for a while below where it was too much (additive increase,
    multiplicative decrease as in RFC 5681; by 0.7 and with a plateau as in RFC 9438).
    """

    _SHRINK = 0.7
    _PLATEAU = 8  # round trips for a frame more

    def __init__(self, manner: Manner) -> None:
        self._frames = float(manner.frames)
        self._most = float(manner.frames_max)
        self._least = self._frames
        self._fixed = self._least == self._most
        self._steady = 0.0  # what was nearly too much; 0: that is not known yet
        self._recovered = 0

    @property
    def frames(self) -> int:
        """Requests that may be under way."""
        return int(self._frames)

    def answered(self) -> None:
        """A request was answered."""
        if not self._fixed:
            step = 1.0
            if self._steady:
                trips = 1 if self._frames + 1 < self._steady else self._PLATEAU
                step /= self._frames * trips
            self._frames = min(self._frames + step, self._most)

    def lost(self, number: int, last: int) -> None:
        """The number'th frame sent was lost; the last'th was the last one sent by now.

        Frames that were under way when it shrank do not shrink it again.
        """
        if self._fixed or number <= self._recovered:
            return
        self._recovered = last
        self._steady = self._frames
        self._frames = max(self._least, self._frames * self._SHRINK)
