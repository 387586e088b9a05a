"""What tests of the host share: both kinds of client behind a link, bad links, the command line."""

from __future__ import annotations

import copy
import io
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from unittest import mock

import numpy as np
import pytest

from splitee.client import LocalClient, Settings, State
from splitee.codec import PLAIN, Coding
from splitee.place import Build
from splitee_exporters.c import to_c
from splitee_host import boards, exchange, keys, window
from splitee_host.cli import main
from splitee_host.device import Device
from splitee_host.learner import Learner
from splitee_host.link import Link, memory_pair
from splitee_host.serve import serve
from splitee_host.torch_learner import TorchLearner
from step_harness import SETTINGS, Case

ENDS = ("firmware", "python")
EVERY_END = (*ENDS, "onnx")


def built(case: Case, folder: Path, key: bytes | None = None) -> boards.Firmware:
    """The case's firmware for this machine, under sanitizers; built once in a folder."""
    place = folder / f"{case.build.checksum:08x}{key.hex() if key else ''}"
    if not (place / "device.elf").exists():
        place.mkdir(parents=True)
        if key:
            (place / "key.c").write_text(keys.source(key))
        (place / "segment.c").write_text(to_c(case.build))
        # -O1: sanitizers make the compiler slow enough
        posix, quick = boards.load_boards()["posix"], {"OPTIMIZE": "-O1"}
        boards.build(posix, place, place, sanitize=True, overrides=quick)
    return boards.read_elf(place / "device.elf")


@contextmanager
def end(kind: str, case: Case, folder: Path) -> Iterator[Link]:
    """A client with the case's segment, which nobody has spoken to yet: the link to it."""
    if kind == "firmware":
        with boards.start(boards.load_boards()["posix"], built(case, folder)) as running:
            yield running.link
        return
    if kind == "onnx":
        with served(onnx_learner(case.build, folder), case.build) as link:
            yield link
        return
    b = case.build
    segment = copy.deepcopy(case.segment)
    client = LocalClient(
        "served", segment, SETTINGS, capacity=b.capacity, scale=b.scale, shift=b.shift
    )
    with serving(client, b) as link:
        yield link


def onnx_learner(build: Build, folder: Path) -> Learner:
    """The case's segment in ONNX Runtime; exported once in a folder."""
    for module in ("onnx", "onnxruntime"):
        pytest.importorskip(module)
    from splitee_exporters.onnx_train import write_client
    from splitee_host.onnx_learner import OnnxLearner

    place = folder / f"onnx-{build.checksum:08x}"
    if not place.exists():
        write_client(build, place)
    return OnnxLearner(place)


def serving(client: LocalClient, build: Build) -> AbstractContextManager[Link]:
    """A client in torch, served."""
    return served(TorchLearner(client), build)


@contextmanager
def served(learner: Learner, build: Build) -> Iterator[Link]:
    """What `splitee client` does, in a thread: the link to it."""
    near, far = memory_pair()

    def work() -> None:
        with far:  # closed also when serving fails, so that nobody waits for an answer
            serve(far, learner, build)

    with ThreadPoolExecutor(max_workers=1) as pool:
        served = pool.submit(work)
        try:
            yield near
        finally:
            near.close()
            served.result()


def host(
    link: Link,
    case: Case,
    settings: Settings = SETTINGS,
    *,
    coding: Coding = PLAIN,
    session: int = 1,
    cut: str | None = None,
    upto: bool = True,
) -> Device:
    """A host at the other end, which has said nothing yet."""
    return Device(
        "it",
        link,
        case.build,
        settings,
        coding=coding,
        cut=cut,
        upto=upto,
        session=session,
        patience=20.0,
    )


def waits(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Hosts wait so long for an answer, not as long as was measured, until they ask again."""
    monkeypatch.setattr(exchange, "_HELLO_AGAIN", (seconds, seconds))
    monkeypatch.setattr(window.RoundTrip, "timeout", seconds)


def differences(a: State, b: State) -> list[str]:
    """What is not the same, bit for bit, in two states."""
    found = [] if a.place == b.place else [f"{a.place} is not {b.place}"]
    for mine, theirs in ((a.weights, b.weights), (a.momentum, b.momentum)):
        if list(mine) != list(theirs):
            found.append(f"{list(mine)} is not {list(theirs)}")
        found += [n for n in mine if n in theirs and not np.array_equal(mine[n], theirs[n])]
    return found


class Recorder:
    """A link that keeps every frame that passes, as coded."""

    def __init__(self, link: Link) -> None:
        self.kind = link.kind
        self.name = link.name
        self.sent: list[bytes] = []
        self.answers: list[bytes] = []
        self._link = link

    def write(self, data: bytes) -> None:
        self.sent.append(data)
        self._link.write(data)

    def read(self, timeout: float) -> bytes:
        data = self._link.read(timeout)
        self.answers += [frame + b"\0" for frame in data.split(b"\0")[:-1]]
        return data

    def close(self) -> None:
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Troubled:
    """A link that loses, doubles or delays every third frame, each way."""

    kind = "udp"  # where such things happen, and so where a host does not wait long

    def __init__(self, link: Link, trouble: str) -> None:
        self.name = link.name
        self._link = link
        self._trouble = trouble
        self._requests = self._answers = 0
        self._late_requests: list[bytes] = []
        self._late_answers: list[bytes] = []
        self._ready: deque[bytes] = deque()

    def _copies(self, number: int) -> int:
        return {"lost": 0, "doubled": 2, "delayed": 1}[self._trouble] if number % 3 == 0 else 1

    def write(self, data: bytes) -> None:
        self._ready.extend(self._late_answers)  # what was late has come by now
        self._late_answers.clear()
        self._requests += 1
        if self._trouble == "delayed" and self._requests % 3 == 0:
            self._late_requests.append(data)
            return
        for frame in (*self._late_requests, *[data] * self._copies(self._requests)):
            self._link.write(frame)
        self._late_requests.clear()

    def read(self, timeout: float) -> bytes:
        if not self._ready:
            for frame in self._link.read(timeout).split(b"\0")[:-1]:
                self._answers += 1
                late = self._trouble == "delayed" and self._answers % 3 == 0
                queue = self._late_answers if late else self._ready
                queue.extend([frame + b"\0"] * self._copies(self._answers))
        return self._ready.popleft() if self._ready else b""

    def close(self) -> None:
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


def splitee(*words: str | Path) -> Said:
    """Runs `splitee words...` in this process; raises what a user would see as a traceback."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    argv = ["splitee", *map(str, words)]
    with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "argv", argv):
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
    return Said(code, out.getvalue(), err.getvalue())
