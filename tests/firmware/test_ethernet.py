"""Emulated boards with Ethernet: packets on the wire itself, and training over UDP."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from firmware.test_net import ANNOUNCEMENT, ARP_REPLY, ARP_REQUEST, CASES, HI, PING, PONG, sealed
from host_harness import Troubled, differences, waits
from splitee.client import State
from splitee.errors import LinkClosed, MissingTool
from splitee.ops import Array
from splitee_host.boards import Board, Firmware, build, load_boards, start
from splitee_host.link import Link, open_link
from splitee_host.verify import step_on_device
from step_harness import SETTINGS, case, device

HERE = Path(__file__).parent
ANSWER = 20.0  # seconds to wait for what has to come; no test waits that long when all is well
FITS = 7  # datagrams of 1,400 bytes that the chip has room for

BOARDS = load_boards()
ETHERNET = [b for b in BOARDS.values() if b.qemu is not None and b.udp is not None]
M4 = BOARDS["qemu-m4-udp"]


def name(board: Board) -> str:
    return board.name


def need(board: Board) -> None:
    assert board.qemu is not None
    for tool in (f"{board.prefix}gcc", board.qemu.program):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


@cache
def echo(board: Board, folder: Path, *flags: str) -> Firmware:
    """A firmware that sends back what comes."""
    need(board)
    place = folder / "-".join((board.name, *flags))
    place.mkdir()
    shutil.copy(HERE / "echo.c", place / "segment.c")
    board = replace(board, cflags=(*board.cflags, *flags))
    return build(board, place, place, overrides={"PROGRAM": ""})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ethernet")


# ---- the wire ----


class Wire:
    """The other end of a board's Ethernet: packets, without their CRC."""

    def __init__(self, near: socket.socket, board: Path) -> None:
        self._near = near
        self._board = str(board)

    def send(self, packet: bytes) -> None:
        """Puts a packet on the wire."""
        self._near.sendto(packet, self._board)

    def receive(self) -> bytes:
        """The next packet from the board."""
        return self._near.recv(65536)


