"""The ports, each held to ``firmware/core/port.h`` by small programs around it."""

from __future__ import annotations

import random
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from qmp_harness import Control
from splitee.errors import BuildError, LinkClosed
from splitee_host.boards import Board, Firmware, build, load_boards, start
from splitee_host.link import Link

HERE = Path(__file__).parent
ANSWER = 20.0  # seconds to wait for what has to come; no test waits that long when all is well

BOARDS = load_boards()
EMULATED = [b for b in BOARDS.values() if b.qemu is not None]
BARE_METAL = [BOARDS["qemu-m4"], BOARDS["qemu-rv32f"]]  # a board for each port without system


def name(board: Board) -> str:
    return board.name


BuildProgram = Callable[..., Firmware]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> BuildProgram:
    """Builds a C file of this folder, which has a main, for a board: the port and nothing else."""

    def program(board: Board, source: str, *flags: str, sanitize: bool = False) -> Firmware:
        tools = [f"{board.prefix}gcc", *([board.qemu.program] if board.qemu else [])]
        for tool in tools:
            if shutil.which(tool) is None:
                pytest.skip(f"{tool} is not installed")
        folder = tmp_path_factory.mktemp("program")
        shutil.copy(HERE / source, folder / "segment.c")
        board = replace(board, cflags=(*board.cflags, *flags))
        return build(board, folder, folder, sanitize=sanitize, overrides={"PROGRAM": ""})

    return program


def receive(link: Link, size: int) -> bytes:
    """The next size bytes of a link."""
    content = b""
    while len(content) < size:
        chunk = link.read(ANSWER)
        assert chunk, f"only {len(content)} of {size} bytes came"
        content += chunk
    assert len(content) == size
    return content


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


# ---- any port ----


@pytest.mark.parametrize("board", [BOARDS["posix"], *EMULATED], ids=name)
def test_bytes_come_back_equal(board: Board, program: BuildProgram) -> None:
    with start(board, program(board, "echo.c")) as running:
        for size in (1, 2, 255, 256, 1460, 1460, 7):
            sent = noise(size)
            running.link.write(sent)
            assert receive(running.link, size) == sent


# ---- posix ----


