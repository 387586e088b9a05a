"""Keys: their file, the firmware that has one, and what those without it can do: nothing."""

from __future__ import annotations

import re
import shutil
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from host_harness import Recorder, built, differences, host, splitee
from splitee.client import State
from splitee.errors import KeyFileError, Timeout
from splitee_host import boards, keys
from splitee_host.device import Device
from splitee_host.link import Link
from splitee_host.wire import messages as m
from splitee_host.wire.frame import Frame, encode
from splitee_host.wire.seal import Direction, Sealing
from step_harness import SETTINGS, case

CASE = case("resnet8")
KEY = bytes(range(32))

FLEET = """
name = "keyed"
rounds = 1
[data]
samples = 40
[model]
width = 2
[[client]]
name = "here"
cut = "layer2"
[[client]]
name = "near"
board = "posix"
cut = "layer1"
[[client]]
name = "far"
board = "python"
cut = "layer2"
"""


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET)
    return path


# ---- the file ----


def test_every_device_gets_a_key_of_its_own(fleet: Path) -> None:
    said = splitee("keys", fleet)
    path = fleet.with_name("fleet.keys.toml")
    assert (said.code, said.err) == (0, "")
    assert f"{path}: a new key for near, far" in said.out
    made = keys.read(path)
    assert list(made) == ["near", "far"]  # what is in the host's process needs none
    assert {len(key) for key in made.values()} == {32}
    assert made["near"] != made["far"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not any(key.hex() in said.out for key in made.values())


def test_a_key_stays_unless_it_is_to_be_renewed(fleet: Path) -> None:
    path = keys.file_of(fleet)
    splitee("keys", fleet)
    first = keys.read(path)
    assert "nobody: all have one" in splitee("keys", fleet).out
    assert keys.read(path) == first
    splitee("keys", fleet, "--renew")
    assert not set(first.values()) & set(keys.read(path).values())


def test_a_file_that_others_may_read_is_refused(fleet: Path) -> None:
    splitee("keys", fleet)
    path = keys.file_of(fleet)
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match=re.escape(f"run `chmod 600 {path}`")):
        keys.read(path)


@pytest.mark.parametrize("text", ["near = 5", 'near = "00"', f'near = "{"g" * 64}"', "near = ["])
def test_a_file_that_holds_something_else_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "some.keys.toml"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match=r"some\.keys\.toml"):
        keys.read(path)


def test_a_fleet_without_a_file_has_no_keys(tmp_path: Path) -> None:
    assert keys.read(tmp_path / "none.keys.toml") == {}


@pytest.mark.parametrize(
    ("link", "open_to_others"),
    [
        ("/dev/ttyACM0", False),
        ("serial:/dev/ttyACM0?baud=921600", False),
        ("udp://127.0.0.1:5000", False),
        ("tcp://[::1]:5000", False),
        ("tcp://localhost:5000", False),
        ("udp://192.0.2.7:5000", True),
        ("rfc2217://192.0.2.7:5000", True),
        ("socket://192.0.2.7:5000", True),
        ("tcp://0.0.0.0:7070", True),
    ],
)
def test_knows_which_links_others_are_on_too(link: str, open_to_others: bool) -> None:
    assert keys.is_open_to_others(link) is open_to_others


# ---- fleets ----


def test_a_network_without_a_key_has_to_be_asked_for_by_name(fleet: Path) -> None:
    text = FLEET.replace('board = "posix"', 'board = "posix"\nlink = "udp://192.0.2.7:5000"')
    fleet.write_text(text)
    said = splitee("train", fleet)
    assert said.code == 1
    words = " ".join(said.err.split())
    assert 'client "near": others are on the network to udp://192.0.2.7:5000' in words
    assert "run `splitee keys" in words
    assert 'auth = "none"' in words
    listening = splitee("client", fleet, "--name", "far", "--listen", "tcp://0.0.0.0:0")
    assert listening.code == 1
    assert "splitee keys" in listening.err


def test_a_fleet_with_keys_learns_what_it_learns_without(fleet: Path) -> None:
    assert splitee("train", fleet).code == 0
    checkpoint = fleet.parent / "runs" / "keyed" / "checkpoint.safetensors"
    without = checkpoint.read_bytes()
    splitee("keys", fleet)
    assert splitee("train", fleet).code == 0
    assert checkpoint.read_bytes() == without
    built_with = [source.parent for source in fleet.parent.rglob("key.c")]
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in built_with] == [0o700]


