"""What the link takes of a microcontroller."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from splitee_host import boards

ROOT = Path(__file__).parents[2]
PARTS = ("frames and seals", "sessions", "requests")


def test_frames_sessions_and_requests_take_six_kilobytes_of_code_and_four_of_ram() -> None:
    if shutil.which("arm-none-eabi-gcc") is None:
        pytest.skip("needs arm-none-eabi-gcc")
    spec = importlib.util.spec_from_file_location("sizes", ROOT / "benchmarks/network_sizes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for auth in (False, True):
        found = module.row(boards.load_boards()["qemu-m4"], auth=auth)
        assert all(found[part]["code_bytes"] > 300 for part in PARTS)
        assert sum(found[part]["code_bytes"] for part in PARTS) <= 6 * 1024
        assert sum(found[part]["ram_bytes"] for part in PARTS) <= 4 * 1024


def test_the_committed_sizes_are_within_the_targets() -> None:
    rows = json.loads((ROOT / "benchmarks/results/network_sizes.json").read_text())["rows"]
    assert {row["board"] for row in rows} >= {"qemu-m4", "qemu-m4-udp"}
    for row in rows:
        assert sum(row[part]["code_bytes"] for part in PARTS) <= 6 * 1024
        assert sum(row[part]["ram_bytes"] for part in PARTS) <= 4 * 1024
