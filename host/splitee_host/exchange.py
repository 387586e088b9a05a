"""Requests and their answers, over a link that may lose, double, reorder and spoil what it carries.

A request is sent until it is answered. The pieces of a transfer are under way together, as many
as the link and the device can take (``window.py``): each is acknowledged by its own answer, so
that only what was lost is sent again, as soon as later ones are answered in front of it, or its
answer is overdue. What a device does only once is under way alone.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from splitee.errors import Late, LinkError, SessionLost, Timeout
from splitee.state import Traffic
from splitee_host.link import Link
from splitee_host.window import MANNERS, RoundTrip, Window
from splitee_host.wire import messages as m
from splitee_host.wire.frame import CAPACITY, Frame, coded_size
from splitee_host.wire.seal import TAG_SIZE, Direction, Sealing, nearest, session_key
from splitee_host.wire.stream import framing

_HELLO_AGAIN = (0.2, 2.0)  # seconds until a hello is repeated: at first, and at most
_SILENCE = 1.0  # seconds without an answer until the device is asked whether it was reset; doubles
_LONGEST = 4.0  # seconds until an overdue request is repeated, however often it was

_MOVES = {message.CODE for message in m.MOVES}
_MOVED = {m.Content.CODE, m.Written.CODE}  # answers that begin with an offset


@dataclass
class _Sent:
    """A request under way. Numbers are those of frames, of whatever request, in the order sent."""

    first: int  # when it was sent first
    last: int
    at: float  # when it was sent last
    size: int  # bytes
    times: int = 1


class Exchange:
    """One host's requests to one device, in sessions."""

    def __init__(
        self,
        link: Link,
        who: str,
        *,
        key: bytes | None = None,
        patience: float = 30.0,
        session: int | None = None,
        silent: str | None = None,
    ) -> None:
        """who: what errors call the device. key: 32 bytes that it has, too; None: CRCs are enough.

        patience: seconds without any answer after which the device is lost. session: 1..65535, the
        number of the first; at random by default, so that a device that went on running takes
        this host for a new one. silent: what an error asks where nobody answers, if not what a
        device would be asked.
        """
        self.who = who
        self._silence = silent
        self.patience = patience
        self.deadline: float | None = None  # of time.monotonic(): what is asked then comes too late
        self.heard = time.monotonic()  # when the last answer came
        self.traffic = Traffic()
        self.repeated = 0  # requests sent again
        self.bad = 0  # frames that came spoilt or forged
        self.foreign = 0  # good frames that were no answer, or one that had come before
        self._key = key
        self._session = 0
        self._session_key = b""
        self._begun = False  # whether the device has answered in it
        self._sequence = 0
        self._greeting = Frame(m.Hello.CODE, (session or 1 + secrets.randbelow(0xFFFF)) - 1, 0)
        self._nonce = 0  # of the greeting
        self._sent = 0  # frames
        self.attach(link)

    def attach(self, link: Link) -> None:
        """Goes on over another link to the same device; a hello comes next."""
        self.link = link
        self._manner = MANNERS[link.kind]
        self._window = Window(self._manner)
        self.room = 0  # bytes of further requests that the device keeps while it is busy with one
        self._trips: dict[int, RoundTrip] = {}  # by the code of the request
        self._framing = framing(link.kind)
        self._reader = self._framing.reader(
            max(CAPACITY, 2 * self.piece), self._sealing_of if self._key else None
        )

    @property
    def piece(self) -> int:
        """Largest body of a frame that carries a piece of a tensor, bytes."""
        return self._manner.piece

    # sessions

    def hello(self, within: float | None = None) -> Frame:
        """Asks who is there; the frame of its Welcome. The next request begins a new session.

        within: seconds; patience by default. Raises Timeout when nobody answers.
        """
        end = time.monotonic() + (self.patience if within is None else within)
        wait, longest = _HELLO_AGAIN
        with self._named():
            self._greet()
            while (now := time.monotonic()) < end:
                self._send_greeting()
                for frame in self._frames(min(now + wait, end)):
                    if self._is_welcome(frame):
                        self._session, self._sequence, self._begun = frame.session, 0, False
                        self._session_key = self._key_of(frame)
                        return frame
                wait = min(2 * wait, longest)
        raise self._silent("Hello", self.patience if within is None else within)

    def _greet(self) -> None:
        """Draws a new greeting."""
        self._nonce = secrets.randbits(64)
        number = self._greeting.session % 0xFFFF + 1
        body = m.Hello(m.schema(), self._nonce).pack()
        self._greeting = Frame(m.Hello.CODE, number, 0, body)

    def _send_greeting(self) -> None:
        sealing = Sealing(self._key, Direction.TO_DEVICE, 0) if self._key else None
        self._write(self._framing.encode(self._greeting, sealing), again=True)

    def _is_welcome(self, frame: Frame) -> bool:
        greeted = (frame.session, frame.sequence) == (self._greeting.session, 0)
        return frame.code == m.Welcome.CODE and greeted

    def _key_of(self, frame: Frame) -> bytes:
        """The key of the session that a Welcome offers."""
        if not self._key:
            return b""
        try:
            welcome = m.unpack(frame.code, frame.body)
        except ValueError:  # of another schema
            return self._key
        assert isinstance(welcome, m.Welcome)
        return session_key(self._key, self._nonce, welcome.nonce, frame.session)

    def _sealing_of(self, frame: Frame) -> Sealing | None:
        """How a frame from the device is sealed."""
        if self._is_welcome(frame):
            return Sealing(self._key_of(frame), Direction.TO_HOST, 0)
        if frame.session != self._session:
            return None
        turns = nearest(self._sequence, frame.sequence) >> 16
        return Sealing(self._session_key, Direction.TO_HOST, turns)

    # requests

    def ask(self, requests: Sequence[m.Message]) -> list[Frame]:
        """The answers to one request, or to the pieces of one transfer, in the order asked.

        What is no answer to a piece ends the transfer: it comes back alone. Raises Timeout when no
        answer comes for as long as patience lasts, SessionLost when the device was reset, Late when
        the deadline has passed, LinkClosed when the link is gone.
        """
        with self._named():
            return _Asked(self, requests).answers()

    def _write(self, coded: list[bytes], *, again: bool) -> int:
        """Sends a frame; its bytes. again: what stands in front of it may be cut short."""
        first, *others = coded
        parts = [b"".join((self._framing.mark, first)) if again else first, *others]
        for part in parts:
            self.link.write(part)
        self._sent += 1
        size = sum(map(len, parts))
        self.traffic.down += size
        return size

    def _read(self, timeout: float) -> list[Frame]:
        """Good frames that have come; none when nothing did within timeout seconds."""
        chunk = self.link.read(max(0.0, timeout))
        self.traffic.up += len(chunk)
        bad = self._reader.bad
        frames = self._reader.feed(chunk)
        self.bad += self._reader.bad - bad
        return frames

    def _frames(self, until: float) -> Iterator[Frame]:
        while (left := until - time.monotonic()) > 0:
            yield from self._read(left)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Says in errors of the link whose it is."""
        try:
            yield
        except LinkError as error:
            if str(error).startswith(self.who):
                raise
            raise type(error)(f"{self.who}: {error}") from error

    def _silent(self, what: str, seconds: float) -> Timeout:
        where = f"{self.who}: no answer to {what} within {seconds:g} s on {self.link.name}"
        if self._silence:
            return Timeout(f"{where}: {self._silence}")
        same = "the same key built into it" if self._key else "no key built into it"
        baud = ", the baud rate right" if self.link.kind == "serial" else ""
        return Timeout(
            f"{where}: is the device powered, its firmware running with {same}{baud}, and nothing "
            "else using the link?"
        )


class _Asked:
    """One call of ``Exchange.ask``."""

    def __init__(self, exchange: Exchange, requests: Sequence[m.Message]) -> None:
        self._x = exchange
        self._requests = requests
        self._code = requests[0].CODE
        moves = [r for r in requests if isinstance(r, m.Read | m.Write)]
        assert len(moves) == len(requests) or len(requests) == 1, "only pieces go together"
        self._places = {r.offset: place for place, r in enumerate(moves)}
        shortest = exchange._manner.shortest
        self._trip = exchange._trips.setdefault(self._code, RoundTrip(shortest))
        self._waiting = deque(range(len(requests)))  # places of those to send
        self._under_way: dict[int, _Sent] = {}  # by place, in the order sent
        self._sent: dict[int, _Sent] = {}  # by place
        self._answers: dict[int, Frame] = {}  # by place
        self._newest = 0  # the last number of which the answer has come
        x = exchange
        x._sequence = (x._sequence + 1) & 0xFFFFFFFF
        turns = x._sequence >> 16
        self._sealing = Sealing(x._session_key, Direction.TO_DEVICE, turns) if x._key else None

    def answers(self) -> list[Frame]:
        x = self._x
        began = asked = time.monotonic()  # asked: whether it was reset
        silence = _SILENCE
        while len(self._answers) < len(self._requests):
            self._send_what_fits()
            now = time.monotonic()
            if x.deadline is not None and now >= x.deadline:
                raise Late(f"{x.who}: its round was over before its pass was")
            if now >= max(began, x.heard) + x.patience:
                raise x._silent(type(self._requests[0]).__name__, x.patience)
            if now >= asked + silence and self._overdue(now):
                # until it is in this session, another's hello may have taken the place of ours
                if silence == _SILENCE and x._begun:
                    x._greet()
                x._send_greeting()
                asked, silence = now, 2 * silence
            for frame in x._read(
                self._next(max(began, x.heard) + x.patience, asked + silence) - now
            ):
                if x._is_welcome(frame):
                    self._still_ours(frame)
                elif (frame.session, frame.sequence) != (x._session, x._sequence & 0xFFFF):
                    x.foreign += 1
                elif self._places and frame.code not in _MOVED:
                    return [frame]
                elif self._take(frame):
                    x.heard = asked = time.monotonic()
                    silence = _SILENCE
            self._look_for_lost()
        return [self._answers[place] for place in range(len(self._requests))]

    def _send_what_fits(self) -> None:
        x = self._x
        while self._waiting:
            place = self._waiting[0]
            body, tail = self._requests[place].parts()
            if not self._fits(len(body) + len(tail)):
                return
            self._waiting.popleft()
            frame = Frame(self._code, x._session, x._sequence & 0xFFFF, body, tail)
            coded = x._framing.encode(frame, self._sealing)
            before = self._sent.get(place)
            size = x._write(coded, again=before is not None)
            sent = _Sent(x._sent, x._sent, time.monotonic(), size)
            if before is not None:
                x.repeated += 1
                sent.first, sent.times = before.first, before.times + 1
            self._sent[place] = self._under_way[place] = sent

    def _fits(self, size: int) -> bool:
        """Whether a request with a body of that size may be under way, too."""
        _, *behind = [sent.size for sent in self._under_way.values()] or [0]
        if len(self._under_way) >= self._x._window.frames:
            return False
        return not self._under_way or sum(behind) + coded_size(size, TAG_SIZE) <= self._x.room

    def _due(self, sent: _Sent) -> float:
        """When its answer is overdue."""
        timeout = self._trip.timeout
        later: float = timeout * 2 ** (sent.times - 1)
        return sent.at + max(timeout, min(later, _LONGEST))

    def _overdue(self, now: float) -> bool:
        return any(now >= self._due(sent) or sent.times > 1 for sent in self._under_way.values())

    def _next(self, end: float, ask: float) -> float:
        """When there is something to do, if nothing comes until then."""
        x = self._x
        times = [self._due(sent) for sent in self._under_way.values()]
        times += [end, max(ask, min(times, default=ask))]
        return min(times if x.deadline is None else [*times, x.deadline])

    def _take(self, frame: Frame) -> bool:
        """Keeps an answer; false when it has come before, or to nothing that was asked."""
        place = 0
        if self._places:
            found = self._places.get(int.from_bytes(frame.body[:4], "little"))
            place = -1 if found is None else found
        if place < 0 or place in self._answers or place not in self._sent:
            self._x.foreign += 1
            return False
        self._answers[place] = frame
        self._x._begun = True
        sent = self._sent[place]
        if self._under_way.pop(place, None) is None:
            self._waiting.remove(place)  # it only took longer than it seemed
        if sent.times == 1:
            self._trip.measured(time.monotonic() - sent.at)
        self._newest = max(self._newest, sent.first)
        self._x._window.answered()
        return True

    def _look_for_lost(self) -> None:
        """Puts those that have to be sent again in front of all others."""
        now, x = time.monotonic(), self._x
        # at the end of a transfer, few are left to overtake a lost one (RFC 5827)
        overtaken = x._manner.overtaken if self._waiting else 1
        lost = [
            place
            for place, sent in self._under_way.items()
            if self._newest - sent.last >= overtaken or now >= self._due(sent)
        ]
        for place in lost:
            x._window.lost(self._under_way.pop(place).last, x._sent)
        self._waiting.extendleft(reversed(lost))

    def _still_ours(self, frame: Frame) -> None:
        """A device that was asked whether it was reset says which session it is in."""
        try:
            welcome = m.unpack(frame.code, frame.body)
        except ValueError:
            return
        assert isinstance(welcome, m.Welcome)
        if frame.session != self._x._session != welcome.session:
            raise SessionLost(
                f"{self._x.who}: it is no longer in the session of this host: it was reset, or "
                "another host uses it"
            )
