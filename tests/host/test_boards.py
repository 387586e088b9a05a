"""Boards: their files, what is built for them, and those that this machine starts."""

from __future__ import annotations

import fcntl
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from qmp_harness import Control
from splitee.errors import BuildError, FitError, LinkClosed, MissingTool, SpliteeError
from splitee.place import Memory
from splitee_exporters.c import to_c
from splitee_host import boards
from splitee_host.boards import Board, Firmware, Udp, build, load_boards, look_up, start
from splitee_host.device import Device
from step_harness import SETTINGS, case_on

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(str(ROOT / root) for root in ("toolkit", "exporters", "host"))
ANSWER = 20.0  # seconds to wait for what has to come; no test waits that long when all is well

BOARDS = load_boards()
POSIX = BOARDS["posix"]
M4 = BOARDS["qemu-m4"]
M4_UDP = BOARDS["qemu-m4-udp"]
RV32 = BOARDS["qemu-rv32"]
FIRMWARE = [b for b in BOARDS.values() if b.firmware]
EMULATED = [b for b in BOARDS.values() if b.qemu is not None]
PORT_ONLY = {"PROGRAM": ""}  # with a segment.c that has a main
NOTHING = Memory(arena=0, weights=0, labels=0, shard=0, static=0, stack=0)

ECHO = (ROOT / "tests" / "firmware" / "echo.c").read_text()


def need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def need_for(board: Board) -> None:
    need("make", f"{board.prefix}gcc", *([board.qemu.program] if board.qemu else []))


WriteSegment = Callable[[str], Path]


@pytest.fixture
def segment(tmp_path: Path) -> WriteSegment:
    """Writes segment.c; the folder it is in, where it may be built too."""

    def segment(text: str) -> Path:
        folder = tmp_path / "segment"
        folder.mkdir(exist_ok=True)
        (folder / "segment.c").write_text(text)
        return folder

    return segment


def name(board: Board) -> str:
    return board.name


@pytest.fixture(params=[POSIX, M4, M4_UDP, RV32], ids=name)
def board(request: pytest.FixtureRequest) -> Board:
    found: Board = request.param
    need_for(found)
    return found


# ---- what boards there are ----


def test_every_tier_has_a_board() -> None:
    assert {b.tier for b in BOARDS.values()} == {"mcu", "edge", "host"}


def test_firmware_boards_have_a_port_and_all_sizes_that_planning_needs() -> None:
    for b in BOARDS.values():
        ports = boards.firmware_root() / "ports"
        assert b.firmware == (ports / b.port).is_dir()
        assert (b.shard_start > 0) == (b.shard_bytes > 0)
        sizes = (b.ram_bytes, b.stack_bytes, b.code_bytes, b.static_bytes, b.receive_max)
        assert all(sizes) if b.firmware else not any(sizes)


def test_planning_sees_the_memory_of_a_board() -> None:
    room = M4.for_assembly.room
    assert room is not None
    assert (room.flash, room.ram) == (1 << 20, 256 << 10)  # nRF52840 Product Specification, 1
    assert (room.code, room.static, room.stack) == (M4.code_bytes, M4.static_bytes, M4.stack_bytes)
    assert room.shard is None
    p4 = BOARDS["qemu-rv32f"].for_assembly.room
    assert p4 is not None
    assert p4.shard == 32 << 20  # ESP32-P4NRW32: the number of its PSRAM
    assert BOARDS["torch"].for_assembly.room is None
    assert not BOARDS["torch"].for_assembly.firmware


def test_an_unknown_board_is_answered_with_those_there_are() -> None:
    with pytest.raises(
        SpliteeError, match=r'no board "qemu-m5": .*posix, python, .*qemu-m4, .*torch'
    ):
        look_up(BOARDS, "qemu-m5")


GOOD = """
name = "mine"
title = "t"
tier = "mcu"
core = "c"
status = "s"
port = "mps2"
link = "serial"
cflags = ["-mthumb"]
"""


def test_a_board_needs_no_more_than_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(GOOD)
    mine = Board(
        name="mine", title="t", tier="mcu", core="c", status="s", port="mps2", link="serial",
        cflags=("-mthumb",),
    )  # fmt: skip
    assert load_boards(tmp_path) == {"mine": mine}