@contextmanager
def wire(board: Board, firmware: Firmware, folder: Path) -> Iterator[Wire]:
    """A running board and its wire; what it sent first, its announcement, has been received."""
    here, there = folder / "here", folder / "there"
    netdev = f"dgram,id=wire,local.type=unix,local.path={there},remote.type=unix,remote.path={here}"
    options = ["-netdev", netdev, "-net", "nic,netdev=wire"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as near:
        near.bind(str(here))
        near.settimeout(ANSWER)
        with start(replace(board, udp=None), firmware, options):
            line = Wire(near, there)
            assert line.receive() == ANNOUNCEMENT
            yield line


def datagram(content: bytes) -> bytes:
    """A good packet with content, as HI is."""
    head = HI[:16] + (28 + len(content)).to_bytes(2, "big") + HI[18:38]
    return sealed(head + (8 + len(content)).to_bytes(2, "big") + bytes(2) + content)


@pytest.mark.parametrize("board", ETHERNET, ids=name)
def test_a_board_tells_its_addresses_and_answers_arp_pings_and_datagrams(
    board: Board, folder: Path, tmp_path: Path
) -> None:
    with wire(board, echo(board, folder), tmp_path) as line:
        line.send(ARP_REQUEST)
        assert line.receive() == ARP_REPLY
        line.send(PING)
        assert line.receive() == PONG
        for size in (1, 2, 3, 4, 1459, 1460):
            content = bytes(i % 255 for i in range(size))
            line.send(datagram(content))
            assert line.receive()[42:] == content


@pytest.mark.parametrize(
    "packet",
    [
        *(datagram(bytes(n)) for n in (1463, 1464, 1468, 1900)),
        HI[:14],
        HI[:-1] + b"j",
        b"\xff" * 6 + HI[6:],
        HI[:6] + b"\xff" * 6 + HI[12:],
    ],
    ids=["1 too long", "4 too long", "8 too long", "much too long", "cut off", "wrong checksum",
         "to everybody", "from everybody"],
)  # fmt: skip
def test_a_packet_that_a_board_does_not_take_is_gone(
    packet: bytes, folder: Path, tmp_path: Path
) -> None:
    with wire(M4, echo(M4, folder), tmp_path) as line:
        for i in range(20):  # more than the chip has room for, were they to stay there
            line.send(packet)
            line.send(datagram(b"%d" % i))
            assert line.receive()[42:] == b"%d" % i


DROPPED = """
#include "core/port.h"
int main(int argc, char **argv) {
    port_init(argc, argv);
    for (;;) {
        uint8_t byte;
        port_read(&byte, 1);
        const uint32_t dropped = port_dropped();
        port_write((const uint8_t *)&dropped, sizeof dropped);
        port_flush();
    }
}
"""


def test_a_board_counts_the_packets_that_it_drops(tmp_path: Path) -> None:
    need(M4)
    (tmp_path / "segment.c").write_text(DROPPED)
    firmware = build(M4, tmp_path, tmp_path, overrides={"PROGRAM": ""})
    too_long, bad = datagram(bytes(1480)), CASES["wrong UDP checksum"].packet
    fragments = [CASES[f"{which} fragment"].packet for which in ("first", "last")]
    with wire(M4, firmware, tmp_path) as line:
        for dropped in (0, 4, 8):
            line.send(datagram(b"?"))
            assert int.from_bytes(line.receive()[42:], "little") == dropped
            for packet in (too_long, bad, *fragments, CASES["to another port"].packet):
                line.send(packet)


def test_of_a_burst_a_board_loses_what_the_chip_has_no_room_for_and_nothing_else(
    folder: Path, tmp_path: Path
) -> None:
    slow = echo(M4, folder, "-DPAUSE_MICROS=300000u")
    with wire(M4, slow, tmp_path) as line:
        sent = [bytes([i]) * 1400 for i in range(3 * FITS)]
        for content in sent:
            line.send(datagram(content))
        came = [line.receive()[42:] for _ in range(FITS)]
        assert came == sent[:FITS]
        line.send(datagram(b"last"))  # the room is there again
        while (content := line.receive()[42:]) != b"last":
            assert content in sent[FITS:]


# ---- the link ----


def test_a_board_answers_whoever_sent_the_last_datagram(folder: Path) -> None:
    with start(M4, echo(M4, folder)) as running, open_link(running.link.name) as other:
        for link in (running.link, other, running.link):
            link.write(b"who am I?")
            assert link.read(ANSWER) == b"who am I?"


FAULT = """
#include "core/port.h"
int main(int argc, char **argv) {
    uint8_t byte;
    port_init(argc, argv);
    port_read(&byte, 1);
    const uint32_t start = port_micros();
    while (port_micros() - start < 500000u) {
    }
    __builtin_trap();
}
"""


ECHO_WITHOUT_CLOCK = """
#include "core/port.h"
int main(int argc, char **argv) {
    static uint8_t bytes[64];
    port_init(argc, argv);
    *(volatile uint32_t *)0xE000E010u = 0; // SysTick, which would wake it up, too
    for (;;) {
        port_write(bytes, port_read(bytes, sizeof bytes));
        port_flush();
    }
}
"""


@pytest.mark.parametrize("board", ETHERNET, ids=name)
def test_a_datagram_wakes_a_board_up(board: Board, tmp_path: Path) -> None:
    need(board)
    (tmp_path / "segment.c").write_text(ECHO_WITHOUT_CLOCK)
    firmware = build(board, tmp_path, tmp_path, overrides={"PROGRAM": ""})
    with start(board, firmware) as running:
        for content in (b"one", b"two", b"three"):
            running.link.write(content)
            assert running.link.read(ANSWER) == content


def test_what_qemu_says_of_lost_datagrams_does_not_hide_how_a_board_ended(tmp_path: Path) -> None:
    need(M4)
    (tmp_path / "segment.c").write_text(FAULT)
    firmware = build(M4, tmp_path, tmp_path, overrides={"PROGRAM": ""})
    with start(M4, firmware) as running:
        for _ in range(3 * FITS):
            running.link.write(bytes(1400))
        with pytest.raises(LinkClosed, match=r"SIGABRT\n  qemu: fatal: Lockup"):
            running.link.read(ANSWER)


def test_a_serial_build_holds_nothing_of_the_network(folder: Path) -> None:
    def functions(board: Board) -> str:
        elf = echo(board, folder).elf
        return subprocess.check_output([f"{board.prefix}nm", elf], text=True)

    over_udp, over_serial = functions(M4), functions(BOARDS["qemu-m4"])
    for part in (" net_receive\n", " lan9118_init\n", " incoming\n"):
        assert part in over_udp
    assert " net_" not in over_serial
    assert " lan9118_" not in over_serial
    assert "coming\n" not in over_serial


# ---- training ----

COUNT = 5  # samples in the step: less than the capacity, and odd


@cache
def step(board: str, folder: Path) -> dict[str, Array]:
    """The tensors of one step."""
    the_case = case("resnet8", width=4, capacity=6)  # fits all boards
    shape = the_case.build.graph.shapes[the_case.build.graph.cut]
    sent = torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(1)) / COUNT
    settings = replace(SETTINGS, exit_weight=0.3, server_weight=0.7)
    try:
        with device(the_case, board, folder / f"step-{board}", settings) as running:
            return step_on_device(running, COUNT, sent)
    except MissingTool as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("board", ETHERNET, ids=name)
def test_a_step_over_udp_is_bit_for_bit_that_over_the_serial_line(
    board: Board, folder: Path
) -> None:
    over_udp, over_serial = (step(b, folder) for b in (board.name, board.name.removesuffix("-udp")))
    assert list(over_udp) == list(over_serial)
    assert [n for n in over_udp if not np.array_equal(over_udp[n], over_serial[n])] == []


SMALL = case("resnet8", width=2, samples=16)


@cache
def trained(board: Board, folder: Path, trouble: str = "") -> tuple[list[float], State, int]:
    """Losses and state after four batches, and how many requests came twice."""
    need(board)

    def through(link: Link) -> Link:
        return Troubled(link, trouble) if trouble else link

    place = folder / f"trained-{board.name}"
    with device(SMALL, board.name, place, SETTINGS, through=through) as it:
        losses = []
        for _ in range(4):
            it.forward(8, 8)
            it.backward(None)
            losses.append(it.step().loss)
        return losses, it.state(), it.exchange.repeated + it.counters().repeated_frames


@pytest.mark.parametrize("trouble", ["lost", "doubled", "delayed"])
def test_a_board_trains_the_same_when_datagrams_are(
    trouble: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, calm_state, _ = trained(BOARDS["qemu-m4"], folder)
    waits(monkeypatch, 0.02)
    stormy, stormy_state, repeated = trained(M4, folder, trouble)
    assert repeated >= 5
    assert stormy == calm
    assert differences(stormy_state, calm_state) == []
