"""Boards: what is known of each, building its firmware, and starting those that this machine runs.

A board is ``firmware/boards/<name>.toml``; ``Board`` says what stands there, and with ``like`` a
file has all that another has and itself does not. ``build`` runs the
firmware's Makefile with a board's values. ``start`` brings up a process or an emulator, with a link
to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from splitee.errors import BuildError, FitError, LinkClosed, MissingTool, SpliteeError, Timeout
from splitee.place import Memory
from splitee_host.link import Link, PipeLink, UdpLink
from splitee_host.memory import Elf, measure

if TYPE_CHECKING:
    from splitee import assemble

_BOOT = 20.0  # seconds that a board has to open its link
_LEAVE = 2.0  # seconds that a process has to end by itself
_SLICE = 0.25  # seconds after which a read looks whether the process still runs
_LOST = "Slirp: Failed to send packet"  # what QEMU says of each that a board has no room for

_PACKAGES = {
    "make": "make",
    "gcc": "gcc libc6-dev",
    "arm-none-eabi-gcc": "gcc-arm-none-eabi picolibc-arm-none-eabi",
    "riscv64-unknown-elf-gcc": "gcc-riscv64-unknown-elf picolibc-riscv64-unknown-elf",
    "qemu-system-arm": "qemu-system-arm",
    "qemu-system-riscv32": "qemu-system-misc",
}
"""Debian's packages that bring a tool."""

_NO_OVERRIDES: Mapping[str, str] = MappingProxyType({})


# ---- what boards there are ----


@dataclass(frozen=True)
class Qemu:
    """How QEMU emulates a board."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    machine: str  # its option -machine
    arch: Literal["arm", "riscv32"] = "arm"
    options: tuple[str, ...] = ()  # further ones

    @property
    def program(self) -> str:
        """The QEMU that emulates this architecture."""
        return f"qemu-system-{self.arch}"


@dataclass(frozen=True)
class Udp:
    """Where a board's firmware is on its network."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    address: IPv4Address
    port: Annotated[int, Field(ge=1, le=65535)]


@dataclass(frozen=True)
class Board:
    """A machine that clients run on. Sizes are in bytes; 0 means no limit that we know of."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    title: str
    tier: Literal["mcu", "edge", "host"]
    core: str
    status: str  # how far it was run
    port: str  # folder under firmware/ports, or "python" or "torch": no firmware
    link: Literal["serial", "udp", "tcp", "memory"]
    stands_for: str = ""
    receive_max: int = 0  # largest body of a frame that it receives
    flash_start: int = 0  # address
    flash_bytes: int = 0
    ram_start: int = 0  # address
    ram_bytes: int = 0
    stack_bytes: int = 0
    shard_start: int = 0  # address of a memory for the shard alone
    shard_bytes: int = 0  # 0: there is none, the shard is in RAM with the rest
    code_bytes: int = 0  # flash of the firmware without a segment; a test holds it to be enough
    static_bytes: int = 0  # RAM of the firmware without a segment and without stack; likewise
    prefix: str = ""  # of the compiler's name, as arm-none-eabi-
    cflags: tuple[str, ...] = ()
    ldflags: tuple[str, ...] = ()
    qemu: Qemu | None = None
    udp: Udp | None = None  # None over UDP: chosen when it is run

    @property
    def firmware(self) -> bool:
        """Whether it runs the C firmware, and so a segment that is built in."""
        return self.port not in ("python", "torch")

    @property
    def for_assembly(self) -> assemble.Board:
        """What assembling a fleet needs to know."""
        from splitee import assemble  # brings torch in, which listing boards can do without
        from splitee.place import Room

        if not self.firmware:
            return assemble.Board(firmware=False, room=None, here=self.port == "torch")
        room = Room(
            ram=self.ram_bytes or sys.maxsize,
            flash=self.flash_bytes or sys.maxsize,
            code=self.code_bytes,
            static=self.static_bytes,
            stack=self.stack_bytes,
            shard=self.shard_bytes or None,
        )
        return assemble.Board(firmware=True, room=room)


def firmware_root() -> Path:
    """The folder of the firmware's sources: the checkout's, or what was installed with us."""
    here = Path(__file__).resolve().parent
    checkout = here.parents[1] / "firmware"
    return checkout if (checkout / "core" / "port.h").exists() else here / "_firmware"


def load_boards(folder: Path | None = None) -> dict[str, Board]:
    """The boards there are, by name: those of a folder of TOML files, or our own.

    Raises SpliteeError, naming file and key, for a file that cannot be used.
    """
    files = sorted((folder or firmware_root() / "boards").glob("*.toml"))
    return {path.stem: _read(path) for path in files}


def look_up(boards: Mapping[str, Board], name: str) -> Board:
    """A board by name; SpliteeError lists those there are."""
    if name not in boards:
        raise SpliteeError(f'there is no board "{name}": there are {", ".join(boards)}')
    return boards[name]


def _read(path: Path) -> Board:
    try:
        board = TypeAdapter(Board).validate_python(_table(path))
    except tomllib.TOMLDecodeError as error:
        raise SpliteeError(f"{path}: not TOML: {error}") from error
    except ValidationError as error:
        found = error.errors()[0]
        key = ".".join(str(part) for part in found["loc"])
        raise SpliteeError(f"{path}: {key}: {found['msg']}") from error
    if board.name != path.stem:
        raise SpliteeError(f'{path}: name: has to be the file\'s, "{path.stem}"')
    return board


def _table(path: Path) -> dict[str, object]:
    """What a board's file says, on top of what the board says that it is like."""
    table = tomllib.loads(path.read_text("utf-8"))
    if "like" not in table:
        return table
    other = path.with_name(f"{table.pop('like')}.toml")
    base = tomllib.loads(other.read_text("utf-8")) if other.exists() else {"like": None}
    if "like" in base:
        raise SpliteeError(f"{path}: like: {other.name} is no board's file with all of its keys")
    return base | table


