"""Frames in Python: their bytes, what a reader makes of any bytes, and what it keeps."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitee_host.wire.frame import Frame, FrameReader, cobs_decode, cobs_encode, encode
from vectors.wire import CODING, FRAMES, STREAMS, WHOLE, frame_of, title, unhex

# Bytes where long runs, zeros and both limits of a block are common.
blocky = st.lists(
    st.one_of(
        st.binary(max_size=8),
        st.integers(1, 600).map(bytes),
        st.integers(250, 258).map(lambda size: b"\x5a" * size),
        st.integers(1, 1100).map(lambda size: b"\x01" * size),
    ),
    max_size=6,
).map(b"".join)
frames = st.builds(
    Frame,
    code=st.integers(0, 2**8 - 1),
    session=st.integers(0, 2**16 - 1),
    sequence=st.integers(0, 2**16 - 1),
    body=blocky,
)


def cobs_by_the_byte(data: bytes) -> bytes:
    """COBS as Cheshire and Baker tell it, but with nothing behind a full last block: an oracle."""
    coded = block = b""
    full = False
    for byte in data:
        if byte:
            block += bytes([byte])
        full = len(block) == 254
        if full or not byte:
            coded += bytes([len(block) + 1]) + block
            block = b""
    return coded if full else coded + bytes([len(block) + 1]) + block


@pytest.mark.parametrize("case", CODING, ids=title)
def test_cobs_is_as_published(case: dict[str, Any]) -> None:
    data, coded = unhex(case["data"]), unhex(case["coded"])
    assert cobs_encode(data) == coded
    assert cobs_decode(coded) == data


@pytest.mark.parametrize("case", WHOLE, ids=title)
def test_a_frame_has_the_published_bytes(case: dict[str, Any]) -> None:
    assert encode(frame_of(case)) == unhex(case["bytes"])
    assert FrameReader().feed(unhex(case["bytes"])) == [frame_of(case)]


@pytest.mark.parametrize("piece", [None, 1, 7], ids=["at once", "by bytes", "by sevens"])
@pytest.mark.parametrize("case", STREAMS, ids=title)
def test_a_reader_finds_the_good_frames_and_counts_the_bad(
    case: dict[str, Any], piece: int | None
) -> None:
    stream = unhex(case["bytes"])
    reader = FrameReader(case["capacity"]) if "capacity" in case else FrameReader()
    found = []
    step = piece or len(stream) or 1
    for start in range(0, len(stream), step):
        found += reader.feed(stream[start : start + step])
    assert found == [FRAMES[title] for title in case["frames"]]
    assert reader.bad == case["bad"]


@given(data=blocky)
def test_cobs_leaves_no_zero_and_at_most_one_byte_more_in_254(data: bytes) -> None:
    coded = cobs_encode(data)
    assert coded == cobs_by_the_byte(data)
    assert 0 not in coded
    assert len(coded) <= len(data) + max(1, -(-len(data) // 254))
    assert cobs_decode(coded) == data


@given(coded=st.binary(max_size=40))
def test_cobs_decodes_no_bytes_but_codings(coded: bytes) -> None:
    data = cobs_decode(coded)
    if data is not None:
        # A full last block may be followed by an empty one; nothing else is coded in two ways.
        assert coded in (cobs_encode(data), cobs_encode(data) + b"\x01", b"")


@given(frame=frames)
def test_a_frame_is_its_header_body_and_crc_coded(frame: Frame) -> None:
    content = struct.pack("<BHH", frame.code, frame.session, frame.sequence) + frame.body
    coded = encode(frame)
    assert coded.endswith(b"\0")
    assert cobs_decode(coded[:-1]) == content + zlib.crc32(content).to_bytes(4, "little")


@given(sent=st.lists(frames, max_size=4), cuts=st.lists(st.integers(0, 5000), max_size=8))
def test_frames_come_back_whatever_pieces_they_come_in(sent: list[Frame], cuts: list[int]) -> None:
    stream = b"".join(encode(frame) for frame in sent)
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    reader = FrameReader()
    found = [frame for a, b in pairwise(places) for frame in reader.feed(stream[a:b])]
    assert found == sent
    assert reader.bad == 0


@given(frame=frames, garbage=st.binary(max_size=300))
def test_a_frame_behind_any_garbage_and_a_zero_is_found(frame: Frame, garbage: bytes) -> None:
    assert FrameReader().feed(garbage + b"\0" + encode(frame))[-1:] == [frame]


@given(frame=frames, data=st.data())
def test_a_frame_with_one_wrong_bit_is_never_taken(frame: Frame, data: st.DataObject) -> None:
    coded = bytearray(encode(frame)[:-1])
    place = data.draw(st.integers(0, len(coded) * 8 - 1))
    coded[place // 8] ^= 1 << place % 8
    reader = FrameReader()
    assert reader.feed(bytes(coded) + b"\0") == []
    assert reader.bad >= 1


@pytest.mark.parametrize(
    "frame",
    [Frame(256, 0, 0), Frame(0, 65536, 0), Frame(0, 0, -1)],
    ids=["code", "session", "sequence"],
)
def test_refuses_to_encode_what_does_not_fit(frame: Frame) -> None:
    with pytest.raises(struct.error):
        encode(frame)


def test_a_reader_keeps_no_more_than_one_frame() -> None:
    reader = FrameReader(capacity=1000)
    noise = b"\x55" * 100_000
    reader.feed(noise)
    tracemalloc.start()
    try:
        for _ in range(20):
            assert reader.feed(noise) == []
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 10_000
    good = Frame(1, 2, 3, b"good")
    assert reader.feed(b"\0" + encode(good)) == [good]
    assert reader.bad == 1
