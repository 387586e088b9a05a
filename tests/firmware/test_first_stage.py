"""The first stage of a resnet8 on images of 3x32x32 trains in the RAM of a small board.

The board's RAM is what the linker is given: a firmware that took more would not link.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from splitee import zoo
from splitee.capture import capture
from splitee.client import Place, Settings, State
from splitee.data import Images, draw_order
from splitee.errors import MissingTool
from splitee.exits import Exit
from splitee.model import Network, Segment
from splitee.place import Build
from splitee.steps import Levers
from splitee_exporters.c import to_c
from splitee_host import boards
from splitee_host.device import Device
from splitee_host.memory import Elf, measure
from splitee_host.verify import relative_error, step_in_torch

BATCH = 16
LEVERS = Levers(relu_bits=True, float16=True, recompute=1.0, local_only=True)
SETTINGS = Settings(learning_rate=0.1, weight_decay=0.001)
# activations are kept as float16: what is learnt is that close to PyTorch
TOLERANCE = 5e-3


@pytest.mark.parametrize(
    ("width", "size", "ram"), [(16, 32, 256), (8, 32, 128), (8, 16, 64)], ids="w{0}".format
)
def test_a_batch_in_parts_trains_in_little_memory(
    width: int, size: int, ram: int, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    model = zoo.build("resnet8", width=width, norm="group", channels=3, classes=10)
    network = Network(model, (3, size, size))
    cut = network.cut("layer1")
    segment = Segment(network, cut, {cut.name: Exit((width, size, size), 10)})
    build = Build(
        capture(segment, 10),
        capacity=1,
        momentum=False,
        samples_max=BATCH,
        scale=(1 / 64,) * 3,
        shift=(-2.0,) * 3,
        levers=LEVERS,
    )
    rng = np.random.default_rng(3)
    images = Images(
        rng.integers(0, 256, (BATCH, 3, size, size), np.uint8),
        rng.integers(0, 10, BATCH, np.uint8),
    )
    # the shard has the board's PSRAM
    board = replace(
        boards.load_boards()["qemu-m4"],
        ram_bytes=ram * 1024,
        shard_start=0x2100_0000,
        shard_bytes=16 << 20,
    )
    (tmp_path / "segment.c").write_text(to_c(build))
    try:
        firmware = boards.build(board, tmp_path, tmp_path)
    except MissingTool as missing:
        pytest.skip(str(missing))
    memory = measure(Elf(firmware.elf))
    assert memory.apart
    assert memory.arena == build.arena_bytes
    weights = {n: t.detach().numpy().copy() for n, t in segment.tensors().items()}
    with boards.start(board, firmware) as running:
        device = Device("board", running.link, build, SETTINGS, close=running.close)
        device.start(State(weights, {}, Place(BATCH, seed=5)), images)
        for _ in range(BATCH):
            device.forward(1, BATCH)
            device.backward(None)
        gradients = {f"gradient of {n}": g for n, g in device.gradients().items()}
        device.step()
        mine = gradients | {f"updated {n}": w for n, w in device.state().weights.items()}
        stack = device.counters().stack_used
    assert 0 < stack < memory.stack
    assert memory.ram <= ram * 1024
    part = images[draw_order(BATCH, 5, 0)]
    theirs = step_in_torch(segment, build, part, SETTINGS, None)
    errors = {name: relative_error(mine, theirs, name) for name in mine}
    assert not {name: e for name, e in errors.items() if e > TOLERANCE}
