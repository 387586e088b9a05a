"""Measuring: what share of a link's rate the exchange with a device leaves to tensors.

The rate is what a bare pump (firmware/bench/pump.c) gets out of the same link in the same run, in
pieces of the same size, without frames and with acknowledgements only where datagrams would be lost
otherwise. The tensors are moved by ``Device.read`` and ``Device.write``.
"""

from __future__ import annotations

import math
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from splitee import zoo
from splitee.capture import capture
from splitee.client import Settings
from splitee.errors import Mismatch, Timeout
from splitee.exits import Exit
from splitee.model import Network, Segment
from splitee.place import Build
from splitee_host import boards
from splitee_host.boards import Board, Firmware
from splitee_host.device import Device
from splitee_host.launch import WriteSegment, build_firmware
from splitee_host.link import Link, ProcessLink
from splitee_host.relay import Faults, Line, Relay
from splitee_host.wire import messages as m

TENSOR = 1 << 16  # bytes of a transfer
PAYLOAD = 1400  # bytes of the transfers that overhead is measured in
CASES = {"clean": 0.0, "loss1": 0.01, "loss5": 0.05}  # share of the frames lost each way
DIRECTIONS = ("down", "up")
SEED = 1

_SHORT = 20  # transfers of PAYLOAD bytes
_ENOUGH = 3.0  # seconds of transfers after which one direction begins no further one
_SILENCE = 10.0  # seconds without a byte after which a pump is given up
_DATAGRAM = 1456  # most bytes that the pump sends as one
_WINDOW = 7 * 1400  # bytes of datagrams that an emulated board keeps while it is busy
_COMMAND = struct.Struct("<cBHI")  # as in pump.c


@dataclass(frozen=True)
class Setup:
    """A link that is measured."""

    board: str
    down: int  # transfers of TENSOR bytes in each row
    up: int
    repeats: int  # of all that, with the same faults
    pipes: bool = False  # the process speaks over its standard input and output
    rate: float = math.inf  # bits a second; as fast as it goes


LINKS = {
    "serial-paced": Setup("posix", 3, 3, 2, pipes=True, rate=921_600),
    "udp-paced": Setup("posix", 20, 20, 2, rate=10e6),
    "serial-qemu-m4": Setup("qemu-m4", 2, 12, 3),
    "udp-qemu-m4": Setup("qemu-m4-udp", 25, 25, 6),
}


