"""What tests of whole runs share: programs of their own, and how runs are compared."""

from __future__ import annotations

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from host_harness import Said
from splitee.runs import Run


@contextmanager
def program(*command: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A Python process of its own; its output can be read, and its input written, as it comes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(said: Said) -> str:
    """The output of a command that went well."""
    assert (said.code, said.err) == (0, "")
    return said.out


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records, or clients of a summary; bytes count what had to be sent again."""
    times = (
        "seconds", "at_seconds", "bytes_up", "bytes_down", "activations_up",
        "ms_per_sample", "bytes_up_per_sample", "link",
    )  # fmt: skip
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def summary_of(run: Run) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run.folder / "summary.json").read_text())
    return summary


def assert_same_run(found: Run, expected: Run) -> None:
    """Every bit of all weights and momenta is the same, and every record but for times."""
    mine, theirs = (load_file(run.checkpoint_file) for run in (found, expected))
    assert list(mine) == list(theirs)
    different = [name for name in mine if mine[name].tobytes() != theirs[name].tobytes()]
    assert different == []
    assert found.checkpoint_file.read_bytes() == expected.checkpoint_file.read_bytes()
    assert without_times(found.metrics()) == without_times(expected.metrics())
    assert without_times(summary_of(found)["clients"]) == without_times(
        summary_of(expected)["clients"]
    )
    assert summary_of(found)["took_part"] == summary_of(expected)["took_part"]
    assert sorted(p.name for p in found.folder.iterdir()) == sorted(
        p.name for p in expected.folder.iterdir()
    )


class Terminal:
    """A terminal of 80 columns in which a program runs in the foreground, as a user starts it.

    Keys are pressed by ``press``: Ctrl-C is the terminal's own signal, to all of its processes that
    are in the program's group.
    """

    def __init__(self, *command: str | Path) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
        self._master, slave = os.openpty()
        try:
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 40, 80, 0, 0))
            self.process = subprocess.Popen(
                ["setsid", "--ctty", sys.executable, *map(str, command)],
                env=environment, stdin=slave, stdout=slave, stderr=slave,
            )  # fmt: skip
        finally:
            os.close(slave)
        self.said = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._master)
        self.process.kill()
        self.process.wait()

    def press(self, key: bytes) -> None:
        """As if somebody did."""
        os.write(self._master, key)

    def read_until(self, word: str) -> None:
        """Takes in what it says up to a word that it did not say before."""
        while word not in self.said:
            self.said += self._read()
        self.said = self.said.partition(word)[2]

    def end(self) -> int:
        """Takes in the rest; its exit status."""
        with suppress(OSError):  # nobody is at the other end any more
            while text := self._read():
                self.said += text
        return self.process.wait()

    def _read(self) -> str:
        return os.read(self._master, 1 << 16).decode(errors="replace")

    @property
    def words(self) -> str:
        """What it said since the last word that was waited for, without colours and folds."""
        return " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", " ", self.said).split())
