"""Brings a fleet up: builds firmware, starts emulators and processes, opens links."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from splitee.assemble import Assembly, Member
from splitee.client import Client
from splitee.errors import BuildError, FleetError, KeyFileError, LinkError, MissingTool
from splitee.fleet import ClientTable
from splitee.place import SAMPLES_MAX, Build
from splitee_host import boards, keys
from splitee_host.boards import Board, Firmware
from splitee_host.device import Device
from splitee_host.link import Link, open_link
from splitee_host.memory import Usage

WriteSegment = Callable[[Build], str]  # the exporter of segment.c


class Built(Protocol):
    """A segment as it is built for a device, of whatever kind."""

    @property
    def checksum(self) -> int:
        """What host and device compare at hello."""
        ...


AnyBuild = TypeVar("AnyBuild", bound=Built)


@dataclass(frozen=True)
class Launched:
    """A client that is up, and what it runs on."""

    client: Client
    member: Member
    tier: str
    board: str
    link: str
    flash_bytes: int
    memory: Usage | None = None  # of firmware that was built here, before it ran

    def usage(self) -> Usage | None:
        """The same with the stack that it has used so far. Raises LinkError when it is lost."""
        if self.memory is None:
            return None
        assert isinstance(self.client, Device)
        return replace(self.memory, stack_used=self.client.counters().stack_used or None)


def firmware_folder(
    member_build: Built, board: Board, root: Path, key: bytes | None = None
) -> Path:
    """Where a firmware is built; named by what is in it, so that the same is built once."""
    name = f"{board.name}-{member_build.checksum:08x}"
    if key is not None:
        name += f"-{hashlib.blake2s(key, digest_size=4, person=b'folder').hexdigest()}"
    return root / name


def usage(client: str, board: Board, firmware: Firmware) -> Usage:
    """What a client's firmware takes of its board's memory, before it runs."""
    return Usage(client, board.name, firmware.memory, board.ram_bytes, board.shard_bytes)


def build_firmware(
    member_build: AnyBuild,
    board: Board,
    write_segment: Callable[[AnyBuild], str],
    root: Path,
    key: bytes | None = None,
) -> Firmware:
    """Writes a segment and builds the firmware around it, in a folder of its own under root.

    key: built in, so that the device answers only to a host that has it, too; the folder is then
    its owner's alone.
    """
    folder = firmware_folder(member_build, board, root, key)
    sources = {"segment.c": write_segment(member_build)}
    if key is not None:
        sources["key.c"] = keys.source(key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if key is not None:
            folder.chmod(0o700)
        for name, text in sources.items():
            source = folder / name
            if not source.exists() or source.read_text() != text:  # the same is not recompiled
                source.write_text(text)
    except OSError as error:
        raise BuildError(
            f"{error.filename or folder}: {error.strerror}: free some space, or build in a folder "
            "that you may write to"
        ) from error
    return boards.build(board, folder, folder)


def key_of(
    client: ClientTable, known: Mapping[str, bytes], auth: str, fleet_file: Path
) -> bytes | None:
    """The key of a client, of those that are known; None where none is needed.

    Raises KeyFileError where it has none and others are on the network to it.
    """
    key, link = known.get(client.name), client.link
    demanded = auth != "none" and link is not None
    if key is None and demanded and keys.is_open_to_others(str(link)):
        raise KeyFileError(
            f'client "{client.name}": others are on the network to {link}, too: run `splitee keys '
            f"{fleet_file}` and load firmware that is built with its key, or say "
            'auth = "none" in the fleet file'
        )
    return key


class Launcher:
    """Brings up the members of an assembly; everything ends with it."""

    def __init__(
        self,
        assembly: Assembly,
        fleet_file: Path,
        write_segment: WriteSegment,
        root: Path,
        say: Callable[[str], None],
    ) -> None:
        """root: folder for what is built. say: tells the user what happens."""
        self._assembly = assembly
        self._fleet_file = fleet_file
        self._write_segment = write_segment
        self._root = root
        self._say = say
        self._known = boards.load_boards()
        # a board alone is checked without a fleet's file
        self._keys = keys.of_fleet(fleet_file, assembly.fleet.auth) if fleet_file.name else {}
        self._ends = ExitStack()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.close()

    def launch(self, member: Member) -> Launched:
        """One client: up, greeted, and given its shard and state."""
        board = self._known[member.table.board]
        if board.port == "torch":
            launched = self._local(member, board)
        elif member.table.link is not None:
            launched = self._attached(member, board)
        elif board.port == "python":
            launched = self._process(member, board)
        else:
            launched = self._firmware(member, board)
        client = launched.client
        client.start(member.state, member.images)
        if isinstance(client, Device) and self._key_of(member) and not client.welcome.fresh:
            self._say(
                f"{member.name}: {board.name} has no source of random bytes: after its reset, what "
                "somebody recorded of its sessions could be played to it"
            )
        return launched

    def _local(self, member: Member, board: Board) -> Launched:
        if member.table.link is not None:
            raise FleetError(
                f'client "{member.name}": board "torch" takes no link, it is this process: leave '
                'link out, or take board = "python"'
            )
        device = torch_device()
        client = self._assembly.here(member, device)
        return Launched(client, member, board.tier, device, "memory", 0)

    def _key_of(self, member: Member) -> bytes | None:
        return key_of(member.table, self._keys, self._assembly.fleet.auth, self._fleet_file)

    def _device(
        self,
        member: Member,
        board: Board,
        link: Link,
        firmware: Firmware | None = None,
        reopen: Callable[[], Link] | None = None,
    ) -> Launched:
        fleet = self._assembly.fleet
        if len(member.images) > SAMPLES_MAX:
            raise FleetError(
                f'client "{member.name}": its share is {len(member.images):,} samples and a device '
                f"counts to {SAMPLES_MAX:,}: lower its share or add clients"
            )
        device = Device(
            member.name,
            link,
            member.build,
            fleet.settings(member.table),
            coding=member.table.coding,
            unsure=fleet.unsure(member.table),
            cut=member.cut.name,
            upto=member.upto,
            key=self._key_of(member),
            patience=fleet.rejoin_within,
            reopen=reopen,
        )
        self._ends.callback(device.close)
        launched = Launched(device, member, board.tier, board.name, device.link.name, 0)
        if firmware is None:
            return launched
        memory = usage(member.name, board, firmware)
        return replace(launched, flash_bytes=firmware.flash_bytes, memory=memory)

    def _attached(self, member: Member, board: Board) -> Launched:
        """A device that runs already, at the address that the fleet file gives."""
        assert member.table.link is not None
        key = self._key_of(member)
        elf = firmware_folder(member.build, board, self._root, key) / "device.elf"
        firmware = boards.read_elf(elf) if board.firmware and elf.exists() else None
        reopen = partial(open_link, member.table.link)
        return self._device(member, board, reopen(), firmware, reopen)

    def _process(self, member: Member, board: Board) -> Launched:
        """A `splitee client` of our own."""
        self._say(f"{member.name}: starting a Python process")

        def start() -> Link:
            return self._ends.enter_context(python_client(self._fleet_file, member.name))

        return self._device(member, board, start(), reopen=start)

    def _firmware(self, member: Member, board: Board) -> Launched:
        built = ", ".join(stage.cut for stage in member.build.stages)
        self._say(f"{member.name}: building firmware for {board.name}, cut {built}")
        try:
            key = self._key_of(member)
            firmware = build_firmware(member.build, board, self._write_segment, self._root, key)
            link = self._start(board, firmware)
        except MissingTool as missing:
            if board.qemu is None:
                raise
            # an emulated board runs the same C as the process does: the fleet is still whole
            self._say(f"{member.name}: {missing}; running the same firmware as a process instead")
            return self._firmware(member, self._known["posix"])
        return self._device(member, board, link, firmware, partial(self._start, board, firmware))

    def _start(self, board: Board, firmware: Firmware) -> Link:
        return self._ends.enter_context(boards.start(board, firmware)).link


def torch_device() -> str:
    """Where torch computes in this process: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def python_client(fleet_file: Path, name: str) -> Iterator[Link]:
    """A `splitee client` process on this machine, and a link to it."""
    command = [sys.executable, "-m", "splitee_host.cli", "client", str(fleet_file)]
    command += ["--name", name, "--listen", "tcp://127.0.0.1:0", "--once"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        process_group=0,  # Ctrl-C is for us, and we end our clients in order
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().decode().strip()
            if not line.startswith("tcp://"):
                raise LinkError(f'client "{name}": its process ended at once: {line or "no word"}')
            with open_link(line) as link:
                yield link
        finally:
            process.terminate()