def test_a_board_has_what_the_board_has_that_it_is_like(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(GOOD)
    udp = '[udp]\naddress = "10.0.2.15"\nport = 5000\n'
    text = 'name = "net"\nlike = "mine"\nlink = "udp"\ncflags = []\n' + udp
    (tmp_path / "net.toml").write_text(text)
    known = load_boards(tmp_path)
    there = Udp(IPv4Address("10.0.2.15"), 5000)
    assert known["net"] == replace(known["mine"], name="net", link="udp", cflags=(), udp=there)


@pytest.mark.parametrize("like", ["nobody", "other", "mine"])
def test_a_board_can_only_be_like_one_with_a_whole_file(tmp_path: Path, like: str) -> None:
    (tmp_path / "whole.toml").write_text(GOOD.replace("mine", "whole"))
    (tmp_path / "other.toml").write_text('name = "other"\nlike = "whole"')
    (tmp_path / "mine.toml").write_text(f'name = "mine"\nlike = "{like}"')
    words = rf"mine\.toml: like: {like}\.toml is no board's file with all of its keys"
    with pytest.raises(SpliteeError, match=words):
        load_boards(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + "ram_byte = 1", r"mine\.toml: ram_byte: "),
        (GOOD + 'ram_bytes = "much"', r"mine\.toml: ram_bytes: .*integer"),
        (GOOD.replace("serial", "radio"), r"mine\.toml: link: .*'serial', 'udp', 'tcp'"),
        (GOOD.replace('core = "c"', ""), r"mine\.toml: core: "),
        (GOOD.replace("mine", "other"), r'mine\.toml: name: has to be the file\'s, "mine"'),
        (GOOD + "[qemu]", r"mine\.toml: qemu\.machine: "),
        (GOOD + '[qemu]\nmachine = "m"\narch = "z80"', r"qemu\.arch: .*'arm' or 'riscv32'"),
        (GOOD + '[udp]\naddress = "10.0.2"\nport = 1', r"mine\.toml: udp\.address: .*IPv4"),
        (GOOD + '[udp]\naddress = "10.0.2.1"\nport = 0', r"mine\.toml: udp\.port: "),
        ("name = \n", r"mine\.toml: not TOML: .*line 1"),
    ],
    ids=[
        "unknown key",
        "wrong type",
        "unknown link",
        "missing key",
        "other name",
        "part",
        "unknown architecture",
        "address",
        "port",
        "syntax",
    ],
)
def test_a_wrong_board_file_is_refused_by_file_and_key(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(SpliteeError, match=words):
        load_boards(tmp_path)


def test_an_installed_host_uses_the_firmware_that_came_with_it(tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    shutil.copytree(ROOT / "host" / "splitee_host", site / "splitee_host")
    shutil.copytree(ROOT / "toolkit" / "splitee", site / "splitee")
    shutil.copytree(ROOT / "firmware", site / "splitee_host" / "_firmware")
    code = "from splitee_host import boards; print(boards.firmware_root(), *boards.load_boards())"
    printed = subprocess.check_output(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(site)}, text=True
    )
    assert printed.split() == [str(site / "splitee_host" / "_firmware"), *BOARDS]


# ---- building ----


def test_sizes_are_those_that_binutils_counts(board: Board, segment: WriteSegment) -> None:
    firmware = build(board, folder := segment(ECHO), folder, overrides=PORT_ONLY)
    table = subprocess.check_output([f"{board.prefix}size", "-A", firmware.elf], text=True)
    counted = {name: int(size) for name, size in re.findall(r"^(\.\S+) +(\d+)", table, re.M)}
    assert firmware.sections.items() <= counted.items()
    text, data, bss = map(
        int,
        subprocess.check_output([f"{board.prefix}size", firmware.elf], text=True).split()[6:9],
    )
    assert firmware.flash_bytes == text + data
    # its "data" is every section with content that can be written, as .data and tables of libc
    assert firmware.ram_bytes == data + bss


def test_what_is_up_to_date_is_not_made_again(board: Board, segment: WriteSegment) -> None:
    folder = segment(ECHO)
    before = build(board, folder, folder, overrides=PORT_ONLY).elf.stat().st_mtime_ns
    assert build(board, folder, folder, overrides=PORT_ONLY).elf.stat().st_mtime_ns == before


def test_a_changed_segment_is_made_again(board: Board, segment: WriteSegment) -> None:
    folder = segment(ECHO)
    before = build(board, folder, folder, overrides=PORT_ONLY)
    segment(ECHO.replace("4096", "8192"))
    after = build(board, folder, folder, overrides=PORT_ONLY)
    assert after.ram_bytes == before.ram_bytes + 4096


def test_everything_is_made_again_when_flags_change(board: Board, segment: WriteSegment) -> None:
    folder = segment(ECHO)
    build(board, folder, folder, overrides=PORT_ONLY)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.o")}
    build(replace(board, cflags=(*board.cflags, "-DX")), folder, folder, overrides=PORT_ONLY)
    assert before
    assert [path for path, time in before.items() if path.stat().st_mtime_ns == time] == []


def test_a_build_waits_for_another_of_the_same_folder(board: Board, segment: WriteSegment) -> None:
    folder = segment(ECHO)
    with ThreadPoolExecutor() as pool:
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waiting = pool.submit(build, board, folder, folder, overrides=PORT_ONLY)
            for other in ("one", "two"):  # each takes as long
                build(board, folder, folder / other, overrides=PORT_ONLY)
            assert not waiting.done()
        waiting.result()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int main(void) { return 1.5; }", r"segment\.c:1:\d+: error: .*-Werror"),
        ("int f(void); int main(void) { return f(); }", r"undefined reference to `f'"),
        ("#error no such thing\n", r"error: #error no such thing"),
    ],
    ids=["warning", "undefined", "error"],
)
def test_a_build_that_fails_says_what_the_compiler_said(
    board: Board, segment: WriteSegment, text: str, words: str
) -> None:
    with pytest.raises(BuildError, match=words) as failed:
        build(board, folder := segment(text), folder, overrides=PORT_ONLY)
    assert str(failed.value).startswith(f"the firmware for {board.name} did not build:\n")
    assert len(str(failed.value).splitlines()) <= 6


