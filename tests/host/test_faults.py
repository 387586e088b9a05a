"""What goes wrong on links and boards, and the outcome: the weights of an undisturbed run.

Boards are emulated and reset by QEMU; processes are killed. Lines are bad by a relay, of which a
seed decides everything.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from host_harness import built, differences
from splitee.assemble import Assembly
from splitee.client import State
from splitee.errors import LinkError, Mismatch, SpliteeError, Timeout
from splitee.fleet import parse
from splitee.strategies import Strategy
from splitee.train import BatchDone, ClientBack, ClientDone, ClientLost, Event, RoundDone, fit
from splitee_exporters.c import to_c
from splitee_host import boards, goodput
from splitee_host.device import Device
from splitee_host.launch import Launcher, build_firmware
from splitee_host.link import Link, ProcessLink, memory_pair
from splitee_host.relay import Faults, Line, Relay
from splitee_host.wire import messages as m
from splitee_host.wire.frame import Bytes, Frame, FrameReader, encode
from step_harness import SETTINGS, Case, case, case_on

BOTH = replace(SETTINGS, exit_weight=0.5, server_weight=0.5)
STORM = Faults(lose=0.10, double=0.05, reorder=0.05, behind=2, corrupt=0.02)
LITTER = replace(STORM, garbage=0.05)
PLACES = ("serial", "udp", "qemu-m4", "qemu-m4-udp")


def the_case(place: str) -> Case:
    return case_on(place, "resnet8") if place.startswith("qemu") else case("resnet8")


@contextmanager
def device_at(place: str, folder: Path, through: Callable[[Link], Link]) -> Iterator[Device]:
    """A device that nobody has spoken to, behind a link of some kind."""
    on = the_case(place)
    with ExitStack() as ends:
        if place == "serial":
            link: Link = ends.enter_context(ProcessLink([str(built(on, folder).elf)], "posix"))
        elif place == "udp":
            link = ends.enter_context(
                boards.start(boards.load_boards()["posix"], built(on, folder))
            ).link
        else:
            board = boards.load_boards()[place]
            try:
                firmware = build_firmware(on.build, board, to_c, folder)
                link = ends.enter_context(boards.start(board, firmware)).link
            except SpliteeError as error:
                if "not installed" not in str(error):
                    raise
                pytest.skip(str(error))
        yield Device("it", ends.enter_context(through(link)), on.build, BOTH, patience=20.0)


def learn(device: Device, on: Case, batches: int = 4) -> State:
    """Trains by the losses of its exits, and by what might be a server's gradient."""
    device.start(on.state, on.images)
    for seed in range(batches):
        part = device.forward(4, 4)
        shape = part.activations.shape
        device.backward(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 100)
        device.step()
    return device.state()


# ---- lines ----


@pytest.mark.parametrize("faults", [STORM, LITTER], ids=["storm", "storm and garbage"])
@pytest.mark.parametrize("place", PLACES)
def test_a_storm_on_the_line_changes_no_weight(place: str, faults: Faults, folder: Path) -> None:
    on = the_case(place)
    with device_at(place, folder, lambda link: link) as device:
        expected = learn(device, on)
    line = Line(faults=faults)
    with device_at(place, folder, lambda link: Relay(link, line, line, seed=5)) as device:
        assert differences(learn(device, on), expected) == []
        relay = device.link
        assert isinstance(relay, Relay)
        for counts in (relay.down_counts, relay.up_counts):
            met = (counts.lost, counts.doubled, counts.reordered, counts.corrupted)
            assert min(met) > 0, met
        assert device.exchange.repeated > 0


def test_what_crosses_a_bad_line_is_seen_to_differ_without_checks(folder: Path) -> None:
    """The comparison above can fail: a device that takes spoilt frames learns something else."""
    on = case("resnet8")
    with device_at("udp", folder, lambda link: link) as device:
        expected = learn(device, on)
    good = FrameReader._decode

    def gullible(reader: FrameReader) -> Frame | None:
        frame = good(reader)
        if frame is not None and frame.code == m.Content.CODE and len(frame.body) > 40:
            return replace(frame, body=bytes(frame.body[:-1]) + bytes([frame.body[-1] ^ 1]))
        return frame

    with (
        mock.patch.object(FrameReader, "_decode", gullible),
        device_at("udp", folder, lambda link: link) as device,
    ):
        assert differences(learn(device, on), expected) != []


@pytest.mark.parametrize("what", [b"\x55" * 300, b"\0\0\0", b"\x05\x0b\x01", b"\xff" * 3000])
def test_garbage_before_the_first_frame_does_no_harm(what: bytes, folder: Path) -> None:
    on = case("resnet8")
    with device_at("serial", folder, lambda link: link) as device:
        expected = learn(device, on)
    with device_at("serial", folder, lambda link: link) as device:
        device.link.write(what)
        assert differences(learn(device, on), expected) == []