def segment() -> Build:
    """A small segment with a shard that a transfer fits in."""
    model = zoo.build("resnet8", width=4, norm="group", channels=3, classes=10)
    network = Network(model, (3, 32, 32))
    cut = network.cut("stem")
    stem = Segment(network, cut, {cut.name: Exit((4, 32, 32), 10)})
    samples = -(-TENSOR // (1 + 3 * 32 * 32))
    return Build(capture(stem, 10), 1, False, samples, (1 / 64,) * 3, (-2.0,) * 3)


class Pump:
    """The host's end of pump.c."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._each = link.kind == "udp"  # a stream needs no window

    def down(self, content: bytes, size: int) -> None:
        """Sends content in pieces of that size; returns when the other end has all of it."""
        pieces = [content[start : start + size] for start in range(0, len(content), size)]
        self._command(b"d", size, len(content))
        window = _WINDOW // size if self._each else len(pieces)
        sent = taken = 0
        while taken < (len(pieces) if self._each else 1):
            while sent < min(taken + window, len(pieces)):
                self._link.write(pieces[sent])
                sent += 1
            taken += len(self._read())

    def up(self, total: int, size: int) -> None:
        """Takes that many bytes in pieces of that size."""
        self._command(b"u", size, total)
        asked = came = 0
        while came < total:
            while not asked or (self._each and asked * size < min(came + _WINDOW, total)):
                self._link.write(b"\1")
                asked += 1
            came += len(self._read())

    def _command(self, what: bytes, size: int, total: int) -> None:
        self._link.write(_COMMAND.pack(what, self._each, size, total))

    def _read(self) -> bytes:
        if data := self._link.read(_SILENCE):
            return data
        raise Timeout(f"{self._link.name} lost something that the bench takes for safe: run again")


def links(
    folder: Path,
    write_segment: WriteSegment,
    names: tuple[str, ...] = tuple(LINKS),
    *,
    auth: bool = False,
) -> Iterator[dict[str, Any]]:
    """A row for each link, case and direction; firmware is built in folder.

    auth: frames are under a key, which is no secret.
    """
    key = b"bench" * 6 + b"!!" if auth else None
    torch.manual_seed(SEED)
    build = segment()
    known = boards.load_boards()
    for name in names:
        setup = LINKS[name]
        board = known[setup.board]
        firmware = build_firmware(build, board, write_segment, folder, key)
        pump_firmware = build_pump(board, folder / f"{board.name}-pump")
        with relayed(setup, board, pump_firmware, Faults()) as pump_link:
            pump = Pump(pump_link)
            for case, lose in CASES.items():
                runs: dict[str, list[Run]] = {direction: [] for direction in DIRECTIONS}
                for _ in range(setup.repeats):
                    with relayed(setup, board, firmware, Faults(lose=lose)) as link:
                        device = Device("bench", link, build, Settings(0.1), key=key)
                        for direction in DIRECTIONS:
                            runs[direction].append(_run(setup, device, link, pump, direction))
                for direction in DIRECTIONS:
                    row = {"link": name, "case": case, "direction": direction}
                    yield {**row, **figures(runs[direction])}


def build_pump(board: Board, folder: Path) -> Firmware:
    """pump.c for a board."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(boards.firmware_root() / "bench" / "pump.c", folder / "segment.c")
    return boards.build(board, folder, folder, overrides={"PROGRAM": ""})


@contextmanager
def relayed(setup: Setup, board: Board, firmware: Firmware, faults: Faults) -> Iterator[Relay]:
    """A board that runs, behind its line."""
    line = Line(setup.rate, faults=faults)
    with ExitStack() as ends:
        if setup.pipes:
            link: Link = ends.enter_context(ProcessLink([str(firmware.elf)], board.name))
        else:
            link = ends.enter_context(boards.start(board, firmware)).link
        yield ends.enter_context(Relay(link, line, line, seed=SEED))


@dataclass(frozen=True)
class Run:
    """What one run over a link took."""

    raw: list[float]  # seconds of each transfer by the pump
    tensors: list[float]  # and by the device
    overhead: float


def _run(setup: Setup, device: Device, relay: Relay, pump: Pump, direction: str) -> Run:
    """Moves tensors in one direction, beside the pump."""
    welcome = device.hello()
    content = np.random.default_rng(SEED).bytes(TENSOR)
    region = m.Region.SHARD
    if direction == "down":
        transfers = setup.down
        size = welcome.receive_max - len(m.Write(region, 0, b"").pack())

        def move(count: int) -> None:
            device.write(region, content[:count])

        def pump_it() -> None:
            pump.down(content, size)
    else:
        transfers = setup.up
        size = min(welcome.send_max, _DATAGRAM)

        def move(count: int) -> None:
            if device.read(region, 0, count) != content[:count]:
                raise Mismatch(f"{relay.name}: what comes up is not what went down")

        def pump_it() -> None:
            pump.up(TENSOR, size)

    raw: list[float] = []
    tensors: list[float] = []
    while len(tensors) < transfers and sum(tensors) < _ENOUGH:
        # Without a pace they take turns, so that both have the machine as it is.
        if not raw or math.isinf(setup.rate):
            raw.append(_seconds(pump_it))
        tensors.append(_seconds(lambda: move(TENSOR)))
    counts = relay.down_counts if direction == "down" else relay.up_counts
    before = counts.bytes
    for _ in range(_SHORT):
        move(PAYLOAD)
    return Run(raw, tensors, (counts.bytes - before) / (_SHORT * PAYLOAD) - 1)


def figures(runs: list[Run]) -> dict[str, float]:
    """The figures of a row: of runs that met the same faults, each transfer's best.

    Whatever else the machine does makes a transfer slower, never faster.
    """
    raw, tensors = (
        [min(times) for times in zip(*by_run, strict=False)]
        for by_run in ([run.raw for run in runs], [run.tensors for run in runs])
    )
    ratio = (sum(raw) / len(raw)) / (sum(tensors) / len(tensors))
    overhead = min(run.overhead for run in runs)
    return {"goodput_ratio": round(ratio, 4), "overhead": round(overhead, 4)}


def _seconds(call: Callable[[], None]) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before
