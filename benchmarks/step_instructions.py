"""Instructions of one training step (forward, backward, update) on every emulated board, as JSON.

.venv/bin/python benchmarks/step_instructions.py > benchmarks/results/step_instructions.json

QEMU counts: with -icount every instruction takes the same virtual time, and the firmware's own
clock says how long it computed. Instructions are not cycles: there are no wait states, no cache and
no pipeline.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from splitee.assemble import Assembly, Member
from splitee.fleet import parse
from splitee_exporters.c import to_c
from splitee_host.boards import Board, load_boards, look_up, start
from splitee_host.device import Device
from splitee_host.launch import build_firmware

ROOT = Path(__file__).parents[1]
COUNTED = ("-icount", "shift=6")
NS_PER_INSTRUCTION = 64  # 2 to the power of that shift

FLEET = """
name = "instructions"
rounds = 1
batch = 1
gradient = "local"
exits = "upto"

[model]
name = "resnet8"
width = 6

[data]
name = "digits"

[optimizer]
learning_rate = 0.01
momentum = 0.9

[[client]]
name = "board"
board = "{board}"
cut = "{cut}"
share = 0.02

[[client]]
name = "rest"
share = 0.98
"""


def instructions(board: Board, cut: str, folder: Path) -> dict[str, int]:
    """The instructions of a step on one sample, by part."""
    known = load_boards()
    fleet = parse(FLEET.format(board=board.name, cut=cut))
    member = Assembly(fleet, lambda name: look_up(known, name).for_assembly).member("board")
    firmware = build_firmware(member.build, board, to_c, folder)
    with start(board, firmware, COUNTED) as running:
        device = Device("board", running.link, member.build, fleet.settings(member.table))
        return _counted(device, member)


def _counted(device: Device, member: Member) -> dict[str, int]:
    device.start(member.state, member.images)
    found: dict[str, int] = {}
    before = device.counters().compute_micros
    for part, run in (
        ("forward", lambda: device.forward(1, 1)),
        ("backward", lambda: device.backward(None)),
        ("update", lambda: device.step()),
    ):
        run()
        after = device.counters().compute_micros
        found[part] = round((after - before) * 1000 / NS_PER_INSTRUCTION)
        before = after
    return {**found, "step": sum(found.values())}


def main() -> None:
    """Measures every emulated board in turn and prints one JSON document."""
    boards = [b for b in load_boards().values() if b.qemu is not None]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    found: dict[str, dict[str, dict[str, int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for board in boards:
            print(board.name, file=sys.stderr)
            found[board.name] = {
                cut: instructions(board, cut, Path(folder)) for cut in ("stem", "layer1")
            }
    print(json.dumps({"setup": {"commit": commit}, "instructions": found}, indent=1))


if __name__ == "__main__":
    main()
