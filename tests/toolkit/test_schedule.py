"""The steps of a pass: what each reads, assigns, clears and adds to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitee.capture import capture
from splitee.graph import Graph
from splitee.model import Network
from splitee.schedule import schedule
from splitee.steps import (
    Levers,
    Place,
    Schedule,
    Step,
    gradient,
    tensor_of,
)
from toolkit.graphs import (
    Builder,
    Replay,
    all_levers,
    graphs,
    replays,
    resnet_graph,
    resnet_schedule,
    touched,
)
from toolkit.networks import CLASSES, SHAPE, resnet, segment_at

CAPACITIES = st.integers(1, 5)


@given(graphs(), CAPACITIES, st.booleans(), st.booleans())
@settings(deadline=None)
def test_a_schedule_reads_only_what_is_there_and_forgets_no_gradient(
    graph: Graph, capacity: int, momentum: bool, moves: bool
) -> None:
    steps = schedule(graph, capacity, momentum, moves=moves)
    for replay in replays(steps, graph, Levers(), moves=moves).values():
        done = [(action, name) for action, name, _, _ in replay.log]
        forward = [name for action, name in done if action == "forward"]
        assert forward == [op.name for op in replay.graph.ops if op.kind != "branch"]
        learning = [op.name for op in replay.graph.ops if op.weights]
        backward = [n for action, n in done if action in ("backward", "backward_weight")]
        assert [n for n in reversed(backward) if n in learning] == learning
        needed = {op.name for op in replay.graph.ops if replay.graph.needs_gradient(op.name)}
        added = {tensor_of(name) for s in steps.steps for name in (*s.adds, *s.writes)}
        assert {gradient(name) for name in needed} <= added
        # nothing that can be done once is done again
        assert set(replay.computed.values()) == {1}
        assert not any("#" in name for name in steps.sizes)


@pytest.mark.parametrize(
    "levers",
    [Levers(), all_levers(0.0), all_levers(1.0), Levers(recompute=0.5)],
    ids=["no lever", "all but again", "all", "recompute"],
)
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("moves", [False, True], ids=["one cut", "every cut"])
def test_there_is_no_step_that_can_be_left_out(levers: Levers, norm: str, moves: bool) -> None:
    graph = resnet_graph(norm, "layer1")
    steps = schedule(graph, 3, momentum=True, moves=moves, levers=levers)
    replays(steps, graph, levers, moves=moves)
    never = Place(len(graph.stages), "cut")
    for i, step in enumerate(steps.steps):
        without = (*steps.steps[:i], replace(step, place=never), *steps.steps[i + 1 :])
        with pytest.raises(AssertionError):
            replays(replace(steps, steps=without), graph, levers, moves=moves)


@pytest.mark.parametrize("moves", [False, True], ids=["one cut", "every cut"])
def test_there_is_no_step_of_the_way_back_that_can_be_done_twice(moves: bool) -> None:
    graph = resnet_graph(cut="layer1")
    steps = schedule(graph, 3, momentum=True, moves=moves)
    for i in range(steps.forward_end, steps.backward_end):
        twice = (*steps.steps[: i + 1], *steps.steps[i:])
        with pytest.raises(AssertionError):
            replays(replace(steps, steps=twice), graph, Levers(), moves=moves)


def residual() -> Graph:
    """A convolution, a ReLU, and a block of one convolution with a shortcut."""
    builder = Builder((1, 4, 4))
    x = builder.add("relu", [builder.conv("input", 2, 3, 1, bias=False)])
    x = builder.add("add", [builder.conv(x, 2, 3, 1, bias=False), x])
    builder.exit(x)
    return builder.graph()


def lines(steps: Schedule) -> list[str]:
    """Every step in one line, without the prefix of the exit's names."""
    found = []
    for step in steps.steps:
        text = f"{step.action} {step.op.name if step.op else step.exit or 'cut'}: "
        text += f"{' '.join(step.reads)} ->"
        for sign, names in (("=", step.writes), ("0", step.clears), ("+", step.adds)):
            text += "".join(f" {sign}{name.replace(' ', '_')}" for name in names)
        found.append(text + "".join(f" | {w} on {r}" for w, r in step.over))
    return [line.replace("exits.0.", "") for line in found]


