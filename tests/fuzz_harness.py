"""What fuzzing shares: the targets under firmware/fuzz, their segments, and their corpus.

Each target's corpus is seeds, which are made here from the published bytes, and what fuzzing has
found since: a line of hexadecimal each in ``vectors/corpus-<target>.txt``. ``python -m
fuzz_harness`` puts what ``make fuzz`` has found into these files.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from splitee.capture import capture
from splitee.errors import MissingTool
from splitee.exits import Exit
from splitee.model import Network, Segment
from splitee.place import Build
from splitee.steps import Levers
from splitee_exporters.c import to_c
from splitee_host import boards
from splitee_host.wire import messages as m
from vectors import wire

ROOT = Path(__file__).parents[1]
FOUND = ROOT / "build" / "fuzz"  # what fuzzing finds is kept here, for the next time
CORPUS = Path(__file__).parent / "vectors"
RECEIVE_MAX = 200
"""Largest body that the device takes; inputs can hold larger ones, of up to 255 bytes."""

KEPT = 200
"""Bytes of an input that are committed: of what is found, most is long and little is new."""

IN_ORDER, REPEATED, LATE, EARLY, SESSION, DAMAGED, RAW = 0, 248, 249, 250, 251, 252, 253


# ---- the segments ----


def _layers() -> nn.Module:
    """A layer of each kind, on images of 4 by 4, so that a step takes little time."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2, 2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.GroupNorm(2, 4),
        nn.ReLU6(),
        nn.Conv2d(4, 3, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    )


