"""What the kernels cost stays what it was, and is what it has to be."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from splitee.errors import MissingTool, SpliteeError
from splitee_host import bench, boards

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "kernels-qemu-m4.json"
RENEW = f"splitee bench kernels --board qemu-m4 --json > benchmarks/{COMMITTED.name}"
BEFORE: list[dict[str, Any]] = json.loads(COMMITTED.read_text(encoding="utf-8"))

# Instructions of one sample's step. For comparison, measured the same way in the first case: AIfES
# 2.2.0 takes 63.1 M, the best of PULP-TrainLib's kernels 7.0 M with 695 KB of scratch.
BARS = {
    ("3x16x32x32k3", "step"): 3_200_000,
    ("3x16x32x32k3", "step_without_dinput"): 1_700_000,
    ("16x16x16x16k3", "step"): 3_000_000,
    ("16x32x16x16k1", "step"): int(2.5 * 3 * 131_072),
    ("32x32x8x8k1", "step"): int(2.5 * 3 * 65_536),
    ("256x10", "step"): int(2.5 * 3 * 2_560),
    ("128x64", "step"): int(2.5 * 3 * 8_192),
}


def key(row: dict[str, Any]) -> tuple[str, str]:
    return row["kernel"], row["shape"]


@cache
def measured(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    try:
        rows = bench.kernels(boards.load_boards()["qemu-m4"], folder)
    except MissingTool as missing:
        pytest.skip(str(missing))
    return {key(row): row for row in rows}


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    rows = measured(tmp_path_factory.mktemp("bench"))
    compiler = next(iter(rows.values()))["compiler"]
    if compiler != BEFORE[0]["compiler"]:
        pytest.skip(f"figures of {BEFORE[0]['compiler']} are committed, here is {compiler}")
    return rows


@pytest.mark.parametrize("before", BEFORE, ids=lambda row: "-".join(key(row)))
def test_no_kernel_takes_one_percent_more_than_before(
    before: dict[str, Any], now: dict[tuple[str, str], dict[str, Any]]
) -> None:
    after = now[key(before)]
    assert after["scratch_bytes"] <= before["scratch_bytes"]
    risen = {
        part: (count, after["instructions"][part])
        for part, count in before["instructions"].items()
        if after["instructions"][part] > 1.01 * count
    }
    assert not risen, f"if this is meant: {RENEW}"


def test_every_kernel_measured_is_committed(
    now: dict[tuple[str, str], dict[str, Any]],
) -> None:
    assert list(now) == [key(row) for row in BEFORE], RENEW


@pytest.mark.parametrize(("shape", "part"), BARS)
def test_a_step_stays_below_its_bar(
    shape: str, part: str, now: dict[tuple[str, str], dict[str, Any]]
) -> None:
    (row,) = (r for (_, name), r in now.items() if name == shape)
    assert row["instructions"][part] <= BARS[shape, part]
    assert row["scratch_bytes"] <= 8192


def test_two_runs_count_the_same(
    now: dict[tuple[str, str], dict[str, Any]], tmp_path: Path
) -> None:
    assert measured(tmp_path) == now


def test_a_board_that_cannot_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpliteeError, match=r"posix cannot count instructions"):
        bench.kernels(boards.load_boards()["posix"], tmp_path)
