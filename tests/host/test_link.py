"""Links, each over the real thing: pseudo-terminals, sockets, pipes to a child process."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import serial
from serial import rfc2217
from serial.tools import list_ports, list_ports_common

from splitee.errors import LinkClosed, LinkError, Timeout
from splitee_host import link as module
from splitee_host.link import Link, ProcessLink, memory_pair, open_link, serve_tcp
from splitee_host.wire.frame import Frame, encode

FOREVER = 60.0  # seconds; every wait with it ends because something happens
FRAME = encode(Frame(1, 2, 3, bytes(range(256)) * 4))


@dataclass
class Echo:
    """A device that sends back what it gets, seen through a link; stop makes it go away."""

    link: Link
    stop: Callable[[], None]


@contextmanager
def running(work: Callable[[], None], stop: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Work in a thread, and what stops it; it is stopped at the latest at the end."""
    thread = threading.Thread(target=work)
    thread.start()

    def end() -> None:
        with suppress(OSError):  # when the work ends at the same time
            stop()
        thread.join()

    try:
        yield end
    finally:
        end()


@contextmanager
def raw_pty() -> Iterator[tuple[int, str]]:
    """The board's end of a pseudo-terminal, and the device file of the other."""
    board, terminal = os.openpty()
    tty.setraw(terminal)
    with os.fdopen(board, "rb"), os.fdopen(terminal, "rb"):
        yield board, os.ttyname(terminal)


@contextmanager
def pty_echo() -> Iterator[Echo]:
    board, terminal = os.openpty()
    near, far = socket.socketpair()

    def work() -> None:
        # Input/output error is how a pseudo-terminal says that the other end was closed.
        with os.fdopen(board, "rb"), suppress(OSError):
            while near.fileno() not in select.select([board, near.fileno()], [], [])[0]:
                data = os.read(board, 1 << 16)
                while data:
                    data = data[os.write(board, data) :]

    with near, far, open_link(os.ttyname(terminal)) as link, running(work, far.close) as stop:
        os.close(terminal)
        yield Echo(link, stop)


@contextmanager
def socket_echo(scheme: str) -> Iterator[Echo]:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        open_link(f"{scheme}://127.0.0.1:{server.getsockname()[1]}") as link,
    ):
        connection, _ = server.accept()

        def work() -> None:
            with connection:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)

        with running(work, lambda: connection.shutdown(socket.SHUT_RDWR)) as stop:
            yield Echo(link, stop)


@contextmanager
def udp_echo() -> Iterator[Echo]:
    near, far = socket.socketpair()
    with near, far, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
        device.bind(("127.0.0.1", 0))

        def work() -> None:
            while near not in select.select([device, near], [], [])[0]:
                data, sender = device.recvfrom(1 << 16)
                device.sendto(data, sender)

        with (
            running(work, far.close) as stop,
            open_link(f"udp://127.0.0.1:{device.getsockname()[1]}") as link,
        ):
            yield Echo(link, stop)


@contextmanager
def process_echo() -> Iterator[Echo]:
    with ProcessLink(["cat"]) as link:
        yield Echo(link, link._process.terminate)


@contextmanager
def link_echo(near: Link, far: Link) -> Iterator[Echo]:
    """A device that uses a link itself."""

    def work() -> None:
        try:
            while True:
                far.write(far.read(FOREVER))
        except LinkClosed:
            return

    with near, far, running(work, far.close) as stop:
        yield Echo(near, stop)


@contextmanager
def accepted_echo() -> Iterator[Echo]:
    with serve_tcp() as listener:
        far = open_link(listener.url)
        with link_echo(listener.accept(FOREVER), far) as echo:
            yield echo


@dataclass
class Remote:
    """A port that a server for RFC 2217 offers."""

    url: str
    port: serial.SerialBase
    drop: Callable[[], None]  # ends the connection to whoever uses it
    stop: Callable[[], None]  # ends the server


