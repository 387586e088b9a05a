"""Frames on TCP: literal bytes, any pieces, tags, and what is none."""

from __future__ import annotations

import hashlib

import pytest

from splitee.errors import LinkClosed
from splitee_host.wire import stream as wire
from splitee_host.wire.frame import Frame
from splitee_host.wire.seal import Direction, Sealing
from splitee_host.wire.stream import StreamReader

HI = Frame(0x89, 0x0102, 0x0304, b"\x00\x01\x00")
# 8 bytes follow: code, session, sequence, body
CODED = bytes.fromhex("08000000 89 0201 0403 000100")
KEY = bytes(range(32))


def encode(frame: Frame, sealing: Sealing | None = None) -> bytes:
    return b"".join(wire.encode(frame, sealing))


def sealing(turns: int = 0) -> Sealing:
    return Sealing(KEY, Direction.TO_HOST, turns)


def test_a_frame_is_its_length_and_its_content() -> None:
    assert encode(HI) == CODED
    assert encode(Frame(0x89, 0x0102, 0x0304, b"\x00", b"\x01\x00")) == CODED
    assert StreamReader().feed(CODED) == [HI]


@pytest.mark.parametrize("key", [None, KEY])
def test_a_large_tail_is_sent_from_where_it_lies(key: bytes | None) -> None:
    tail = memoryview(bytearray(b"\x07" * 70_000))
    seal = sealing() if key else None
    parts = wire.encode(Frame(0x89, 1, 2, b"ab", tail), seal)
    assert id(parts[1]) == id(tail)
    reader = StreamReader(sealing=(lambda _: sealing()) if key else None)
    (frame,) = [f for part in parts for f in reader.feed(bytes(part))]
    assert bytes(frame.body) == b"ab" + tail


def test_a_tag_is_blake2s_of_direction_turns_and_content() -> None:
    said = b"\x01\x05\x00" + CODED[4:]
    tag = hashlib.blake2s(said, key=KEY, digest_size=16).digest()
    assert encode(HI, sealing(5)) == b"\x18\0\0\0" + CODED[4:] + tag


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 12, 100])
def test_frames_come_in_pieces_of_any_size(size: int) -> None:
    stream = b"".join(encode(Frame(1, 2, n, bytes(n))) for n in (0, 1, 30, 0))
    reader = StreamReader()
    pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
    found = [frame for piece in pieces for frame in reader.feed(piece)]
    assert [(f.sequence, bytes(f.body)) for f in found] == [(n, bytes(n)) for n in (0, 1, 30, 0)]
    assert reader.bad == 0


def test_a_frame_without_the_right_tag_is_dropped_and_the_next_is_taken() -> None:
    reader = StreamReader(sealing=lambda _: sealing())
    good = encode(HI, sealing())
    forged = good[:-1] + bytes([good[-1] ^ 1])
    short = b"\x04\0\0\0abcd"
    assert reader.feed(forged + short + encode(HI, sealing(1)) + good) == [HI]
    assert reader.bad == 3


@pytest.mark.parametrize("length", ["00000000", "01010000", "ffffffff"])
def test_a_length_that_no_frame_has_ends_the_link(length: str) -> None:
    with pytest.raises(LinkClosed, match="no program of ours, or one of another version"):
        StreamReader(256).feed(bytes.fromhex(length))
