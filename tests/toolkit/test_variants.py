"""One schedule and one plan for every cut: each variant runs what a build for it alone would."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitee.arena import Schedule, Step, Variant, gradient, plan, schedule, softmax, verify
from splitee.capture import capture
from splitee.graph import Graph
from splitee.model import Network
from toolkit.graphs import Builder, graphs, overlaps
from toolkit.networks import CLASSES, SHAPE, resnet, segment_at

CAPACITIES = st.integers(1, 5)
CUTS = ("stem", "layer1", "layer2")


def resnet_graph(cut: str = "layer2") -> Graph:
    """A narrow resnet8 with all its exits."""
    return capture(segment_at(Network(resnet(), SHAPE), cut, upto=True), CLASSES)


def running(steps: Schedule, variant: Variant) -> Schedule:
    """Only what runs of a schedule, as a schedule."""
    return replace(steps, steps=tuple(s for s in steps.steps if s.runs(variant)))


def anywhere(steps: Schedule) -> list[Step]:
    """The steps without the stages that they belong to."""
    return [replace(step, stage=0, part="") for step in steps.steps]


@given(graphs(), CAPACITIES, st.booleans())
@settings(deadline=None)
def test_a_variant_runs_what_a_build_for_its_cut_alone_does(
    graph: Graph, capacity: int, momentum: bool
) -> None:
    every = schedule(graph, capacity, momentum, moves=True)
    for variant in every.variants:
        cut = graph.stages[variant.cut].cut
        alone = schedule(graph.at(cut, upto=variant.upto), capacity, momentum)
        assert anywhere(running(every, variant)) == anywhere(alone)


@given(graphs())
@settings(deadline=None)
def test_there_is_a_variant_for_each_cut_with_its_exit_alone_and_with_all(graph: Graph) -> None:
    cuts = range(len(graph.exits))
    deeper = [Variant(cut, upto) for cut in cuts[1:] for upto in (False, True)]
    assert list(schedule(graph, 1, True, moves=True).variants) == [Variant(0, True), *deeper]
    assert schedule(graph, 1, True).variants == (Variant(0, True),)


@given(graphs(), CAPACITIES, st.booleans())
@settings(deadline=None)
def test_one_plan_is_sound_for_every_variant(graph: Graph, capacity: int, momentum: bool) -> None:
    every = schedule(graph, capacity, momentum, moves=True)
    found = plan(every)
    assert verify(every, found) == []
    for variant in every.variants:
        assert overlaps(running(every, variant), found) == set()


@given(graphs(), CAPACITIES, st.data())
@settings(deadline=None)
def test_verify_refutes_the_plans_under_which_buffers_overlap_in_any_variant(
    graph: Graph, capacity: int, data: st.DataObject
) -> None:
    every = schedule(graph, capacity, True, moves=True)
    sound = plan(every)
    name = data.draw(st.sampled_from(sorted(sound.offsets)))
    other = data.draw(st.sampled_from(sorted(sound.offsets)))
    offset = min(sound.offsets[other], (sound.size - every.sizes[name]) // 16 * 16)
    moved = replace(sound, offsets={**sound.offsets, name: offset})
    pairs = [overlaps(running(every, variant), moved) for variant in every.variants]
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
        if step.action == "send" and step.reads == (stem.point,)
    ]


@pytest.mark.parametrize("cut", CUTS)
def test_the_servers_gradient_is_taken_where_the_cut_is_and_nowhere_else(cut: str) -> None:
    every = schedule(resnet_graph(), 3, True, moves=True)
    number = CUTS.index(cut)
    point = ("stem.2", "layer1.0.relu2", "layer2.0.relu2")[number]
    steps = running(every, Variant(number, True)).steps
    assert [s.writes for s in steps if s.action == "weigh"] == [(gradient(point),)]
    assert not any(gradient(point) in s.clears for s in steps)


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