@contextmanager
def rfc2217_server() -> Iterator[Remote]:
    """pyserial's own server for RFC 2217 in front of its own port that echoes."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        serial.serial_for_url("loop://") as port,
    ):
        connections: list[socket.socket] = []

        class Sender:
            def write(self, data: bytes) -> None:
                connections[-1].sendall(data)

        def work() -> None:
            with suppress(OSError):  # by which accept says that the server was stopped
                while True:
                    connections.append(server.accept()[0])
                    with connections[-1] as connection:
                        manager = rfc2217.PortManager(port, Sender())
                        while data := connection.recv(1024):
                            port.write(b"".join(manager.filter(data)))
                            answer = manager.escape(port.read(port.in_waiting))
                            connection.sendall(b"".join(answer))

        def drop() -> None:
            connections[-1].shutdown(socket.SHUT_RDWR)

        def stop() -> None:
            server.shutdown(socket.SHUT_RDWR)
            drop()

        with running(work, stop) as end:
            url = f"rfc2217://127.0.0.1:{server.getsockname()[1]}"
            yield Remote(url, port, drop, end)


@contextmanager
def rfc2217_echo() -> Iterator[Echo]:
    with rfc2217_server() as remote, open_link(remote.url) as link:
        yield Echo(link, remote.stop)


ECHOES: dict[str, Callable[[], AbstractContextManager[Echo]]] = {
    "pseudo-terminal": pty_echo,
    "socket": lambda: socket_echo("socket"),
    "tcp": lambda: socket_echo("tcp"),
    "accepted tcp": accepted_echo,
    "udp": udp_echo,
    "process": process_echo,
    "memory": lambda: link_echo(*memory_pair()),
    "rfc2217": rfc2217_echo,
}
STREAMS = [name for name in ECHOES if name != "udp"]

# pyserial's RFC 2217 port starts its thread in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:set(Daemon|Name).*:DeprecationWarning")


@pytest.fixture(params=ECHOES)
def echo(request: pytest.FixtureRequest) -> Iterator[Echo]:
    """A device at the other end of each kind of link."""
    with ECHOES[request.param]() as device:
        yield device


@pytest.fixture(params=STREAMS)
def stream(request: pytest.FixtureRequest) -> Iterator[Echo]:
    """The same without datagrams."""
    with ECHOES[request.param]() as device:
        yield device


def read_bytes(link: Link, size: int) -> bytes:
    """The next so many bytes, in whatever pieces they come."""
    data = b""
    while len(data) < size:
        piece = link.read(FOREVER)
        assert piece
        data += piece
    return data


class Attempt(threading.Thread):
    """A call in a thread of its own, and the error it ends with."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self._call = call
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except Exception as error:
            self.error = error

    def until_it_waits(self) -> None:
        """Returns when the system says that this thread sleeps, or when it has ended."""
        stat = Path(f"/proc/self/task/{self.native_id}/stat")
        while self.is_alive() and stat.read_text().rpartition(")")[2].split()[0] != "S":
            os.sched_yield()

    def ended_with(self) -> Exception | None:
        self.join(FOREVER)
        assert not self.is_alive()
        return self.error


def test_what_is_written_arrives_and_comes_back(echo: Echo) -> None:
    for _ in range(3):
        echo.link.write(FRAME)
        assert read_bytes(echo.link, len(FRAME)) == FRAME


def test_a_read_returns_nothing_when_nothing_comes(echo: Echo) -> None:
    for timeout in (0.01, 0.0, -1.0):
        assert echo.link.read(timeout) == b""


def test_the_name_begins_with_the_kind(echo: Echo) -> None:
    assert echo.link.kind in ("serial", "udp", "tcp", "memory")
    assert echo.link.name.startswith(f"{echo.link.kind}:")


def test_more_than_a_pipe_holds_passes_while_it_is_read(stream: Echo) -> None:
    content = bytes(range(256)) * 400
    writing = Attempt(lambda: stream.link.write(content))
    assert read_bytes(stream.link, len(content)) == content
    assert writing.ended_with() is None


def test_a_closed_link_says_so_and_can_be_closed_again(echo: Echo) -> None:
    echo.link.close()
    echo.link.close()
    with pytest.raises(LinkClosed, match="was closed on this side"):
        echo.link.read(FOREVER)
    with pytest.raises(LinkClosed, match="was closed on this side"):
        echo.link.write(FRAME)


