"""What a segment takes, and what fits where."""

from __future__ import annotations

import dataclasses

import pytest

from splitee.capture import capture
from splitee.errors import CutError
from splitee.model import Network
from splitee.place import SHARD_GAP, STEP_CODE, Build, Memory, Room, deepest_that_fits, kib
from splitee.steps import Levers
from toolkit.networks import CLASSES, SCALE, SHAPE, SHIFT, resnet, segment_at

CUTS = ("stem", "layer1", "layer2", "layer3")
ROOM = Room(ram=128 * 1024, flash=512 * 1024, code=20_000, static=5_000, stack=3_000)


def build(cut: str = "stem", *, capacity: int = 4, momentum: bool = True) -> Build:
    """A build of a narrow resnet8 up to a cut."""
    graph = capture(segment_at(Network(resnet(), SHAPE), cut), CLASSES)
    return Build(graph, capacity, momentum, samples_max=100, scale=SCALE, shift=SHIFT)


def test_a_build_takes_what_pencil_and_paper_say() -> None:
    stem = build()
    parameters = 36 + 4 + 4 + 640 + 10
    assert stem.weight_bytes == 4 * parameters
    assert stem.record_size == 1 + 64
    assert stem.shard_bytes == 100 * (65 + 2)  # a uint16 of the order for each record
    assert stem.bytes_up_per_sample() == 4 * 256 + 1
    # capacity: a label for each sample held
    expected = stem.arena_bytes + 4 * parameters + 6_700 + 4 + 5_000 + 3_000
    assert stem.ram_bytes(ROOM) == expected
    steps = len(stem.schedule.steps) - 2  # a send is no code
    assert stem.flash_bytes(ROOM) == 20_000 + 4 * parameters + STEP_CODE * steps


def test_the_arena_of_a_build_is_the_verified_plan() -> None:
    small, large = build(capacity=1), build(capacity=8)
    assert small.arena_bytes == small.plan.size
    # the gradient and the velocity of each of 694 parameters, aligned, are there at any capacity
    assert large.arena_bytes > small.arena_bytes > 2 * 4 * 694
    saved = small.plan.lower_bound - build(capacity=1, momentum=False).plan.lower_bound
    assert saved == -(-4 * 694 // 16) * 16


def test_all_parts_of_the_memory_are_planned() -> None:
    stem, apart = build(), dataclasses.replace(ROOM, shard=8_000)
    planned = stem.memory(ROOM)
    assert planned == Memory(stem.arena_bytes, 4 * 694, 4, 6_700, 5_000, 3_000)
    assert stem.memory(apart) == dataclasses.replace(planned, apart=True)
    assert stem.ram_bytes(apart) == stem.ram_bytes(ROOM) - 6_700


@pytest.mark.parametrize("samples", [0, 1, 99, 100, 60_000])
def test_the_samples_that_fit_beside_a_segment_fit_to_the_byte(samples: int) -> None:
    stem = build()
    room = dataclasses.replace(ROOM, ram=stem.ram_bytes(ROOM) - 6_700 + 67 * samples)
    assert stem.samples_that_fit(room) == samples
    if samples:
        assert stem.samples_that_fit(dataclasses.replace(room, ram=room.ram - 1)) == samples - 1
        filled = dataclasses.replace(stem, samples_max=samples)
        assert filled.ram_bytes(room) == room.ram


def test_no_sample_fits_where_the_segment_does_not() -> None:
    assert build().samples_that_fit(dataclasses.replace(ROOM, ram=5_000)) == 0


def test_a_memory_of_its_own_is_the_shards_alone() -> None:
    stem = build()
    room = dataclasses.replace(ROOM, ram=stem.ram_bytes(ROOM) - 6_700, shard=6_700 + SHARD_GAP)
    assert stem.shortage(room) is None
    assert stem.samples_that_fit(room) == 100
    tight = dataclasses.replace(room, shard=room.shard and room.shard - 1)
    assert stem.samples_that_fit(tight) == 99
    assert stem.shortage(tight) == (
        "needs 6.5 KB of memory for its shard, 0.0 KB more than the 6.5 KB there are "
        "(of its 100 samples 99 fit)"
    )
    # what RAM lacks then is not for the shard
    short = stem.shortage(dataclasses.replace(room, ram=room.ram - 1))
    assert short is not None
    assert "samples" not in short


def test_a_device_counts_to_16_bits_of_samples_and_so_no_more_fit() -> None:
    assert build().samples_that_fit(dataclasses.replace(ROOM, ram=2**30)) == 65_535
    assert build().samples_that_fit(dataclasses.replace(ROOM, shard=2**30)) == 65_535


def test_a_deeper_cut_takes_more() -> None:
    sizes = [build(cut).ram_bytes(ROOM) for cut in CUTS]
    assert sizes == sorted(set(sizes))


def test_what_fits_fits_to_the_byte() -> None:
    stem = build()
    needed, flashed = stem.ram_bytes(ROOM), stem.flash_bytes(ROOM)
    exact = dataclasses.replace(ROOM, ram=needed, flash=flashed)
    assert stem.shortage(exact) is None
    assert stem.shortage(dataclasses.replace(exact, ram=needed - 1)) == (
        f"needs {kib(needed)} of RAM, 0.0 KB more than the {kib(needed - 1)} there are "
        "(of its 100 samples 99 fit)"
    )
    without = dataclasses.replace(exact, ram=needed - stem.shard_bytes)
    assert stem.shortage(without) == (  # nothing is left for a shard
        f"needs {kib(needed)} of RAM, 6.5 KB more than the {kib(without.ram)} there are"
    )
    assert stem.shortage(dataclasses.replace(exact, flash=flashed - 2048)) == (
        f"needs {kib(flashed)} of flash, 2.0 KB more than the {kib(flashed - 2048)} there are"
    )


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 KB"), (1536, "1.5 KB"), (10 * 1024 - 103, "9.9 KB"), (10 * 1024, "10 KB"),
     (2_000 * 1024, "2,000 KB")],
)  # fmt: skip
def test_sizes_are_told_in_kb(size: int, text: str) -> None:
    assert kib(size) == text


