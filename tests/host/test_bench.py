"""What kernels and hashes cost stays what it was, and is what it has to be; links are measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from host_harness import splitee
from splitee.errors import MissingTool, SpliteeError
from splitee_exporters.c import to_c
from splitee_host import bench, boards, goodput
from splitee_host.relay import Faults, Relay

FOLDER = Path(__file__).parents[2] / "benchmarks"
RENEW = "splitee bench kernels --board {0} --json > benchmarks/kernels-{0}.json"

Row = dict[str, Any]
Key = tuple[str, str]  # kernel, shape


def key(row: Row) -> Key:
    return row["kernel"], row["shape"]


def committed(board: str) -> list[Row]:
    rows: list[Row] = json.loads((FOLDER / f"kernels-{board}.json").read_text(encoding="utf-8"))
    return rows


BOARDS = ("qemu-m4", "qemu-m55")
BEFORE = [(board, row) for board in BOARDS for row in committed(board)]

# Instructions of one sample's step. For comparison, measured the same way on the Cortex-M4 in the
# first case: AIfES 2.2.0 takes 63.1 M, the best of PULP-TrainLib's kernels 7.0 M with 695 KB of
# scratch.
BARS = {
    ("qemu-m4", "3x16x32x32k3", "step"): 3_200_000,
    ("qemu-m4", "3x16x32x32k3", "step_without_dinput"): 1_700_000,
    ("qemu-m4", "16x16x16x16k3", "step"): 3_000_000,
    ("qemu-m4", "16x32x16x16k1", "step"): int(2.5 * 3 * 131_072),
    ("qemu-m4", "32x32x8x8k1", "step"): int(2.5 * 3 * 65_536),
    ("qemu-m4", "256x10", "step"): int(2.5 * 3 * 2_560),
    ("qemu-m4", "128x64", "step"): int(2.5 * 3 * 8_192),
    ("qemu-m55", "3x16x32x32k3", "step"): 1_300_000,
    ("qemu-m55", "16x16x16x16k3", "step"): 1_300_000,
    ("qemu-m55", "16x32x16x16k1", "step"): 1 * 3 * 131_072,
    ("qemu-m55", "32x32x8x8k1", "step"): 1 * 3 * 65_536,
    ("qemu-m55", "256x10", "step"): 2 * 3 * 2_560,
    ("qemu-m55", "128x64", "step"): 2 * 3 * 8_192,
}


@cache
def measured(board: str, folder: Path) -> dict[Key, Row]:
    try:
        rows = bench.kernels(boards.load_boards()[board], folder)
    except MissingTool as missing:
        pytest.skip(str(missing))
    return {key(row): row for row in rows}


Measure = Callable[[str], dict[Key, Row]]


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """Measures a board, once."""
    folder = tmp_path_factory.mktemp("bench")

    def now(board: str) -> dict[Key, Row]:
        rows = measured(board, folder / board)
        here, there = next(iter(rows.values()))["compiler"], committed(board)[0]["compiler"]
        if here != there:
            pytest.skip(f"figures of {there} are committed, here is {here}")
        return rows

    return now


CLOCK = 8  # instructions that a part may seem to differ by: it is timed in microseconds


@pytest.mark.parametrize(
    ("board", "before"), BEFORE, ids=["-".join((board, *key(row))) for board, row in BEFORE]
)
def test_no_kernel_takes_one_percent_more_than_before(
    board: str, before: Row, now: Measure
) -> None:
    after = now(board)[key(before)]
    assert after["scratch_bytes"] <= before["scratch_bytes"]
    risen = {
        part: (count, after["instructions"][part])
        for part, count in before["instructions"].items()
        if after["instructions"][part] > 1.01 * count + CLOCK
    }
    assert not risen, f"if this is meant: {RENEW.format(board)}"


@pytest.mark.parametrize("board", BOARDS)
def test_every_kernel_measured_is_committed(board: str, now: Measure) -> None:
    assert list(now(board)) == [key(row) for row in committed(board)], RENEW.format(board)


@pytest.mark.parametrize(("board", "shape", "part"), BARS)
def test_a_step_stays_below_its_bar(board: str, shape: str, part: str, now: Measure) -> None:
    (row,) = (r for (_, name), r in now(board).items() if name == shape)
    assert row["instructions"][part] <= BARS[board, shape, part]
    assert row["scratch_bytes"] <= 8192


@pytest.mark.parametrize("board", BOARDS)
def test_two_runs_count_the_same(board: str, now: Measure, tmp_path: Path) -> None:
    assert measured(board, tmp_path) == now(board)


# Instructions a multiply-accumulate of inference in 8 bits. For comparison, CMSIS-NN on the
# Cortex-M4: 4.77 and 2.33.
INT8_BARS = {
    ("qemu-m4", "3x16x32x32k3"): 3.8,
    ("qemu-m4", "16x16x16x16k3"): 2.0,
    ("qemu-m55", "16x16x16x16k3"): 0.45,
}


@pytest.mark.parametrize("board", BOARDS)
def test_no_kernel_in_8_bits_takes_one_percent_more_than_before(board: str, tmp_path: Path) -> None:
    text = (FOLDER / f"kernels-int8-{board}.json").read_text(encoding="utf-8")
    before: list[Row] = json.loads(text)
    try:
        after = bench.int8_kernels(boards.load_boards()[board], tmp_path)
    except MissingTool as missing:
        pytest.skip(str(missing))
    if after[0]["compiler"] != before[0]["compiler"]:
        pytest.skip(f"figures of {before[0]['compiler']} are committed")
    renew = f"splitee bench kernels --int8 --board {board} --json > kernels-int8-{board}.json"
    assert [key(row) for row in after] == [key(row) for row in before], renew
    for old, new in zip(before, after, strict=True):
        assert new["instructions"] <= 1.01 * old["instructions"] + CLOCK, (key(old), renew)
        assert new["scratch_bytes"] <= min(old["scratch_bytes"], 4096)
        if bar := INT8_BARS.get((board, new["shape"])):
            assert new["instructions"] <= bar * new["macs"], key(new)


def test_no_hash_takes_one_percent_more_than_before(tmp_path: Path) -> None:
    before: list[Row] = json.loads((FOLDER / "hash-qemu-m4.json").read_text(encoding="utf-8"))
    try:
        after = bench.hashes(boards.load_boards()["qemu-m4"], tmp_path)
    except MissingTool as missing:
        pytest.skip(str(missing))
    if after[0]["compiler"] != before[0]["compiler"]:
        pytest.skip(f"figures of {before[0]['compiler']} are committed")
    renew = "splitee bench hash --json > benchmarks/hash-qemu-m4.json"
    kinds = [(row["hash"], row["bytes"]) for row in before]
    assert [(row["hash"], row["bytes"]) for row in after] == kinds, renew
    for old, new in zip(before, after, strict=True):
        assert new["instructions"] <= 1.01 * old["instructions"] + CLOCK, renew
        assert new["hash"] != "blake2s" or new["flash_bytes"] <= 2048


def test_a_board_that_cannot_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpliteeError, match=r"posix cannot count instructions"):
        bench.kernels(boards.load_boards()["posix"], tmp_path)


# ---- links ----


@contextmanager
def pump(name: str, folder: Path) -> Iterator[tuple[Relay, goodput.Pump]]:
    """The host's end of a pump on one of the links that are measured."""
    setup = goodput.LINKS[name]
    board = boards.load_boards()[setup.board]
    firmware = goodput.build_pump(board, folder / board.name)
    with goodput.relayed(setup, board, firmware, Faults()) as relay:
        yield relay, goodput.Pump(relay)


