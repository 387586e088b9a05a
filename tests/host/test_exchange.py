"""The exchange: pieces that are under way together, sessions, seals, and what is lost."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import pytest

from host_harness import ENDS, Recorder, differences, end, host, waits
from splitee.errors import Late, LinkError, SessionLost, Timeout
from splitee_host import serve as serve_module
from splitee_host.device import Device
from splitee_host.exchange import Exchange
from splitee_host.link import Link, memory_pair
from splitee_host.serve import _Server
from splitee_host.torch_learner import TorchLearner
from splitee_host.window import MANNERS, RoundTrip, Window
from splitee_host.wire import messages as m
from splitee_host.wire.frame import Frame, FrameReader, encode
from splitee_host.wire.seal import Direction, Sealing, nearest, session_key
from step_harness import SETTINGS, case, local
from vectors import wire

CASE = case("resnet8")
SMALL = case("pools")
KEY = bytes(range(32))


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The host's clock."""
    it = Clock()
    monkeypatch.setattr("splitee_host.exchange.time", it)
    monkeypatch.setattr("splitee_host.device.time", it)
    return it


class Here:
    """A link to a Python client in this thread: what is written is carried out at once.

    ``lose`` says of each frame, request or answer, whether it is lost; ``held`` at most so many
    requests wait at the other end between two reads, and those that come then are lost. A look at
    what has come takes a millisecond of the clock.
    """

    def __init__(
        self,
        kind: str = "udp",
        *,
        clock: Clock | None = None,
        key: bytes | None = None,
        lose: Callable[[], bool] = lambda: False,
        held: int | None = None,
    ) -> None:
        self.kind = kind
        self.name = f"{kind}:here"
        self.lost = 0
        self.requests: list[bytes] = []
        self._client = local(CASE, SETTINGS)
        self._clock = clock
        self._key = key
        self._lose = lose
        self._held = held
        self._waiting: deque[bytes] = deque()
        self._answers: deque[bytes] = deque()
        self.reset()

    def reset(self) -> None:
        """The device restarts: it knows of no session, and of no samples."""
        self.server = _Server(TorchLearner(self._client), CASE.build, self._key, self.kind)

    def write(self, data: bytes) -> None:
        self.requests.append(data)
        if self._lose() or (self._held is not None and len(self._waiting) >= self._held):
            self.lost += 1
        else:
            self._waiting.append(data)

    def read(self, timeout: float) -> bytes:
        if self._clock:
            self._clock.sleep(0.001 if self._waiting or self._answers else max(0.001, timeout))
        # one request is carried out for each look: others wait meanwhile
        if self._waiting:
            self._answers.extend(self.server.sessions.receive(self._waiting.popleft()))
        while self._answers:
            answer = self._answers.popleft()
            if not self._lose():
                return answer
            self.lost += 1
        return b""

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def chance(share: float, seed: int) -> Callable[[], bool]:
    """True for that share of the calls, at random."""
    rng = random.Random(seed)
    return lambda: rng.random() < share