def test_the_deepest_that_fits_is_chosen() -> None:
    builds = [build(cut) for cut in CUTS]
    for i, chosen in enumerate(builds):
        room = dataclasses.replace(ROOM, ram=chosen.ram_bytes(ROOM), flash=2**30)
        assert deepest_that_fits(builds, room) is chosen
        tight = dataclasses.replace(room, ram=room.ram - 1)
        assert deepest_that_fits(builds, tight) is (builds[i - 1] if i else None)
    assert deepest_that_fits(builds, None) is builds[-1]


def test_a_builds_checksum_names_structure_and_settings_and_not_values() -> None:
    one = build()
    same = dataclasses.replace(
        one, graph=capture(segment_at(Network(resnet(seed=5), SHAPE), "stem"), CLASSES)
    )
    assert same.checksum == one.checksum
    others = [
        build("layer1"),
        build(capacity=2),
        build(momentum=False),
        dataclasses.replace(one, samples_max=99),
        dataclasses.replace(one, scale=(0.5,)),
        dataclasses.replace(one, shift=(0.5,)),
        dataclasses.replace(one, moves=True),
        dataclasses.replace(one, levers=Levers(relu_bits=True)),
        dataclasses.replace(one, levers=Levers(float16=True)),
        dataclasses.replace(one, levers=Levers(recompute=0.25)),
        dataclasses.replace(one, levers=Levers(recompute=0.5)),
        dataclasses.replace(one, levers=Levers(fused_update=True)),
        dataclasses.replace(one, levers=Levers(local_only=True)),
    ]
    assert len({b.checksum for b in (one, *others)}) == len(others) + 1


def every_cut(*, upto: bool = True, moves: bool = True) -> Build:
    """A build up to layer2."""
    graph = capture(segment_at(Network(resnet(), SHAPE), "layer2", upto=upto), CLASSES)
    return Build(graph, 4, True, samples_max=100, scale=SCALE, shift=SHIFT, moves=moves)


def test_cuts_are_counted_from_the_shallowest_that_is_built_in() -> None:
    every = every_cut()
    numbers = [every.number(cut, upto=upto) for cut in CUTS[:3] for upto in (False, True)]
    assert numbers == [1, 1, 2, 2, 3, 3]
    assert build("layer2").number("layer2", upto=False) == 1
    assert build("layer2").number("layer2", upto=True) == 1
    assert every_cut(moves=False).number("layer2", upto=True) == 1


@pytest.mark.parametrize(
    ("build", "cut", "upto", "words"),
    [
        (every_cut(), "layer3", True, "stem, layer1, layer2, not for layer3 with every exit up to"),
        (build("layer2"), "stem", False, "layer2, not for stem with its exit alone"),
        (every_cut(moves=False), "layer1", True, "layer2, not for layer1 with every exit up to it"),
        (every_cut(moves=False), "layer2", False, "layer2, not for layer2 with its exit alone"),
    ],
)
def test_a_cut_that_is_not_built_in_is_refused(
    build: Build, cut: str, upto: bool, words: str
) -> None:
    with pytest.raises(CutError, match=f"^the segment is built for {words}.*`deepest` in the"):
        build.number(cut, upto=upto)


def test_every_cut_costs_the_exits_that_a_single_one_has_not_and_a_few_steps() -> None:
    every, single, own = every_cut(), every_cut(moves=False), build("layer2")
    assert every.arena_bytes == single.arena_bytes
    assert every.weight_bytes == single.weight_bytes
    # two further cuts at which the server's gradient may come in
    assert every.flash_bytes(ROOM) - single.flash_bytes(ROOM) == 2 * STEP_CODE
    exits = 2 * (640 + 10)
    assert every.weight_bytes - own.weight_bytes == 4 * exits
    assert every.arena_bytes - own.arena_bytes >= 2 * 4 * exits  # gradients and momentum
