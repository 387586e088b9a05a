"""Boards that answer in 8 bits, brought up: built, started, or found where they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from splitee.errors import MissingTool
from splitee.place_int8 import Int8Build
from splitee_host import boards
from splitee_host.boards import Board
from splitee_host.int8_device import Int8Device
from splitee_host.launch import build_firmware
from splitee_host.link import open_link


@contextmanager
def running(
    name: str,
    build: Int8Build,
    board: Board,
    write_segment: Callable[[Int8Build], str],
    root: Path,
    *,
    link: str | None = None,
    key: bytes | None = None,
    say: Callable[[str], None],
) -> Iterator[tuple[Int8Device, Board]]:
    """A client's board with its segment of 8 bits, greeted; and what it really is.

    link: address of a board that runs that firmware already. An emulated board whose emulator or
    compiler is missing is replaced by a process, and say is told so.
    """
    if link is not None:
        with open_link(link) as opened:
            device = Int8Device(name, opened, build, key=key)
            device.hello()
            yield device, board
        return
    try:
        say(f"{name}: building firmware of 8 bits for {board.name}, cut {build.cut}")
        started = boards.start(board, build_firmware(build, board, write_segment, root, key))
    except MissingTool as missing:
        if board.qemu is None:
            raise
        say(f"{name}: {missing}; running the same firmware as a process instead")
        posix = boards.load_boards()["posix"]
        with running(name, build, posix, write_segment, root, key=key, say=say) as found:
            yield found
        return
    with started as on:
        device = Int8Device(name, on.link, build, key=key)
        device.hello()
        yield device, board
