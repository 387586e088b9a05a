"""Boards found by VID, PID and USB serial number.

There is no USB here: what pyserial finds on it is made up. The ports that are then opened are real
pseudo-terminals.
"""

from __future__ import annotations

import json
import os
import re
import termios
import tty
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest
from serial.tools import list_ports, list_ports_common

from host_harness import splitee
from splitee.errors import LinkError
from splitee_host.link import open_link
from splitee_host.ports import attached, find

ESP = "F4:12:FA:4C:11:02"  # a serial number with colons, as ESP32s have


class Bus:
    """A USB that boards are plugged into: each is a pseudo-terminal, under a name of a folder."""

    def __init__(self, ends: ExitStack, folder: Path) -> None:
        self._ends = ends
        self._folder = folder
        self._names = count(9)
        self._ports: dict[str, list_ports_common.ListPortInfo] = {}

    def comports(self) -> list[list_ports_common.ListPortInfo]:
        return list(self._ports.values())[::-1]

    def plug_in(
        self, vid: int | None, pid: int | None, number: str | None = None, title: str | None = None
    ) -> tuple[int, str]:
        """The board's end, and the device of the other."""
        board, terminal = os.openpty()
        self._ends.callback(os.close, board)
        self._ends.callback(os.close, terminal)
        tty.setraw(terminal)
        path = self._folder / f"ttyACM{next(self._names)}"
        path.symlink_to(os.ttyname(terminal))
        device = str(path)
        port = list_ports_common.ListPortInfo(device)
        port.vid, port.pid, port.serial_number, port.product = vid, pid, number, title
        self._ports[device] = port
        return board, device

    def unplug(self, device: str) -> None:
        del self._ports[device]


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bus]:
    with ExitStack() as ends:
        bus = Bus(ends, tmp_path)
        monkeypatch.setattr(list_ports, "comports", bus.comports)
        yield bus


@pytest.mark.parametrize("url", ["usb:303a:1001", "usb:303A:1001", f"usb:303a:1001:{ESP}"])
def test_a_board_is_found_by_what_it_is(url: str, bus: Bus) -> None:
    bus.plug_in(None, None)
    bus.plug_in(0x303A, 0x4001, ESP)
    board, device = bus.plug_in(0x303A, 0x1001, ESP)
    bus.plug_in(0x0483, 0x1001, ESP)
    with open_link(url) as link:
        assert (link.kind, link.name) == ("serial", f"serial:{device}")
        link.write(b"to the board")
        assert os.read(board, 100) == b"to the board"
        os.write(board, b"and back")
        assert link.read(60.0) == b"and back"


def test_its_port_is_opened_at_the_speed_asked_for(bus: Bus) -> None:
    board, _ = bus.plug_in(0x2E8A, 0x000A, "E660")
    for query, speed in (("", termios.B115200), ("?baud=921600", termios.B921600)):
        with open_link(f"usb:2e8a:000a:E660{query}"):
            assert termios.tcgetattr(board)[4:6] == [speed, speed]


def test_a_board_that_comes_back_elsewhere_is_found_again(bus: Bus) -> None:
    _, before = bus.plug_in(0x2E8A, 0x000A, "E660")
    with open_link("usb:2e8a:000a") as link:
        assert link.name == f"serial:{before}"
    bus.unplug(before)
    with pytest.raises(LinkError, match="no board usb:2e8a:000a is attached"):
        open_link("usb:2e8a:000a")
    board, after = bus.plug_in(0x2E8A, 0x000A, "E660")
    assert after != before
    with open_link("usb:2e8a:000a") as link:
        link.write(b"again")
        assert os.read(board, 100) == b"again"


def test_two_boards_of_a_kind_are_told_apart_by_their_serial_numbers(bus: Bus) -> None:
    _, first = bus.plug_in(0x2E8A, 0x000A, "E660")
    _, second = bus.plug_in(0x2E8A, 0x000A, "E661")
    for number, device in (("E660", first), ("E661", second)):
        assert find(f"usb:2e8a:000a:{number}") == device
    with pytest.raises(LinkError) as caught:
        open_link("usb:2e8a:000a")
    assert str(caught.value) == (
        f"usb:2e8a:000a is 2 ports (usb:2e8a:000a:E660 at {first}, "
        f"usb:2e8a:000a:E661 at {second}): give the serial number as well"
    )


def test_ports_that_no_serial_number_tells_apart_are_told(bus: Bus) -> None:
    for _ in range(2):
        bus.plug_in(0x1A86, 0x7523)
    with pytest.raises(LinkError, match=r"is 2 ports .*: .* give a path of /dev/serial/by-path"):
        find("usb:1a86:7523")


def test_a_board_that_is_not_there_is_told_with_what_is(bus: Bus) -> None:
    with pytest.raises(LinkError, match=re.escape("use what is there (nothing is)")):
        open_link("usb:2e8a:000a")
    _, plain = bus.plug_in(None, None)
    _, other = bus.plug_in(0x303A, 0x1001, ESP)
    for url in ("usb:2e8a:000a", "usb:303a:1001:F4", f"usb:303a:1002:{ESP}"):
        with pytest.raises(LinkError) as caught:
            open_link(url)
        assert str(caught.value) == (
            f"no board {url} is attached: plug it in, or use what is there "
            f"(serial:{plain}, usb:303a:1001:{ESP} at {other})"
        )


@pytest.mark.parametrize(
    "url", ["usb:", "usb:303a", "usb:303a:", "usb:303:1001", "usb:303a:10012", "usb:303a:1001:",
            "usb:303g:1001", "usb:303a:1001?speed=9600", "usb:303a:1001?baud=0"]
)  # fmt: skip
def test_what_is_no_usb_address_is_refused(url: str, bus: Bus) -> None:
    bus.plug_in(0x303A, 0x1001, ESP)
    with pytest.raises(LinkError, match=r"is no link; .*usb:VID:PID\[:SERIAL\]"):
        open_link(url)


def test_the_address_of_every_port_leads_to_it(bus: Bus) -> None:
    devices = [
        bus.plug_in(0x303A, 0x1001, ESP)[1],
        bus.plug_in(0x1A86, 0x7523)[1],
        bus.plug_in(None, None)[1],
    ]
    assert [port.device for port in attached()] == devices  # 9, 10, 11
    for port in attached():
        with open_link(port.address) as link:
            assert link.name == f"serial:{port.device}"


def test_the_command_line_lists_what_is_attached(bus: Bus) -> None:
    assert splitee("boards", "--connected").out == "no serial port is attached\n"
    _, plain = bus.plug_in(None, None)
    _, board = bus.plug_in(0x303A, 0x1001, ESP, "USB JTAG/serial debug unit")
    listed = json.loads(splitee("boards", "--connected", "--json").out)
    assert listed == [
        {
            "link": f"serial:{plain}",
            "device": plain,
            "vid": None,
            "pid": None,
            "serial_number": None,
            "title": "",
        },
        {
            "link": f"usb:303a:1001:{ESP}",
            "device": board,
            "vid": "303a",
            "pid": "1001",
            "serial_number": ESP,
            "title": "USB JTAG/serial debug unit",
        },
    ]
    table = splitee("boards", "--connected").out
    for shown in (f"usb:303a:1001:{ESP}", "303a:1001", "USB JTAG/serial debug unit"):
        assert shown in table
