"""Frames on a byte stream: COBS with a zero byte behind each, a seal inside.

A frame before coding: code u8, session u16, sequence u16, body, seal of all that (``seal.py``),
little endian. ``firmware/protocol/frame.c`` is the other end, and the two give the same verdict on
any bytes. The coding is Consistent Overhead Byte Stuffing (Cheshire and Baker, IEEE/ACM
Transactions on Networking 7(2), 1999): no zero byte is left in a frame, so that a receiver that
lost its place has it again at the next zero byte.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from splitee_host.wire.seal import CRC_SIZE, TAG_SIZE, Sealing, seal

HEADER = struct.Struct("<BHH")
"""Code, session, sequence."""

Bytes = bytes | bytearray | memoryview

CAPACITY = 1 << 20
"""Bytes of the largest frame (header, body, seal) that a reader takes unless told otherwise."""

_FULL = 254
"""Bytes in a full block. It is the only block that no zero byte of the data follows."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame, decoded and found good; ``messages.unpack(code, body)`` says what it means."""

    code: int
    session: int
    sequence: int
    body: Bytes = b""
    tail: Bytes = b""  # the rest of the body of one to send: what is large is not put together


def encode(frame: Frame, sealing: Sealing | None = None) -> bytes:
    """The bytes to send for a frame, with the zero byte that ends it; sealed by a CRC-32, or a key.

    Raises ``struct.error`` when the code is no u8, or session or sequence no u16.
    """
    header = HEADER.pack(frame.code, frame.session, frame.sequence)
    content = b"".join((header, frame.body, frame.tail))
    return cobs_encode(content + seal(content, sealing)) + b"\0"


def coded_size(body: int, seal_size: int) -> int:
    """The most bytes that a frame with a body of so many bytes takes on the wire."""
    size = HEADER.size + body + seal_size
    return size + size // _FULL + 2


def coded_body(size: int) -> int:
    """The largest body of a frame that takes no more than so many bytes on the wire."""
    return size - 2 - size // _FULL - HEADER.size - TAG_SIZE


def cobs_encode(data: bytes) -> bytes:
    """Data coded by COBS, without a zero byte."""
    # With a zero put before and behind the data, a code is nothing but the distance from one zero
    # to the next, written over the first of the two. Activations behind a ReLU are half zeros:
    # numpy does this 25 times faster for them than a loop over the blocks.
    marked = np.frombuffer(b"\0" + data + b"\0", np.uint8).copy()
    zeros = np.flatnonzero(marked == 0)
    distances = np.diff(zeros)
    if np.any(distances > _FULL):
        # A code ends a full block too. It is put in as one more zero; not behind the last block.
        end = len(marked) - 1
        places = [
            np.arange(zeros[i] + _FULL + 1, zeros[i + 1] + (zeros[i + 1] < end), _FULL)
            for i in np.flatnonzero(distances > _FULL)
        ]
        marked = np.insert(marked, np.concatenate(places), 0)
        zeros = np.flatnonzero(marked == 0)
        distances = np.diff(zeros)
    marked[zeros[:-1]] = distances
    return marked[:-1].tobytes()


def cobs_decode(coded: bytes | bytearray) -> bytes | None:
    """The data that ``cobs_encode`` coded, or None when these bytes are not a coding of any."""
    if 0 in coded:
        return None
    data = bytearray(coded)
    pieces = []
    place = start = 0
    while place < len(data):
        code = data[place]
        data[place] = 0  # in the data, this code was a zero byte
        place += code
        if code == _FULL + 1:  # the next code was not: leave it out
            pieces.append(data[start:place])
            start = place + 1
    if place > len(data):
        return None
    pieces.append(data[start:])
    return b"".join(pieces)[1:]


class FrameReader:
    """Finds the frames in a stream of bytes, whatever pieces it comes in.

    ``bad`` counts the frames dropped so far: longer than ``capacity`` bytes (header, body and
    seal), miscoded, too short, or with a wrong seal. Empty frames (runs of zero bytes) are not
    counted. No more than a frame of ``capacity`` bytes is kept between calls.
    """

    def __init__(
        self,
        capacity: int = CAPACITY,
        sealing: Callable[[Frame], Sealing | None] | None = None,
    ) -> None:
        """sealing: says how a frame has to be sealed, or None that it cannot be good.

        Without it, all frames have a CRC-32.
        """
        self.bad = 0
        self._sealing = sealing
        self._seal_size = CRC_SIZE if sealing is None else TAG_SIZE
        self._capacity = capacity
        self._coded_max = capacity + capacity // _FULL + 1
        self._coded = bytearray()  # of the frame that has begun, cut off one byte past the limit

    def feed(self, chunk: bytes) -> list[Frame]:
        """The good frames that this chunk completes, in order."""
        *ends, rest = chunk.split(b"\0")
        frames = []
        for end in ends:
            self._collect(end)
            if self._coded:
                frame = self._decode()
                if frame is None:
                    self.bad += 1
                else:
                    frames.append(frame)
                self._coded.clear()
        self._collect(rest)
        return frames

    def _collect(self, piece: bytes) -> None:
        self._coded += piece[: self._coded_max + 1 - len(self._coded)]

    def _decode(self) -> Frame | None:
        if len(self._coded) > self._coded_max:
            return None
        data = cobs_decode(self._coded)
        if data is None or not HEADER.size + self._seal_size <= len(data) <= self._capacity:
            return None
        content, end = data[: -self._seal_size], data[-self._seal_size :]
        code, session, sequence = HEADER.unpack_from(content)
        frame = Frame(code, session, sequence, content[HEADER.size :])
        sealing = None
        if self._sealing is not None:
            sealing = self._sealing(frame)
            if sealing is None:
                return None
        return frame if hmac.compare_digest(seal(content, sealing), end) else None


class Reader(Protocol):
    """Finds frames in what comes."""

    bad: int  # frames dropped so far

    def feed(self, chunk: bytes) -> list[Frame]:
        """The good frames that this chunk completes, in order."""


@dataclass(frozen=True)
class Framing:
    """How frames stand in what a link carries."""

    encode: Callable[[Frame, Sealing | None], list[bytes]]  # what to write, one behind the other
    reader: Callable[[int, Callable[[Frame], Sealing | None] | None], Reader]  # capacity, sealing
    mark: bytes  # ends whatever stands in front of a frame


COBS = Framing(lambda frame, sealing: [encode(frame, sealing)], FrameReader, b"\0")
"""That of everything but TCP: a receiver that lost its place, or bytes, finds the next frame."""
