"""Links: how bytes get to a device and back, over a serial line, a network or within this process.

A link carries whole encoded frames away and brings back bytes as they come: in pieces of any size
on a stream, in whole datagrams over UDP. It neither retries nor understands what it carries.
``open_link`` makes one from a URL, ``serve_tcp`` takes those who connect to this machine.

Reading is for one thread. Writing and closing may come from others, and closing ends a read or a
write that waits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

import serial

from splitee.errors import LinkClosed, LinkError, Timeout
from splitee_host import ports

BAUD = 115200
"""Bits per second of a serial port whose URL names none."""

STALL = 10.0
"""Seconds after which a write gives up when the other end takes not a single byte."""

_CONNECT = 5.0  # seconds to wait for a TCP connection
_READ_MAX = 1 << 16  # bytes taken at once; no datagram is larger
_TCP_READ_MAX = 1 << 18  # of a stream of tensors: each read costs as much as copying these
_SLICE = 0.05  # seconds after which a read that cannot be interrupted looks whether to go on
_LEAVE = 2.0  # seconds that a child process has to end by itself

_FORMS = (
    "serial:/dev/ttyX[?baud=115200], /dev/ttyX, usb:VID:PID[:SERIAL][?baud=115200], "
    "rfc2217://host:port[?baud=115200], socket://host:port, tcp://host:port, udp://host:port"
)


class Link(Protocol):
    """A way to one device.

    ``kind`` is "serial" (a stream that may lose or change bytes), "tcp" (a stream that does not),
    "udp" (datagrams that may be lost) or "memory"; ``name`` is how the link is shown and begins
    with it.
    """

    kind: str
    name: str

    def write(self, data: bytes) -> None:
        """Sends one whole encoded frame (over UDP: as one datagram).

        Raises LinkClosed when the other end is gone, Timeout when it takes nothing any more; then
        a part of the frame may have been sent, which the other end drops.
        """
        ...

    def read(self, timeout: float) -> bytes:
        """Whatever has come, as soon as something has; b"" when nothing came for timeout seconds.

        Raises LinkClosed when the other end is gone and everything it sent has been read.
        """
        ...

    def close(self) -> None:
        """Lets go of everything; a second time does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def open_link(url: str) -> Link:
    """The link that a URL describes, open.

    ``serial:/dev/ttyACM0?baud=921600`` or just ``/dev/ttyACM0`` is a serial port of this machine;
    ``usb:VID:PID`` or ``usb:VID:PID:SERIAL`` is that of a board on USB, wherever it is now;
    ``rfc2217://host:port`` one of another machine, ``socket://host:port`` a serial line that
    something offers as a plain TCP stream (an emulator, ser2net), ``tcp://host:port`` and
    ``udp://host:port`` a device on the network. Raises LinkError, saying why, when there is no
    such form or nothing can be opened there.
    """
    address, _, query = url.partition("?")
    scheme, _, rest = address.partition(":")
    if address.startswith("/dev/"):
        scheme, rest = "serial", address
    baud = _baud(query)
    if scheme == "serial" and rest and baud:
        return SerialLink(rest, baud)
    if ports.is_address(address) and baud:
        return SerialLink(ports.find(address), baud)
    host, port = _host_and_port(address)
    if scheme == "rfc2217" and host and port and baud:
        return RemoteSerialLink(host, port, baud)
    if scheme in ("socket", "tcp", "udp") and host and port and not query:
        if scheme == "udp":
            return UdpLink(host, port)
        return TcpLink.connect(host, port, kind="tcp" if scheme == "tcp" else "serial")
    raise LinkError(f"{url!r} is no link; the forms there are: {_FORMS}")


def _baud(query: str) -> int | None:
    """The speed that the query of a URL asks for; None when it asks for anything else."""
    if not query:
        return BAUD
    found = re.fullmatch(r"baud=([1-9]\d*)", query)
    return int(found[1]) if found else None


