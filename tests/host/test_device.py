"""A host and its device, with the firmware and with the Python client at the other end."""

from __future__ import annotations

import re
import secrets
import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from host_harness import ENDS, Recorder, Troubled, built, differences, end, host, waits
from splitee.client import Place, State, Stepped
from splitee.data import Images, draw_order
from splitee.errors import DeviceRefused, LinkClosed, Mismatch, Timeout
from splitee_host import boards
from splitee_host.device import Device, records
from splitee_host.errors import refusal
from splitee_host.link import Link, UdpLink, memory_pair
from splitee_host.wire import messages as m
from splitee_host.wire.frame import Frame, FrameReader, encode
from step_harness import SETTINGS, Case, case

CASE = case("resnet8")  # capacity 8, 24 samples
SMALL = case("pools")  # few weights: few requests
BUILD = CASE.build
PLAIN = case("pools", momentum=False)
RECORD = BUILD.record_size


@pytest.fixture(autouse=True)
def _nothing_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames are counted here: none is repeated only because this machine is busy."""
    waits(monkeypatch, 10.0)


def learnt_state(the_case: Case, place: Place) -> State:
    """A state of some training: random weights and momentum."""
    rng = np.random.default_rng(11)
    graph = the_case.build.graph

    def random(size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return rng.standard_normal(size, np.float32)

    return State(
        graph.unflatten(random(graph.weight_size)),
        graph.unflatten_parameters(random(graph.parameter_size)),
        place,
    )


def train(device: Device, steps: int, batch: int = 8) -> list[Stepped]:
    """Whole batches, with the loss of the exits only."""
    done = []
    for _ in range(steps):
        device.forward(batch, batch)
        device.backward(None)
        done.append(device.step())
    return done


def raw(code: int, body: bytes) -> m.Message:
    """Any request at all, as no host of ours would send it."""

    class Raw(m.Message):
        CODE = code

        def parts(self) -> tuple[bytes, bytes]:
            return body, b""

    return Raw()


# ---- state ----


@pytest.mark.parametrize("kind", ENDS)
def test_what_a_device_is_given_comes_back_bit_for_bit(kind: str, folder: Path) -> None:
    state = learnt_state(CASE, Place(samples=24, seed=9, epoch=3, position=5, steps=7))
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(state, CASE.images)
        assert differences(device.state(), state) == []
        assert differences(device.state(), state) == []  # what was written is what is held
        shard = device.read(m.Region.SHARD, 0, 24 * RECORD)
        assert shard[:RECORD] == bytes([CASE.images.y[0], *CASE.images.x[0].ravel()])
        assert shard == records(CASE.images)


@pytest.mark.parametrize("kind", ENDS)
def test_a_device_says_what_it_is(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        fresh = device.hello()
        assert (fresh.schema, fresh.segment) == (m.schema(), BUILD.checksum)
        assert (fresh.samples, fresh.samples_max, fresh.steps, fresh.shard) == (0, 24, 0, 0)
        assert min(fresh.receive_max, fresh.send_max) >= 256
        device.start(CASE.state, CASE.images)
        train(device, 2)
        welcome = device.hello()
        checksum = zlib.crc32(records(CASE.images))
        assert (welcome.samples, welcome.steps, welcome.shard) == (24, 2, checksum)


@pytest.mark.parametrize("kind", ENDS)
def test_new_settings_count_from_the_next_step_on(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(CASE.state, CASE.images)
        train(device, 1)
        before = device.state()
        device.settings = replace(SETTINGS, learning_rate=0.0)
        train(device, 1)
        after = device.state()
        device.settings = SETTINGS
        train(device, 1)
        moved = differences(device.state(), after)
    assert (
        differences(replace(after, momentum={}, place=before.place), replace(before, momentum={}))
        == []
    )
    assert set(moved) >= set(BUILD.graph.parameters)


@pytest.mark.parametrize("kind", ENDS)
def test_another_device_goes_on_where_one_stopped(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(CASE.state, CASE.images)
        train(device, 2)
        state = device.state()
        expected = train(device, 5), device.state()  # the data order begins anew on the way
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(state, CASE.images)
        assert train(device, 5) == expected[0]
        assert differences(device.state(), expected[1]) == []


@pytest.mark.parametrize("kind", ENDS)
def test_a_new_start_forgets_momentum(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(CASE.state, CASE.images)
        expected = train(device, 3), device.state()
        device.start(CASE.state, CASE.images)
        assert all(not v.any() for v in device.state().momentum.values())
        assert train(device, 3) == expected[0]
        assert differences(device.state(), expected[1]) == []


@pytest.mark.parametrize("kind", ENDS)
def test_a_state_has_momentum_also_while_a_setting_makes_no_use_of_it(
    kind: str, folder: Path
) -> None:
    state = learnt_state(CASE, Place(samples=24, seed=9, steps=7))
    with end(kind, CASE, folder) as link:
        device = host(link, CASE, replace(SETTINGS, momentum=0.0))
        device.start(state, CASE.images)
        assert list(device.state().momentum) == list(BUILD.graph.parameters)


# ---- the shard ----


@pytest.mark.parametrize("kind", ENDS)
def test_a_shard_that_the_device_holds_is_not_sent_again(kind: str, folder: Path) -> None:
    other = Images(CASE.images.x, (CASE.images.y + 1) % 10)
    fewer = CASE.images[slice(0, 23)]
    with end(kind, CASE, folder) as link:
        sent, down = [], []
        for session, images in enumerate((CASE.images, CASE.images, other, other, fewer), 1):
            recorder = Recorder(link)
            device = host(recorder, CASE, session=session)
            device.start(replace(CASE.state, place=Place(len(images), seed=5)), images)
            down.append(device.traffic.down)
            frames = map(frame_of, recorder.sent)
            writes = [m.unpack(f.code, f.body) for f in frames if f.code == m.Write.CODE]
            pieces = [w for w in writes if isinstance(w, m.Write) and w.region == m.Region.SHARD]
            sent.append(b"".join(p.content for p in pieces))
            assert device.read(m.Region.SHARD, 0, len(images) * RECORD) == records(images)
    assert sent == [records(CASE.images), b"", records(other), b"", records(fewer)]
    assert down[0] - down[1] in range(24 * RECORD, 24 * RECORD + 100)  # and the frames around it


# ---- once and only once ----


@pytest.mark.parametrize("kind", ENDS)
def test_a_repeated_request_is_answered_again_and_not_acted_on(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        recorder = Recorder(link)
        device = host(recorder, CASE)
        device.start(CASE.state, CASE.images)
        device.forward(8, 8)
        device.backward(None)
        device.step()
        for _ in range(2):
            recorder.write(recorder.sent[-1])  # the Step
            expected = recorder.answers[-1]
            while len(recorder.answers) < len(recorder.sent):
                recorder.read(20.0)
            assert recorder.answers[-1] == expected
        repeated = device.state(), device.counters()
        assert (repeated[1].steps, repeated[1].repeated_frames) == (1, 2)
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(CASE.state, CASE.images)
        train(device, 1)
        assert differences(device.state(), repeated[0]) == []


def frame_of(coded: bytes) -> Frame:
    (frame,) = FrameReader().feed(coded)
    return frame


IGNORED: dict[str, Callable[[Frame], Frame]] = {
    "the request before": lambda f: replace(f, sequence=f.sequence - 1),
    "one of long ago": lambda f: replace(f, sequence=f.sequence - 0x7000 & 0xFFFF),
    "the one after the next": lambda f: replace(f, sequence=f.sequence + 2),
    "another session's": lambda f: replace(f, session=2, sequence=f.sequence + 1),
    "another session's with the last number": lambda f: replace(f, session=2),
    "one from before the first hello": lambda f: replace(f, session=0),
}


@pytest.mark.parametrize("title", IGNORED)
@pytest.mark.parametrize("kind", ENDS)
def test_ignores(kind: str, title: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        recorder = Recorder(link)
        device = host(recorder, CASE)
        device.start(CASE.state, CASE.images)
        train(device, 1)
        state = device.state()  # its last request is Stats
        counted = device.counters()
        strange = replace(IGNORED[title](frame_of(recorder.sent[-1])), code=m.Forward.CODE)
        link.write(encode(replace(strange, body=m.Forward(8, 8).pack())))
        after = device.counters()  # had there been an answer, it would come first
        assert (after.frames, after.repeated_frames) == (counted.frames + 1, 0)
        assert after.foreign_frames == counted.foreign_frames + 1
        assert len(recorder.answers) == len(recorder.sent)
        assert differences(device.state(), state) == []


@pytest.mark.parametrize(
    "frame",
    [
        Frame(m.Stats.CODE, session=0, sequence=0),
        Frame(m.Stats.CODE, session=0, sequence=1),
        Frame(0xAD, session=0, sequence=0),
        Frame(m.Hello.CODE, session=0, sequence=1, body=m.Hello(m.schema(), 1).pack()),
    ],
    ids=["the number of no request", "the first number", "an unknown message", "a hello"],
)
@pytest.mark.parametrize("kind", ENDS)
def test_ignores_what_is_of_no_session_before_the_first_hello(
    kind: str, frame: Frame, folder: Path
) -> None:
    with end(kind, CASE, folder) as link:
        link.write(encode(frame))
        recorder = Recorder(link)
        device = host(recorder, CASE)
        device.hello()  # had there been an answer, it would come first
        counters = device.counters()
        assert (counters.frames, counters.foreign_frames) == (2, 1)
        assert len(recorder.answers) == len(recorder.sent)


@pytest.mark.parametrize("kind", ENDS)
def test_a_new_session_takes_a_running_device_over(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        first = host(link, CASE, session=1)
        first.start(CASE.state, CASE.images)
        first.forward(8, 8)  # a batch that is never finished
        second = host(link, CASE, session=2)
        second.hello()
        assert second.request(m.Backward(), m.Refused) == m.Refused(m.Error.OUT_OF_ORDER, 0)
        second.start(CASE.state, CASE.images)
        assert len(train(second, 1)) == 1
        assert second.counters().steps == 1


@pytest.mark.parametrize("kind", ENDS)
def test_every_host_draws_a_session_of_its_own(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = iter((0, 0xFFFE))
    monkeypatch.setattr(secrets, "randbelow", lambda below: next(drawn))
    with end(kind, CASE, folder) as link:
        used = []
        for _ in range(2):
            recorder = Recorder(link)
            Device("it", recorder, BUILD, SETTINGS, patience=20.0).hello()
            used.append(frame_of(recorder.sent[0]).session)
    assert used == [1, 0xFFFF]


@pytest.mark.parametrize("trouble", ["lost", "doubled", "delayed"])
@pytest.mark.parametrize("kind", ENDS)
def test_trains_the_same_when_frames_are(
    kind: str, trouble: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits(monkeypatch, 0.005)
    results = []
    for wrapped in (False, True):
        with end(kind, SMALL, folder) as link:
            device = host(Troubled(link, trouble) if wrapped else link, SMALL)
            device.start(SMALL.state, SMALL.images)
            results.append((train(device, 4), device.state()))
            repeated = device.exchange.repeated + device.counters().repeated_frames
    (calm, calm_state), (stormy, stormy_state) = results
    assert repeated >= 5
    assert stormy == calm
    assert differences(stormy_state, calm_state) == []


# ---- what a device refuses ----


@dataclass(frozen=True)
class Refused:
    """A request at a wrong time or of a wrong kind, and the literal answer."""

    phase: str  # when it comes: "idle", after a "forward" or after a "backward"
    request: m.Message
    error: m.Error
    detail: int
    kinds: tuple[str, ...] = ENDS


WEIGHTS = 4 * BUILD.graph.weight_size
PARAMETERS = 4 * BUILD.graph.parameter_size
SENT = 4 * 8 * BUILD.graph.elements(BUILD.graph.cut)
STEPS = len(BUILD.schedule.steps)
FIRMWARE, PYTHON = ("firmware",), ("python",)

REFUSED = {
    # what is no request
    "a code that no message has": Refused("idle", raw(0x55, b""), m.Error.UNKNOWN_MESSAGE, 0x55),
    "an answer": Refused("idle", m.Done(), m.Error.UNKNOWN_MESSAGE, 0x80),
    "a body that is too short": Refused("idle", raw(0x05, b"abc"), m.Error.BAD_LENGTH, 3),
    "a body that is too long": Refused("idle", raw(0x05, b"abcde"), m.Error.BAD_LENGTH, 5),
    "a body where none belongs": Refused("forward", raw(0x07, b"x"), m.Error.BAD_LENGTH, 1),
    "a write without all of its head": Refused("idle", raw(0x0A, b"abcd"), m.Error.BAD_LENGTH, 4),
    # regions
    "reading a region that there is not": Refused(
        "idle",
        m.Read(11, 0, 0),
        m.Error.NO_SUCH_REGION,
        11,
    ),
    "writing a region that there is not": Refused(
        "idle",
        m.Write(200, 0, b""),
        m.Error.NO_SUCH_REGION,
        200,
    ),
    "reading past the weights": Refused(
        "idle", m.Read(m.Region.WEIGHTS, WEIGHTS - 3, 4), m.Error.OUT_OF_RANGE, WEIGHTS
    ),
    "reading far behind the momentum": Refused(
        "idle", m.Read(m.Region.MOMENTUM, 0xFFFFFFFF, 4), m.Error.OUT_OF_RANGE, PARAMETERS
    ),
    "reading past the activations": Refused(
        "idle", m.Read(m.Region.ACTIVATIONS, SENT, 1), m.Error.OUT_OF_RANGE, SENT
    ),
    "reading past the logits": Refused(
        "forward", m.Read(m.Region.LOGITS, 4 * 8 * 10, 1), m.Error.OUT_OF_RANGE, 320
    ),
    "reading past the gradients": Refused(
        "backward", m.Read(m.Region.GRADIENTS, PARAMETERS - 3, 4), m.Error.OUT_OF_RANGE, PARAMETERS
    ),
    "writing past the weights": Refused(
        "idle", m.Write(m.Region.WEIGHTS, WEIGHTS - 3, b"abcd"), m.Error.OUT_OF_RANGE, WEIGHTS
    ),
    "writing past the server's gradient": Refused(
        "forward", m.Write(m.Region.GRADIENT, SENT, b"a"), m.Error.OUT_OF_RANGE, SENT
    ),
    "writing past the images": Refused(
        "idle", m.Write(m.Region.INPUT, 8 * 64, b"a"), m.Error.OUT_OF_RANGE, 512
    ),
    "writing past the activations": Refused(
        "idle", m.Write(m.Region.ACTIVATIONS, SENT, b"a"), m.Error.OUT_OF_RANGE, SENT
    ),
    "a record too many": Refused(
        "idle", m.Write(m.Region.SHARD, 24 * 65 - 1, b"ab"), m.Error.OUT_OF_RANGE, 24 * 65
    ),
    "writing the activations": Refused(
        "idle", m.Write(m.Region.ACTIVATIONS, 0, b"abcd"), m.Error.READ_ONLY, 4
    ),
    "writing the logits": Refused(
        "idle", m.Write(m.Region.LOGITS, 0, b"abcd"), m.Error.READ_ONLY, 6
    ),
    "writing the gradients": Refused(
        "backward", m.Write(m.Region.GRADIENTS, 0, b"abcd"), m.Error.READ_ONLY, 7
    ),
    "writing images while a part is held": Refused(
        "forward", m.Write(m.Region.INPUT, 0, b"abcd"), m.Error.READ_ONLY, 3
    ),
    "writing the arena": Refused(
        "idle", m.Write(m.Region.ARENA, 0, b"a"), m.Error.READ_ONLY, 8, FIRMWARE
    ),
    "writing an arena that torch does not have": Refused(
        "idle", m.Write(m.Region.ARENA, 0, b"a"), m.Error.NO_SUCH_REGION, 8, PYTHON
    ),
    # samples
    "a shard that is too large": Refused(
        "idle", m.Place(25, 0, 5, 0, 0), m.Error.TOO_MANY_SAMPLES, 24
    ),
    "a place behind the shard": Refused(
        "idle", m.Place(20, 21, 5, 0, 0), m.Error.TOO_MANY_SAMPLES, 24
    ),
    "a part of no sample": Refused("idle", m.Forward(0, 8), m.Error.TOO_MANY_SAMPLES, 8),
    "a part above the capacity": Refused("idle", m.Forward(9, 16), m.Error.TOO_MANY_SAMPLES, 8),
    "a part above its batch": Refused("idle", m.Forward(8, 7), m.Error.TOO_MANY_SAMPLES, 8),
    "a part of a batch of none": Refused("idle", m.Forward(1, 0), m.Error.TOO_MANY_SAMPLES, 8),
    "no image to answer": Refused("idle", m.Infer(0), m.Error.TOO_MANY_SAMPLES, 8),
    "images above the capacity": Refused("idle", m.Infer(9), m.Error.TOO_MANY_SAMPLES, 8),
    # order
    "backward before forward": Refused("idle", m.Backward(), m.Error.OUT_OF_ORDER, 0),
    "a step before forward": Refused("idle", m.Step(), m.Error.OUT_OF_ORDER, 0),
    "forward twice": Refused("forward", m.Forward(1, 8), m.Error.OUT_OF_ORDER, 1),
    "images while a part is held": Refused("forward", m.Infer(1), m.Error.OUT_OF_ORDER, 1),
    "a step before backward": Refused("forward", m.Step(), m.Error.OUT_OF_ORDER, 1),
    "backward twice": Refused("backward", m.Backward(), m.Error.OUT_OF_ORDER, 2),
    # cuts
    "a cut before the first": Refused("idle", m.Select(0, 1), m.Error.NO_SUCH_CUT, 1),
    "a cut that is not built in": Refused("idle", m.Select(2, 1), m.Error.NO_SUCH_CUT, 1),
    "a cut while a part is held": Refused("forward", m.Select(1, 1), m.Error.OUT_OF_ORDER, 1),
    "a cut in the midst of a batch": Refused("backward", m.Select(1, 1), m.Error.OUT_OF_ORDER, 2),
    # single-stepping
    "a single step before forward": Refused("idle", m.Run(0, 1), m.Error.OUT_OF_ORDER, 0, FIRMWARE),
    "a single step after backward": Refused(
        "backward", m.Run(0, 1), m.Error.OUT_OF_ORDER, 2, FIRMWARE
    ),
    "a single step too many": Refused(
        "forward", m.Run(0, STEPS + 1), m.Error.BAD_STEP, STEPS, FIRMWARE
    ),
    "steps that end before they begin": Refused(
        "forward", m.Run(3, 2), m.Error.BAD_STEP, STEPS, FIRMWARE
    ),
    "single steps in torch": Refused("forward", m.Run(0, 1), m.Error.UNKNOWN_MESSAGE, 0x0C, PYTHON),
}


def interrupted(
    kind: str, folder: Path, phase: str, interrupt: Callable[[Device], None]
) -> tuple[Stepped, m.Counters, State, bytes]:
    """A batch in two parts with something in between: everything that a device knows then."""
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(learnt_state(CASE, CASE.state.place), CASE.images)
        if phase == "idle":
            interrupt(device)
        device.forward(5, 8)
        if phase == "forward":
            interrupt(device)
        device.backward(None)
        if phase == "backward":
            interrupt(device)
        device.forward(3, 8)
        device.backward(None)
        stepped = device.step()
        counters = replace(device.counters(), frames=0, compute_micros=0)
        shard = device.read(m.Region.SHARD, 0, 24 * RECORD)
        return stepped, counters, device.state(), shard


@cache
def undisturbed(kind: str, folder: Path) -> tuple[Stepped, m.Counters, State, bytes]:
    return interrupted(kind, folder, "never", lambda device: None)


@pytest.mark.parametrize(
    ("kind", "title"), [(k, title) for title, case in REFUSED.items() for k in case.kinds]
)
def test_refuses_and_changes_nothing(kind: str, title: str, folder: Path) -> None:
    refused = REFUSED[title]
    answers = []

    def interrupt(device: Device) -> None:
        answers.append(device.request(refused.request, m.Refused))

    after = interrupted(kind, folder, refused.phase, interrupt)
    assert answers == [m.Refused(refused.error, refused.detail)]
    expected = undisturbed(kind, folder)
    assert (after[0], after[1], after[3]) == (expected[0], expected[1], expected[3])
    assert differences(after[2], expected[2]) == []


@pytest.mark.parametrize("kind", ENDS)
def test_refuses_to_send_more_than_it_can_in_a_piece(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        most = device.hello().send_max - 4  # there is an offset, too
        answer = device.request(m.Read(m.Region.WEIGHTS, 0, most + 1), m.Refused)
        assert answer == m.Refused(m.Error.OUT_OF_RANGE, most)


@pytest.mark.parametrize("kind", ENDS)
def test_refuses_to_train_without_samples(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.hello()
        assert device.request(m.Forward(1, 1), m.Refused) == m.Refused(m.Error.NO_DATA, 0)


@pytest.mark.parametrize("kind", ENDS)
def test_refuses_a_part_that_reaches_past_the_end_of_the_epoch(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(replace(CASE.state, place=Place(5, seed=5)), CASE.images[:5])
        device.forward(3, 8)
        device.backward(None)
        before = device.counters()
        answer = device.request(m.Forward(3, 8), m.Refused)
        assert answer == m.Refused(m.Error.TOO_MANY_SAMPLES, 2)
        device.forward(2, 8)
        device.backward(None)
        # now a new epoch may begin, with at most as many samples as there are
        answer = device.request(m.Forward(6, 8), m.Refused)
        assert answer == m.Refused(m.Error.TOO_MANY_SAMPLES, 5)
        after = device.counters()
        assert (before.epoch, before.position) == (0, 3)
        assert (after.epoch, after.position) == (0, 5)


@pytest.mark.parametrize("kind", ENDS)
def test_refuses_labels_that_the_network_has_no_class_for(kind: str, folder: Path) -> None:
    labels = CASE.images.y.copy()
    order = draw_order(24, 5, 0)
    labels[order[8:16]] = [0, 9, 10, 255, 0, 1, 2, 3]  # of two bad ones the first is named
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(CASE.state, Images(CASE.images.x, labels))
        assert device.forward(8, 8).labels.tolist() == labels[order[:8]].tolist()
        device.backward(None)
        device.step()
        before = device.state()
        assert device.request(m.Forward(8, 8), m.Refused) == m.Refused(m.Error.BAD_LABEL, 10)
        assert device.request(m.Backward(), m.Refused) == m.Refused(m.Error.OUT_OF_ORDER, 0)
        assert differences(device.state(), before) == []
        assert device.forward(2, 8).labels.tolist() == [0, 9]


@pytest.mark.parametrize("kind", ENDS)
def test_refuses_momentum_that_it_was_built_without(kind: str, folder: Path) -> None:
    with end(kind, PLAIN, folder) as link:
        plain = replace(SETTINGS, momentum=0.0)
        device = host(link, PLAIN, plain)
        device.start(PLAIN.state, PLAIN.images)
        with pytest.raises(DeviceRefused, match="built without momentum"):
            device.settings = replace(SETTINGS, learning_rate=0.5)
        answer = device.request(m.Read(m.Region.MOMENTUM, 0, 1), m.Refused)
        assert answer == m.Refused(m.Error.OUT_OF_RANGE, 0)
        # it learns on as it was told before: a step of plain gradient descent
        before = device.state()
        device.forward(8, 8)
        device.backward(None)
        gradients = device.gradients()
        device.step()
        after = device.state()
        assert after.momentum == {}
        for name, gradient in gradients.items():
            w = before.weights[name].astype(np.float64)
            expected = w - 0.1 * (gradient + 0.01 * w)
            np.testing.assert_allclose(after.weights[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ENDS)
def test_nothing_can_be_read_from_a_memory_that_was_not_built_in(kind: str, folder: Path) -> None:
    with end(kind, PLAIN, folder) as link:
        device = host(link, PLAIN, replace(SETTINGS, momentum=0.0))
        device.hello()
        assert device.request(m.Read(m.Region.MOMENTUM, 0, 0), m.Content) == m.Content(0, b"")
        assert device.request(m.Write(m.Region.MOMENTUM, 0, b""), m.Written) == m.Written(0)
        past = device.request(m.Read(m.Region.MOMENTUM, 0, 1), m.Refused)
        assert past == m.Refused(m.Error.OUT_OF_RANGE, 0)


def test_every_refusal_is_reached_above() -> None:
    reached = {case.error for case in REFUSED.values()}
    elsewhere = {m.Error.NO_DATA, m.Error.BAD_LABEL, m.Error.NO_MOMENTUM, m.Error.NOT_FINITE}
    elsewhere |= {m.Error.BAD_CODEC, m.Error.BAD_CODE}  # test_codec.py
    elsewhere |= {m.Error.NOT_WHOLE, m.Error.NO_CLIP, m.Error.LOCAL_ONLY}  # firmware/test_levers.py
    elsewhere |= {m.Error.NO_DISTILL}  # test_distill.py
    elsewhere |= {m.Error.INFERS_ONLY}  # firmware/test_int8_segments.py
    assert reached == set(m.Error) - elsewhere


WORDS = {
    "Read refused: it knows no message 0x55: run `splitee build`": (m.Error.UNKNOWN_MESSAGE, 0x55),
    "Read refused: its body had 3 bytes: run `splitee build`": (m.Error.BAD_LENGTH, 3),
    "Read refused: it has no region 9: run `splitee build`": (m.Error.NO_SUCH_REGION, 9),
    "Read refused: the most it takes there is 320 bytes": (m.Error.OUT_OF_RANGE, 320),
    "Read refused: region LOGITS cannot be written now": (m.Error.READ_ONLY, 6),
    "Read refused: the most it takes is 8 samples": (m.Error.TOO_MANY_SAMPLES, 8),
    "Read refused: it holds no samples: start it with its shard first": (m.Error.NO_DATA, 0),
    "Read refused: that comes at the wrong time (phase 2)": (m.Error.OUT_OF_ORDER, 2),
    "Read refused: its updates are fused: a batch is one part of at most 8 samples": (
        m.Error.NOT_WHOLE,
        8,
    ),
    "Read refused: its updates are fused: it cannot clip; take no clip, or fused_update = false": (
        m.Error.NO_CLIP,
        0,
    ),
    "Read refused: it was built with local_only: it has no room for the server's gradient": (
        m.Error.LOCAL_ONLY,
        0,
    ),
    "Read refused: a sample has the label 10, which the network has no class for": (
        m.Error.BAD_LABEL,
        10,
    ),
    "Read refused: it was built without distill: run `splitee build` with distill > 0": (
        m.Error.NO_DISTILL,
        0,
    ),
    "Read refused: it was built without momentum: run `splitee build` with momentum > 0": (
        m.Error.NO_MOMENTUM,
        0,
    ),
    "Read refused: it answers images only, in 8 bits: run `splitee build` without --int8": (
        m.Error.INFERS_ONLY,
        0,
    ),
    "Read refused: its segment has 40 steps": (m.Error.BAD_STEP, 40),
    "Read refused: its segment has 3 cuts: run `splitee build`": (m.Error.NO_SUCH_CUT, 3),
    "Read refused: it has no codec 4 for samples of this size: run `splitee build`": (
        m.Error.BAD_CODEC,
        4,
    ),
    "Read refused: the coded gradient of sample 2 is no code": (m.Error.BAD_CODE, 2),
    "Read refused: error 77, detail 5": (77, 5),
}


@pytest.mark.parametrize("words", WORDS)
def test_the_host_has_the_words_for(words: str) -> None:
    error, detail = WORDS[words]
    asked = m.Read(m.Region.WEIGHTS, 0, 1)
    assert refusal(asked, m.Refused(error, detail)) == words


def test_there_are_words_for_every_error() -> None:
    # a step that was not taken is an error of its own
    assert {error for error, _ in WORDS.values()} == {*m.Error, 77} - {m.Error.NOT_FINITE}


@pytest.mark.parametrize("kind", ENDS)
def test_a_refusal_names_client_link_and_request(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(CASE.state, CASE.images)
        with pytest.raises(DeviceRefused) as refused:
            device.step()
    assert str(refused.value) == (
        f'client "it" on {link.name}: Step refused: that comes at the wrong time (phase 0)'
    )


# ---- what a host refuses ----


@pytest.mark.parametrize("kind", ENDS)
def test_another_segment_is_a_mismatch(kind: str, folder: Path) -> None:
    ours = replace(BUILD, capacity=7)
    with end(kind, CASE, folder) as link:
        device = Device("it", link, ours, SETTINGS)
        with pytest.raises(Mismatch) as mismatch:
            device.start(CASE.state, CASE.images)
    said = str(mismatch.value)
    assert said.startswith(f'client "it" on {link.name}: ')
    assert re.findall(r"\b[0-9a-f]{8}\b", said) == [
        f"{BUILD.checksum:08x}",
        f"{ours.checksum:08x}",
    ]
    assert "`splitee build`" in said


def test_firmware_of_another_schema_is_a_mismatch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = m.schema()
    monkeypatch.setattr(m, "schema", lambda: 0x0000BEEF)
    with end("firmware", CASE, folder) as link, pytest.raises(Mismatch) as mismatch:
        host(link, CASE).hello()
    said = str(mismatch.value)
    assert re.findall(r"\b[0-9a-f]{8}\b", said) == [f"{theirs:08x}", "0000beef"]
    assert "`splitee build`" in said


STRANGE_ANSWERS = {
    "a Done that is longer than ours": (m.Done.CODE, bytes(30), "Done takes 0 bytes"),
    "an answer that we do not know": (0xC3, b"", "no message has the code 0xc3"),
    "an answer to something else": (m.Counters.CODE, bytes(34), "Counters"),
}


@pytest.mark.parametrize("title", STRANGE_ANSWERS)
def test_is_a_mismatch(title: str) -> None:
    code, body, words = STRANGE_ANSWERS[title]
    near, far = memory_pair()
    far.write(encode(Frame(code, 0, 1, body)))  # an answer to the first request
    with near, far, pytest.raises(Mismatch) as mismatch:
        host(near, CASE).backward(None)
    said = str(mismatch.value)
    assert said.startswith('client "it" on memory:near answered Backward with ')
    assert words in said
    assert "`splitee build`" in said


@pytest.mark.parametrize("labels", [b"", bytes([3]), bytes([3, 1, 4]), bytes([3, 10])])
def test_labels_that_cannot_be_are_a_mismatch(labels: bytes) -> None:
    near, far = memory_pair()
    far.write(encode(Frame(m.Forwarded.CODE, 0, 1, labels)))
    with near, far, pytest.raises(Mismatch, match=r'^client "it" sent labels .* for 2 samples$'):
        host(near, CASE).forward(2, 8)


# ---- devices that are not there ----


@pytest.mark.parametrize("kind", ["memory", "udp"])
def test_an_absent_device_is_a_timeout(kind: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind(("127.0.0.1", 0))
        near, far = memory_pair()
        link: Link = near if kind == "memory" else UdpLink(*nobody.getsockname())
        with near, far, link, pytest.raises(Timeout) as timeout:
            Device("it", link, BUILD, SETTINGS, patience=0.3).start(CASE.state, CASE.images)
        said = str(timeout.value)
        assert said.startswith(f'client "it": no answer to Hello within 0.3 s on {link.name}: ')
        assert "is the device powered" in said


def test_a_request_is_sent_again_while_there_is_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = memory_pair()
    recorder = Recorder(near)
    device = Device("it", recorder, BUILD, SETTINGS, session=1, patience=0.3)
    waits(monkeypatch, 0.05)
    with near, far, pytest.raises(Timeout):
        device.hello()
    assert len(recorder.sent) > 1
    assert len(set(recorder.sent)) == 1
    hello = frame_of(recorder.sent[0])
    assert (hello.code, hello.session, hello.sequence) == (m.Hello.CODE, 1, 0)
    asked = m.unpack(hello.code, hello.body)
    assert isinstance(asked, m.Hello)
    assert asked.schema == m.schema()


def test_a_device_that_is_killed_is_a_closed_link(folder: Path) -> None:
    with boards.start(boards.load_boards()["posix"], built(CASE, folder)) as running:
        device = host(running.link, CASE)
        device.start(CASE.state, CASE.images)
        device.forward(8, 8)
        running.process.kill()
        with pytest.raises(LinkClosed) as closed:
            device.backward(None)
    assert str(closed.value) == 'client "it": posix ended with SIGKILL'


def test_a_device_that_ends_is_a_closed_link_with_its_status(folder: Path) -> None:
    with boards.start(boards.load_boards()["posix"], built(CASE, folder)) as running:
        device = host(running.link, CASE)
        device.hello()
        running.process.terminate()
        with pytest.raises(LinkClosed) as closed:
            device.counters()
    assert str(closed.value) == 'client "it": posix ended with status 0'


def test_a_python_client_that_leaves_is_a_closed_link() -> None:
    near, far = memory_pair()
    far.close()
    with near, pytest.raises(LinkClosed, match=r'^client "it": memory:near: '):
        host(near, CASE).hello()


def test_closing_a_device_closes_its_link_and_what_was_started_for_it() -> None:
    near, far = memory_pair()
    ended = []
    Device("it", near, BUILD, SETTINGS, close=lambda: ended.append("it")).close()
    assert ended == ["it"]
    with far, pytest.raises(LinkClosed):
        far.read(0)