def test_a_small_residual_network_has_the_steps_that_pencil_and_paper_say() -> None:
    assert lines(schedule(residual(), 2, momentum=False)) == [
        "forward conv2d0: input -> =conv2d0 =conv2d0:forward_scratch",
        # a ReLU's backward reads its output: nobody needs the input any more
        "forward relu1: conv2d0 -> =relu1 | relu1 on conv2d0",
        "forward conv2d2: relu1 -> =conv2d2 =conv2d2:forward_scratch",
        # relu1 is read again
        "forward add3: conv2d2 relu1 -> =add3 | add3 on conv2d2",
        "forward avg_pool5: add3 -> =avg_pool5",
        "forward linear6: avg_pool5 -> =linear6",
        "send cut: add3 linear6 ->",
        "loss add3: linear6 -> =linear6:softmax",
        "send cut: add3 linear6 ->",
        "weigh cut:  -> =d(add3)",
        "loss_backward add3: linear6:softmax -> 0d(linear6) +d(linear6)",
        "backward_weight linear6: avg_pool5 d(linear6) -> +gradients",
        "backward_input linear6: d(linear6) -> 0d(avg_pool5) +d(avg_pool5)",
        "backward avg_pool5: d(avg_pool5) -> 0d(branch4) +d(branch4)",
        # the server's gradient is there already: the exit's is worked out first, then added
        "backward branch4: d(branch4) -> =d(add3)_by_branch4 | d(add3) by branch4 on d(branch4)",
        "pass branch4: d(add3) by branch4 -> +d(add3)",
        # to both terms; the second may have the sum's own gradient
        "pass add3: d(add3) -> =d(conv2d2)",
        "pass add3: d(add3) -> =d(relu1) | d(relu1) on d(add3)",
        "backward_weight conv2d2: relu1 d(conv2d2) -> =conv2d2:backward_weight_scratch +gradients",
        "backward_input conv2d2: d(conv2d2) -> =conv2d2:backward_input_scratch +d(relu1)",
        "backward relu1: d(relu1) relu1 -> =d(conv2d0) | d(conv2d0) on d(relu1)",
        # nothing below learns
        "backward_weight conv2d0: input d(conv2d0) -> =conv2d0:backward_weight_scratch +gradients",
    ]


def test_with_levers_it_has_those_that_they_need() -> None:
    levers = Levers(relu_bits=True, fused_update=True, local_only=True)
    found = lines(schedule(residual(), 2, momentum=False, levers=levers))
    assert "forward relu1: conv2d0 -> =relu1 =relu1:bits | relu1 on conv2d0" in found
    loss = found.index("loss add3: linear6 -> =linear6:softmax")
    assert found[loss + 1 :] == [
        "send cut: add3 linear6 ->",
        "loss_backward add3: linear6:softmax -> 0d(linear6) +d(linear6)",
        "backward_weight linear6: avg_pool5 d(linear6) -> 0linear6:gradients +linear6:gradients",
        "backward_input linear6: d(linear6) -> 0d(avg_pool5) +d(avg_pool5)",
        "update linear6: linear6:gradients ->",
        "backward avg_pool5: d(avg_pool5) -> 0d(branch4) +d(branch4)",
        # nobody else has a say in it
        "backward branch4: d(branch4) -> =d(add3) | d(add3) on d(branch4)",
        "pass add3: d(add3) -> =d(conv2d2)",
        "pass add3: d(add3) -> =d(relu1) | d(relu1) on d(add3)",
        "backward_weight conv2d2: relu1 d(conv2d2) -> =conv2d2:backward_weight_scratch "
        "0conv2d2:gradients +conv2d2:gradients",
        "backward_input conv2d2: d(conv2d2) -> =conv2d2:backward_input_scratch +d(relu1)",
        "update conv2d2: conv2d2:gradients ->",
        "backward relu1: d(relu1) relu1:bits -> =d(conv2d0) | d(conv2d0) on d(relu1)",
        "backward_weight conv2d0: input d(conv2d0) -> =conv2d0:backward_weight_scratch "
        "0conv2d0:gradients +conv2d0:gradients",
        "update conv2d0: conv2d0:gradients ->",
    ]


