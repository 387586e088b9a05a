"""What a ResNet-8's first stage takes of a board's RAM, and what each lever contributes, as JSON.

.venv/bin/python benchmarks/memory.py > benchmarks/results/memory.json

The segment is the stem and layer1 with the exit on top, one sample at a time. Each row is built for
a Cortex-M4F and measured in its ELF file; in the rows that say so, the firmware trained a batch of
16 in parts in QEMU, and its painted stack was read back. The shard has a memory of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from splitee import zoo
from splitee.capture import capture
from splitee.client import Place, Settings, State
from splitee.data import Images
from splitee.exits import Exit
from splitee.model import Network, Segment
from splitee.place import Build
from splitee.steps import Levers
from splitee_exporters.c import to_c
from splitee_host import boards
from splitee_host.bench import compiler
from splitee_host.device import Device
from splitee_host.memory import Elf, measure

ROOT = Path(__file__).parents[1]
BATCH = 16
# QEMU's machine has more RAM than the boards that it stands for, and PSRAM for the shard
BOARD = replace(
    boards.load_boards()["qemu-m4"],
    ram_bytes=2 << 20,
    shard_start=0x2100_0000,
    shard_bytes=16 << 20,
)
SMALLEST = Levers(relu_bits=True, float16=True, recompute=1.0, local_only=True)
EXACT = replace(SMALLEST, float16=False)
ROWS = {
    "none": Levers(),
    "relu_bits": Levers(relu_bits=True),
    "float16": Levers(float16=True),
    "recompute 0.5": Levers(recompute=0.5),
    "recompute 1.0": Levers(recompute=1.0),
    "local_only": Levers(local_only=True),
    "fused_update, a batch in one part": Levers(fused_update=True),
    "relu_bits, recompute 1.0": replace(EXACT, local_only=False),
    "relu_bits, float16, recompute 1.0": replace(SMALLEST, local_only=False),
    "relu_bits, recompute 1.0, local_only": EXACT,
    "relu_bits, float16, local_only": replace(SMALLEST, recompute=0.0),
    "relu_bits, float16, recompute 1.0, local_only": SMALLEST,
}
TRAINED = ("none", "relu_bits, float16, recompute 1.0, local_only")


def first_stage(width: int, size: int, levers: Levers) -> tuple[Segment, Build]:
    """The segment and its build."""
    torch.manual_seed(0)
    model = zoo.build("resnet8", width=width, norm="group", channels=3, classes=10)
    network = Network(model, (3, size, size))
    cut = network.cut("layer1")
    segment = Segment(network, cut, {cut.name: Exit((width, size, size), 10)})
    build = Build(
        graph=capture(segment, 10),
        capacity=1,
        momentum=False,
        samples_max=BATCH,
        scale=(1 / 64,) * 3,
        shift=(-2.0,) * 3,
        levers=levers,
    )
    return segment, build


def stack_of(segment: Segment, build: Build, firmware: boards.Firmware) -> int:
    """The most bytes of stack that training a batch took."""
    rng = np.random.default_rng(0)
    shape = build.graph.input_shape
    images = Images(
        rng.integers(0, 256, (BATCH, *shape), np.uint8), rng.integers(0, 10, BATCH, np.uint8)
    )
    weights = {n: t.detach().numpy().copy() for n, t in segment.tensors().items()}
    with boards.start(BOARD, firmware) as running:
        settings = Settings(learning_rate=0.01)
        device = Device(BOARD.name, running.link, build, settings, close=running.close)
        device.start(State(weights, {}, Place(BATCH, seed=0)), images)
        for _ in range(BATCH):
            device.forward(1, BATCH)
            device.backward(None)
        device.step()
        return device.counters().stack_used


def row(width: int, size: int, name: str) -> dict[str, Any]:
    """One row of the table."""
    segment, build = first_stage(width, size, ROWS[name])
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "segment.c").write_text(to_c(build))
        firmware = boards.build(BOARD, folder, folder)
        memory = measure(Elf(firmware.elf))
        used = stack_of(segment, build, firmware) if name in TRAINED else None
    return {
        "width": width,
        "input": [3, size, size],
        "levers": name,
        "arena_bytes": memory.arena,
        "arena_lower_bound": build.plan.lower_bound,
        "weight_bytes": memory.weights,
        "static_bytes": memory.static,
        "stack_bytes": memory.stack,
        "stack_used_bytes": used,
        "ram_bytes": memory.ram,
        "shard_bytes_apart": memory.shard,
        "forward_macs_again": round(build.schedule.macs_again / build.graph.macs()[0], 3),
    }


def main() -> None:
    """Prints every row, with what they were made by."""
    head = ["git", "rev-parse", "--short", "HEAD"]
    made = subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = []
    for width, size in ((16, 32), (8, 32), (8, 16)):
        for name in ROWS:
            rows.append(row(width, size, name))
            print(rows[-1], file=sys.stderr)
    levers = {name: asdict(setting) for name, setting in ROWS.items()}
    print(json.dumps(
        {"commit": made.stdout.strip(), "board": BOARD.name, "compiler": compiler(BOARD),
         "settings": levers, "rows": rows},
        indent=1,
    ))  # fmt: skip


if __name__ == "__main__":
    main()
