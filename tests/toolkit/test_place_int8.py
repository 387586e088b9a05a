"""What a segment of 8 bits takes: its plan holds, and it is what is alive at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from splitee import arena
from splitee.int8 import Int8Graph, Int8Op, Scale
from splitee.place import Room
from splitee.place_int8 import Int8Build, schedule
from splitee.quantize import quantize
from step_harness import case

KINDS = ("resnet8-batch", "resnet20-batch", "vgg", "windows", "mobilenet")
ROOM = Room(ram=1 << 18, flash=1 << 20, code=20_000, static=3_000, stack=2_000)


def build(kind: str, capacity: int = 1) -> Int8Build:
    made = case(kind)
    images, b = made.images.x, made.build
    return Int8Build(quantize(b.graph, images, b.scale, b.shift), b.stages[-1].cut, capacity)


def chain(*ops: Int8Op, cut: str, logits: str) -> Int8Graph:
    """Operations on tensors of 4x4 pixels of 4 channels."""
    names = ["x", *(op.name for op in ops)]
    return Int8Graph(
        input="x",
        input_shape=(4, 4, 4),
        table=np.zeros((4, 256), np.int8),
        ops=ops,
        weights={},
        weight_scales={},
        scales={name: Scale(0.5, 0) for name in names},
        cut=cut,
        logits=logits,
        classes=64,
    )


def relu(name: str, x: str) -> Int8Op:
    return Int8Op("relu", name, (x,), {"activation": "relu"})


def add(name: str, a: str, b: str) -> Int8Op:
    return Int8Op("add", name, (a, b), {"activation": "none"})


@pytest.mark.parametrize("capacity", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_plan_is_sound_and_close_to_what_is_alive(kind: str, capacity: int) -> None:
    made = build(kind, capacity)
    assert arena.verify(made.schedule, made.plan) == []
    assert made.plan.size <= 1.02 * made.plan.lower_bound


def test_an_addition_writes_on_what_nobody_needs_any_more() -> None:
    graph = chain(
        relu("a", "x"), relu("b", "x"), add("y", "a", "b"), relu("z", "y"), cut="y", logits="z"
    )
    made = Int8Build(graph, "y")
    places = made.plan.offsets
    assert places["y"] in (places["a"], places["b"])
    assert places["z"] != places["y"]  # the cut is read when all is done
    assert made.plan.size == 2 * 64
    apart = schedule(graph, 1, in_place=())
    assert arena.plan(apart).size == 3 * 64


def test_what_is_needed_later_is_not_written_on() -> None:
    graph = chain(relu("a", "x"), add("y", "a", "x"), add("z", "y", "a"), cut="a", logits="z")
    places = Int8Build(graph, "a").plan.offsets
    assert places["y"] == places["input"]
    assert len({places["a"], places["y"]}) == 2
    assert places["z"] == places["y"]


def test_a_plan_that_writes_on_what_is_needed_is_found_out() -> None:
    made = build("resnet8-batch")
    graph = made.graph
    shortcut = next(op for op in graph.ops if op.kind == "add").inputs[1]
    for name in (graph.ops[1].name, graph.ops[2].name):
        moved = {**made.plan.offsets, name: made.plan.offsets[shortcut]}
        assert arena.verify(made.schedule, replace(made.plan, offsets=moved))


def test_no_value_of_a_weight_goes_unnoticed() -> None:
    made = build("resnet8-batch")
    graph = made.graph
    name = next(iter(graph.weights))
    other = graph.weights[name].copy()
    other.flat[-1] ^= 1
    weights = {**graph.weights, name: other}
    assert replace(made, graph=replace(graph, weights=weights)).checksum != made.checksum
    assert replace(made, capacity=2).checksum != made.checksum
    assert build("resnet8-batch").checksum == made.checksum


def test_what_is_missing_is_said_of_ram_and_of_flash() -> None:
    made = build("resnet8-batch")
    assert made.shortage(ROOM) is None
    need = made.plan.size + 5_000
    assert made.memory(ROOM).ram == need
    assert made.shortage(replace(ROOM, ram=need)) is None
    few = made.shortage(replace(ROOM, ram=need - 1024))
    assert few is not None
    assert few.startswith(f"needs {need / 1024:.1f} KB of RAM, 1.0 KB more than the ")
    little = made.shortage(replace(ROOM, flash=20_000))
    assert little is not None
    assert "KB of flash, " in little


def test_a_sample_sends_a_byte_for_each_value() -> None:
    made = build("resnet8-batch")
    assert made.bytes_up_sure == 10
    assert made.bytes_up_per_sample == 10 + 12 * 4 * 4
