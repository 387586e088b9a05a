"""Relays: lines keep their pace, faults are as many as asked for and the same ones every time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from host_harness import differences, end, host
from splitee.errors import LinkClosed, LinkError
from splitee_host.link import MemoryLink, memory_pair
from splitee_host.relay import CLEAR, Direction, Faults, Line, Relay, Sent, Spoiler
from splitee_host.wire.frame import Frame, FrameReader, encode
from step_harness import case

FOREVER = 60.0  # seconds; every wait with it ends because something happens
FRAMES = [encode(Frame(1, 2, number, bytes([number & 0xFF]) * 40)) for number in range(2000)]


def spoilt(
    faults: Faults, frames: list[bytes] = FRAMES, seed: str = "0", *, stream: bool = True
) -> tuple[list[bytes], Spoiler]:
    spoiler = Spoiler(faults, seed, stream=stream)
    out = [sent for frame in frames for sent in spoiler.spoil(frame)]
    return [sent.content for sent in out if not sent.lost], spoiler


# ---- faults ----


def test_a_line_without_faults_passes_everything() -> None:
    out, spoiler = spoilt(Faults())
    assert out == FRAMES
    assert (spoiler.counts.frames, spoiler.counts.lost) == (2000, 0)


def test_what_is_lost_is_missing_and_nothing_else() -> None:
    out, spoiler = spoilt(Faults(lose=0.05))
    assert sorted(out, key=FRAMES.index) == out
    assert len(out) == 2000 - spoiler.counts.lost
    assert 60 <= spoiler.counts.lost <= 140  # 100, and four deviations of 9.7


def test_a_doubled_frame_comes_twice_in_a_row() -> None:
    out, spoiler = spoilt(Faults(double=0.05))
    assert [frame for i, frame in enumerate(out) if frame not in out[:i][-1:]] == FRAMES
    assert len(out) == 2000 + spoiler.counts.doubled
    assert 60 <= spoiler.counts.doubled <= 140


def test_a_late_frame_comes_behind_as_many_as_asked_for() -> None:
    spoiler = Spoiler(Faults(reorder=1.0, behind=2), "0", stream=True)
    sent = [[out.content for out in spoiler.spoil(frame)] for frame in FRAMES[:4]]
    assert sent == [[], [], [FRAMES[0]], [FRAMES[1]]]
    out, spoiler = spoilt(Faults(reorder=0.05, behind=3))
    moved = [frame for i, frame in enumerate(out[1:]) if FRAMES.index(out[i]) > FRAMES.index(frame)]
    assert 60 <= spoiler.counts.reordered <= 140
    assert len(out) in range(1997, 2001)  # the last ones may still be waiting
    assert moved
    for frame in moved:  # each behind the three that followed it, or more where some of them moved
        came, went = out.index(frame), FRAMES.index(frame)
        assert set(FRAMES[went + 1 : went + 4]) - set(out[:came]) <= set(moved)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "datagrams"])
def test_a_corrupted_frame_differs_in_one_place_and_is_found(stream: bool) -> None:
    out, spoiler = spoilt(Faults(corrupt=1.0), stream=stream)
    assert spoiler.counts.corrupted == len(out) == 2000
    assert not any(a == b for a, b in zip(out, FRAMES, strict=True))
    sizes = {len(a) - len(b) for a, b in zip(out, FRAMES, strict=True)}
    assert sizes == ({-1, 0, 1} if stream else {0})
    for a, b in zip(out, FRAMES, strict=True):
        if len(a) == len(b):
            number = int.from_bytes(a, "big") ^ int.from_bytes(b, "big")
            assert number.bit_count() == 1 or stream  # a byte may be put in and be the same size
    assert FrameReader().feed(b"".join(out)) == []


def test_garbage_comes_between_frames_and_within_them() -> None:
    out, spoiler = spoilt(Faults(garbage=1.0))
    assert spoiler.counts.garbage == 2000
    whole = [frame for frame in out if frame in FRAMES]
    assert 900 <= len(whole) <= 1100
    assert len(out) == 2000 + len(whole)  # in front of each of these, and within the others
    read = [frame.sequence for frame in FrameReader().feed(b"".join(out))]
    assert read == sorted(set(read))
    assert 400 <= len(read) <= 600  # half of them are joined to the garbage in front of them


EVERYTHING = Faults(lose=0.1, double=0.1, reorder=0.1, corrupt=0.1, garbage=0.1)


def test_the_same_seed_makes_the_same_faults() -> None:
    assert spoilt(EVERYTHING)[0] == spoilt(EVERYTHING)[0]
    assert spoilt(EVERYTHING)[0] != spoilt(EVERYTHING, seed="1")[0]


def test_what_a_frame_meets_does_not_depend_on_the_frames() -> None:
    others = [encode(Frame(9, 9, number, b"other")) for number in range(2000)]
    a, b = spoilt(EVERYTHING)[1].counts, spoilt(EVERYTHING, others)[1].counts
    assert a == b
    more = spoilt(Faults(lose=0.1, corrupt=0.9))[1].counts
    assert more.lost == a.lost


# ---- pace, by a clock that is handed in ----


def flow(direction: Direction, pieces: list[bytes]) -> list[tuple[float, bytes]]:
    """Sends as fast as there is room; when each piece comes out."""
    now, out = 0.0, []
    for data in pieces:
        for piece in direction.pieces(data):
            now = max(now, direction.room_at(now))
            direction.push(piece, now)
            while direction.next_at() <= now:
                out.append((direction.next_at(), direction.pop(direction.next_at())))
    while not math.isinf(direction.next_at()):
        out.append((direction.next_at(), direction.pop(direction.next_at())))
    return out


def test_a_stream_takes_ten_bits_a_byte() -> None:
    data = [bytes(1000)] * 100
    out = flow(Direction(Line(rate=921_600), "", stream=True), data)
    assert b"".join(piece for _, piece in out) == b"".join(data)
    assert out[-1][0] == pytest.approx(100_000 / 92_160)
    came = 0
    for at, piece in out:  # evenly, not in lumps
        came += len(piece)
        assert at == pytest.approx(came / 92_160)
        assert len(piece) <= 256


def test_a_datagram_takes_eight_bits_a_byte_and_comes_whole() -> None:
    data = [bytes(1400)] * 50
    out = flow(Direction(Line(rate=10e6), "", stream=False), data)
    assert [piece for _, piece in out] == data
    assert [at for at, _ in out] == pytest.approx([(i + 1) * 1400 * 8 / 10e6 for i in range(50)])


def test_what_comes_to_an_idle_line_leaves_at_once() -> None:
    direction = Direction(Line(rate=1e6), "", stream=False)
    for now in (5.0, 9.0):
        direction.push(Sent(bytes(125)), now)
        assert direction.next_at() == pytest.approx(now + 0.001)
        assert direction.pop(now + 0.001) == bytes(125)


def test_what_is_lost_takes_its_time_all_the_same() -> None:
    direction = Direction(Line(rate=8000, faults=Faults(lose=1.0)), "", stream=False)
    for piece in direction.pieces(bytes(1000)):
        direction.push(piece, 0)
    direction.push(Sent(b"then"), 0)
    assert direction.next_at() == pytest.approx(1.0)
    assert direction.pop(1.0) == b""
    assert direction.next_at() == pytest.approx(1.004)
    assert direction.counts.bytes == 1004


def test_latency_delays_what_comes_and_does_not_slow_it_down() -> None:
    data = [bytes(1000)] * 100
    out = flow(Direction(Line(rate=921_600, latency=0.5), "", stream=True), data)
    assert out[-1][0] == pytest.approx(0.5 + 100_000 / 92_160)
    out = flow(Direction(Line(latency=0.5), "", stream=False), data)
    assert {at for at, _ in out} == {0.5}


def test_who_writes_more_than_there_is_room_for_waits() -> None:
    direction = Direction(Line(rate=10_000, room=1024), "", stream=True)
    for _ in range(4):
        assert direction.room_at(0) == 0
        direction.push(Sent(bytes(256)), 0)
    assert direction.room_at(0) == pytest.approx(0.256)  # when the first has left
    assert direction.room_at(0.5) == 0.5


def test_without_a_rate_there_is_room_when_something_is_taken() -> None:
    direction = Direction(Line(room=256), "", stream=True)
    direction.push(Sent(bytes(256)), 0)
    assert direction.room_at(1) == math.inf
    assert direction.pop(1) == bytes(256)
    assert direction.room_at(1) == 1


def test_a_datagram_more_than_the_queue_holds_is_dropped() -> None:
    direction = Direction(Line(rate=8000, queue=3), "", stream=False)
    for number in range(5):
        assert direction.room_at(0) == 0
        direction.push(Sent(bytes([number]) * 1000), 0)
    direction.push(Sent(b"5" * 1000), 1.5)  # one has left
    assert direction.counts.dropped == 2
    assert [direction.pop(9)[:1] for _ in range(4)] == [b"\0", b"\1", b"\2", b"5"]


def test_the_frames_of_a_stream_are_found_in_whatever_pieces_they_come() -> None:
    direction = Direction(Line(faults=Faults(lose=0.2)), "0", stream=True)
    stream = b"".join(FRAMES)
    out = [p for start in range(0, len(stream), 7) for p in direction.pieces(stream[start:][:7])]
    through = b"".join(sent.content for sent in out if not sent.lost)
    kept = [frame.sequence for frame in FrameReader().feed(through)]
    assert len(kept) == 2000 - direction.counts.lost < 2000
    assert direction.counts.frames == 2000


# ---- the link ----


class Ends(NamedTuple):
    relay: Relay
    far: MemoryLink


@contextmanager
def relayed(down: Line = CLEAR, up: Line = CLEAR, seed: int = 0) -> Iterator[Ends]:
    near, far = memory_pair()
    with far, Relay(near, down, up, seed=seed) as relay:
        yield Ends(relay, far)


def read_all(read: Callable[[float], bytes], size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += read(FOREVER)
    return data


@pytest.mark.parametrize("rate", [math.inf, 50e6])
def test_what_is_written_arrives_both_ways(rate: float) -> None:
    stream = b"".join(FRAMES[:200])
    with relayed(Line(rate), Line(rate)) as (relay, far):
        assert (relay.kind, relay.name) == ("memory", "memory:near")
        for frame in FRAMES[:200]:
            relay.write(frame)
        assert read_all(far.read, len(stream)) == stream
        far.write(stream)
        assert read_all(relay.read, len(stream)) == stream
        assert relay.down_counts.bytes == relay.up_counts.bytes == len(stream)
        assert relay.down_counts.frames == relay.up_counts.frames == 200


def test_the_two_directions_have_faults_of_their_own() -> None:
    lossy = Line(faults=Faults(lose=0.5))
    passed = []
    for _ in range(2):
        with relayed(lossy, lossy) as (relay, far):
            last = encode(Frame(9, 9, 9))
            for frame in FRAMES[:100]:
                relay.write(frame)
                far.write(frame)
            for reader, end_of in ((far, relay), (relay, far)):
                found: list[Frame] = []
                decode = FrameReader()
                while not (found and found[-1].code == 9):  # some of these are lost, too
                    end_of.write(last)
                    found += decode.feed(reader.read(0.01))
                passed.append([frame.sequence for frame in found if frame.code == 1])
    assert passed[0] == passed[2]
    assert passed[1] == passed[3]
    assert passed[0] != passed[1]
    assert 20 <= len(passed[0]) <= 80


def test_a_read_returns_nothing_when_nothing_comes() -> None:
    with relayed() as (relay, _):
        for timeout in (0.01, 0.0, -1.0):
            assert relay.read(timeout) == b""


def test_unplugged_everything_is_lost_until_it_is_plugged_in() -> None:
    with relayed(Line(1e6), Line(1e6)) as (relay, far):
        relay.unplug()
        relay.write(FRAMES[0])
        far.write(FRAMES[1])
        while relay.up_counts.lost == 0:
            assert relay.read(0.001) == b""
        assert far.read(0.001) == b""
        relay.plug_in()
        relay.write(FRAMES[2])
        far.write(FRAMES[3])
        assert read_all(far.read, len(FRAMES[2])) == FRAMES[2]
        assert read_all(relay.read, len(FRAMES[3])) == FRAMES[3]
        assert (relay.down_counts.lost, relay.up_counts.lost) == (1, 1)


def ended_with(call: Callable[[], object], then: Callable[[], None]) -> LinkError:
    """How a call ends that waits until then."""
    errors: list[LinkError] = []
    begun = threading.Event()

    def work() -> None:
        begun.set()
        try:
            while True:
                call()
        except LinkError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    then()
    thread.join(FOREVER)
    assert not thread.is_alive()
    return errors[0]


@pytest.mark.parametrize("line", [CLEAR, Line(rate=1000.0), Line(latency=1000.0)])
def test_closing_ends_what_waits(line: Line) -> None:
    with relayed(line, line) as (relay, _):
        relay.write(FRAMES[0])  # on its way for long, but on a clear line
        error = ended_with(lambda: relay.read(FOREVER), relay.close)
        assert "was closed on this side" in str(error)
    with relayed(Line(rate=1000.0), line) as (relay, far):
        error = ended_with(lambda: relay.write(bytes(5000)), relay.close)
        assert "was closed on this side" in str(error)
        relay.close()
        for call in (lambda: relay.read(FOREVER), lambda: relay.write(b"x")):
            with pytest.raises(LinkClosed, match="was closed on this side"):
                call()
        with pytest.raises(LinkClosed):  # and so is the link
            read_all(far.read, 10_000)


def test_the_end_of_the_link_is_told_when_all_that_came_is_read() -> None:
    with relayed(Line(1e6), Line(1e6, latency=0.01)) as (relay, far):
        far.write(FRAMES[0])
        far.close()
        assert read_all(relay.read, len(FRAMES[0])) == FRAMES[0]
        for _ in range(2):
            with pytest.raises(LinkClosed, match="the other end was closed"):
                relay.read(FOREVER)
        assert "the other end was closed" in str(
            ended_with(lambda: relay.write(FRAMES[1]), lambda: None)
        )


SMALL = case("pools")


def test_a_device_learns_the_same_through_a_bad_line(folder: Path) -> None:
    states = []
    faults = Faults(lose=0.02, double=0.05, reorder=0.02, corrupt=0.02, garbage=0.02)
    for line in (CLEAR, Line(rate=20e6, faults=faults)):
        with end("firmware", SMALL, folder) as link, Relay(link, line, line, seed=3) as relay:
            assert isinstance(relay, Relay)
            assert relay.kind == "udp"
            device = host(relay, SMALL)
            device.start(SMALL.state, SMALL.images)
            for _ in range(3):
                device.forward(2, 2)
                device.backward(None)
                device.step()
            states.append(device.state())
    assert differences(*states) == []
