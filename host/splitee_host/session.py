"""Who answers, and to which request: the sessions of ``firmware/core/session.c``, in Python.

What is asked is the business of an ``Answerer``: a client that trains (``serve.py``), or a server's
half that is asked for its answers (``answering.py``).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from splitee_host.window import MANNERS
from splitee_host.wire import messages as m
from splitee_host.wire.frame import Frame
from splitee_host.wire.seal import TAG_SIZE, Direction, Sealing, nearest, session_key
from splitee_host.wire.stream import framing

WINDOW = 1 << 23  # bytes of requests that wait in the system, or in the host's, while it is busy

_HELLO = len(m.Hello(0, 0).pack())
_MOVES = {message.CODE for message in m.MOVES}


@dataclass
class Refusal(Exception):
    """A request that is not carried out."""

    error: m.Error
    detail: int = 0


class Answerer(Protocol):
    """What carries requests out."""

    def welcome(self, session: int, nonce: int) -> m.Welcome:
        """What it is. session: that it is in. nonce: of the session that is offered."""

    def begin(self) -> None:
        """A session begins: what an earlier one has not finished is forgotten."""

    def act(self, frame: Frame) -> m.Message:
        """Carries a request out; the answer to it."""


@dataclass
class _Session:
    """One of ``firmware/core/session.c``."""

    number: int = 0  # 0: there is none
    sequence: int = 0  # of the last request
    key: bytes = b""


class Sessions:
    """One end of a link that is asked; ``receive`` takes what has come."""

    def __init__(self, answerer: Answerer, key: bytes | None, kind: str) -> None:
        """key: 32 bytes that who asks has, too; None: there is none. kind: of the link."""
        self.most = max(1 << 16, MANNERS[kind].piece)  # largest body of a frame, bytes
        self.frames = 0  # good ones
        self.foreign = 0  # of another session, or not in turn
        self.repeated = 0  # requests that came again, pieces of transfers not counted
        self._answerer = answerer
        self._key = key
        self._framing = framing(kind)
        self._reader = self._framing.reader(self.most + 64, self._sealing_of if key else None)
        self._active, self._greeted = _Session(), _Session()
        self._nonce: int | None = None  # None: it made a session, the next hello draws another
        self._acted = False  # whether the last number was acted on, and the answer is the one to it
        self._answer: m.Message = m.Done()

    @property
    def bad(self) -> int:
        """Frames that came spoilt or forged."""
        return self._reader.bad

    @property
    def active(self) -> int:
        """The number of the session that it is in; 0: there was none."""
        return self._active.number

    def _sealing_of(self, frame: Frame) -> Sealing | None:
        assert self._key is not None
        if frame.code == m.Hello.CODE:
            return Sealing(self._key, Direction.TO_DEVICE, 0)
        session = self._session_of(frame)
        turns = nearest(session.sequence, frame.sequence) >> 16
        return Sealing(session.key, Direction.TO_DEVICE, turns) if session.key else None

    def _session_of(self, frame: Frame) -> _Session:
        return self._active if frame.session == self._active.number else self._greeted

    def receive(self, chunk: bytes) -> Iterator[bytes]:
        """The coded answers to what has come."""
        for frame in self._reader.feed(chunk):
            answer = self._take(frame)
            if answer is None:
                continue
            session = self._greeted if frame.code == m.Hello.CODE else self._active
            sealing = None
            if self._key:
                sealing = Sealing(session.key, Direction.TO_HOST, session.sequence >> 16)
            sequence = session.sequence & 0xFFFF
            yield from self._framing.encode(
                Frame(answer.CODE, session.number, sequence, *answer.parts()), sealing
            )

    def _take(self, frame: Frame) -> m.Message | None:
        """The answer to a frame; None to one that is of no session, or not in turn."""
        session = self._session_of(frame)
        sequence = nearest(session.sequence, frame.sequence)
        ahead = (sequence - session.sequence) & 0xFFFFFFFF
        opens = session is self._greeted
        if frame.code == m.Hello.CODE:
            # on a stream, what tells that a key was meant is the tag behind it
            tagged = self._key is None and len(frame.body) == _HELLO + TAG_SIZE
            ours = frame.session != 0 and frame.sequence == 0 and not tagged
        else:
            ours = frame.session == session.number != 0 and sequence != 0
            ours = ours and (sequence == 1 if opens else ahead in (0, 1))
        if not ours:
            self.foreign += 1
            return None
        self.frames += 1
        if frame.code == m.Hello.CODE:
            return self._welcome(frame)
        if opens:
            self._active, self._greeted = session, _Session()
            self._nonce = None
            self._answerer.begin()
        again = not opens and ahead == 0
        session.sequence = sequence
        moves = frame.code in _MOVES
        self.repeated += again and not moves
        if again and moves == self._acted:  # the number of an act is no other's
            return None
        if moves:
            self._acted = False
            return self._answerer.act(frame)
        if not again:
            self._acted = True
            self._answer = self._answerer.act(frame)
        return self._answer

    def _welcome(self, frame: Frame) -> m.Welcome:
        try:
            hello = m.unpack(frame.code, frame.body)
        except ValueError:  # of another schema: the host compares them
            hello = m.Hello(0, 0)
        assert isinstance(hello, m.Hello)
        if self._nonce is None:
            self._nonce = secrets.randbits(64)
        key = b""
        if self._key:
            key = session_key(self._key, hello.nonce, self._nonce, frame.session)
        self._greeted = _Session(frame.session, 0, key)
        return self._answerer.welcome(self.active, self._nonce)