# ---- building ----


@dataclass(frozen=True)
class Firmware:
    """A firmware that was built."""

    elf: Path
    flash_bytes: int  # code, constants and the initial values of variables
    memory: Memory  # that it takes beside flash, by part
    sections: Mapping[str, int]  # bytes of every section that is loaded or kept in RAM

    @property
    def ram_bytes(self) -> int:
        """Variables, and the stack where the linker sets it aside."""
        return self.memory.ram


def build(
    board: Board,
    segment_dir: Path,
    out_dir: Path,
    *,
    sanitize: bool = False,
    overrides: Mapping[str, str] = _NO_OVERRIDES,
) -> Firmware:
    """Builds a board's firmware around segment_dir/segment.c; everything made is in out_dir.

    What is up to date is not made again, and a second build of the same out_dir waits for the
    first. sanitize: with address and undefined-behaviour sanitizers (ports of this machine).
    overrides: variables of firmware/Makefile to replace. Raises FitError when it is larger than
    the board, BuildError with the compiler's words, MissingTool when there is no compiler.
    """
    compiler = f"{board.prefix}gcc"
    _require("make", compiler)
    variables = {
        "PORT": board.port,
        "SEGMENT": str(segment_dir.resolve()),
        "OUT": str(out_dir.resolve()),
        "CROSS": board.prefix,
        "BOARD_CFLAGS": " ".join(board.cflags),
        "BOARD_LDFLAGS": " ".join(board.ldflags),
        "FLASH_START": hex(board.flash_start),
        "FLASH_BYTES": str(board.flash_bytes),
        "RAM_START": hex(board.ram_start),
        "RAM_BYTES": str(board.ram_bytes),
        "STACK_BYTES": str(board.stack_bytes),
        "SHARD_START": hex(board.shard_start),
        "SHARD_BYTES": str(board.shard_bytes),
        "RECEIVE_MAX": str(board.receive_max),
        "LINK": board.link,
        "UDP_ADDRESS": str(board.udp.address) if board.udp else "",
        "UDP_PORT": str(board.udp.port) if board.udp else "",
        "SANITIZE": str(int(sanitize)),
        **overrides,
    }
    for path in (segment_dir.resolve(), out_dir.resolve()):
        if re.search(r"[\s:$#%]", str(path)):
            raise BuildError(f'make cannot work in "{path}": take a folder without spaces or :$#%')
    command = ["make", "-s", f"-j{os.cpu_count()}", "-C", str(firmware_root())]
    command += [f"{name}={value}" for name, value in variables.items()]
    # A make that runs us must not hand its own options and variables on.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    with _lock(out_dir):
        made = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env={**environment, "LC_ALL": "C"},
        )
        if made.returncode != 0:
            raise _failure(board, made.stderr)
        firmware = read_elf(out_dir / "device.elf")
    if board.ram_bytes and firmware.ram_bytes > board.ram_bytes:
        raise _misfit(board, {"RAM": firmware.ram_bytes - board.ram_bytes})
    return firmware