@contextmanager
def process(firmware: Firmware, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [firmware.elf, *arguments],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def udp_address(child: subprocess.Popen[bytes]) -> tuple[str, int]:
    """Where a process listens, as it printed it."""
    assert child.stdout is not None
    word, address = child.stdout.readline().decode().split()
    assert word == "udp"
    host, port = address.split(":")
    return host, int(port)


@contextmanager
def udp_socket() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as near:
        near.settimeout(ANSWER)
        yield near


@pytest.fixture(scope="module")
def posix_echo(program: BuildProgram) -> Firmware:
    return program(BOARDS["posix"], "echo.c", sanitize=True)


def test_posix_carries_a_stream_over_stdin_and_stdout_and_ends_with_it(
    posix_echo: Firmware,
) -> None:
    with process(posix_echo) as child:
        sent = noise(200_000)
        received, said = child.communicate(sent, timeout=ANSWER)
        assert received == sent
        assert (child.returncode, said) == (0, b"")


def test_posix_answers_whoever_sent_the_last_datagram(posix_echo: Firmware) -> None:
    with process(posix_echo, "--udp", "0") as child, udp_socket() as one, udp_socket() as other:
        address = udp_address(child)
        assert address[0] == "127.0.0.1"
        for near in (one, other, one):
            near.sendto(noise(1472), address)
            assert near.recvfrom(65536) == (noise(1472), address)


def test_posix_hands_a_large_datagram_out_in_pieces(posix_echo: Firmware) -> None:
    sent = noise(10_000)  # echo.c reads 4,096 bytes at once and sends them as a datagram
    with process(posix_echo, "--udp", "0") as child, udp_socket() as near:
        near.sendto(sent, udp_address(child))
        assert [near.recv(65536) for _ in range(3)] == [
            sent[:4096], sent[4096:8192], sent[8192:]
        ]  # fmt: skip


def test_posix_outlives_a_host_that_left_before_its_answer(posix_echo: Firmware) -> None:
    with process(posix_echo, "--udp", "0") as child, udp_socket() as second:
        address = udp_address(child)
        for _ in range(20):
            with udp_socket() as first:
                first.sendto(b"who is there?", address)
        second.sendto(b"hello", address)
        assert second.recv(100) == b"hello"


@pytest.mark.parametrize("arguments", [[], ["--udp", "0"]], ids=["stream", "udp"])
def test_posix_ends_well_at_the_end_of_stdin(posix_echo: Firmware, arguments: list[str]) -> None:
    with process(posix_echo, *arguments) as child:
        child.communicate(timeout=ANSWER)
        assert child.returncode == 0


@pytest.mark.parametrize("arguments", [[], ["--udp", "0"]], ids=["stream", "udp"])
def test_posix_ends_well_when_terminated(posix_echo: Firmware, arguments: list[str]) -> None:
    with process(posix_echo, *arguments) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        if arguments:
            udp_address(child)
        else:  # once a byte has come back the port is up
            child.stdin.write(b"x")
            child.stdout.read(1)
        child.terminate()
        assert child.wait(ANSWER) == 0


@pytest.mark.parametrize(
    "arguments",
    [["--udp"], ["--udp", "x"], ["--udp", ""], ["--udp", "65536"], ["--bind", "127.0.0.1"],
     ["--udp", "0", "--bind", "nowhere"], ["--upd", "0"]],
    ids=" ".join,
)  # fmt: skip
def test_posix_refuses_arguments_that_it_does_not_know(
    posix_echo: Firmware, arguments: list[str]
) -> None:
    with process(posix_echo, *arguments) as child:
        received, said = child.communicate(timeout=ANSWER)
        assert child.returncode == 2
        assert received == b""
        assert said.startswith(b"usage: device [--udp PORT")


def test_posix_says_when_its_port_is_taken(posix_echo: Firmware) -> None:
    with udp_socket() as other:
        other.bind(("127.0.0.1", 0))
        with process(posix_echo, "--udp", str(other.getsockname()[1])) as child:
            _, said = child.communicate(timeout=ANSWER)
            assert child.returncode == 2
            assert said == b"cannot bind the UDP port: Address already in use\n"


def test_posix_listens_on_the_address_it_is_given(posix_echo: Firmware) -> None:
    with process(posix_echo, "--bind", "127.0.0.2", "--udp", "0") as child, udp_socket() as near:
        address = udp_address(child)
        assert address[0] == "127.0.0.2"
        near.sendto(b"hello", address)
        assert near.recv(100) == b"hello"


# ---- bare metal ----


@pytest.mark.parametrize("board", BARE_METAL, ids=name)
def test_a_board_loses_nothing_of_a_long_stream(board: Board, program: BuildProgram) -> None:
    with start(board, program(board, "echo.c")) as running:
        sent = noise(50_000)
        running.link.write(sent)
        assert receive(running.link, len(sent)) == sent


@pytest.mark.parametrize("board", BARE_METAL, ids=name)
def test_a_board_loses_nothing_while_it_does_something_else(
    board: Board, program: BuildProgram
) -> None:
    # the ring fills in a fifth of it
    firmware = program(board, "echo.c", "-DPAUSE_MICROS=100000u")
    with start(board, firmware) as running:
        sent = noise(10_000)
        running.link.write(sent)
        assert receive(running.link, len(sent)) == sent


@pytest.mark.parametrize("board", BARE_METAL, ids=name)
def test_a_board_gets_what_was_sent_before_it_ran(
    board: Board, program: BuildProgram, tmp_path: Path
) -> None:
    firmware = program(board, "echo.c")
    with Control(tmp_path) as control, start(board, firmware, ["-S", *control.options]) as running:
        running.link.write(b"are you there?")
        # the queries give QEMU the time to take the bytes
        control.execute(*[("query-status", {})] * 10, ("cont", {}))
        assert receive(running.link, 14) == b"are you there?"


@pytest.mark.parametrize("board", EMULATED, ids=name)
def test_a_clock_agrees_with_another_clock_of_the_board(
    board: Board, program: BuildProgram
) -> None:
    # counted time: an instruction is 64 ns, whatever else this machine does meanwhile
    counted = ["-icount", "shift=6", "-rtc", "clock=vm"]
    with start(board, program(board, "clock.c"), counted) as running:
        running.link.write(b"?")
        elapsed, back, leaps = struct.unpack("<3I", receive(running.link, 12))
    assert (back, leaps) == (0, 0)
    assert abs(elapsed - 1_500_000) < 50


@pytest.mark.parametrize("board", BARE_METAL, ids=name)
def test_a_clock_never_goes_back_in_real_time(board: Board, program: BuildProgram) -> None:
    with start(board, program(board, "clock.c")) as running:
        running.link.write(b"?")
        _, back, _ = struct.unpack("<3I", receive(running.link, 12))
    assert back == 0


@pytest.mark.parametrize("board", EMULATED, ids=name)
def test_a_stack_that_overflows_ends_the_emulator_instead_of_overwriting_data(
    board: Board, program: BuildProgram
) -> None:
    forbidden_write = 7  # RISC-V: the fault is the status
    status, words = -signal.SIGABRT, r"SIGABRT\n.*Lockup"
    if board.port == "rv32":
        status, words = forbidden_write, f"status {forbidden_write}$"
    with start(board, program(board, "deep.c")) as running:
        running.link.write(b"!")
        with pytest.raises(LinkClosed, match=f"^{board.name} ended with {words}"):
            receive(running.link, 1)
        assert running.process.returncode == status


def used_stack(board: Board, program: BuildProgram, depth: int) -> int:
    """What a firmware says that has gone so deep."""
    with start(board, program(board, "stack.c", f"-DDEPTH={depth}u")) as running:
        running.link.write(b"?")
        used = int.from_bytes(receive(running.link, 4), "little")
        running.link.write(b"?")
        assert int.from_bytes(receive(running.link, 4), "little") == used
    return used


@pytest.mark.parametrize("board", EMULATED, ids=name)
def test_a_board_tells_how_deep_its_stack_ever_was(board: Board, program: BuildProgram) -> None:
    shallow, deep = (used_stack(board, program, depth) for depth in (768, 1536))
    assert 768 < shallow < 768 + 128  # and what main and the call take
    assert deep == shallow + 768


def test_a_process_does_not_know_its_stack(program: BuildProgram) -> None:
    assert used_stack(BOARDS["posix"], program, 768) == 0


@pytest.mark.parametrize(
    ("stack_bytes", "words"), [(512, "less than 1 KB"), (2050, "not a multiple of")]
)
@pytest.mark.parametrize("board", BARE_METAL, ids=name)
def test_a_stack_that_cannot_work_is_refused(
    board: Board, program: BuildProgram, stack_bytes: int, words: str
) -> None:
    with pytest.raises(BuildError, match=words):
        program(replace(board, stack_bytes=stack_bytes), "echo.c")


@pytest.mark.parametrize("board", BARE_METAL, ids=name)
def test_frames_larger_than_the_ring_are_refused(board: Board, program: BuildProgram) -> None:
    program(replace(board, receive_max=2029), "echo.c")  # coded: 2029 + 9, 8 and 2 more
    with pytest.raises(BuildError, match="a frame does not fit the ring"):
        program(replace(board, receive_max=2031), "echo.c")


def test_a_port_that_serves_several_machines_refuses_a_board_that_names_none(
    program: BuildProgram,
) -> None:
    m4 = BOARDS["qemu-m4"]
    nameless = replace(m4, cflags=tuple(f for f in m4.cflags if not f.startswith("-DMPS")))
    with pytest.raises(BuildError, match="name no machine: add -DMPS2_AN386"):
        program(nameless, "echo.c")