def content(size: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(size)


SHARD = CASE.build.samples_max * CASE.build.record_size


# ---- the window ----


def test_waits_as_long_as_the_estimate_of_rfc_6298_says() -> None:
    trip = RoundTrip(shortest=0.01)
    assert trip.timeout == 1.0
    trip.measured(0.1)  # mean 0.1, deviation 0.05
    assert trip.timeout == pytest.approx(0.1 + 4 * 0.05)
    trip.measured(0.2)  # deviation 3/4 0.05 + 1/4 |0.1 - 0.2| = 0.0625, mean 7/8 0.1 + 1/8 0.2
    assert trip.timeout == pytest.approx(0.1125 + 4 * 0.0625)
    for _ in range(200):
        trip.measured(0.001)
    assert trip.timeout == 0.01


def test_a_window_grows_until_frames_are_lost_and_then_slower() -> None:
    window = Window(MANNERS["udp"])
    assert window.frames == 4
    for _ in range(6):
        window.answered()
    assert window.frames == 10
    window.lost(number=20, last=25)
    assert window.frames == 7  # 0.7 x 10
    window.lost(number=25, last=30)  # it was under way then
    assert window.frames == 7
    for _ in range(8):  # a round trip, and a frame more
        window.answered()
    assert window.frames == 8
    for _ in range(9 + 10):
        window.answered()
    assert window.frames == 9  # it was too much at 10: from there on it takes its time
    for _ in range(8 * 9):
        window.answered()
    assert window.frames == 10
    for number in itertools.count(100, 100):
        window.lost(number, last=number)
        if number == 2000:
            break
    assert window.frames == 4


def test_a_line_that_spoils_frames_keeps_its_window() -> None:
    window = Window(MANNERS["serial"])
    window.lost(number=1, last=3)
    assert window.frames == MANNERS["serial"].frames


# ---- transfers ----


@pytest.mark.parametrize("kind", ["udp", "serial", "tcp"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3])
def test_a_tensor_crosses_whatever_is_lost(kind: str, share: float, clock: Clock) -> None:
    link = Here(kind, clock=clock, lose=chance(share, seed=3))
    device = host(link, CASE)
    device.hello()
    sent = content(SHARD)
    for _ in range(3):
        device.write(m.Region.SHARD, sent)
        assert device.read(m.Region.SHARD, 0, SHARD) == sent
    assert (link.lost > 0) == (share > 0)
    assert (device.exchange.repeated > 0) == (share > 0)


def test_only_what_was_lost_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits(monkeypatch, 60.0)  # nothing is overdue: later answers tell of the loss
    numbers = itertools.count()
    link = Here("serial", lose=lambda: next(numbers) == 20)
    device = host(link, CASE)
    device.hello()
    device.counters()
    monkeypatch.setattr(device.exchange, "_manner", replace(MANNERS["serial"], piece=128))
    device.hello()
    device.write(m.Region.SHARD, content(SHARD))
    device.read(m.Region.SHARD, 0, SHARD)
    assert link.lost == 1
    assert device.exchange.repeated == 1


def test_the_window_finds_how_much_a_chip_holds(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MANNERS, "udp", replace(MANNERS["udp"], piece=100))
    link = Here("udp", clock=clock, held=7)
    device = host(link, CASE)
    device.hello()
    frames = []
    for seed in range(20):
        device.write(m.Region.SHARD, content(SHARD, seed))
        frames.append(device.exchange._window.frames)
    assert link.lost > 0
    assert max(frames[1:]) <= 9
    assert min(frames[1:]) >= 4
    assert link.lost < len(link.requests) / 10
    assert device.read(m.Region.SHARD, 0, SHARD) == content(SHARD, 19)


class Uart:
    """The bytes that a device keeps while it is busy: what comes on top of them is lost.

    It is busy with a request until the host has read the answer.
    """

    def __init__(self, link: Here, size: int) -> None:
        self.kind, self.name = "serial", "serial:uart"
        self._link = link
        self._size = size
        self._held: deque[bytes] = deque()
        self._busy = False
        self.overrun = 0

    def write(self, data: bytes) -> None:
        if not self._busy:
            self._link.write(data)
            self._busy = True
        elif sum(map(len, self._held)) + len(data) <= self._size:
            self._held.append(data)
        else:
            self.overrun += 1

    def read(self, timeout: float) -> bytes:
        data = self._link.read(timeout)
        self._busy = False
        if self._held:
            self.write(self._held.popleft())
        return data

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def test_a_device_that_keeps_256_bytes_is_not_overrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_module, "WINDOW", 256)
    uart = Uart(Here("serial"), 256)
    device = host(uart, CASE)
    device.hello()
    sent = content(SHARD)
    device.write(m.Region.SHARD, sent)
    assert device.read(m.Region.SHARD, 0, SHARD) == sent
    assert uart.overrun == 0
    assert device.exchange.repeated == 0
    # seen to fail: a host that takes no care
    device.exchange.room = 1 << 20
    waits(monkeypatch, 0.002)
    device.write(m.Region.SHARD, sent)
    assert uart.overrun > 0


