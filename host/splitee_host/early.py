"""Early exits on boards: what the exit is sure of is answered there, the rest by the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from splitee.data import Images
from splitee.errors import MissingTool
from splitee.exits import entropy
from splitee.place_int8 import Int8Build
from splitee.server import Server
from splitee_host import boards
from splitee_host.boards import Board
from splitee_host.int8_device import Int8Device
from splitee_host.launch import build_firmware
from splitee_host.link import open_link


@dataclass(frozen=True)
class Answered:
    """How a board and its server have answered images. Shares and accuracies are 0..1."""

    samples: int
    exit_accuracy: float  # of the exit, whether or not it was sure
    share_at_exit: float
    accuracy: float  # of both together
    bytes_up_per_sample: float  # frames included


def answer(device: Int8Device, server: Server, images: Images, threshold: float) -> Answered:
    """Asks a board for images; those that it is unsure of go up, and the server answers them.

    threshold: normalised entropy up to which the exit answers.
    """
    exits: list[np.ndarray] = []
    together: list[np.ndarray] = []
    unsure = 0
    before = device.traffic.up
    for start in range(0, len(images), device.capacity):
        logits = device.infer(images.x[start : start + device.capacity])
        asked = (entropy(torch.from_numpy(logits)) > threshold).numpy()
        exits.append(logits.argmax(1))
        together.append(exits[-1].copy())
        if asked.any():
            sent = torch.from_numpy(device.activations(asked))
            together[-1][asked] = (
                server.infer(sent, device.build.cut, device.name).argmax(1).cpu().numpy()
            )
        unsure += int(asked.sum())
    return Answered(
        samples=len(images),
        exit_accuracy=float((np.concatenate(exits) == images.y).mean()),
        share_at_exit=1 - unsure / len(images),
        accuracy=float((np.concatenate(together) == images.y).mean()),
        bytes_up_per_sample=round((device.traffic.up - before) / len(images), 1),
    )


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