def test_half_a_frame_and_then_silence_does_no_harm(folder: Path) -> None:
    on = case("resnet8")
    with device_at("serial", folder, lambda link: link) as device:
        device.start(on.state, on.images)
        expected = device.counters().steps, device.state()
        device.link.write(encode(Frame(m.Step.CODE, 1, 1))[:4])
        assert (device.counters().steps, device.state().place) == (0, expected[1].place)
        assert differences(device.state(), expected[1]) == []
        assert device.counters().bad_frames == 1


def test_a_line_of_which_nothing_is_right_is_a_clear_error(folder: Path) -> None:
    """As with another baud rate at the other end: every frame is spoilt."""
    line = Line(faults=Faults(corrupt=1.0))
    with (
        device_at("serial", folder, lambda link: Relay(link, line, line, seed=1)) as device,
        pytest.raises(Timeout) as timeout,
    ):
        device.hello(1.0)
    words = str(timeout.value)
    assert words.startswith('client "it": no answer to Hello within 1 s on serial:posix')
    assert "the baud rate right" in words


def test_nothing_of_a_serial_device_is_lost_when_it_is_unplugged_for_a_while(folder: Path) -> None:
    on = case("resnet8")
    with device_at("serial", folder, lambda link: link) as device:
        expected = learn(device, on)
    with device_at("serial", folder, lambda link: Relay(link)) as device:
        device.start(on.state, on.images)
        relay = device.link
        assert isinstance(relay, Relay)
        read, calls = relay.read, []

        def replugged(timeout: float) -> bytes:
            data = read(min(timeout, 0.05))
            calls.append(data)
            if len(calls) == 3:
                relay.unplug()
            elif len(calls) == 12:
                relay.plug_in()
            return data

        with mock.patch.object(relay, "read", replugged):
            state = learn(device, on)
        assert len(calls) > 12
        assert differences(state, expected) == []


def test_the_window_finds_what_an_ethernet_chip_has_room_for(folder: Path) -> None:
    """QEMU's LAN9118 loses all but seven datagrams of a burst; nobody tells the host."""
    need("qemu-m4-udp")
    build = goodput.segment()
    firmware = build_firmware(build, boards.load_boards()["qemu-m4-udp"], to_c, folder)
    with boards.start(boards.load_boards()["qemu-m4-udp"], firmware) as running:
        device = Device("it", running.link, build, SETTINGS, patience=20.0)
        device.hello()
        frames = []
        for seed in range(12):
            content = np.random.default_rng(seed).bytes(goodput.TENSOR)
            device.write(m.Region.SHARD, content)
            assert device.read(m.Region.SHARD, 0, goodput.TENSOR) == content
            frames.append(device.exchange._window.frames)
        assert device.exchange.repeated > 0  # it was too much, at first
        assert min(frames) < 64
        sent = 2 * 12 * goodput.TENSOR / 1400
        assert device.exchange.repeated < sent / 5


# ---- what a device must not send ----


class Rogue:
    """A link that changes what certain answers hold, and seals them anew."""

    kind = "memory"

    def __init__(self, link: Link, change: Callable[[Frame], Frame]) -> None:
        self.name = link.name
        self._link = link
        self._reader = FrameReader()
        self._change = change

    def write(self, data: bytes) -> None:
        self._link.write(data)

    def read(self, timeout: float) -> bytes:
        frames = self._reader.feed(self._link.read(timeout))
        return b"".join(encode(self._change(frame)) for frame in frames)

    def close(self) -> None:
        self._link.close()

    def __enter__(self) -> Rogue:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def instead(code: int, body: Callable[[bytes], bytes]) -> Callable[[Frame], Frame]:
    return lambda f: replace(f, body=body(bytes(f.body))) if f.code == code else f


FORBIDDEN: dict[str, tuple[Callable[[Frame], Frame], str]] = {
    "labels of another number": (
        instead(m.Forwarded.CODE, lambda body: body + b"\1"),
        "sent labels",
    ),
    "an impossible label": (
        instead(m.Forwarded.CODE, lambda body: b"\x0a" + body[1:]),
        "sent labels",
    ),
    "fewer activations": (
        instead(m.Content.CODE, lambda body: body[:-4]),
        "sent .* bytes of ACTIVATIONS",
    ),
    "more activations": (
        instead(m.Content.CODE, lambda body: body + bytes(4)),
        "sent .* bytes of ACTIVATIONS",
    ),
    "an answer of another kind": (
        lambda f: replace(f, code=m.Stepped.CODE, body=bytes(6)) if f.code == m.Content.CODE else f,
        "answered Read with something else",
    ),
    "an answer that nobody knows": (
        lambda f: replace(f, code=0xC3) if f.code == m.Forwarded.CODE else f,
        "no message has the code 0xc3",
    ),
}