def test_a_tensor_in_float16_is_packed_once_it_is_made_and_unpacked_before_it_is_read() -> None:
    found = lines(schedule(residual(), 2, momentum=False, levers=Levers(float16=True)))
    # a convolution and the linear layer read their inputs again; the image stays as it is, and the
    # pool's 2 values are a sixteenth of the largest tensor's: just enough to be worth a step
    packs = [line for line in found if "pack " in line]
    assert packs == [
        "pack relu1: relu1 -> =relu1:half",
        "pack avg_pool5: avg_pool5 -> =avg_pool5:half",
        "unpack avg_pool5: avg_pool5:half -> =avg_pool5#2",
        "unpack relu1: relu1:half -> =relu1#2",
    ]
    for before, after in (
        ("forward relu1: conv2d0 -> =relu1 =relu1:bits | relu1 on conv2d0", packs[0]),
        ("forward avg_pool5: add3 -> =avg_pool5", packs[1]),
        (packs[2], "backward_weight linear6: avg_pool5#2 d(linear6) -> +gradients"),
        (packs[3], "backward_weight conv2d2: relu1#2 d(conv2d2) -> "
                   "=conv2d2:backward_weight_scratch +gradients"),
    ):  # fmt: skip
        assert found.index(after) == found.index(before) + 1
    # what comes behind it forward, and what is sent, has the float32 itself
    assert "forward conv2d2: relu1 -> =conv2d2 =conv2d2:forward_scratch" in found


def test_a_schedule_is_forward_then_losses_then_backward() -> None:
    steps = resnet_schedule()
    actions = [s.action for s in steps.steps]
    assert set(actions[: steps.infer_end]) == {"forward", "send"}
    assert actions[steps.infer_end : steps.forward_end] == ["loss", "loss", "loss", "send"]
    assert actions[steps.forward_end] == "weigh"
    assert set(actions[steps.forward_end + 1 :]) == {
        "loss_backward", "backward", "backward_weight", "backward_input", "pass",
    }  # fmt: skip
    assert steps.steps[steps.forward_end].writes == ("d(layer2.0.relu2)",)


def test_momentum_costs_one_value_per_parameter_and_capacity_scales_the_rest() -> None:
    graph = capture(segment_at(Network(resnet(), SHAPE), "stem"), CLASSES)
    without, with_momentum = (schedule(graph, 3, momentum) for momentum in (False, True))
    assert with_momentum.steps == without.steps
    assert {n: s for n, s in with_momentum.sizes.items() if n not in without.sizes} == {
        "momentum": 4 * (36 + 4 + 4 + 640 + 10)
    }
    doubled = schedule(graph, 6, momentum=False)
    fixed = {"gradients", "stem.0:forward scratch", "stem.0:backward_weight scratch"}
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
        "loss_backward", "backward", "backward_weight", "backward_input", "pass",
    }  # fmt: skip
    assert "statistics" not in resnet_schedule().sizes  # group norm has none
    assert resnet_schedule().backward_end == len(resnet_schedule().steps)


def test_the_exits_share_the_trunks_tensor_and_not_its_gradient() -> None:
    steps = resnet_schedule()
    assert steps.aliases["exits.stem"] == "stem.2"
    assert "exits.stem" not in set().union(*(touched(s) for s in steps.steps))
    assert steps.sizes["d(exits.stem)"] == steps.sizes["d(stem.2)"] == 3 * 4 * 4 * 8 * 8


def planted(steps: Schedule, number: int, **changes: object) -> Schedule:
    """The schedule with something else in one of its steps."""
    found = list(steps.steps)
    found[number] = replace(found[number], **changes)  # type: ignore[arg-type]
    return replace(steps, steps=tuple(found))


def find(steps: Schedule, action: str, name: str) -> tuple[int, Step]:
    """The first step of an operation with that action."""
    return next((i, s) for i, s in enumerate(steps.steps) if s.action == action and s.op is not None
                and s.op.name == name)  # fmt: skip


def test_the_account_of_a_schedule_refutes_what_is_written_on_too_early() -> None:
    graph, levers = residual(), Levers()
    steps = schedule(graph, 2, momentum=False)
    i, _ = find(steps, "forward", "add3")
    early = planted(steps, i, over=(("add3", "relu1"),))  # which backward reads
    with pytest.raises(AssertionError, match="relu1 is not there"):
        Replay(early, graph, steps.variants[0], levers, moves=False)
    i, _ = find(steps, "backward", "relu1")
    apart = planted(steps, i, over=())  # its kernel works in place
    with pytest.raises(AssertionError, match="it works in place"):
        Replay(apart, graph, steps.variants[0], levers, moves=False)