def test_a_folder_that_make_cannot_work_in_is_refused(segment: WriteSegment) -> None:
    folder = segment(ECHO)
    with pytest.raises(BuildError, match=r'make cannot work in ".*/a b": take a folder'):
        build(POSIX, folder, folder / "a b")


def test_firmware_larger_than_ram_is_told_by_how_much(segment: WriteSegment) -> None:
    need_for(M4)

    def with_buffer(size: int) -> Path:
        return segment(ECHO.replace("buffer[4096]", f"buffer[{size}]"))

    folder = with_buffer(8)
    free = M4.ram_bytes - build(M4, folder, folder, overrides=PORT_ONLY).ram_bytes
    with pytest.raises(
        FitError, match=r"does not fit qemu-m4.* 1,000 bytes more RAM than the 262,"
    ):
        build(M4, with_buffer(8 + free + 1000), folder, overrides=PORT_ONLY)
    build(M4, with_buffer(8 + free), folder, overrides=PORT_ONLY)


def test_firmware_larger_than_flash_is_told_by_how_much(segment: WriteSegment) -> None:
    need_for(M4)
    text = "static volatile const uint8_t big[1048576] = {1};\nint main(int argc, char **argv) {"
    text = ECHO.replace("int main(int argc, char **argv) {", text + "\n(void)big[0];")
    with pytest.raises(FitError, match=r" [\d,]+ bytes more flash than the 1,048,576 there are"):
        build(M4, folder := segment(text), folder, overrides=PORT_ONLY)


def test_a_process_is_held_to_its_boards_memory_too(segment: WriteSegment) -> None:
    need_for(POSIX)
    little = replace(POSIX, ram_bytes=100_000)
    with pytest.raises(FitError, match=r"does not fit posix.* bytes more RAM than the 100,000"):
        build(little, folder := segment(ECHO), folder, overrides=PORT_ONLY)