def test_closing_in_another_thread_ends_a_read_that_waits(echo: Echo) -> None:
    reading = Attempt(lambda: echo.link.read(FOREVER))
    reading.until_it_waits()
    echo.link.close()
    assert "was closed on this side" in str(reading.ended_with())


def test_a_read_ends_when_the_other_end_goes_away(stream: Echo) -> None:
    reading = Attempt(lambda: stream.link.read(FOREVER))
    reading.until_it_waits()
    stream.stop()
    assert isinstance(reading.ended_with(), LinkClosed)
    assert stream.link.name in str(reading.error)
    with pytest.raises(LinkClosed):
        stream.link.read(FOREVER)


def test_writing_ends_when_the_other_end_has_gone_away(stream: Echo) -> None:
    stream.stop()

    def write_on() -> None:
        while True:
            stream.link.write(FRAME)

    assert isinstance(Attempt(write_on).ended_with(), LinkClosed)


def test_what_was_sent_before_the_end_is_still_read() -> None:
    with serve_tcp() as listener, open_link(listener.url) as far:
        near, memory_far = memory_pair()
        speaker = [sys.executable, "-c", "print(end='last words')"]
        with listener.accept(FOREVER) as tcp, near, memory_far, ProcessLink(speaker) as process:
            for end in (far, memory_far):
                end.write(b"last words")
                end.close()
            for link in (tcp, near, process):
                assert read_bytes(link, 10) == b"last words"
                with pytest.raises(LinkClosed):
                    link.read(FOREVER)


@contextmanager
def stuck_pty() -> Iterator[Link]:
    with raw_pty() as (_, device), open_link(device) as link:
        yield link


@contextmanager
def stuck_tcp() -> Iterator[Link]:
    with serve_tcp() as listener, open_link(listener.url) as link, listener.accept(FOREVER):
        yield link


@contextmanager
def stuck_process() -> Iterator[Link]:
    with ProcessLink(["sleep", "600"]) as link:
        yield link


