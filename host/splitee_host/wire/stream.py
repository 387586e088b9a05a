"""Frames on a stream that neither loses nor changes bytes: on TCP, a length and what follows it.

length u32 of all that follows, code u8, session u16, sequence u16, body, little endian; with a key
the tag of these (``seal.py``). Nothing else ends or checks a frame: that is TCP's to do, and what a
tensor of megabytes costs here is hardly more than its way through the system.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Callable
from typing import cast

from splitee.errors import LinkClosed
from splitee_host.wire.frame import CAPACITY, COBS, HEADER, Frame, Framing
from splitee_host.wire.seal import TAG_SIZE, Sealing, seal

_LENGTH = struct.Struct("<I")


def size(body: int, *, keyed: bool) -> int:
    """The bytes that a frame with a body of so many takes."""
    return _LENGTH.size + HEADER.size + body + (TAG_SIZE if keyed else 0)


_LARGE = 1 << 14  # bytes that cost more to copy than to write apart


def encode(frame: Frame, sealing: Sealing | None = None) -> list[bytes]:
    """What to send for a frame, one behind the other; with a tag where there is a key."""
    header = HEADER.pack(frame.code, frame.session, frame.sequence)
    tag = b"" if sealing is None else seal(b"".join((header, frame.body, frame.tail)), sealing)
    size = len(header) + len(frame.body) + len(frame.tail) + len(tag)
    first = b"".join((_LENGTH.pack(size), header, frame.body))
    if len(frame.tail) < _LARGE:
        return [b"".join((first, frame.tail, tag))]
    tail = cast(bytes, frame.tail)  # or what looks like them: all that TCP's link needs
    return [first, tail, tag] if tag else [first, tail]


class StreamReader:
    """Finds the frames in what comes, in pieces of any size; their bodies are not copied again.

    ``bad`` counts the frames dropped so far, each too short or with a wrong tag.
    """

    def __init__(
        self,
        capacity: int = CAPACITY,
        sealing: Callable[[Frame], Sealing | None] | None = None,
    ) -> None:
        """capacity: bytes of the largest frame (header, body, tag). sealing: as of FrameReader."""
        self.bad = 0
        self._capacity = capacity
        self._sealing = sealing
        self._tag_size = TAG_SIZE if sealing else 0
        self._length = bytearray()
        self._content = bytearray()  # of the frame that has begun
        self._missing = 0  # bytes of it

    def feed(self, chunk: bytes) -> list[Frame]:
        """The good frames that this chunk completes, in order.

        Raises LinkClosed at a length that is no frame's: where the next one begins is not known.
        """
        frames = []
        rest = memoryview(chunk)
        while rest:
            if not self._missing:
                rest = self._begin(rest)
            place, part = len(self._content) - self._missing, rest[: self._missing]
            self._content[place : place + len(part)] = part
            rest = rest[len(part) :]
            if part and len(part) == self._missing:
                frame = self._decode(memoryview(self._content))
                if frame is None:
                    self.bad += 1
                else:
                    frames.append(frame)
            self._missing -= len(part)
        return frames

    def _begin(self, rest: memoryview) -> memoryview:
        """Takes what has come of a length; what stands behind it."""
        left = _LENGTH.size - len(self._length)
        self._length += rest[:left]
        if len(self._length) == _LENGTH.size:
            (size,) = _LENGTH.unpack(self._length)
            self._length.clear()
            if not 0 < size <= self._capacity:
                raise LinkClosed(
                    f"a frame of {size:,} bytes came, and none is longer than {self._capacity:,}: "
                    "the other end is no program of ours, or one of another version"
                )
            self._content, self._missing = bytearray(size), size
        return rest[left:]

    def _decode(self, data: memoryview) -> Frame | None:
        if len(data) < HEADER.size + self._tag_size:
            return None
        end = len(data) - self._tag_size
        code, session, sequence = HEADER.unpack_from(data)
        frame = Frame(code, session, sequence, data[HEADER.size : end])
        if self._sealing is None:
            return frame
        sealing = self._sealing(frame)
        good = sealing and hmac.compare_digest(seal(bytes(data[:end]), sealing), data[end:])
        return frame if good else None


LENGTHS = Framing(encode, StreamReader, b"")
"""That of TCP."""


def framing(kind: str) -> Framing:
    """How frames stand in what a link of that kind carries."""
    return LENGTHS if kind == "tcp" else COBS
