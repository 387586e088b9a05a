"""The memory plan: sound, tight, and refuted by verify wherever it is not sound."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitee import arena
from splitee.arena import Plan, plan, verify
from splitee.capture import capture
from splitee.graph import Graph
from splitee.model import Network
from splitee.schedule import schedule
from splitee.steps import (
    ALIGNMENT,
    GRADIENTS,
    MOMENTUM,
    STATISTICS,
    Levers,
    Place,
    Schedule,
    Step,
    Variant,
)
from toolkit.graphs import (
    all_levers,
    fullest,
    graphs,
    levers,
    overlaps,
    resnet_graph,
    resnet_schedule,
)
from toolkit.networks import CLASSES, SHAPE, resnet, segment_at

CAPACITIES = st.integers(1, 5)


ONE = Variant(0, True)


@given(graphs(), CAPACITIES, st.booleans(), levers())
@settings(deadline=None)
def test_a_plan_is_sound_and_no_smaller_than_what_is_alive_at_once(
    graph: Graph, capacity: int, momentum: bool, pulled: Levers
) -> None:
    steps = schedule(graph, capacity, momentum, levers=pulled)
    found = plan(steps)
    assert verify(steps, found) == []
    assert overlaps(steps, found) == set()
    assert found.lower_bound == fullest(steps)
    assert found.lower_bound <= found.size


@given(graphs(), CAPACITIES, levers(), st.data())
@settings(deadline=None)
def test_verify_refutes_exactly_the_plans_whose_living_buffers_overlap(
    graph: Graph, capacity: int, pulled: Levers, data: st.DataObject
) -> None:
    steps = schedule(graph, capacity, True, levers=pulled)
    sound = plan(steps)
    name = data.draw(st.sampled_from(sorted(sound.offsets)))
    other = data.draw(st.sampled_from(sorted(sound.offsets)))
    offset = min(sound.offsets[other], (sound.size - steps.sizes[name]) // 16 * 16)
    moved = replace(sound, offsets={**sound.offsets, name: offset})
    faults = verify(steps, moved)
    assert bool(faults) == bool(overlaps(steps, moved))
    for fault in faults:
        assert f"needs {name}, but" in fault or fault.endswith(f"there lies {name}"), fault


@given(graphs(), CAPACITIES, levers(), st.data())
@settings(deadline=None)
def test_verify_refutes_two_buffers_of_one_step_at_one_place(
    graph: Graph, capacity: int, pulled: Levers, data: st.DataObject
) -> None:
    steps = schedule(graph, capacity, True, levers=pulled)
    sound = plan(steps)
    step = data.draw(st.sampled_from([s for s in steps.steps if len(set(s.touched)) > 1]))
    name, other = data.draw(st.permutations(sorted(set(step.touched))))[:2]
    offset = min(sound.offsets[other], (sound.size - steps.sizes[name]) // 16 * 16)
    moved = replace(sound, offsets={**sound.offsets, name: offset})
    stays = {(name, other), (other, name)}.intersection(step.over)
    assert bool(verify(steps, moved)) == bool(overlaps(steps, moved))
    assert overlaps(steps, moved) or stays


def test_verify_refutes_what_a_step_assigns_on_itself_though_nobody_reads_it() -> None:
    steps = schedule(resnet_graph(), 3, momentum=True, levers=Levers(recompute=1.0))
    sound = plan(steps)
    # a norm that is done again assigns its mean and rstd anew; backward reads the first ones
    mean, rstd = (next(n for n in sound.offsets if n.endswith(f"{w}#2")) for w in ("mean", "rstd"))
    number = next(i for i, s in enumerate(steps.steps) if mean in s.writes)
    assert rstd in steps.steps[number].writes
    moved = replace(sound, offsets={**sound.offsets, mean: sound.offsets[rstd]})
    assert verify(steps, moved) == [f"step {number} needs {mean}, but there lies {rstd}"]


def by_hand(*steps: Step, **sizes: int) -> Schedule:
    """A schedule of one variant."""
    return Schedule(steps, (ONE,), 0, 0, len(steps), {"input": 16, **sizes}, (), {})


def step(reads: str, writes: str, *over: tuple[str, str]) -> Step:
    """A step that reads and assigns."""
    return Step("forward", Place(0, "trunk"), reads=tuple(reads.split()),
                writes=tuple(writes.split()), over=over)  # fmt: skip


def test_what_is_written_on_what_it_is_made_of_shares_its_place() -> None:
    steps = by_hand(step("input", "a"), step("a", "b", ("b", "a")), step("b", "c"),
                    a=64, b=64, c=16)  # fmt: skip
    found = plan(steps)
    assert found.offsets["a"] == found.offsets["b"]
    assert (found.size, found.lower_bound, verify(steps, found)) == (80, 80, [])
    # without a word of it, or at another place that is a part of the same, it is refuted
    silent = by_hand(step("input", "a"), step("a", "b"), step("b", "c"), a=64, b=64, c=16)
    assert verify(silent, found) == ["step 1 needs a, but there lies b"]
    assert plan(silent).size == 128
    beside = Plan({"input": 96, "a": 0, "b": 16, "c": 80}, 112, 112)
    assert verify(steps, beside) == ["step 1 needs a, but there lies b"]
    apart = replace(beside, offsets={**beside.offsets, "b": 128}, size=192)
    assert verify(steps, apart) == []  # it may lie there, but need not


@pytest.mark.parametrize("reads", ["a b", "a"])
def test_verify_refutes_a_buffer_that_is_written_on_and_read_later(reads: str) -> None:
    steps = by_hand(step("input", "a"), step("a", "b", ("b", "a")), step(reads, "c"),
                    a=64, b=64, c=16)  # fmt: skip
    assert "step 2 needs a, but there lies b" in verify(steps, plan(steps))


@pytest.mark.parametrize("pulled", [Levers(), all_levers(0.0), all_levers(1.0)],
                         ids=["no lever", "all but again", "all"])  # fmt: skip
def test_verify_refutes_every_step_that_writes_on_what_is_read_later(
    pulled: Levers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "ATTEMPTS", 0)  # at a better plan: any will do
    steps = schedule(resnet_graph(), 3, momentum=False, levers=pulled)
    assert verify(steps, plan(steps)) == []
    planted = 0
    for i, one in enumerate(steps.steps):
        later = {name for other in steps.steps[i + 1 :] for name in other.reads}
        for read in later.intersection(one.reads):
            for written in one.writes:
                if steps.sizes[read] == steps.sizes[written] and not one.over:
                    changed = replace(one, over=((written, read),))
                    wrong = replace(steps, steps=(*steps.steps[:i], changed, *steps.steps[i + 1 :]))
                    assert any(f"needs {read}, but" in f for f in verify(wrong, plan(wrong)))
                    planted += 1
    assert planted >= 5


def test_verify_names_a_buffer_that_lies_on_another() -> None:
    steps = resnet_schedule()
    sound = plan(steps)
    offsets = {**sound.offsets, "stem.2": sound.offsets["stem.0"]}
    number = next(i for i, s in enumerate(steps.steps) if "stem.0" in s.reads and s.op is not None
                  and s.action == "backward")  # fmt: skip
    assert f"step {number} needs stem.0, but there lies stem.2" in verify(
        steps, replace(sound, offsets=offsets)
    )


@pytest.mark.parametrize("name", [GRADIENTS, MOMENTUM, STATISTICS])
def test_verify_names_what_has_to_last_and_is_overwritten(name: str) -> None:
    steps = resnet_schedule(norm="batch")
    sound = plan(steps)
    # under a tensor of the first step, which nothing else needs the lasting buffer after
    moved = replace(sound, offsets={**sound.offsets, name: sound.offsets["stem.0"]})
    assert any(f"needs {name}, but there lies" in fault for fault in verify(steps, moved))


def test_verify_names_the_buffers_outside_of_a_shrunk_arena() -> None:
    steps = resnet_schedule()
    sound = plan(steps)
    last = [n for n in sound.offsets if sound.offsets[n] + steps.sizes[n] > sound.size - 16]
    shrunk = replace(sound, size=sound.size - 16)
    assert last
    assert [f for f in verify(steps, shrunk) if "outside" in f] == [
        f"{name} lies outside of the arena" for name in last
    ]
    below = replace(sound, offsets={**sound.offsets, "stem.0": -16})
    assert "stem.0 lies outside of the arena" in verify(steps, below)


def test_verify_names_a_buffer_that_is_not_aligned() -> None:
    steps = resnet_schedule()
    sound = plan(steps)
    for name, offset in sound.offsets.items():
        moved = replace(sound, offsets={**sound.offsets, name: offset + 4}, size=sound.size + 16)
        assert f"{name} is not aligned to {ALIGNMENT} bytes" in verify(steps, moved)


def shortened(steps: Schedule, name: str, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan of a planner that forgets the last step in which a buffer is needed."""
    spans = steps.spans(ONE)
    first, last = spans[name]
    with monkeypatch.context() as patch:
        patch.setattr(arena, "ATTEMPTS", 0)  # at a better plan: any will do
        patch.setattr(Schedule, "spans", lambda *_: {**spans, name: (first, last - 1)})
        return plan(steps)


