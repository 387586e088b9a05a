"""The memory plan: sound, tight, and refuted by verify wherever it is not sound."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitee import arena
from splitee.arena import ALIGNMENT, Plan, Schedule, gradient, plan, schedule, verify
from splitee.capture import capture
from splitee.graph import Graph
from splitee.model import Network
from toolkit.graphs import alive, graphs, overlaps, touched
from toolkit.networks import CLASSES, SHAPE, resnet, segment_at

CAPACITIES = st.integers(1, 5)


def resnet_schedule(cut: str = "layer2", *, momentum: bool = True) -> Schedule:
    """The schedule of a narrow resnet8 with all its exits."""
    network = Network(resnet(), SHAPE)
    return schedule(capture(segment_at(network, cut, upto=True), CLASSES), 3, momentum)


@given(graphs(), CAPACITIES, st.booleans())
@settings(deadline=None)
def test_a_plan_is_sound_and_no_smaller_than_what_is_alive_at_once(
    graph: Graph, capacity: int, momentum: bool
) -> None:
    steps = schedule(graph, capacity, momentum)
    found = plan(steps)
    assert verify(steps, found) == []
    assert overlaps(steps, found) == set()
    together = [sum(-(-steps.sizes[n] // 16) * 16 for n in names) for names in alive(steps)]
    assert found.lower_bound == max(together)
    assert found.lower_bound <= found.size


@given(graphs(), CAPACITIES, st.booleans())
@settings(deadline=None)
def test_a_schedule_reads_only_what_is_there_and_forgets_no_gradient(
    graph: Graph, capacity: int, momentum: bool
) -> None:
    steps = schedule(graph, capacity, momentum)
    there = {"input", *steps.lasting}
    added: set[str] = set()
    for step in steps.steps:
        assert set(step.reads) <= there, step
        there |= {*step.writes, *step.clears}
        assert set(step.adds) <= there, step
        assert not added.intersection((*step.writes, *step.clears)), step
        added.update(step.adds)
    forward, backward = (
        [s.op.name for s in steps.steps if s.action == action and s.op is not None]
        for action in ("forward", "backward")
    )
    computed = [op.name for op in graph.ops if op.kind != "branch"]
    learning = [op.name for op in graph.ops if graph.needs_gradient(op.name)]
    assert forward == computed
    assert [n for n in reversed(backward) if n in learning] == learning
    last = {name: i for i, s in enumerate(steps.steps) for name in s.adds}
    for i, step in enumerate(steps.steps):  # a gradient is handed on when it is complete
        if step.action == "backward" and step.op is not None:
            assert last[gradient(step.op.name)] < i, step


@given(graphs(), CAPACITIES, st.data())
@settings(deadline=None)
def test_verify_refutes_exactly_the_plans_whose_living_buffers_overlap(
    graph: Graph, capacity: int, data: st.DataObject
) -> None:
    steps = schedule(graph, capacity, True)
    sound = plan(steps)
    name = data.draw(st.sampled_from(sorted(sound.offsets)))
    other = data.draw(st.sampled_from(sorted(sound.offsets)))
    offset = min(sound.offsets[other], (sound.size - steps.sizes[name]) // 16 * 16)
    moved = replace(sound, offsets={**sound.offsets, name: offset})
    faults = verify(steps, moved)
    assert bool(faults) == bool(overlaps(steps, moved))
    for fault in faults:
        assert f"needs {name}, but" in fault or fault.endswith(f"there lies {name}"), fault


def test_verify_names_a_buffer_that_lies_on_another() -> None:
    steps = resnet_schedule()
    sound = plan(steps)
    offsets = {**sound.offsets, "stem.2": sound.offsets["stem.0"]}
    number = next(i for i, s in enumerate(steps.steps) if "stem.0" in s.reads and s.op is not None
                  and s.action == "backward")  # fmt: skip
    assert f"step {number} needs stem.0, but there lies stem.2" in verify(
        steps, replace(sound, offsets=offsets)
    )


@pytest.mark.parametrize("name", [arena.GRADIENTS, arena.MOMENTUM])
def test_verify_names_what_has_to_last_and_is_overwritten(name: str) -> None:
    steps = resnet_schedule()
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
    spans = arena.lifetimes(steps)
    first, last = spans[name]
    with monkeypatch.context() as patch:
        patch.setattr(arena, "lifetimes", lambda _: {**spans, name: (first, last - 1)})
        return plan(steps)


def test_verify_names_a_buffer_whose_lifetime_was_cut_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = resnet_schedule()
    refuted = []
    for name, (first, last) in arena.lifetimes(steps).items():
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


def test_a_schedule_is_forward_then_losses_then_backward() -> None:
    steps = resnet_schedule()
    actions = [s.action for s in steps.steps]
    assert set(actions[: steps.infer_end]) == {"forward", "send"}
    assert actions[steps.infer_end : steps.forward_end] == ["loss", "loss", "loss", "send"]
    assert actions[steps.forward_end] == "weigh"
    assert set(actions[steps.forward_end + 1 :]) == {"loss_backward", "backward"}
    assert steps.steps[steps.forward_end].writes == ("d(layer2.0.relu2)",)


def test_momentum_costs_one_value_per_parameter_and_capacity_scales_the_rest() -> None:
    graph = capture(segment_at(Network(resnet(), SHAPE), "stem"), CLASSES)
    without, with_momentum = (schedule(graph, 3, momentum) for momentum in (False, True))
    assert {n: s for n, s in with_momentum.sizes.items() if n not in without.sizes} == {
        "momentum": 4 * (36 + 4 + 4 + 640 + 10)
    }
    doubled = schedule(graph, 6, momentum=False)
    fixed = {"gradients"}
    assert {n for n in without.sizes if doubled.sizes[n] == without.sizes[n]} == fixed
    assert all(doubled.sizes[n] == 2 * s for n, s in without.sizes.items() if n not in fixed)
    assert without.sizes["stem.1:mean"] == 3 * 4  # one group of four channels


def test_the_exits_share_the_trunks_tensor_and_not_its_gradient() -> None:
    steps = resnet_schedule()
    assert steps.aliases["exits.stem"] == "stem.2"
    assert "exits.stem" not in set().union(*(touched(s) for s in steps.steps))
    assert steps.sizes["d(exits.stem)"] == steps.sizes["d(stem.2)"] == 3 * 4 * 4 * 8 * 8