def _host_and_port(address: str) -> tuple[str | None, int | None]:
    """What stands behind the // of an address; None for what is missing or wrong."""
    try:
        parts = urlsplit(address)
        return (None, None) if parts.path else (parts.hostname, parts.port)
    except ValueError:
        return None, None


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Closable:
    """What can be closed once, from any thread, whatever other threads are waiting for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._closed = False
        self._closing = threading.Lock()
        self._reading = threading.Lock()  # held by whoever uses what _release() lets go of
        self._writing = threading.Lock()

    def close(self) -> None:
        """Lets go of everything; a second time does nothing."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._interrupt()
            with self._reading, self._writing:
                self._release()

    def _interrupt(self) -> None:
        """Ends what waits in other threads; it calls _check_open() next."""

    def _release(self) -> None:
        """Lets go; no other thread is at it any more."""

    def _check_open(self) -> None:
        if self._closed:
            raise LinkClosed(f"{self.name} was closed on this side: open it again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Waiting:
    """select() that another thread can end for good."""

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()

    def until_ready(self, sources: list[int], sinks: list[int], timeout: float | None) -> bool:
        """False when none was ready within timeout seconds; true when one is, or once stopped."""
        near = self._near.fileno()
        return any(select.select([near, *sources], sinks, [], timeout))

    def stop(self) -> None:
        """Ends every wait, now and from now on."""
        self._far.send(b"\0")

    def close(self) -> None:
        """Lets go; nobody may be waiting any more."""
        self._near.close()
        self._far.close()


class _DescriptorLink(Closable):
    """What the links have in common whose ends are descriptors that never block."""

    def __init__(self, kind: str, name: str, source: int, sink: int) -> None:
        super().__init__(name)
        self.kind = kind
        self._source = source
        self._sink = sink
        self._waiting = _Waiting()

    def _receive(self) -> bytes | None:
        """What has come; b"" when the other end is gone, None when there was nothing after all."""
        raise NotImplementedError

    def _send(self, data: memoryview) -> int:
        """Sends what goes out at once; returns how many bytes that were."""
        raise NotImplementedError

    def _gone(self) -> str:
        """How the other end was lost, and what to do about it."""
        raise NotImplementedError

    def write(self, data: bytes) -> None:
        with self._writing:
            rest = memoryview(data)
            while rest:
                self._check_open()
                try:
                    rest = rest[self._send(rest) :]
                except BlockingIOError:
                    if not self._waiting.until_ready([], [self._sink], STALL):
                        raise Timeout(
                            f"{self.name} took nothing for {STALL:g} s: is the device stuck? "
                            "Reset it"
                        ) from None
                except OSError as error:
                    raise LinkClosed(self._gone()) from error

    def read(self, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        with self._reading:
            self._check_open()
            while self._waiting.until_ready(
                [self._source], [], max(0, deadline - time.monotonic())
            ):
                self._check_open()
                try:
                    data = self._receive()
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise LinkClosed(self._gone()) from error
                if data == b"":
                    raise LinkClosed(self._gone())
                if data is not None:
                    return data
        return b""

    def _interrupt(self) -> None:
        self._waiting.stop()

    def _release(self) -> None:
        self._waiting.close()


class SerialLink(_DescriptorLink):
    """A serial port of this machine: a device file, or the pseudo-terminal of an emulator."""

    def __init__(self, device: str, baud: int = BAUD) -> None:
        self._port = _open_port(device, baud)
        descriptor = self._port.fileno()
        super().__init__("serial", f"serial:{device}", descriptor, descriptor)

    def _receive(self) -> bytes:
        return os.read(self._source, _READ_MAX)

    def _send(self, data: memoryview) -> int:
        return os.write(self._sink, data)

    def _release(self) -> None:
        super()._release()
        self._port.close()

    def _gone(self) -> str:
        return f"{self.name} is gone: plug the board in again, or start its emulator again"


class TcpLink(_DescriptorLink):
    """A TCP connection; of kind "serial" when it stands for a serial line."""

    def __init__(self, connection: socket.socket, name: str, kind: str = "tcp") -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        super().__init__(kind, name, connection.fileno(), connection.fileno())

    @classmethod
    def connect(cls, host: str, port: int, kind: str = "tcp") -> TcpLink:
        """A connection to a device that listens."""
        scheme = "tcp" if kind == "tcp" else "serial:socket"
        name = f"{scheme}://{_shown(host, port)}"
        try:
            connection = socket.create_connection((host, port), _CONNECT)
        except OSError as error:
            raise LinkError(
                f"cannot connect to {name} ({_said(error)}): is the device running, and are host "
                "and port right?"
            ) from error
        return cls(connection, name, kind)

    def _receive(self) -> bytes:
        return self._connection.recv(_TCP_READ_MAX)

    def _send(self, data: memoryview) -> int:
        return self._connection.send(data)

    def _release(self) -> None:
        super()._release()
        self._connection.close()

    def _gone(self) -> str:
        return f"{self.name} closed the connection: start it again"


class UdpLink(_DescriptorLink):
    """Datagrams to one device and back; any of them may be lost, and nobody learns of it."""

    # The device is not (yet, or any more) there: for a datagram that is nothing but a loss. The
    # system tells it with the next call, which has then not been carried out.
    _LOST = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH)

    def __init__(self, host: str, port: int) -> None:
        name = f"udp://{_shown(host, port)}"
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_DGRAM
            )[0]
            self._socket = socket.socket(family, kind, protocol)
            try:
                self._socket.connect(address)
            except OSError:
                self._socket.close()
                raise
        except OSError as error:
            raise LinkError(f"cannot reach {name} ({_said(error)}): is the host right?") from error
        self._socket.setblocking(False)
        super().__init__("udp", name, self._socket.fileno(), self._socket.fileno())

    def _receive(self) -> bytes | None:
        try:
            return self._socket.recv(_READ_MAX) or None
        except OSError as error:
            if error.errno in self._LOST:
                return None
            raise

    def _send(self, data: memoryview) -> int:
        for _ in range(2):  # the first try may only have told of an earlier datagram
            try:
                return self._socket.send(data)
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    raise LinkError(
                        f"{self.name}: {len(data)} bytes do not fit in a datagram: send less at "
                        "once"
                    ) from error
                if error.errno not in self._LOST:
                    raise
        return len(data)

    def _release(self) -> None:
        super()._release()
        self._socket.close()

    def _gone(self) -> str:
        return f"{self.name} cannot be reached any more: is this machine's network up?"