@pytest.mark.parametrize("pulled", [Levers(), all_levers(0.0), all_levers(1.0)],
                         ids=["no lever", "all but again", "all"])  # fmt: skip
def test_verify_names_a_buffer_whose_lifetime_was_cut_short(
    pulled: Levers, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = schedule(resnet_graph(), 3, momentum=True, levers=pulled)
    refuted = []
    for name, (first, last) in steps.spans(ONE).items():
        if first == last:
            continue
        short = shortened(steps, name, monkeypatch)
        faults = verify(steps, short)
        pairs = overlaps(steps, short)
        assert bool(faults) == bool(pairs), name
        if pairs:
            refuted.append(name)
            assert any(f"needs {name}, but" in f or f"lies {name}" in f for f in faults), name
    assert len(refuted) >= 5  # elsewhere the planner did not use the gap


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet20"])
def test_every_segment_of_the_zoo_is_planned_within_2_percent_of_the_bound(name: str) -> None:
    network = Network(resnet(name, width=8), SHAPE)
    for cut in network.cuts:
        for upto in (False, True):
            graph = capture(segment_at(network, cut.name, upto=upto), CLASSES)
            for capacity in (1, 8):
                steps = schedule(graph, capacity, momentum=capacity == 8)
                found = plan(steps)
                assert verify(steps, found) == []
                assert found.size <= 1.02 * found.lower_bound, (cut.name, upto, capacity)
