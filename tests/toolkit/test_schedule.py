"""The steps of a pass: what each reads, assigns, clears and adds to."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from splitee import arena
from splitee.arena import gradient, schedule
from splitee.capture import capture
from splitee.graph import Graph
from splitee.model import Network
from toolkit.graphs import graphs, resnet_schedule, touched
from toolkit.networks import CLASSES, SHAPE, resnet, segment_at

CAPACITIES = st.integers(1, 5)


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


# what the gradient of an operation is worked out from, beside the gradient of its output
BACKWARD_NEEDS: dict[str, tuple[str, ...]] = {
    "conv2d": ("input",),
    "linear": ("input",),
    "group_norm": ("input", "mean", "rstd"),
    "batch_norm": ("input", "statistics"),
    "relu": ("output",),
    "relu6": ("output",),
    "add": (),
    "max_pool": ("winner",),
    "avg_pool": (),
    "branch": (),
}


@given(graphs())
@settings(deadline=None)
def test_a_step_backward_reads_what_its_gradient_is_made_of(graph: Graph) -> None:
    steps = schedule(graph, 1, True)
    for step in steps.steps:
        if step.action != "backward" or step.op is None:
            continue
        op, needs = step.op, BACKWARD_NEEDS[step.op.kind]
        source = steps.aliases.get(op.inputs[0], op.inputs[0])
        names = {"input": source, "output": op.name, "statistics": arena.STATISTICS}
        expected = [gradient(op.name), *(names.get(n, f"{op.name}:{n}") for n in needs)]
        assert list(step.reads) == expected, op.kind
        targets = {gradient(i) for i in op.inputs if graph.needs_gradient(i)}
        assert set(step.adds) == targets | ({arena.GRADIENTS} if op.weights else set())


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
    fixed = {"gradients", "stem.0:forward scratch", "stem.0:backward scratch"}
    assert {n for n in without.sizes if doubled.sizes[n] == without.sizes[n]} == fixed
    assert all(doubled.sizes[n] == 2 * s for n, s in without.sizes.items() if n not in fixed)
    assert without.sizes["stem.1:mean"] == 3 * 4  # one group of four channels


def test_statistics_of_the_batch_last_and_are_followed_behind_the_step() -> None:
    network = Network(resnet(norm="batch"), SHAPE)
    steps = schedule(capture(segment_at(network, "layer1"), CLASSES), 3, momentum=False)
    norms = ["stem.1", "layer1.0.norm1", "layer1.0.norm2"]
    assert steps.sizes["statistics"] == 4 * 2 * 4 * len(norms)  # mean and variance of 4 channels
    assert "statistics" in steps.lasting
    assert [s.op.name for s in steps.steps if "statistics" in s.adds and s.op] == norms
    behind = steps.steps[steps.backward_end :]
    assert [(s.action, s.op.name) for s in behind if s.op] == [("follow", n) for n in norms]
    assert {s.action for s in steps.steps[steps.forward_end + 1 : steps.backward_end]} == {
        "loss_backward", "backward",
    }  # fmt: skip
    assert "statistics" not in resnet_schedule().sizes  # group norm has none
    assert resnet_schedule().backward_end == len(resnet_schedule().steps)


def test_the_exits_share_the_trunks_tensor_and_not_its_gradient() -> None:
    steps = resnet_schedule()
    assert steps.aliases["exits.stem"] == "stem.2"
    assert "exits.stem" not in set().union(*(touched(s) for s in steps.steps))
    assert steps.sizes["d(exits.stem)"] == steps.sizes["d(stem.2)"] == 3 * 4 * 4 * 8 * 8