@pytest.mark.parametrize("title", FORBIDDEN)
def test_is_rejected_and_named(title: str, folder: Path) -> None:
    change, words = FORBIDDEN[title]
    on = case("resnet8")
    rogue: list[Rogue] = []

    def through(link: Link) -> Link:
        rogue.append(Rogue(link, lambda frame: frame))
        return rogue[0]

    with device_at("udp", folder, through) as device:
        device.start(on.state, on.images)
        rogue[0]._change = change
        with pytest.raises(Mismatch, match=words) as mismatch:
            device.forward(4, 4)
    assert 'client "it"' in str(mismatch.value)


def test_a_length_of_four_gigabytes_takes_no_memory_and_is_counted() -> None:
    near, far = memory_pair()
    device = Device("it", near, case("resnet8").build, SETTINGS, patience=0.5)
    with near, far:
        for _ in range(40):  # 40 MB of one frame that never ends
            far.write(b"\x01" * (1 << 20))
        far.write(b"\0")
        with pytest.raises(Timeout):
            device.hello()
    assert device.exchange.bad == 1
    assert isinstance(device.exchange._reader, FrameReader)
    assert len(device.exchange._reader._coded) <= (1 << 20) + (1 << 13)


def test_another_segment_is_rejected_by_its_checksum(folder: Path) -> None:
    with device_at("udp", folder, lambda link: link) as device:
        device.checksum = case("pools").build.checksum
        with pytest.raises(Mismatch, match="holds segment"):
            device.hello()


# ---- fleets ----


FLEET = """
name = "faulty"
rounds = 3
batch = 8
strategy = "{strategy}"
gradient = "both"
aggregate = "all"
rejoin_within = 20.0
[data]
samples = 120
[model]
width = 2
norm = "group"
[[client]]
name = "board"
board = "{board}"
cut = "stem"
[[client]]
name = "here"
board = "torch"
cut = "layer2"
"""


@contextmanager
def fleet(
    folder: Path, text: str, options: tuple[str, ...] = ()
) -> Iterator[tuple[Launcher, Strategy, list[Any]]]:
    """A fleet that is up."""
    known = boards.load_boards()
    assembly = Assembly(parse(text), lambda name: known[name].for_assembly)
    start = boards.start

    def started(board: boards.Board, firmware: boards.Firmware) -> boards.Running:
        return start(board, firmware, options)

    with (
        mock.patch.object(boards, "start", started),
        Launcher(assembly, Path(), to_c, folder, lambda said: None) as launcher,
    ):
        launched = [launcher.launch(member) for member in assembly.members]
        yield launcher, assembly.strategy([entry.client for entry in launched]), launched


def run(strategy: Strategy, rounds: int, on: Callable[[Event], None]) -> list[Event]:
    events = []
    for event in fit(strategy, rounds):
        events.append(event)
        on(event)
    return events


def outcome(strategy: Strategy) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, state in strategy.states.items():
        found |= {f"{name}/{k}": v for k, v in state.weights.items()}
        found |= {f"{name}/momentum/{k}": v for k, v in state.momentum.items()}
        found[f"{name}/place"] = state.place
    for name, server in strategy.servers().items():
        found |= {f"{name}/{k}": v.detach().numpy().copy() for k, v in server.tensors().items()}
        found |= {
            f"{name}/momentum/{k}": v.detach().numpy().copy() for k, v in server.momentum().items()
        }
    return found


