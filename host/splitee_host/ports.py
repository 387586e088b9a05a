"""Ports: the serial ports of this machine, and boards found by what they are and not where.

A board on USB says who made it (VID), what it is (PID) and, mostly, a serial number of its own; the
name that the system gives its port depends on what else is attached, and may be another one after
it was unplugged. ``usb:VID:PID`` and ``usb:VID:PID:SERIAL`` (as lsusb prints them) stay the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from serial.tools import list_ports

from splitee.errors import LinkError

# A serial number is anything: an ESP32's has colons in it.
_ADDRESS = re.compile(r"usb:([0-9a-f]{4}):([0-9a-f]{4})(?::(.+))?", re.IGNORECASE)


@dataclass(frozen=True)
class Port:
    """A serial port of this machine."""

    device: str
    vendor: int | None = None  # VID; None: it is not on USB
    product: int | None = None  # PID
    serial_number: str | None = None
    title: str = ""  # what it says that it is

    @property
    def address(self) -> str:
        """What a fleet file names it by."""
        if self.vendor is None or self.product is None:
            return f"serial:{self.device}"
        number = f":{self.serial_number}" if self.serial_number else ""
        return f"usb:{self.vendor:04x}:{self.product:04x}{number}"


def attached() -> list[Port]:
    """The serial ports there are now, by device; 10 comes after 9."""
    ports = [
        Port(
            found.device,
            found.vid,
            found.pid,
            found.serial_number,
            " ".join(filter(None, (found.manufacturer, found.product))),
        )
        for found in list_ports.comports()
    ]
    return sorted(ports, key=lambda port: _in_order(port.device))


def _in_order(device: str) -> list[tuple[str, int]]:
    return [(name, int(number or 0)) for name, number in re.findall(r"(\D+)(\d*)", device)]


def is_address(address: str) -> bool:
    """Whether this has the form of a usb: address."""
    return _ADDRESS.fullmatch(address) is not None


def find(address: str) -> str:
    """The device of the one board that a usb: address names, as it is now.

    Raises LinkError, listing what is attached, when there is none or more than one.
    """
    parts = _ADDRESS.fullmatch(address)
    assert parts is not None
    wanted = (int(parts[1], 16), int(parts[2], 16))
    ports = attached()
    same = [port for port in ports if (port.vendor, port.product) == wanted]
    matching = [port for port in same if parts[3] in (None, port.serial_number)]
    if len(matching) == 1:
        return matching[0].device
    if not matching:
        there = _listed(ports) or "nothing is"
        raise LinkError(
            f"no board {address} is attached: plug it in, or use what is there ({there})"
        )
    cure = "give the serial number as well"
    if len({port.serial_number for port in matching}) < len(matching):
        cure = "they have no serial numbers of their own, so give a path of /dev/serial/by-path"
    raise LinkError(f"{address} is {len(matching)} ports ({_listed(matching)}): {cure}")


def _listed(ports: list[Port]) -> str:
    return ", ".join(
        port.address if port.vendor is None else f"{port.address} at {port.device}"
        for port in ports
    )