@pytest.mark.parametrize(
    ("there", "board", "words"),
    [
        ([], POSIX, "make is not installed: `make setup`, or `sudo apt-get install make`"),
        (["make"], POSIX, "gcc is not installed: .* gcc libc6-dev`"),
        (["make"], M4, "arm-none-eabi-gcc is not .* gcc-arm-none-eabi picolibc-arm-none-eabi`"),
        (
            ["make"],
            RV32,
            "riscv64-unknown-elf-gcc is not .* "
            "gcc-riscv64-unknown-elf picolibc-riscv64-unknown-elf`",
        ),
        (["make"], replace(M4, prefix="xtensa-"), "xtensa-gcc is not installed: install it"),
    ],
    ids=["make", "gcc", "arm-none-eabi-gcc", "riscv64-unknown-elf-gcc", "another"],
)
def test_a_missing_compiler_is_named_with_its_package(
    segment: WriteSegment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    there: list[str], board: Board, words: str,
) -> None:  # fmt: skip
    folder = segment(ECHO)
    for tool in there:
        (tmp_path / tool).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingTool, match=words):
        build(board, folder, folder)


@pytest.mark.parametrize(
    ("board", "package"),
    [(M4, "picolibc-arm-none-eabi"), (RV32, "picolibc-riscv64-unknown-elf")],
    ids=["arm", "riscv"],
)
def test_a_missing_c_library_is_named_with_its_package(
    board: Board, package: str, segment: WriteSegment
) -> None:
    need_for(board)
    without = replace(board, cflags=("--specs=picolibc-gone.specs",))
    with pytest.raises(MissingTool, match=f"picolibc is not .* {package}`"):
        build(without, folder := segment(ECHO), folder)


@pytest.mark.parametrize(
    ("board", "words"),
    [
        (M4, "qemu-system-arm is not .* install qemu-system-arm`"),
        (RV32, "qemu-system-riscv32 is not .* install qemu-system-misc`"),
    ],
    ids=["arm", "riscv"],
)
def test_a_missing_emulator_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, board: Board, words: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingTool, match=words):
        start(board, Firmware(Path("none"), 0, NOTHING, {}))


# ---- the sizes in a board's file ----


@pytest.mark.parametrize(
    ("board", "kind"),
    [
        *(pytest.param(b, "resnet8", id=f"{b.name}-resnet8") for b in FIRMWARE),
        *(pytest.param(b, "pools", id=f"{b.name}-pools") for b in FIRMWARE if b.udp is None),
        *(pytest.param(M4, k, id=k) for k in ("resnet20-batch", "mobilenet-frozen")),
    ],
)
def test_a_board_file_allows_for_all_that_the_firmware_takes(
    board: Board, kind: str, segment: WriteSegment
) -> None:
    need_for(board)
    b = case_on(board.name, kind).build
    firmware = build(board, folder := segment(to_c(b)), folder)
    room = board.for_assembly.room
    assert room is not None
    planned, measured = b.memory(room), firmware.memory
    assert 0 < measured.static <= planned.static
    if board.port == "posix":  # where the system gives the stack
        planned = replace(planned, stack=0)
    assert measured == replace(planned, static=measured.static)
    assert measured.apart == (board.shard_bytes > 0)
    # the rest of flash_bytes is a step's call, for which place.STEP_CODE allows
    assert firmware.flash_bytes <= b.flash_bytes(room)
    assert firmware.ram_bytes <= b.ram_bytes(room)


@pytest.mark.parametrize("board", EMULATED, ids=name)
def test_training_leaves_a_quarter_of_the_stack_untouched_and_the_board_tells_how_much(
    board: Board, segment: WriteSegment, tmp_path: Path
) -> None:
    need_for(board)
    trained = case_on(board.name, "resnet8")
    firmware = build(board, folder := segment(to_c(trained.build)), folder)
    dump = tmp_path / "stack"
    with Control(tmp_path) as control, start(board, firmware, control.options) as running:
        device = Device("board", running.link, trained.build, SETTINGS)
        device.start(trained.state, trained.images)
        count = trained.build.capacity
        activations = device.forward(count, count).activations
        device.backward(activations)
        device.step()
        device.infer(trained.images.x[:count])
        used = device.counters().stack_used
        memory = {"val": board.ram_start, "size": board.stack_bytes, "filename": str(dump)}
        control.execute(("memsave", memory))
    stack = dump.read_bytes()  # it grows down, into what startup painted
    paint = bytes.fromhex("3c5ac3a5")
    unused = next(i for i in range(0, len(stack) + 4, 4) if stack[i : i + 4] != paint)
    assert 0 < used == len(stack) - unused
    assert unused >= board.stack_bytes / 4