def _require(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            package = _PACKAGES.get(tool)
            cure = f"`make setup`, or `sudo apt-get install {package}`" if package else "install it"
            raise MissingTool(f"{tool} is not installed: {cure}")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Holds a folder for this process and thread alone; makes it if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go of by closing
        yield


def _failure(board: Board, said: str) -> SpliteeError:
    """Why make failed, from what it and the compiler said."""
    if missing := re.findall(r"region `?(\w+)' overflowed by (\d+) bytes", said):
        return _misfit(board, {region: int(size) for region, size in missing})
    if re.search(r"cannot read spec file '\S*picolibc", said):
        package = f"picolibc-{board.prefix}".removesuffix("-")
        return MissingTool(
            f"picolibc is not installed: `make setup`, or `sudo apt-get install {package}`"
        )
    lines = [line for line in said.splitlines() if line.strip()]
    telling = re.compile(r"\berror: (?!ld returned)|undefined reference|\bld: (?!.*in function)")
    errors = [line for line in lines if telling.search(line)]
    first = "\n  ".join((errors or lines)[:5])
    return BuildError(f"the firmware for {board.name} did not build:\n  {first}")


def _misfit(board: Board, missing: Mapping[str, int]) -> FitError:
    there = {
        "RAM": ("RAM", board.ram_bytes),
        "FLASH": ("flash", board.flash_bytes),
        "SHARD": ("memory for its shard", board.shard_bytes),
    }
    listed = " and ".join(
        f"{size:,} bytes more {there[region][0]} than the {there[region][1]:,} there are"
        for region, size in missing.items()
    )
    return FitError(
        f"the firmware does not fit {board.name}, it takes {listed}: cut earlier, lower the "
        "client's capacity or share, or take a larger board"
    )


def read_elf(path: Path) -> Firmware:
    """A firmware's sizes, from its ELF file."""
    elf = Elf(path)
    flash = sum(s.size for s in elf.sections if s.flashed)
    return Firmware(path, flash, measure(elf), elf.kept())


# ---- starting ----


class Running:
    """A board that runs as a process of this machine; it ends with ``close``, or with us.

    ``link`` leads to it; once the process has ended it raises LinkClosed with the process's status
    and words. ``process`` is QEMU or the firmware itself.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        connect: Callable[[subprocess.Popen[bytes]], Link | None],
        *,
        ends_with_stdin: bool,
    ) -> None:
        """Starts command. connect is asked again and again until it gives the link.

        ends_with_stdin: the process ends by itself at the end of its standard input.
        """
        self.name = name
        with contextlib.ExitStack() as undo:
            self._said = undo.enter_context(tempfile.TemporaryFile())
            try:
                # A group of its own: Ctrl-C is for us, and we end our boards in order.
                self.process = subprocess.Popen(
                    command,
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._said,
                    process_group=0,
                )
            except OSError as error:
                raise SpliteeError(
                    f"{name}: cannot start {command[0]}: {error.strerror}: build it again"
                ) from error
            undo.callback(_end, self.process, _LEAVE if ends_with_stdin else 0)
            self._watcher = None if ends_with_stdin else _watch(self.process.pid)
            undo.callback(self._dismiss_watcher)
            self.link: Link = _ProcessLink(self._connected(connect), self)
            undo.callback(self.link.close)
            self._ends = undo.pop_all()

    def _connected(self, connect: Callable[[subprocess.Popen[bytes]], Link | None]) -> Link:
        deadline = time.monotonic() + _BOOT
        while time.monotonic() < deadline:
            if link := connect(self.process):
                return link
            if obituary := self.obituary():
                raise LinkClosed(obituary)
        raise Timeout(
            f"{self.name} did not open its link for {_BOOT:g} s: is the machine too busy?"
        )

    def obituary(self, wait: float = 0) -> str | None:
        """How the process ended and what it said, as soon as it has; None while it runs."""
        try:
            status = self.process.wait(wait)
        except subprocess.TimeoutExpired:
            return None
        self._dismiss_watcher()
        how = f"status {status}" if status >= 0 else signal.Signals(-status).name
        lines: list[str] = []
        with contextlib.suppress(ValueError):  # closed meanwhile
            self._said.seek(0)
            lines = self._said.read().decode(errors="replace").splitlines()
        words = [line.strip("=\0") for line in lines if line.strip("=\0 ") and _LOST not in line]
        # The cause comes first; registers and stacks follow.
        return f"{self.name} ended with {how}" + "".join(f"\n  {line}" for line in words[:3])

    def _dismiss_watcher(self) -> None:
        """Before the process's number can become another's."""
        if self._watcher is not None:
            assert self._watcher.stdin is not None
            self._watcher.kill()
            self._watcher.wait()
            self._watcher.stdin.close()

    def close(self) -> None:
        """Closes the link and ends the process; a second time does nothing."""
        self._ends.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def start(board: Board, firmware: Firmware, options: Sequence[str] = ()) -> Running:
    """Runs a board's firmware on this machine and opens the link to it.

    options: further ones for QEMU, or for the firmware's process. Raises MissingTool when QEMU is
    not installed, LinkClosed when the process ends at once, and SpliteeError for a board that
    this machine cannot run.
    """
    if board.qemu is not None:
        return _start_qemu(board, board.qemu, firmware, options)
    if board.port == "posix":
        command = [str(firmware.elf), "--udp", "0", *options]
        return Running(board.name, command, _printed_link, ends_with_stdin=True)
    raise SpliteeError(
        f"{board.name} is no board that this machine can run: load {firmware.elf} into it, and "
        "give its link in the fleet file"
    )


def _start_qemu(board: Board, qemu: Qemu, firmware: Firmware, options: Sequence[str]) -> Running:
    _require(qemu.program)
    command = [
        *(qemu.program, *qemu.options, *options),
        *("-machine", qemu.machine, "-kernel", str(firmware.elf)),
        *("-display", "none", "-monitor", "none"),
    ]
    if board.udp is not None:
        command += _qemu_network(board.udp)
        return Running(board.name, command, _forwarded_link, ends_with_stdin=False)
    command += _QEMU_SERIAL
    return Running(
        board.name, command, lambda p: PipeLink(p, f"serial:{board.name}"), ends_with_stdin=False
    )


# The board's serial line is QEMU's standard input and output.
#
# Of all that QEMU offers pipes are the fastest, three times as fast upwards as a socket or a
# pseudo-terminal, and lose nothing: a pseudo-terminal looks for somebody at its other end once a
# second, and drops what is sent until then. mux=on hands the UART 32 bytes at a time instead of
# one, three times as fast downwards; -echr turns off the escape character that comes with it.
_QEMU_SERIAL = (
    *("-chardev", "stdio,id=link,mux=on,signal=off"),
    *("-serial", "chardev:link", "-echr", "0x1ff"),
)


def _qemu_network(udp: Udp) -> Sequence[str]:
    """A network of the board's own, with a free port of this machine that leads to it.

    QEMU is asked for the port over its control line, standard input and output.
    """
    forward = f"hostfwd=udp:127.0.0.1:0-{udp.address}:{udp.port}"
    return "-nic", f"user,{forward}", "-serial", "null", "-qmp", "stdio"


def _forwarded_link(process: subprocess.Popen[bytes]) -> Link | None:
    """The link to the port that leads to an emulated board's network."""
    assert process.stdin is not None
    assert process.stdout is not None
    ask = {"execute": "human-monitor-command", "arguments": {"command-line": "info usernet"}}
    if b"QMP" not in process.stdout.readline():  # its greeting, or its end
        return None
    for command in ({"execute": "qmp_capabilities"}, ask):
        process.stdin.write(json.dumps(command).encode())
    while line := process.stdout.readline():
        if found := re.search(rb"UDP\[HOST_FORWARD\] +\d+ +127\.0\.0\.1 +(\d+)", line):
            return UdpLink("127.0.0.1", int(found[1]))
    return None


def _printed_link(process: subprocess.Popen[bytes]) -> Link | None:
    """The link to the port that a firmware of the posix port printed."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], _SLICE)[0]:
        return None
    found = re.fullmatch(rb"udp ([\d.]+):(\d+)\n", process.stdout.readline())
    return UdpLink(found[1].decode(), int(found[2])) if found else None


def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    """Ends a process: by the end of its input, and after patience seconds without asking."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    process.kill()
    process.wait()
    process.stdout.close()


def _watch(pid: int) -> subprocess.Popen[bytes]:
    """A shell that kills a process when we end, however we end: its input ends with us then."""
    command = ["/bin/sh", "-c", 'read -r line; kill -9 "$1"', "sh", str(pid)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)


class _ProcessLink:
    """A link that knows when the process at its other end has ended, and how."""

    def __init__(self, link: Link, running: Running) -> None:
        self.kind = link.kind
        self.name = link.name
        self._link = link
        self._running = running
        self._closed = False

    def write(self, data: bytes) -> None:
        if not self._closed and (obituary := self._running.obituary()):
            raise LinkClosed(obituary)
        with self._explained():
            self._link.write(data)

    def read(self, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            with self._explained():
                data = self._link.read(max(0, min(left, _SLICE)))
            if data:
                return data
            if obituary := self._running.obituary():  # over UDP nothing else tells
                raise LinkClosed(obituary)
            if left <= _SLICE:
                return b""

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Says how the process ended, where the link only knows that it is closed."""
        try:
            yield
        except LinkClosed as error:
            obituary = None if self._closed else self._running.obituary(_LEAVE)
            raise LinkClosed(obituary or str(error)) from error

    def close(self) -> None:
        self._closed = True
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