def unequal(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    assert list(one) == list(other)
    return [
        name
        for name, value in one.items()
        if not (
            np.array_equal(value, other[name])
            if isinstance(value, np.ndarray)
            else value == other[name]
        )
    ]


def need(board: str) -> None:
    import shutil

    qemu = boards.load_boards()[board].qemu
    for tool in (f"{boards.load_boards()[board].prefix}gcc", qemu.program if qemu else "make"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")


def reset(path: Path) -> None:
    """Presses the reset button of an emulated board."""
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(20)
        control.connect(str(path))
        with control.makefile("rw") as lines:
            for command in ("qmp_capabilities", "system_reset"):
                print(json.dumps({"execute": command}), file=lines, flush=True)
                while "return" not in (answer := json.loads(lines.readline())):
                    assert "error" not in answer, answer


@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
def test_a_board_that_is_reset_in_a_round_ends_with_the_same_weights(
    strategy: str, folder: Path, tmp_path: Path
) -> None:
    need("qemu-m4")
    text = FLEET.format(strategy=strategy, board="qemu-m4")
    with fleet(folder, text) as (_, whole, _launched):
        run(whole, 3, lambda _: None)
        expected = outcome(whole)
    button = tmp_path / "qmp"
    options = ("-qmp", f"unix:{button},server=on,wait=off")
    batches: list[BatchDone] = []

    def press(event: Event) -> None:
        if isinstance(event, BatchDone) and event.client == "board":
            batches.append(event)
            if len(batches) in (2, 13):  # in the midst of two rounds
                reset(button)

    with fleet(folder, text, options) as (_, strategy_, _launched):
        events = run(strategy_, 3, press)
        assert [type(e) for e in events].count(ClientBack) == 2
        assert not any(isinstance(e, ClientLost) for e in events)
        assert unequal(outcome(strategy_), expected) == []


@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
def test_a_process_that_is_killed_in_a_round_ends_with_the_same_weights(
    strategy: str, folder: Path
) -> None:
    text = FLEET.format(strategy=strategy, board="posix")
    with fleet(folder, text) as (_, whole, _launched):
        run(whole, 3, lambda _: None)
        expected = outcome(whole)
    running: list[boards.Running] = []
    made = boards.Running.__init__

    def remembered(it: boards.Running, *arguments: Any, **named: Any) -> None:
        running.append(it)
        made(it, *arguments, **named)

    batches: list[BatchDone] = []

    def kill(event: Event) -> None:
        if isinstance(event, BatchDone) and event.client == "board":
            batches.append(event)
            if len(batches) in (2, 13):
                running[-1].process.kill()

    with (
        mock.patch.object(boards.Running, "__init__", remembered),
        fleet(folder, text) as (_, strategy_, _launched),
    ):
        events = run(strategy_, 3, kill)
        assert len(running) == 3
        assert [type(e) for e in events].count(ClientBack) == 2
        assert unequal(outcome(strategy_), expected) == []


def test_a_client_that_sends_no_numbers_never_reaches_the_weights_of_the_server(
    folder: Path,
) -> None:
    text = FLEET.format(strategy="averaging", board="posix")
    with fleet(folder, text) as (_, strategy, launched):
        device = launched[0].client
        server = strategy.server("board")
        before = {k: v.clone() for k, v in server.tensors().items()}
        pieces = device.pieces

        def poisoned(region: m.Region, offset: int, length: int) -> list[Bytes]:
            data: list[Bytes] = pieces(region, offset, length)
            spoilt = np.full(length // 4, np.nan, "<f4").tobytes()
            return [spoilt] if "ACT" in region.name else data

        device.pieces = poisoned
        with pytest.raises(SpliteeError, match=r'client "board".*not finite in round 1'):
            run(strategy, 1, lambda _: None)
        assert all(torch.equal(v, server.tensors()[k]) for k, v in before.items())


def test_a_client_that_is_too_slow_misses_a_round_and_takes_part_in_the_next(
    folder: Path,
) -> None:
    text = FLEET.format(strategy="averaging", board="posix").replace(
        "rejoin_within = 20.0", "rejoin_within = 20.0\nround_deadline = 8.0"
    )
    with fleet(folder, text) as (_, strategy, launched):
        slow = launched[0].client
        write = slow.link.write
        rounds: list[RoundDone] = []

        def held_up(data: bytes) -> None:
            if rounds:  # on its way for as long as the first round lasts
                write(data)

        slow.link.write = held_up
        events = run(strategy, 3, lambda e: rounds.append(e) if isinstance(e, RoundDone) else None)
        lost = [e for e in events if isinstance(e, ClientLost)]
        assert [(e.client, e.round) for e in lost] == [("board", 1)]
        assert "its round was over before its pass was" in lost[0].reason
        assert [sorted(r.clients) for r in rounds] == [["here"], *[["board", "here"]] * 2]


def test_a_fleet_of_64_devices_does_not_wait_for_a_slow_one_in_the_midst_of_a_round(
    folder: Path,
) -> None:
    head = FLEET.split("[[client]]")[0].format(strategy="averaging").replace("120", "1437")
    clients = [f'[[client]]\nname = "c{i}"\nboard = "posix"\ncut = "stem"\n' for i in range(64)]
    with fleet(folder, head + "".join(clients)) as (_, strategy, launched):
        slow = launched[0].client
        others: set[str] = set()
        write = slow.link.write

        def late(data: bytes) -> None:
            # it answers only when all others have finished their pass
            if len(others) == 63:
                write(data)

        slow.link.write = late
        ended: list[str] = []

        def note(event: Event) -> None:
            if isinstance(event, ClientDone):
                ended.append(event.client)
                others.update(ended)

        events = run(strategy, 1, note)
        assert ended[-1] == "c0"
        assert sorted(ended) == sorted(f"c{i}" for i in range(64))
        (done,) = (e for e in events if isinstance(e, RoundDone))
        assert set(done.clients) == set(ended)
        assert not any(isinstance(e, LinkError) for e in events)