class PipeLink(_DescriptorLink):
    """Standard input and output of a process that somebody else ends: its line to us."""

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        """process: started with both pipes, unbuffered."""
        assert process.stdin is not None
        assert process.stdout is not None
        self._pipes = (process.stdin, process.stdout)
        for pipe in self._pipes:
            os.set_blocking(pipe.fileno(), False)
        super().__init__("serial", name, process.stdout.fileno(), process.stdin.fileno())

    def _receive(self) -> bytes:
        return os.read(self._source, _READ_MAX)

    def _send(self, data: memoryview) -> int:
        return os.write(self._sink, data)

    def _release(self) -> None:
        super()._release()
        for pipe in self._pipes:
            pipe.close()

    def _gone(self) -> str:
        return f"{self.name} closed its end of the line"


class ProcessLink(PipeLink):
    """A child process whose standard input and output are the line: the device on this machine.

    It inherits standard error. Closing the link closes its input, by which it should end; if it
    has not after two seconds it is killed.
    """

    def __init__(self, command: Sequence[str], name: str | None = None) -> None:
        try:
            # A group of its own: Ctrl-C is for the host, which then ends its devices in order.
            self._process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,
            )
        except OSError as error:
            raise LinkError(f"cannot start {command[0]} ({_said(error)}): is it built?") from error
        super().__init__(self._process, f"serial:{name or Path(command[0]).name}")

    def _release(self) -> None:
        super()._release()
        try:
            self._process.wait(_LEAVE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _gone(self) -> str:
        try:
            status = self._process.wait(_LEAVE)
        except subprocess.TimeoutExpired:
            return f"{self.name} closed its end of the line and still runs: end it"
        how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        return f"{self.name} ended with {how}: see what it wrote to standard error"


class RemoteSerialLink(Closable):
    """A serial port of another machine, offered by RFC 2217 (ser2net, pyserial, esptool)."""

    def __init__(self, host: str, port: int, baud: int = BAUD) -> None:
        url = f"rfc2217://{_shown(host, port)}"
        self._port = _open_port(url, baud)
        super().__init__(f"serial:{url}")
        self.kind = "serial"

    def write(self, data: bytes) -> None:
        with self._writing:
            self._check_open()
            try:
                self._port.write(data)
            except serial.SerialException as error:
                raise LinkClosed(self._gone()) from error

    def read(self, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        with self._reading:
            while True:
                self._check_open()
                try:
                    data: bytes = self._port.read(max(1, self._port.in_waiting))
                except serial.SerialException as error:
                    raise LinkClosed(self._gone()) from error
                if data or time.monotonic() >= deadline:
                    return data

    def _release(self) -> None:
        connection = self._port._socket  # pyserial forgets it when the server left first
        self._port.close()
        connection.close()

    def _gone(self) -> str:
        return f"{self.name} closed the connection: start its server again"


class MemoryLink(Closable):
    """One end of a link within this process; ``memory_pair`` makes both."""

    _peer: MemoryLink

    def __init__(self, name: str, changed: threading.Condition) -> None:
        super().__init__(name)
        self.kind = "memory"
        self._changed = changed  # one for both ends
        self._inbox: deque[bytes] = deque()

    def write(self, data: bytes) -> None:
        with self._changed:
            self._check_open()
            if self._peer._closed:
                raise LinkClosed(self._gone())
            self._peer._inbox.append(bytes(data))
            self._changed.notify_all()

    def read(self, timeout: float) -> bytes:
        with self._changed:
            self._changed.wait_for(
                lambda: self._inbox or self._closed or self._peer._closed, max(0, timeout)
            )
            self._check_open()
            if not self._inbox and self._peer._closed:
                raise LinkClosed(self._gone())
            data = b"".join(self._inbox)
            self._inbox.clear()
            return data

    def _interrupt(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _gone(self) -> str:
        return f"{self.name}: the other end was closed: open a new pair"


def memory_pair() -> tuple[MemoryLink, MemoryLink]:
    """Two ends; what is written to one is read from the other."""
    changed = threading.Condition()
    near, far = MemoryLink("memory:near", changed), MemoryLink("memory:far", changed)
    near._peer, far._peer = far, near
    return near, far


class Listener(Closable):
    """Takes those who connect over TCP; ``url`` is what they pass to ``open_link``."""

    def __init__(self, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family)
        except OSError as error:
            raise LinkError(
                f"cannot listen on {_shown(host, port)} ({_said(error)}): choose another port, or "
                "0 for any free one"
            ) from error
        self._socket.setblocking(False)
        self._waiting = _Waiting()
        self.url = f"tcp://{_shown(*self._socket.getsockname()[:2])}"
        super().__init__(self.url)

    def accept(self, timeout: float | None = None) -> Link:
        """The link to the next who connects.

        Raises Timeout when nobody does for timeout seconds, LinkClosed when the listener is
        closed meanwhile. Links outlive the listener.
        """
        with self._reading:
            self._check_open()
            while self._waiting.until_ready([self._socket.fileno()], [], timeout):
                self._check_open()
                with contextlib.suppress(BlockingIOError, ConnectionAbortedError):  # left again
                    connection, address = self._socket.accept()
                    return TcpLink(connection, f"tcp://{_shown(*address[:2])}")
        raise Timeout(f"nobody connected to {self.url} for {timeout:g} s: start the client")

    def _interrupt(self) -> None:
        self._waiting.stop()

    def _release(self) -> None:
        self._waiting.close()
        self._socket.close()


def serve_tcp(host: str = "127.0.0.1", port: int = 0) -> Listener:
    """Listens on this machine for devices that connect; port 0 is any free one."""
    return Listener(host, port)


def _said(error: OSError) -> str:
    """What the system said, without its number."""
    return (error.strerror or str(error)).lower()


def _open_port(url: str, baud: int) -> Any:
    """An open port of pyserial, for this program alone. LinkError says why not and what helps."""
    try:
        return serial.serial_for_url(url, baudrate=baud, timeout=_SLICE, exclusive=True)
    except (OSError, ValueError) as error:
        raise LinkError(_why_no_port(url, baud, error)) from error


def _why_no_port(device: str, baud: int, error: OSError | ValueError) -> str:
    """What went wrong in opening a port, and the cure."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOENT:
        there = ", ".join(port.device for port in ports.attached())
        cure = f"use one of those there are ({there})" if there else "plug the board in"
        return f"there is no serial port {device}: {cure}"
    if number in (errno.EACCES, errno.EPERM):
        group = _group(device)
        return (
            f"no permission to open {device}: join its group {group} with "
            f"`sudo usermod -aG {group} $USER` and log in again"
        )
    if number in (errno.EBUSY, errno.EAGAIN):
        return f"{device} is in use: close the other program (a serial monitor, another run)"
    return f"{device} cannot be opened as a serial port at {baud} baud ({error}): is it one?"


def _group(device: str) -> str:
    """The group that a device file belongs to."""
    try:
        return Path(device).group()
    except (OSError, KeyError):
        return "dialout"