@pytest.mark.parametrize("name", goodput.LINKS)
def test_a_pump_moves_every_byte_and_hardly_another(name: str, tmp_path: Path) -> None:
    size, pieces = 1449, 14  # the last one is shorter
    total = size * (pieces - 1) + 7
    try:
        with pump(name, tmp_path) as (relay, the_pump):
            for _ in range(2):  # it is where it was
                down, up = relay.down_counts.bytes, relay.up_counts.bytes
                the_pump.down(bytes(total), size)
                command, answers = 8, pieces if relay.kind == "udp" else 1
                assert relay.down_counts.bytes - down == total + command
                assert relay.up_counts.bytes - up == answers
                down, up = relay.down_counts.bytes, relay.up_counts.bytes
                the_pump.up(total, size)
                assert relay.up_counts.bytes - up == total
                assert relay.down_counts.bytes - down == answers + command
    except MissingTool as missing:
        pytest.skip(str(missing))


def test_a_row_for_each_case_and_direction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = replace(goodput.LINKS["udp-paced"], down=1, up=1, repeats=1, rate=math.inf)
    monkeypatch.setitem(goodput.LINKS, "udp-paced", quick)
    monkeypatch.setattr(goodput, "CASES", {"clean": 0.0, "loss1": 0.01})
    rows = list(goodput.links(tmp_path, to_c, ("udp-paced",)))
    assert [(row["link"], row["case"], row["direction"]) for row in rows] == [
        ("udp-paced", case, direction)
        for case in ("clean", "loss1")
        for direction in ("down", "up")
    ]
    for row in rows:
        assert row["goodput_ratio"] > 0
        assert row["overhead"] > 0


def test_a_ratio_is_that_of_each_transfers_best() -> None:
    run = goodput.Run
    runs = [run([1.0, 3.0], [4.0, 2.0], 0.02), run([2.0, 1.0], [2.0, 6.0, 9.0], 0.01)]
    assert goodput.figures(runs) == {"goodput_ratio": 0.5, "overhead": 0.01}


def test_a_link_that_is_not_measured_is_told() -> None:
    said = splitee("bench", "link", "--link", "pigeon")
    assert said.code == 1
    assert 'no link "pigeon" is measured: there are serial-paced, udp-paced' in said.err
