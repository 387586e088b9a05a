"""One schedule and one plan for every cut: each variant runs what a build for it alone would."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitee.arena import plan, verify
from splitee.capture import capture
from splitee.graph import Graph
from splitee.model import Network
from splitee.schedule import schedule
from splitee.steps import Levers, Variant, gradient, softmax
from toolkit.graphs import (
    Builder,
    graphs,
    levers,
    of_variant,
    overlaps,
    replays,
    resnet_graph,
    running,
)
from toolkit.networks import CLASSES, SHAPE, resnet, segment_at

CAPACITIES = st.integers(1, 5)
CUTS = ("stem", "layer1", "layer2")
# What is halved or made again is chosen for the whole network, whatever the cut.
ALIKE = [Levers(), Levers(relu_bits=True), Levers(fused_update=True)]


@given(graphs(), CAPACITIES, st.booleans(), st.sampled_from(ALIKE))
@settings(deadline=None)
def test_a_variant_runs_what_a_build_for_its_cut_alone_does(
    graph: Graph, capacity: int, momentum: bool, pulled: Levers
) -> None:
    every = schedule(graph, capacity, momentum, moves=True, levers=pulled)
    for variant, replay in replays(every, graph, pulled, moves=True).items():
        part = of_variant(every, graph, variant)
        alone = schedule(part, capacity, momentum, levers=pulled)
        (expected,) = replays(alone, part, pulled).values()
        # the same kernels on the same tensors in the same order
        assert replay.log == expected.log
        passes = [
            sum(s.action == "pass" and not s.over for _, s in running(steps, v))
            for steps, v in ((every, variant), (alone, alone.variants[0]))
        ]
        assert passes[0] == passes[1]  # and what has to be copied or added for it


@given(graphs())
@settings(deadline=None)
def test_there_is_a_variant_for_each_cut_with_its_exit_alone_and_with_all(graph: Graph) -> None:
    cuts = range(len(graph.exits))
    deeper = [Variant(cut, upto) for cut in cuts[1:] for upto in (False, True)]
    assert list(schedule(graph, 1, True, moves=True).variants) == [Variant(0, True), *deeper]
    assert schedule(graph, 1, True).variants == (Variant(0, True),)


@given(graphs(), CAPACITIES, st.booleans(), levers())
@settings(deadline=None)
def test_one_plan_is_sound_for_every_variant(
    graph: Graph, capacity: int, momentum: bool, pulled: Levers
) -> None:
    every = schedule(graph, capacity, momentum, moves=True, levers=pulled)
    found = plan(every)
    assert verify(every, found) == []
    for variant in every.variants:
        assert overlaps(every, found, [variant]) == set()


@given(graphs(), CAPACITIES, levers(), st.data())
@settings(deadline=None)
def test_verify_refutes_the_plans_under_which_buffers_overlap_in_any_variant(
    graph: Graph, capacity: int, pulled: Levers, data: st.DataObject
) -> None:
    every = schedule(graph, capacity, True, moves=True, levers=pulled)
    sound = plan(every)
    name = data.draw(st.sampled_from(sorted(sound.offsets)))
    other = data.draw(st.sampled_from(sorted(sound.offsets)))
    offset = min(sound.offsets[other], (sound.size - every.sizes[name]) // 16 * 16)
    moved = replace(sound, offsets={**sound.offsets, name: offset})
    pairs = [overlaps(every, moved, [variant]) for variant in every.variants]
    assert bool(verify(every, moved)) == any(pairs)


def pooled() -> Graph:
    """Two stages, of which the second needs the first's point no more once it has run."""
    builder = Builder((1, 4, 4))
    x = builder.conv("input", 2, 3, 1, bias=False)
    builder.exit(x)
    x = builder.conv(builder.pool(x, "max_pool"), 2, 3, 1, bias=False)
    builder.exit(x)
    return builder.graph()


def test_verify_finds_an_overlap_that_only_a_shallower_cut_suffers_from() -> None:
    graph = pooled()
    stem = graph.stages[0]
    deep, every = (schedule(graph, 2, True, moves=moves) for moves in (False, True))
    sound = plan(every)
    assert verify(every, sound) == []
    # in a place of their own, the probabilities of its loss lie on the point that has to be sent
    p = softmax(stem.logits)
    apart = {stem.point: sound.size, p: sound.size}
    planted = replace(sound, offsets={**sound.offsets, **apart}, size=2 * sound.size)
    assert verify(deep, planted) == []
    assert verify(every, planted) == [
        f"step {i} needs {stem.point}, but there lies {p}"
        for i, step in enumerate(every.steps)
        if step.action == "send" and stem.point in step.reads and i >= every.infer_end
    ]


@pytest.mark.parametrize("cut", CUTS)
def test_the_servers_gradient_is_taken_where_the_cut_is_and_nowhere_else(cut: str) -> None:
    every = schedule(resnet_graph(), 3, True, moves=True)
    number = CUTS.index(cut)
    point = ("stem.2", "layer1.0.relu2", "layer2.0.relu2")[number]
    steps = [step for _, step in running(every, Variant(number, True))]
    (weigh,) = [i for i, s in enumerate(steps) if s.action == "weigh"]
    assert steps[weigh].writes == (gradient(point),)
    touching = [i for i, s in enumerate(steps) if gradient(point) in s.touched]
    assert touching[0] == weigh  # what the exit has to say comes on top of it
    assert [s.action for s in steps if gradient(point) in s.adds] == ["pass"]


def test_with_all_exits_the_other_cuts_take_no_room_in_the_arena() -> None:
    graph = resnet_graph()
    single, every = (plan(schedule(graph, 3, True, moves=moves)) for moves in (False, True))
    assert every.size == single.size


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet20"])
def test_every_build_of_the_zoo_is_planned_within_2_percent_of_the_bound(name: str) -> None:
    network = Network(resnet(name, width=8), SHAPE)
    graph = capture(segment_at(network, network.cuts[-1].name, upto=True), CLASSES)
    for capacity in (1, 8):
        every = schedule(graph, capacity, momentum=capacity == 8, moves=True)
        found = plan(every)
        assert verify(every, found) == []
        assert found.size <= 1.02 * found.lower_bound
