"""The answering end of early exits: a run's server halves, asked by clients over links.

To a client that asks, the server is a device (``asking.py``): it is selected whose activations come
and how they are coded, they are written, ``Infer`` runs the server's half, and its logits are read.
``Select`` counts the run's clients by their sorted names; a ``Welcome``'s segment is the CRC-32 of
the checkpoint, its samples_max how many samples may be asked at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from splitee.codec import KINDS, Codec, Kind
from splitee.errors import LinkClosed, LinkError
from splitee.ops import Array
from splitee_host.link import Link, Listener
from splitee_host.session import WINDOW, Refusal, Sessions
from splitee_host.wire import messages as m
from splitee_host.wire.frame import Frame

CAPACITY = 64  # samples that may be asked at once

_GREETING = 10.0  # seconds that who connects has until its first frame
_GREETING_MAX = 1024  # bytes; a hello takes fewer
_REQUESTS = {request.CODE for request in m.REQUESTS}
_KINDS: dict[int, Kind] = {m.Codec[k.replace("-", "_").upper()]: k for k in KINDS}


@dataclass(frozen=True)
class Half:
    """What completes one client's answers."""

    client: str
    number: int  # its place among the run's clients, by name; the first is 1
    key: bytes | None  # under which it asks; None: it has none
    elements: int  # of a sample's activations
    infer: Callable[[Array], Array]  # float32 (n, elements) -> logits (n, classes); one at a time


@dataclass
class Asked:
    """What was answered to one client so far."""

    samples: int = 0
    bytes_up: int = 0  # that came from it, frames included
    bytes_down: int = 0


class _Answers:
    """The state machine: of nobody, or of a client with its codec."""

    def __init__(
        self, halves: Sequence[Half], checkpoint: int, key: bytes | None, lock: threading.Lock
    ) -> None:
        """halves: those that may be asked here."""
        self.sessions = Sessions(self, key, "tcp")
        self._halves = {half.number: half for half in halves}
        self._checkpoint = checkpoint
        self._lock = lock
        self.samples = 0
        self.begin()

    def begin(self) -> None:
        """A session begins: it is nobody's."""
        self.half: Half | None = None
        self._codec = Codec("float32", 0)
        self._activations, self._logits = bytearray(), b""

    def welcome(self, session: int, nonce: int) -> m.Welcome:
        """What it is."""
        return m.Welcome(
            schema=m.schema(),
            segment=self._checkpoint,
            receive_max=self.sessions.most,
            send_max=self.sessions.most,
            window=WINDOW,
            samples_max=CAPACITY,
            samples=0,
            steps=0,
            shard=0,
            session=session,
            fresh=1,
            nonce=nonce,
        )

    def act(self, frame: Frame) -> m.Message:
        """Carries a request out; the answer to it."""
        if frame.code not in _REQUESTS:
            return m.Refused(m.Error.UNKNOWN_MESSAGE, frame.code)
        try:
            request = m.unpack(frame.code, frame.body)
        except ValueError:
            return m.Refused(m.Error.BAD_LENGTH, len(frame.body))
        try:
            return self._on(request)
        except Refusal as refusal:
            return m.Refused(refusal.error, refusal.detail)

    def _on(self, request: m.Message) -> m.Message:
        match request:
            case m.Select(number, _):
                if number not in self._halves:
                    raise Refusal(m.Error.NO_SUCH_CUT, len(self._halves))
                self.half = self._halves[number]
                self._code(Codec("float32", self.half.elements))
            case m.Coding(activations, _, kept):
                self._coding(self._asked, activations, kept)
            case m.Write(m.Region.CODED_ACTIVATIONS, offset, content):
                end = offset + len(content)
                if end > len(self._activations):
                    raise Refusal(m.Error.OUT_OF_RANGE, len(self._activations))
                self._activations[offset:end] = content
                return m.Written(offset)
            case m.Infer(count):
                self._infer(self._asked, count)
            case m.Read(m.Region.LOGITS, offset, length):
                if offset + length > len(self._logits):
                    raise Refusal(m.Error.OUT_OF_RANGE, len(self._logits))
                return m.Content(offset, self._logits[offset : offset + length])
            case m.Read(region) | m.Write(region):
                raise Refusal(m.Error.NO_SUCH_REGION, region)
            case _:
                raise Refusal(m.Error.UNKNOWN_MESSAGE, request.CODE)
        return m.Done()

    @property
    def _asked(self) -> Half:
        """Whose answers these are."""
        if self.half is None:
            raise Refusal(m.Error.OUT_OF_ORDER, 0)
        return self.half

    def _code(self, codec: Codec) -> None:
        self._codec = codec
        self._activations = bytearray(CAPACITY * codec.size)

    def _coding(self, half: Half, number: int, kept: int) -> None:
        kind = _KINDS.get(number)
        codec = kind and Codec(kind, half.elements, kept if kind == "top-k" else 0)
        if not codec or codec.fault or (kind == "top-k" and kept == 0):
            raise Refusal(m.Error.BAD_CODEC, number)
        self._code(codec)

    def _infer(self, half: Half, count: int) -> None:
        if not 0 < count <= CAPACITY:
            raise Refusal(m.Error.TOO_MANY_SAMPLES, CAPACITY)
        try:
            values = self._codec.decode(bytes(self._activations[: count * self._codec.size]))
        except ValueError as error:
            raise Refusal(m.Error.BAD_CODE, 0) from error
        with self._lock:  # clients may share a server, and a server is one thing at a time
            logits = half.infer(values)
        self._logits = logits.astype("<f4").tobytes()
        self.samples += count