@pytest.mark.parametrize("kind", ENDS)
def test_a_late_piece_of_an_earlier_transfer_changes_nothing(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link, Recorder(link) as recorder:
        device = host(recorder, CASE)
        device.hello()
        device.write(m.Region.SHARD, b"\1" * 100)
        late = recorder.sent[-1]
        device.write(m.Region.SHARD, b"\2" * 100)
        device.counters()
        before = device.counters().foreign_frames
        link.write(late)
        assert device.read(m.Region.SHARD, 0, 100) == b"\2" * 100
        assert device.counters().foreign_frames == before + 1


# ---- sessions ----


def test_a_hello_changes_nothing_until_a_request_comes() -> None:
    link = Here()
    device = host(link, CASE)
    device.start(CASE.state, CASE.images)
    device.forward(8, 8)
    other = host(link, CASE, session=77)
    assert other.hello().session == 1
    device.backward(None)
    device.step()
    other.counters()  # now it has taken the device over
    with pytest.raises(LinkError):
        Exchange(link, "nobody", patience=0.01).ask([m.Stats()])


def test_a_device_that_was_reset_is_told_from_one_that_is_slow(clock: Clock) -> None:
    link = Here(clock=clock)
    device = host(link, CASE)
    device.start(CASE.state, CASE.images)
    device.forward(8, 8)
    link.reset()
    with pytest.raises(SessionLost, match='client "it": it is no longer in the session'):
        device.backward(None)


def test_comes_back_from_a_reset_as_it_was(clock: Clock) -> None:
    link = Here(clock=clock)
    device = host(link, CASE)
    device.start(CASE.state, CASE.images)
    device.forward(8, 8)
    device.backward(None)
    device.step()
    state = device.state()
    device.forward(8, 8)
    link.reset()
    device.rejoin(state, 5.0)
    assert differences(device.state(), state) == []
    assert device.read(m.Region.SHARD, 0, 10) == device_records()[:10]


def device_records() -> bytes:
    flat = CASE.images.x.reshape(len(CASE.images), -1)
    return np.concatenate([CASE.images.y[:, None], flat], axis=1).tobytes()


def test_is_not_back_in_time() -> None:
    near, far = memory_pair()
    device = host(near, CASE)
    with near, far, pytest.raises(Timeout, match="no answer to Hello within"):
        device.rejoin(CASE.state, 0.3)


def test_a_link_that_broke_is_opened_again(folder: Path) -> None:
    links: list[Link] = []

    def reopen() -> Link:
        links.append(Here())
        return links[-1]

    near, far = memory_pair()
    far.close()
    with near:
        device = Device("it", near, CASE.build, SETTINGS, reopen=reopen)
        device._images = CASE.images
        device.rejoin(CASE.state, 5.0)
    assert len(links) == 1
    back = device.state()
    assert back.place == CASE.state.place
    for name, weights in CASE.state.weights.items():
        np.testing.assert_array_equal(back.weights[name], weights)


def test_what_is_asked_after_the_deadline_is_late() -> None:
    near, far = memory_pair()
    with near, far:
        device = host(near, CASE)
        device.deadline = 0.0
        with pytest.raises(Late, match='client "it"'):
            device.backward(None)


# ---- seals ----


@pytest.mark.parametrize("one", wire.SEALED, ids=wire.title)
def test_seals_the_published_bytes(one: dict[str, object]) -> None:
    number = int(str(one["number"]))
    frame = Frame(
        int(str(one["code"])), int(str(one["session"])), number & 0xFFFF, wire.body_of(one)
    )
    key = bytes.fromhex(str(one["key"]))
    sealing = Sealing(key, Direction(int(str(one["direction"]))), number >> 16)
    assert encode(frame, sealing) == wire.bytes_of(one)
    assert FrameReader(sealing=lambda _: sealing).feed(wire.bytes_of(one)) == [frame]
    for wrong in (
        replace(sealing, key=bytes(32)),
        replace(sealing, direction=Direction(1 - sealing.direction)),
        replace(sealing, turns=sealing.turns ^ 1),
        None,
    ):
        reader = FrameReader(sealing=lambda _, wrong=wrong: wrong)  # type: ignore[misc]
        assert reader.feed(wire.bytes_of(one)) == []
        assert reader.bad == 1


@pytest.mark.parametrize("one", wire.SESSION_KEYS)
def test_makes_the_published_session_keys(one: dict[str, object]) -> None:
    key = bytes.fromhex(str(one["key"]))
    nonces = int(str(one["host_nonce"])), int(str(one["device_nonce"]))
    made = session_key(key, *nonces, int(str(one["session"])))
    assert made.hex() == one["session_key"]


def test_a_number_stands_for_the_nearest_that_ends_like_it() -> None:
    assert nearest(0x1_0000, 0x0001) == 0x1_0001
    assert nearest(0x1_0000, 0xFFFF) == 0xFFFF
    assert nearest(0x1_FFFF, 0x0000) == 0x2_0000
    assert nearest(0xFFFF_FFFF, 0x0000) == 0


def keyed(link: Link, key: bytes | None = KEY, patience: float = 20.0) -> Device:
    return Device("it", link, CASE.build, SETTINGS, key=key, session=1, patience=patience)


def learn(device: Device) -> None:
    device.start(CASE.state, CASE.images)
    for _ in range(3):
        device.forward(8, 8)
        device.backward(None)
        device.step()


def test_both_ends_with_a_key_train_as_without() -> None:
    states = []
    for key in (None, KEY):
        device = keyed(Here(key=key), key)
        learn(device)
        states.append(device.state())
    assert differences(*states) == []


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(None, KEY), (KEY, None), (KEY, bytes(32))],
    ids=["no key", "a key that the device has not", "another key"],
)
def test_is_not_answered_with(ours: bytes | None, theirs: bytes | None) -> None:
    link = Here(key=theirs)
    with pytest.raises(Timeout, match=r"no answer to Hello .*key"):
        keyed(link, ours, patience=0.3).hello()
    assert link.server.sessions.bad > 0
    assert link.server.sessions.frames == 0