# ---- starting ----


@pytest.fixture
def echo(board: Board, segment: WriteSegment) -> Firmware:
    return build(board, folder := segment(ECHO), folder, overrides=PORT_ONLY)


def ended(pid: int) -> bool:
    """Whether a process ends within ANSWER; it need not be a child of ours."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], ANSWER)[0])
    finally:
        os.close(descriptor)


def test_a_board_ends_when_it_is_closed_and_its_link_with_it(board: Board, echo: Firmware) -> None:
    with start(board, echo) as running:
        assert running.link.kind == board.link
        assert running.link.name.startswith(board.link)
        assert running.obituary() is None
    assert running.process.returncode is not None
    with pytest.raises(LinkClosed, match="was closed on this side"):
        running.link.read(0)
    running.close()


def test_a_board_with_nothing_to_say_is_waited_for(board: Board, echo: Firmware) -> None:
    with start(board, echo) as running:
        assert running.link.read(0) == b""
        assert running.link.read(0.3) == b""


@pytest.mark.parametrize("use", ["read", "write"])
def test_a_link_tells_how_its_process_ended(board: Board, echo: Firmware, use: str) -> None:
    with start(board, echo) as running:
        running.process.kill()
        assert ended(running.process.pid)
        with pytest.raises(LinkClosed, match=f"^{board.name} ended with SIGKILL"):
            running.link.read(ANSWER) if use == "read" else running.link.write(b"hello")


def test_a_link_tells_what_its_process_said(board: Board, echo: Firmware) -> None:
    options = ["--nonsense"] if board.port == "posix" else ["-nonsense"]
    words = "status 2\n  usage: device " if board.port == "posix" else "status 1\n  .*nonsense"
    with (
        pytest.raises(LinkClosed, match=f"^{board.name} ended with {words}"),
        start(board, echo, options) as running,
    ):
        running.link.read(ANSWER)


def test_a_fault_that_a_sanitizer_finds_is_told(segment: WriteSegment) -> None:
    need_for(POSIX)
    text = ECHO.replace("        port_write(buffer, size);", "port_write(buffer + 4000, size);")
    firmware = build(POSIX, folder := segment(text), folder, sanitize=True, overrides=PORT_ONLY)
    with start(POSIX, firmware) as running:
        running.link.write(bytes(1000))
        with pytest.raises(
            LinkClosed, match=r"posix ended with status 1\n.*global-buffer-overflow"
        ):
            running.link.read(ANSWER)


def test_firmware_that_is_not_there_is_told() -> None:
    with pytest.raises(SpliteeError, match=r"posix: cannot start .*none: No such file.*: build it"):
        start(POSIX, Firmware(Path("none"), 0, NOTHING, {}))


def test_a_board_that_cannot_run_here_is_told(tmp_path: Path) -> None:
    real = replace(M4, name="real", qemu=None)
    with pytest.raises(SpliteeError, match="real is no board that this machine can run: load"):
        start(real, Firmware(tmp_path / "device.elf", 0, NOTHING, {}))


@pytest.mark.parametrize("how", ["killed", "ended by an error"])
def test_a_host_that_does_not_close_its_board_leaves_nothing_behind(
    board: Board, echo: Firmware, how: str
) -> None:
    code = f"""
from pathlib import Path
from splitee_host.boards import *
running = start(load_boards()["{board.name}"], read_elf(Path("{echo.elf}")))
print(running.process.pid, flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": PATHS},
    ) as host:
        assert host.stdout is not None
        assert host.stdin is not None
        pid = int(host.stdout.readline())
        if how == "killed":
            host.kill()
        else:
            host.stdin.close()  # there input() raises EOFError
        assert ended(pid)


def test_two_emulated_boards_run_beside_each_other(segment: WriteSegment) -> None:
    need_for(M4)
    firmware = build(M4, folder := segment(ECHO), folder, overrides=PORT_ONLY)
    with start(M4, firmware) as one, start(M4, firmware) as other:
        one.link.write(b"one")
        other.link.write(b"other")
        assert other.link.read(ANSWER)[:1] == b"o"
        assert one.link.read(ANSWER)[:1] == b"o"