@pytest.fixture(params=[stuck_pty, stuck_tcp, stuck_process], ids=["serial", "tcp", "process"])
def stuck(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    """A link to a device that takes nothing."""
    monkeypatch.setattr(module, "_LEAVE", 0.01)
    with request.param() as link:
        yield link


MORE_THAN_FITS = bytes(1 << 26)


def test_a_write_that_nobody_takes_gives_up(stuck: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL", 0.01)
    with pytest.raises(Timeout, match=r"took nothing for 0.01 s: is the device stuck\?"):
        stuck.write(MORE_THAN_FITS)


def test_closing_in_another_thread_ends_a_write_that_waits(stuck: Link) -> None:
    writing = Attempt(lambda: stuck.write(MORE_THAN_FITS))
    writing.until_it_waits()
    stuck.close()
    assert "was closed on this side" in str(writing.ended_with())


def test_a_serial_port_is_opened_at_the_speed_asked_for() -> None:
    with raw_pty() as (board, device):
        for url, speed in [
            (device, termios.B115200),
            (f"{device}?baud=9600", termios.B9600),
            (f"serial:{device}?baud=57600", termios.B57600),
        ]:
            with open_link(url) as link:
                assert link.name == f"serial:{device}"
                assert termios.tcgetattr(board)[4:6] == [speed, speed]


def test_a_remote_port_is_opened_at_the_speed_asked_for() -> None:
    with rfc2217_server() as remote:
        for query, speed in (("", 115200), ("?baud=9600", 9600), ("?baud=921600", 921600)):
            with open_link(remote.url + query) as link:
                assert link.name == f"serial:{remote.url}"
                assert remote.port.baudrate == speed


@contextmanager
def pty_that_comes_back(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """A board under a name that leads to another device each time, as udev's by-id names do."""
    path = folder / "usb-board"
    with ExitStack() as ends:
        first = ends.enter_context(ExitStack())
        _, device = first.enter_context(raw_pty())
        path.symlink_to(device)

        def again() -> None:
            board, other = ends.enter_context(raw_pty())
            ends.enter_context(running(lambda: echo_once(board), lambda: None))
            path.unlink()
            path.symlink_to(other)
            first.close()

        yield f"serial:{path}", again


def echo_once(board: int) -> None:
    data = os.read(board, 1 << 16)
    os.write(board, data)


@contextmanager
def socket_that_comes_back(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    with socket.create_server(("127.0.0.1", 0)) as server, ExitStack() as ends:

        def again() -> None:
            server.accept()[0].close()
            ends.enter_context(running(serve_next, lambda: None))

        def serve_next() -> None:
            with server.accept()[0] as connection:
                connection.sendall(connection.recv(1 << 16))

        yield f"socket://127.0.0.1:{server.getsockname()[1]}", again


@contextmanager
def rfc2217_that_comes_back(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    with rfc2217_server() as remote:
        yield remote.url, remote.drop


@pytest.mark.parametrize(
    "coming_back",
    [pty_that_comes_back, socket_that_comes_back, rfc2217_that_comes_back],
    ids=["serial", "socket", "rfc2217"],
)
def test_a_line_that_broke_can_be_opened_again(
    coming_back: Callable[[Path], AbstractContextManager[tuple[str, Callable[[], None]]]],
    tmp_path: Path,
) -> None:
    message = b"short\0"
    with coming_back(tmp_path) as (url, breaks):
        with open_link(url) as link:
            breaks()
            with pytest.raises(LinkClosed):
                link.read(FOREVER)
        with open_link(url) as link:
            link.write(message)
            assert read_bytes(link, len(message)) == message


@pytest.mark.parametrize(
    ("plugged", "cure"),
    [([], "plug the board in"), (["/dev/ttyUSB1", "/dev/ttyACM0"], "/dev/ttyACM0, /dev/ttyUSB1")],
    ids=["none", "others"],
)
def test_a_serial_port_that_is_not_there_is_told_with_those_that_are(
    plugged: list[str], cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = [list_ports_common.ListPortInfo(device) for device in plugged]
    monkeypatch.setattr(list_ports, "comports", lambda: ports)
    with pytest.raises(LinkError, match=f"no serial port /dev/ttyNONE: .*{cure}"):
        open_link("/dev/ttyNONE")


def test_a_serial_port_is_for_one_program_alone() -> None:
    with (
        raw_pty() as (_, device),
        open_link(device),
        pytest.raises(LinkError, match="is in use: close the other program"),
    ):
        open_link(device)


def test_a_file_is_no_serial_port(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(LinkError, match="cannot be opened as a serial port at 115200 baud"):
        open_link(f"serial:{path}")


def test_a_port_without_permission_is_told_with_its_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = tmp_path / "ttyACM0"
    device.touch()

    def refuse(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(LinkError, match=f"usermod -aG {device.group()} \\$USER"):
            open_link(f"serial:{device}")


def test_a_remote_port_that_nobody_offers_is_told() -> None:
    with pytest.raises(LinkError, match=r"rfc2217://127\.0\.0\.1:\d+ cannot be opened"):
        open_link(f"rfc2217://127.0.0.1:{free_port()}")


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_connection_that_nobody_takes_is_told() -> None:
    with pytest.raises(LinkError, match=r"connection refused\): is the device running"):
        open_link(f"tcp://127.0.0.1:{free_port()}")


@pytest.mark.parametrize("scheme", ["tcp", "udp", "socket"])
def test_an_unknown_host_is_told(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(LinkError, match=r"board\.lan:5000 \(name or service not known\)"):
        open_link(f"{scheme}://board.lan:5000")


def test_a_tcp_link_does_not_collect_small_frames() -> None:
    with (
        serve_tcp() as listener,
        open_link(listener.url) as far,
        listener.accept(FOREVER) as near,
    ):
        for link in (near, far):
            with socket.socket(fileno=os.dup(link._source)) as copy:  # type: ignore[attr-defined]
                assert copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_frame_is_one_datagram_and_a_read_is_one() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
        device.bind(("127.0.0.1", 0))
        with open_link(f"udp://127.0.0.1:{device.getsockname()[1]}") as link:
            link.write(FRAME)
            data, host = device.recvfrom(1 << 16)
            assert data == FRAME
            for answer in (b"one", b"", b"two"):
                device.sendto(answer, host)
            assert [link.read(FOREVER), link.read(FOREVER)] == [b"one", b"two"]


def test_a_refused_datagram_is_a_loss_and_not_the_end() -> None:
    port = free_port()
    with open_link(f"udp://127.0.0.1:{port}") as link:
        for _ in range(3):
            link.write(FRAME)
            assert link.read(0.001) == b""
        link.write(FRAME)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
            device.bind(("127.0.0.1", port))
            link.write(FRAME)
            data, host = device.recvfrom(1 << 16)
            assert data == FRAME
            device.sendto(b"here again", host)
            assert link.read(FOREVER) == b"here again"


def test_a_frame_larger_than_a_datagram_is_refused() -> None:
    with (
        open_link(f"udp://127.0.0.1:{free_port()}") as link,
        pytest.raises(LinkError, match="65508 bytes do not fit in a datagram"),
    ):
        link.write(bytes(65508))


@pytest.mark.parametrize(
    ("program", "end"),
    [
        ("raise SystemExit(3)", "exit status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    ],
    ids=["by itself", "by a signal"],
)
def test_a_process_that_ended_is_told_with_how(program: str, end: str) -> None:
    with (
        ProcessLink([sys.executable, "-c", program], name="device") as link,
        pytest.raises(LinkClosed, match=f"serial:device ended with {end}"),
    ):
        link.read(FOREVER)


def test_a_process_that_only_closes_its_output_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAVE", 0.01)
    program = "import os; os.close(1); os.read(0, 1); os._exit(0)"
    with (
        ProcessLink([sys.executable, "-c", program]) as link,
        pytest.raises(LinkClosed, match="and still runs"),
    ):
        link.read(FOREVER)


def test_a_process_ends_by_itself_when_its_link_is_closed() -> None:
    with ProcessLink(["cat"]) as link:
        pass
    assert link._process.returncode == 0


def test_a_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAVE", 0.01)
    with ProcessLink(["sleep", "600"]) as link:
        pass
    assert link._process.returncode == -signal.SIGKILL


def test_a_program_that_is_not_there_is_told() -> None:
    with pytest.raises(LinkError, match=r"cannot start /no/program \(no such file or directory\)"):
        ProcessLink(["/no/program"])


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost",
        "http://localhost:80",
        "tcp:localhost:80",
        "tcp://localhost",
        "tcp://:80",
        "tcp://localhost:0",
        "tcp://localhost:65536",
        "tcp://localhost:port",
        "tcp://localhost:80/path",
        "udp://localhost:80?baud=9600",
        "socket://localhost:80?logging=debug",
        "socket://localhost:80?baud=9600",
        "rfc2217://localhost:80?baud=fast",
        "serial:",
        "serial:/dev/ttyACM0?baud=0",
        "/dev/ttyACM0?speed=9600",
        "tcp://[::1:80",
    ],
)
def test_what_is_no_link_is_refused_with_the_forms_there_are(url: str) -> None:
    with pytest.raises(LinkError) as caught:
        open_link(url)
    assert repr(url) in str(caught.value)
    for form in ("serial:/dev/", "usb:", "rfc2217://", "socket://", "tcp://", "udp://"):
        assert form in str(caught.value)


def test_nobody_connecting_is_a_timeout() -> None:
    with (
        serve_tcp() as listener,
        pytest.raises(Timeout, match=rf"nobody connected to {listener.url} for 0.01 s"),
    ):
        listener.accept(0.01)


def test_closing_in_another_thread_ends_an_accept_that_waits() -> None:
    with serve_tcp() as listener:
        accepting = Attempt(listener.accept)
        accepting.until_it_waits()
        listener.close()
        assert "was closed on this side" in str(accepting.ended_with())
        with pytest.raises(LinkClosed):
            listener.accept()


def test_a_port_in_use_cannot_be_listened_on() -> None:
    with serve_tcp() as listener:
        port = int(listener.url.rpartition(":")[2])
        with pytest.raises(LinkError, match="choose another port, or 0 for any free one"):
            serve_tcp(port=port)


def test_the_newer_internet_protocol_works_as_well() -> None:
    try:
        listener = serve_tcp("::1")
    except LinkError:
        pytest.skip("needs IPv6 on this machine")
    with listener, open_link(listener.url) as far, listener.accept(FOREVER) as near:
        assert listener.url.startswith("tcp://[::1]:")
        far.write(FRAME)
        assert read_bytes(near, len(FRAME)) == FRAME