def test_a_replayed_frame_is_not_carried_out() -> None:
    link = Here(key=KEY)
    device = keyed(link)
    learn(device)
    state, counted = device.state(), device.counters()
    for frame in list(link.requests):  # a whole session, heard by another
        link.write(frame)
        while link.read(0.0):
            pass
    after = device.counters()
    assert differences(device.state(), state) == []
    assert after.steps == counted.steps == 3
    assert after.foreign_frames + after.bad_frames > counted.foreign_frames + counted.bad_frames


def test_a_session_that_was_heard_cannot_be_played_to_a_device_that_was_reset() -> None:
    link = Here(key=KEY)
    device = keyed(link)
    learn(device)
    heard = list(link.requests)
    link.reset()
    for frame in heard:
        link.write(frame)
        while link.read(0.0):
            pass
    assert link.server.sessions.active == 0
    assert link.server._learner.place.steps == 3  # of torch's own, not of what was replayed


def test_a_host_takes_no_answer_of_another_key() -> None:
    near, far = memory_pair()
    device = keyed(near, patience=0.5)
    forged = m.Welcome(m.schema(), CASE.build.checksum, 1024, 1024, 2048, 9, 0, 0, 0, 0, 1, 5)
    with near, far:
        for number in (1, 2):
            sealing = Sealing(session_key(bytes(32), 0, 5, number), Direction.TO_HOST, 0)
            far.write(encode(Frame(m.Welcome.CODE, number, 0, forged.pack()), sealing))
            far.write(encode(Frame(m.Welcome.CODE, number, 0, forged.pack())))
        with pytest.raises(Timeout):
            device.hello()
    assert device.exchange.bad >= 4
