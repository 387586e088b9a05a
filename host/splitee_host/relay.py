"""A relay: what stands between a host and a device in benchmarks and tests, paces and spoils.

A ``Relay`` is a link around another link. Each direction is a ``Line`` of its own: so many bits a
second, a queue in front of it, and faults that a seed decides, frame by frame, so that a second run
meets the same ones. On a stream a frame is what a zero byte ends; over UDP it is a datagram.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from splitee.errors import LinkClosed, LinkError
from splitee_host.link import Closable, Link

_SLICE = 256  # bytes of a stream that come out together; a datagram always does
_GARBAGE = 64  # most bytes of garbage at once
_PATIENCE = 3600.0  # seconds that a thread waits for anything before it looks again


@dataclass(frozen=True)
class Faults:
    """What happens to the frames of one direction: the share of them that meets each fault.

    Every fault is drawn for itself, so that a frame may meet several; one that is lost meets no
    other.
    """

    lose: float = 0.0
    double: float = 0.0
    reorder: float = 0.0  # comes out behind the frames that follow it
    behind: int = 2  # how many those are
    corrupt: float = 0.0  # a bit is changed; or, on a stream, a byte is put in or left out
    garbage: float = 0.0  # random bytes come in front of it or within it


@dataclass(frozen=True)
class Line:
    """One direction between two ends."""

    rate: float = math.inf  # bits a second; a byte is 10 of them on a stream, 8 in a datagram
    latency: float = 0.0  # seconds from its end on the line to the other end
    room: int = 4096  # bytes that wait to leave; on a stream, whoever writes more waits
    queue: int = 64  # datagrams that wait to leave; one more is dropped
    faults: Faults = Faults()


CLEAR = Line()
"""A line without pace or faults."""


@dataclass
class Counts:
    """What has become of the frames of one direction."""

    frames: int = 0  # that were sent into it
    lost: int = 0
    doubled: int = 0
    reordered: int = 0
    corrupted: int = 0
    garbage: int = 0
    dropped: int = 0  # datagrams for which the queue had no place
    bytes: int = 0  # that went over the line, those of lost frames as well


@dataclass(frozen=True)
class Sent:
    """What goes on a line: lost is what takes its time there and then does not come out."""

    content: bytes
    lost: bool = False


class Spoiler:
    """The faults of one direction. Nothing but the seed decides what happens to which frame."""

    def __init__(self, faults: Faults, seed: str, *, stream: bool) -> None:
        self.counts = Counts()
        self._faults = faults
        self._stream = stream
        # Apart, so that what one frame meets does not depend on how another was corrupted.
        self._whether = random.Random(f"{seed} whether")
        self._how = random.Random(f"{seed} how")
        self._late: deque[tuple[int, Sent]] = deque()  # number of the frame it follows

    def spoil(self, frame: bytes) -> list[Sent]:
        """What goes on the line when this frame is sent, in order."""
        f, counts = self._faults, self.counts
        chances = (f.lose, f.double, f.reorder, f.corrupt, f.garbage)
        lost, doubled, late, corrupted, garbage = (self._whether.random() < c for c in chances)
        counts.frames += 1
        out: list[Sent] = []
        if lost:
            counts.lost += 1
            out.append(Sent(frame, lost=True))
        else:
            if corrupted:
                counts.corrupted += 1
                frame = self._corrupted(frame)
            if garbage:
                counts.garbage += 1
                frame = self._littered(frame, out)
            copies = [Sent(frame)] * (2 if doubled else 1)
            counts.doubled += doubled
            counts.reordered += late
            if late:
                self._late.extend((counts.frames + f.behind, copy) for copy in copies)
            else:
                out += copies
        while self._late and self._late[0][0] <= counts.frames:
            out.append(self._late.popleft()[1])
        return out

    def _corrupted(self, frame: bytes) -> bytes:
        data = bytearray(frame)
        if not data:
            return frame
        place = self._how.randrange(len(data))
        match self._how.choice(["change", "insert", "remove"]) if self._stream else "change":
            case "change":
                data[place] ^= 1 << self._how.randrange(8)
            case "insert":
                data.insert(place, self._how.randrange(256))
            case _:
                del data[place]
        return bytes(data)

    def _littered(self, frame: bytes, out: list[Sent]) -> bytes:
        """A frame with garbage in it; or as it is, with the garbage in front of it."""
        garbage = self._how.randbytes(self._how.randint(1, _GARBAGE))
        if self._how.random() < 0.5:
            end = self._how.choice([b"", b"\0"])  # without one, what comes next is spoilt as well
            out.append(Sent(garbage + end))
            return frame
        place = self._how.randrange(len(frame) + 1)
        return frame[:place] + garbage + frame[place:]


@dataclass
class _Piece:
    content: bytes
    size: int  # on the line
    leaves: float  # when its last bit is on the line; never, where taking it is what ends the wait
    arrives: float


class Direction:
    """A line in use: what is on it and when that comes out, by a clock that is handed in."""

    def __init__(self, line: Line, seed: str, *, stream: bool) -> None:
        self.line = line
        self._stream = stream
        self._spoiler = Spoiler(line.faults, seed, stream=stream)
        self.counts = self._spoiler.counts
        self._begun = b""  # of a frame whose end has not come
        self._free = -math.inf  # when the last bit that was sent is on the line
        self._pieces: deque[_Piece] = deque()

    def pieces(self, data: bytes) -> Iterator[Sent]:
        """What goes on the line, when this is sent."""
        for frame in self._frames(data):
            size = _SLICE if self._stream else max(1, len(frame.content))
            for start in range(0, len(frame.content), size):
                yield Sent(frame.content[start : start + size], frame.lost)

    def _frames(self, data: bytes) -> Iterator[Sent]:
        if not self._stream:
            yield from self._spoiler.spoil(data)
            return
        if self.line.faults == Faults():  # no matter where a frame ends
            self.counts.frames += data.count(0)
            yield Sent(data)
            return
        *ends, rest = data.split(b"\0")
        for end in ends:
            frame, self._begun = self._begun + end + b"\0", b""
            yield from self._spoiler.spoil(frame)
        self._begun += rest

    def _leaving(self, now: float) -> list[_Piece]:
        """Those that have not left yet, the last first."""
        return list(takewhile(lambda piece: piece.leaves > now, reversed(self._pieces)))

    def room_at(self, now: float) -> float:
        """When the next piece has room: now or later; never, before one is taken.

        A datagram always has: to be dropped.
        """
        leaving = self._leaving(now) if self._stream else []
        excess = sum(piece.size for piece in leaving) - self.line.room
        for piece in reversed(leaving):
            if excess < 0:
                break
            excess -= piece.size
            now = piece.leaves
        return now

    def push(self, piece: Sent, now: float) -> None:
        """Puts a piece on the line."""
        if not self._stream and len(self._leaving(now)) >= self.line.queue:
            self.counts.dropped += 1
            return
        size = len(piece.content)
        self.counts.bytes += size
        leaves, gone = math.inf, now
        if not math.isinf(self.line.rate):
            bits = (10 if self._stream else 8) * size
            self._free = leaves = gone = max(self._free, now) + bits / self.line.rate
        content = b"" if piece.lost else piece.content
        self._pieces.append(_Piece(content, size, leaves, gone + self.line.latency))

    def next_at(self) -> float:
        """When something comes out next; never, while nothing is on the line."""
        return self._pieces[0].arrives if self._pieces else math.inf

    def pop(self, now: float) -> bytes:
        """What has come out by now: of a stream all of it, otherwise one datagram.

        Nothing, where that was lost.
        """
        out = [self._pieces.popleft().content]
        while self._stream and self.next_at() <= now:
            out.append(self._pieces.popleft().content)
        return b"".join(out)

    def lose(self, data: bytes) -> None:
        """Takes data that does not get to the line."""
        frames = data.count(0) if self._stream else 1
        self.counts.frames += frames
        self.counts.lost += frames

    def clear(self) -> None:
        """Loses what is on the line."""
        self._pieces.clear()
        self._begun = b""


@dataclass
class _Way:
    """A direction between two threads."""

    direction: Direction
    changed: threading.Condition = field(default_factory=threading.Condition)
    silent: bool = False
    end: LinkError | None = None  # why nothing goes this way any more

    def put(self, data: bytes) -> None:
        """Sends data; waits for room where there has to be some. Raises why it ended."""
        with self.changed:
            if self.silent:
                self.direction.lose(data)
                return
            for piece in self.direction.pieces(data):
                if not self._has_room():
                    return
                self.direction.push(piece, time.monotonic())
                self.changed.notify_all()

    def _has_room(self) -> bool:
        """Waits for room; false once nothing comes through any more."""
        while not self.silent:
            self._check()
            now = time.monotonic()
            wait = self.direction.room_at(now) - now
            if wait <= 0:
                return True
            self.changed.wait(min(wait, _PATIENCE))
        return False

    def take(self, timeout: float) -> bytes:
        """What has come out, as soon as something has; b"" when nothing did.

        Raises why it ended, once all is taken.
        """
        deadline = time.monotonic() + timeout
        with self.changed:
            while True:
                now = time.monotonic()
                come = self.direction.next_at()
                if come <= now:
                    data = self.direction.pop(now)
                    self.changed.notify_all()
                    if data:
                        return data
                    continue
                if math.isinf(come):
                    self._check()
                if deadline <= now:
                    return b""
                self.changed.wait(min(come, deadline) - now)

    def _check(self) -> None:
        if self.end is not None:
            raise type(self.end)(*self.end.args)  # another one: several threads raise it

    def stop(self, why: LinkError, *, at_once: bool = False) -> None:
        """Ends this way for good; at once: also for what is on the line."""
        with self.changed:
            self.end = self.end or why
            if at_once:
                self.direction.clear()
            self.changed.notify_all()

    def be_silent(self, silent: bool) -> None:
        with self.changed:
            self.silent = silent
            self.direction.clear()
            self.changed.notify_all()


class Relay(Closable):
    """A link as its lines let it be: slow, short of room, faulty. It closes the link, too.

    ``down`` leads to the device and ``up`` to the host; ``down_counts`` and ``up_counts`` say what
    became of the frames.
    """

    def __init__(
        self,
        link: Link,
        down: Line = CLEAR,
        up: Line = CLEAR,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(link.name)
        self.kind = link.kind
        self._link = link
        stream = link.kind != "udp"
        self._down, self._up = (
            _Way(Direction(line, f"{seed} {name}", stream=stream))
            for line, name in ((down, "down"), (up, "up"))
        )
        self.down_counts = self._down.direction.counts
        self.up_counts = self._up.direction.counts
        self._threads = [
            threading.Thread(target=self._carry, args=(way, step), name=link.name, daemon=True)
            for way, step in ((self._down, self._carry_down), (self._up, self._carry_up))
        ]
        for thread in self._threads:
            thread.start()

    def write(self, data: bytes) -> None:
        with self._writing:
            self._check_open()
            self._down.put(data)

    def read(self, timeout: float) -> bytes:
        with self._reading:
            self._check_open()
            return self._up.take(timeout)

    def unplug(self) -> None:
        """Loses everything, both ways, from now on, and what is on its way."""
        self._down.be_silent(True)
        self._up.be_silent(True)

    def plug_in(self) -> None:
        """Ends that."""
        self._down.be_silent(False)
        self._up.be_silent(False)

    def _carry(self, way: _Way, step: Callable[[], None]) -> None:
        try:
            while True:
                step()
        except LinkError as error:
            way.stop(error)

    def _carry_down(self) -> None:
        if data := self._down.take(_PATIENCE):
            self._link.write(data)

    def _carry_up(self) -> None:
        if data := self._link.read(_PATIENCE):
            self._up.put(data)

    def _interrupt(self) -> None:
        closed = LinkClosed(f"{self.name} was closed on this side: open it again")
        self._down.stop(closed, at_once=True)
        self._up.stop(closed, at_once=True)
        self._link.close()

    def _release(self) -> None:
        for thread in self._threads:
            thread.join()