def test_a_run_that_goes_on_has_the_keys_that_it_began_with(
    fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splitee("keys", fleet)
    assert splitee("train", fleet).code == 0
    run = fleet.parent / "runs" / "keyed"
    used: dict[str, bytes | None] = {}
    made = Device.__init__

    def noting(self: Device, name: str, *arguments: Any, **named: Any) -> None:
        used[name] = named.get("key")
        made(self, name, *arguments, **named)

    monkeypatch.setattr(Device, "__init__", noting)
    assert splitee("train", "--resume", run).code == 0
    assert used == keys.read(keys.file_of(fleet))
    assert not any(key.hex() in path.read_text(errors="replace") for key in used.values() if key
                   for path in run.rglob("*")
                   if path.is_file() and not path.is_symlink())  # fmt: skip
    splitee("keys", run / "fleet.toml", "--renew")  # there is one file, whichever way it is named
    assert set(used.values()).isdisjoint(keys.read(keys.file_of(fleet)).values())
    keys.file_of(fleet).unlink()
    gone = splitee("train", "--resume", run)
    assert gone.code == 1
    assert "any more: restore them" in " ".join(gone.err.split())


# ---- devices ----


def train(device: Device, steps: int = 3) -> State:
    for _ in range(steps):
        device.forward(8, 8)
        device.backward(None)
        device.step()
    return device.state()


@contextmanager
def keyed(folder: Path, key: bytes | None = KEY, **how: float) -> Iterator[tuple[Device, Link]]:
    with boards.start(boards.load_boards()["posix"], built(CASE, folder, KEY)) as running:
        recorder = Recorder(running.link)
        yield (
            Device("it", recorder, CASE.build, SETTINGS, key=key, patience=how.get("patience", 20)),
            running.link,
        )


def address_of(link: Link) -> tuple[str, int]:
    parts = urlsplit(link.name)
    assert parts.scheme == "udp"
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


@pytest.fixture(scope="module")
def expected(folder: Path) -> State:
    """What the same firmware without a key learns."""
    with boards.start(boards.load_boards()["posix"], built(CASE, folder)) as running:
        device = host(running.link, CASE)
        device.start(CASE.state, CASE.images)
        return train(device)


def test_firmware_with_a_key_trains_as_without(folder: Path, expected: State) -> None:
    with keyed(folder) as (device, _):
        device.start(CASE.state, CASE.images)
        assert differences(train(device), expected) == []
        assert device.welcome.fresh == 1
        assert device.exchange.bad == 0


def test_a_board_with_a_key_trains_as_without_and_says_that_it_has_no_random_bytes(
    fleet: Path,
) -> None:
    if shutil.which("qemu-system-arm") is None or shutil.which("arm-none-eabi-gcc") is None:
        pytest.skip("needs qemu-system-arm and arm-none-eabi-gcc")
    fleet.write_text(FLEET.replace("posix", "qemu-m4-udp"))
    assert splitee("train", fleet).code == 0
    checkpoint = fleet.parent / "runs" / "keyed" / "checkpoint.safetensors"
    without = checkpoint.read_bytes()
    splitee("keys", fleet)
    said = splitee("train", fleet)
    assert said.code == 0
    assert checkpoint.read_bytes() == without
    words = " ".join(said.out.split())
    assert "near: qemu-m4-udp has no source of random bytes" in words
    assert "far: python has no source" not in words


@pytest.mark.parametrize("key", [None, bytes(32)], ids=["no key", "another key"])
def test_firmware_with_a_key_does_not_answer_a_host_with(key: bytes | None, folder: Path) -> None:
    with keyed(folder, key, patience=0.5) as (device, _), pytest.raises(Timeout, match="key"):
        device.hello()


def test_firmware_carries_out_no_replayed_frame(folder: Path, expected: State) -> None:
    with keyed(folder) as (device, link):
        device.start(CASE.state, CASE.images)
        recorder = device.link
        assert isinstance(recorder, Recorder)
        train(device, 2)
        before = device.counters()
        for frame in list(recorder.sent):
            link.write(frame)
        state = train(device, 1)
        after = device.counters()
        assert differences(state, expected) == []
        assert after.bad_frames + after.foreign_frames > before.bad_frames + before.foreign_frames


def test_a_flood_of_forged_datagrams_changes_nothing(folder: Path, expected: State) -> None:
    """100,000 of them while it trains: noise, no key, another key, replayed, and half a frame."""
    with keyed(folder) as (device, link):
        address = address_of(link)
        device.start(CASE.state, CASE.images)
        train(device, 1)
        recorder = device.link
        assert isinstance(recorder, Recorder)
        session = device.exchange._session
        step = m.Step().pack()
        wrong = Sealing(bytes(32), Direction.TO_DEVICE, 0)
        forged = [
            *(encode(Frame(m.Step.CODE, session, n, step)) for n in range(200)),
            *(encode(Frame(m.Step.CODE, session, n, step), wrong) for n in range(200)),
            *(encode(Frame(m.Hello.CODE, n, 0, m.Hello(m.schema(), n).pack())) for n in range(200)),
            *recorder.sent,
            b"\xff" * 1000,
            encode(Frame(m.Step.CODE, session, 1, step))[:-3],
        ]
        before = device.counters()
        flooded = threading.Event()

        def flood() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as attacker:
                for i in range(100_000):
                    attacker.sendto(forged[i % len(forged)], address)
            flooded.set()

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            rounds = 0
            while not flooded.is_set() or rounds == 0:  # the same steps again and again meanwhile
                device.load_state(CASE.state)
                state = train(device)
                rounds += 1
        finally:
            thread.join()
        after = device.counters()
        assert differences(state, expected) == []
        counted = after.bad_frames + after.foreign_frames
        assert counted - before.bad_frames - before.foreign_frames > 1000
        assert device.exchange.bad == 0


def test_a_spoofed_source_is_not_answered(folder: Path, expected: State) -> None:
    """Half a frame from another socket, and forged ones, between all requests of the host."""
    with keyed(folder) as (device, link), socket.socket(type=socket.SOCK_DGRAM) as other:
        address = address_of(link)
        write = link.write

        def spoofed(data: bytes) -> None:
            other.sendto(b"\x09half a frame", address)
            write(data)

        link.write = spoofed  # type: ignore[method-assign]
        device.start(CASE.state, CASE.images)
        assert differences(train(device), expected) == []
        assert device.exchange.repeated == 0
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.recv(1)