class AnsweringServer:
    """Answers all who connect, each in a thread of its own."""

    def __init__(
        self, halves: Sequence[Half], checkpoint: int, *, say: Callable[[str], None]
    ) -> None:
        """checkpoint: its CRC-32. say: is told who comes and leaves."""
        self.asked: Mapping[str, Asked] = {half.client: Asked() for half in halves}
        self._halves = halves
        self._checkpoint = checkpoint
        self._say = say
        self._computing = threading.Lock()
        self._noting = threading.Lock()

    def serve(self, listener: Listener) -> None:
        """Takes those who connect, until the listener is closed or this is interrupted."""
        threads: dict[threading.Thread, Link] = {}
        try:
            while True:
                link = listener.accept()
                # a daemon: nobody waits for one whom an interrupt kept out of the list below
                thread = threading.Thread(target=self._attend, args=(link,), daemon=True)
                thread.start()
                threads = {t: k for t, k in threads.items() if t.is_alive()} | {thread: link}
        except LinkClosed:
            return
        finally:
            for link in threads.values():
                link.close()  # ends what its thread waits for
            for thread in threads:
                thread.join()

    def _attend(self, link: Link) -> None:
        """Answers one who has connected, until he leaves."""
        with link, suppress(LinkError):
            # who it is shows in the key of the first frame
            keys = {half.key for half in self._halves}
            candidates = [
                _Answers(
                    [half for half in self._halves if half.key == key],
                    self._checkpoint,
                    key,
                    self._computing,
                )
                for key in keys
            ]
            found, read = None, 0
            while found is None:
                chunk = link.read(_GREETING)
                read += len(chunk)
                for answers in candidates:
                    if self._take(link, answers, chunk):
                        found = answers
                spoilt = all(a.sessions.bad or a.sessions.foreign for a in candidates)
                if not found and (not chunk or spoilt or read > _GREETING_MAX):
                    self._say(f"{link.name}: it did not say hello under a key that is known here")
                    return
            self._converse(link, found)

    def _converse(self, link: Link, answers: _Answers) -> None:
        known = ""
        try:
            while True:
                self._take(link, answers, link.read(3600.0))
                if answers.half is not None and answers.half.client != known:
                    known = answers.half.client
                    self._say(f"{known}: asks from {link.name}")
        finally:
            if known:
                self._say(f"{known}: left, {answers.samples:,} samples answered")

    def _take(self, link: Link, answers: _Answers, chunk: bytes) -> bool:
        """Answers what has come; whether there was something to answer."""
        before, sent = answers.samples, 0
        for coded in answers.sessions.receive(chunk):
            link.write(coded)
            sent += len(coded)
        if answers.half is not None:
            with self._noting:
                asked = self.asked[answers.half.client]
                asked.samples += answers.samples - before
                asked.bytes_up += len(chunk)
                asked.bytes_down += sent
        return sent > 0