class _Block(nn.Module):
    """Two convolutions, and a way round them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.GroupNorm(1, 2), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.inner(x))


def _joins() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.ReLU()),
        _Block(),
        nn.Conv2d(2, 3, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    )


@cache
def segment(target: str) -> Build:
    """The segment of a target: "device" moves its cut and distils, "lean" has every lever."""
    torch.manual_seed(1)
    network = Network({"device": _layers, "lean": _joins}[target](), (1, 4, 4))
    cuts = network.cuts[:2]
    below = Segment(network, cuts[-1], {c.name: Exit(_image(c.shape), 3) for c in cuts})
    levers = Levers(relu_bits=True, float16=True, recompute=1.0, fused_update=True)
    moves = target == "device"
    return Build(
        capture(below, 3),
        capacity=3,
        momentum=moves,
        samples_max=7,
        scale=(1 / 64,),
        shift=(-2.0,),
        moves=moves,
        distills=moves,
        levers=Levers() if moves else levers,
    )


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, height, width


# ---- the targets ----


@dataclass(frozen=True)
class Target:
    """A program under libFuzzer."""

    program: str  # the file under firmware/fuzz
    sources: tuple[str, ...]  # of the firmware, that it is linked with
    longest: int  # new inputs, in bytes

    def segment_c(self, name: str) -> str:
        return to_c(segment(name)) if self.program == "any_requests.c" else ""


_FRAME = ("protocol/frame.c", "protocol/seal.c")
_CORE = (
    *(f"core/{name}.c" for name in ("order", "trainer", "step", "fused")),
    *_FRAME,
    "protocol/codec.c",
)
_KERNELS = tuple(
    str(path.relative_to(ROOT / "firmware"))
    for path in sorted((ROOT / "firmware" / "kernels").glob("**/*.c"))
)
TARGETS = {
    "frame": Target("any_bytes.c", _FRAME, longest=600),  # two full blocks and more
    "device": Target("any_requests.c", _CORE + _KERNELS, longest=1024),
    "lean": Target("any_requests.c", _CORE + _KERNELS, longest=1024),
}


def build(name: str, root: Path | None = None) -> Path:
    """The program of a target, compiled under libFuzzer and sanitizers.

    root: where to make it, instead of build/fuzz.
    Raises MissingTool without clang, or without its sanitizers.
    """
    if shutil.which("clang") is None:
        raise MissingTool("clang is not installed: `make setup`, or `sudo apt-get install clang`")
    target = TARGETS[name]
    own = (root or FOUND) / name
    own.mkdir(parents=True, exist_ok=True)
    (own / "segment.c").write_text(target.segment_c(name))
    # two targets of one program differ in the segment: all else is compiled once
    objects = own.parent / f"{target.program.removesuffix('.c')}-objects"
    for stale in objects.glob("segment.*"):
        stale.unlink()
    made = boards.build(
        boards.load_boards()["posix"],
        own,
        objects,
        sanitize=True,
        overrides={
            "CC": "clang",
            "PORT": "none",  # it is in the program
            "PROGRAM": " ".join((f"fuzz/{target.program}", *target.sources)),
            "OPTIMIZE": "-O1",
            "BOARD_CFLAGS": "-fsanitize=fuzzer",
            "RECEIVE_MAX": str(RECEIVE_MAX),
        },
    )
    program = own / "fuzz.elf"
    program.unlink(missing_ok=True)  # the one before may still run
    return Path(shutil.copy2(made.elf, program))


# ---- what they are fed ----


@dataclass(frozen=True)
class Request:
    """One request of an input of any_requests.c."""

    code: int
    body: bytes
    how: int = IN_ORDER

    def pack(self) -> bytes:
        return bytes([self.code, self.how, len(self.body)]) + self.body


def row(*requests: m.Message | Request) -> bytes:
    """An input of any_requests.c."""
    return b"".join(
        (r if isinstance(r, Request) else Request(r.CODE, r.pack())).pack() for r in requests
    )


def requests(script: bytes) -> Iterator[Request]:
    """The requests in an input of any_requests.c, which reads any bytes as such."""
    at = 0
    while at + 3 <= len(script):
        code, how, size = script[at : at + 3]
        body = script[at + 3 : at + 3 + size]
        yield Request(code, body, how)
        at += 3 + len(body)


def _conversation(name: str) -> list[bytes]:
    """Inputs that train, look at every memory, move the cut, step singly, and stray from that."""
    built = segment(name)
    size = built.record_size
    moves = built.moves
    hello = Request(m.Hello.CODE, m.Hello(m.schema(), 1).pack(), SESSION)
    more = (0.9, 1.0, 0.25) if moves else (0.0, 0.0, 0.0)  # momentum, clip, distill
    settings = m.Settings(0.1, more[0], 0.01, 0.5, 0.5, *more[1:])
    records = b"".join(bytes([i % 3, *range(i, i + size - 1)]) for i in range(built.samples_max))
    weights = built.graph.flatten(built.graph.weights).astype("<f4").tobytes()
    start: list[m.Message | Request] = [hello, settings]
    start += [
        m.Write(m.Region.SHARD, at, records[at : at + 160]) for at in range(0, len(records), 160)
    ]
    start += [
        m.Write(m.Region.WEIGHTS, at, weights[at : at + 160]) for at in range(0, len(weights), 160)
    ]
    start.append(m.Place(samples=7, position=0, seed=5, epoch=0, steps=0))
    gradient = m.Write(m.Region.GRADIENT, 0, bytes([0, 0, 0, 0x3E]) * 8)
    last = [m.Backward(), m.Step(), m.Stats()]
    batch = [m.Forward(3, 3), m.Read(m.Region.ACTIVATIONS, 0, 64), gradient, *last]
    ends = [m.Forward(1, 1), *last]
    steps = len(built.schedule.steps)
    step = m.Forward(2, 2)
    cases: list[Sequence[m.Message | Request]] = [
        [*start, *batch, *batch, *ends, *batch],
        [*start, m.Forward(2, 4), m.Backward(), m.Forward(2, 4), *last],
        [*start, *(m.Read(region, 0, 256) for region in m.Region)],
        [*start, *(m.Write(region, 8, bytes(range(32))) for region in m.Region)],
        [*start, m.Write(m.Region.INPUT, 0, bytes(range(48))), m.Infer(3), m.Infer(4)],
        [*start, step, *(m.Run(i, i + 1) for i in range(steps)), m.Step()],
        [*start, step, m.Run(5, steps), m.Run(0, 3), m.Backward(), m.Infer(1), m.Step()],
        [*start, step, m.Backward(), m.Infer(2), m.Forward(1, 2), hello, *batch],
        [*start, m.Select(1, 0), *batch, m.Select(2, 0), *batch, m.Select(2, 1), *ends],
        [*start, m.Forward(7, 7), m.Forward(0, 0), m.Forward(3, 2), *last],
        [
            *start,
            m.Write(m.Region.SHARD, size, b"\x03"),
            m.Write(m.Region.SHARD, 4 * size, b"\xff"),
            *batch,
            *batch,
            *batch,
        ],
        [*start, Request(m.Stats.CODE, b"", DAMAGED), m.Stats()],
        [*start, *batch, Request(m.Step.CODE, b"", REPEATED), m.Stats()],
        [*start, Request(m.Step.CODE, b"", LATE), Request(m.Step.CODE, b"", EARLY), *batch],
        [*start, m.Settings(float("inf"), 0, 0, float("nan"), 1e38, 0, 0), *batch, *batch],
        [*start, Request(0, bytes.fromhex("05 0b 01 01 01 00"), RAW), m.Stats()],
        [hello, m.Place(65535, 65535, 0, 0, 0), m.Place(7, 7, 1, 0xFFFFFFFF, 1), *ends],
    ]
    return [row(*case) for case in cases]


def seeds(name: str) -> list[bytes]:
    """Where fuzzing starts: the published bytes, and conversations with a device."""
    if name == "frame":
        enough = (4096).to_bytes(2, "little")
        whole = [enough + wire.unhex(case["bytes"]) for case in wire.WHOLE]
        return whole + [
            case.get("capacity", 4096).to_bytes(2, "little") + wire.unhex(case["bytes"])
            for case in wire.STREAMS
        ]
    bodies = [(case["code"], wire.unhex(case["body"])) for case in wire.MESSAGES]
    whole = [row(*(Request(code, body[:255]) for code, body in bodies))]
    long = [row(*(Request(code, body[:254] + b"\0") for code, body in bodies))]
    short = [row(*(Request(code, body[:-1]) for code, body in bodies))]
    return [*whole, *long, *short, *_conversation(name)]


def found(name: str) -> list[bytes]:
    """What fuzzing has added to the seeds, as committed."""
    lines = (CORPUS / f"corpus-{name}.txt").read_text(encoding="ascii").splitlines()
    return [bytes.fromhex(line) for line in lines if not line.startswith("#")]


def corpus(name: str) -> list[bytes]:
    """Every input of a target that is known."""
    return seeds(name) + found(name)


def fill(folder: Path, inputs: Sequence[bytes]) -> Path:
    """The folder, with a file for each input, as libFuzzer has it."""
    folder.mkdir(parents=True, exist_ok=True)
    for content in inputs:
        (folder / hashlib.sha1(content).hexdigest()).write_bytes(content)
    return folder


# ---- running ----


@dataclass(frozen=True)
class Outcome:
    """How a run of libFuzzer ended."""

    finding: str  # what it said last, or nothing
    inputs: int  # how many it has tried
    said: str


def fuzz(program: Path, folders: Sequence[Path], artifacts: Path, *options: str) -> Outcome:
    """Runs a target; new inputs go to the first folder, and one that is a finding to artifacts."""
    artifacts.mkdir(parents=True, exist_ok=True)
    ended = subprocess.run(
        [
            program,
            *options,
            *("-timeout=10", "-detect_leaks=0", "-print_final_stats=1"),
            f"-artifact_prefix={artifacts}/",
            *folders,
        ],
        capture_output=True,
        text=True,
        errors="replace",
    )
    counted = re.findall(r"number_of_executed_units: (\d+)", ended.stderr)
    finding = "" if ended.returncode == 0 else "\n".join(ended.stderr.splitlines()[-40:])
    return Outcome(finding, int(counted[-1]) if counted else 0, ended.stderr)


def renew(name: str) -> None:
    """Writes the committed corpus of a target anew: what was found and covers more than seeds."""
    program = build(name)
    scratch = FOUND / name / "merge"
    shutil.rmtree(scratch, ignore_errors=True)
    merged = fill(scratch, seeds(name))
    before = {path.name for path in merged.iterdir()}
    fresh = fill(FOUND / name / "found", found(name))
    options = ("-merge=1", f"-max_len={KEPT}")
    outcome = fuzz(program, [merged, fresh], FOUND / name / "findings", *options)
    if outcome.finding:
        sys.exit(outcome.finding)
    new = [path.read_bytes() for path in merged.iterdir() if path.name not in before]
    lines = [
        f"# What fuzzing `{name}` found beyond the seeds: `python -m fuzz_harness` in tests/",
        *(content.hex() for content in sorted(new, key=lambda content: (len(content), content))),
    ]
    (CORPUS / f"corpus-{name}.txt").write_text("\n".join([*lines, ""]), encoding="ascii")


if __name__ == "__main__":
    for target in sys.argv[1:] or TARGETS:
        renew(target)
