"""What saves memory: each lever computes the same, keeps its promise and is worth its bytes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitee import zoo
from splitee.arena import plan, verify
from splitee.capture import capture
from splitee.forget import fullness
from splitee.graph import Graph, Op
from splitee.model import Network
from splitee.schedule import Pass, schedule
from splitee.steps import Levers, Schedule
from toolkit.graphs import (
    Builder,
    Kept,
    Tensor,
    all_levers,
    fullest,
    graphs,
    levers,
    macs,
    replays,
    resnet_graph,
)
from toolkit.networks import CLASSES, SHAPE, resnet, segment_at

CAPACITIES = st.integers(1, 5)
TARGET = Levers(relu_bits=True, float16=True, recompute=1.0, local_only=True)


@given(graphs(), CAPACITIES, st.booleans(), st.booleans(), levers())
@settings(deadline=None)
def test_with_any_lever_each_step_finds_what_it_needs_and_each_gradient_is_whole(
    graph: Graph, capacity: int, momentum: bool, moves: bool, pulled: Levers
) -> None:
    steps = schedule(graph, capacity, momentum, moves=moves, levers=pulled)
    for replay in replays(steps, graph, pulled, moves=moves).values():
        again = {name for name, times in replay.computed.items() if times > 1}
        assert pulled.recompute or not again
    assert verify(steps, plan(steps)) == []


def macs_again(steps: Schedule, graph: Graph) -> int:
    """Multiply-accumulates of operations that are done more than once."""
    forward = [s.op for s in steps.steps if s.action == "forward" and s.op is not None]
    times = Counter(op.name for op in forward)
    return sum((times[op.name] - 1) * macs(graph, op) for op in graph.ops if op.name in times)


@given(graphs(), CAPACITIES, st.booleans(), levers(), st.sampled_from((0.0, 0.25, 1.0)))
@settings(deadline=None, max_examples=50)
def test_no_more_is_done_again_than_allowed_and_none_of_it_for_nothing(
    graph: Graph, capacity: int, moves: bool, pulled: Levers, share: float
) -> None:
    pulled = replace(pulled, recompute=share)
    steps = schedule(graph, capacity, False, moves=moves, levers=pulled)
    assert steps.macs_again == macs_again(steps, graph)
    assert steps.macs_again <= share * sum(macs(graph, op) for op in graph.ops)
    kept = schedule(graph, capacity, False, moves=moves, levers=replace(pulled, recompute=0.0))
    assert fullest(steps) <= fullest(kept)
    assert plan(steps).lower_bound <= plan(kept).lower_bound


@given(graphs(), CAPACITIES, st.booleans())
@settings(deadline=None)
def test_only_float16_rounds_and_only_what_backward_reads(
    graph: Graph, capacity: int, moves: bool
) -> None:
    steps = schedule(graph, capacity, False, moves=moves, levers=Levers(float16=True))
    largest = max(4 * capacity * graph.elements(name) for name in graph.shapes)
    for replay in replays(steps, graph, Levers(float16=True), moves=moves).values():
        read = {
            content.name for action, _, reads, _ in replay.log
            if action.startswith("backward") for content in reads if isinstance(content, Tensor)
        }  # fmt: skip
        rounded = {
            content.of for action, _, _, made in replay.log
            if action == "pack" for content in made if isinstance(content, Kept)
        }  # fmt: skip
        # what convolutions, linear layers and norms had for an input, but for the image itself
        inputs = {op.inputs[0] for op in replay.graph.ops if op.weights} - {"input"}
        assert read - {"input"} == {steps.aliases.get(name, name) for name in inputs}
        sizes = {name: 4 * capacity * graph.elements(name) for name in read}
        assert rounded >= {n for n in read - {"input"} if 16 * sizes[n] >= largest}
        assert all(2 * steps.sizes[f"{name}:half"] == sizes[name] for name in rounded & read)


def stem(capacity: int = 3) -> Graph:
    """The stem of a narrow resnet8 with its exit: 4 channels of 8 x 8."""
    return capture(segment_at(Network(resnet(), SHAPE), "stem"), CLASSES)


IMAGE = 3 * 4 * 64  # bytes: three samples of 8 x 8
MAP = 4 * IMAGE  # of one of the three tensors of four channels: stem.0 to stem.2
NORM = 2 * 16  # mean and rstd, 12 bytes each, aligned
POOL = 3 * 4 * 64  # the exit's input: four channels of 4 x 4
PARAMETERS = 2784  # gradients of 36 + 4 + 4 + 640 + 10 parameters, aligned
BITS = 3 * 4 * 64 // 8  # of the one ReLU
SCRATCH = 4 * 4 * (8 + 4) * (8 + 8)  # of the convolution, as the kernel wants it

# All is fullest on the way from the exit back to the cut: the gradients of the pool's output and
# input, and in wait the image, the convolution's output (for the norm), the norm's two, and the
# server's gradient.
BACK = PARAMETERS + IMAGE + MAP + NORM + MAP + POOL + MAP


@pytest.mark.parametrize(
    ("pulled", "size"),
    [
        pytest.param(Levers(), BACK + MAP, id="the ReLU's output waits"),
        pytest.param(Levers(relu_bits=True), BACK + BITS, id="only a bit an element does"),
        pytest.param(
            Levers(float16=True), BACK + BITS - MAP // 2, id="the convolution's output is halved"
        ),
        pytest.param(
            Levers(fused_update=True), BACK + MAP - PARAMETERS, id="no layer learns just then"
        ),
        pytest.param(Levers(local_only=True), BACK + MAP - MAP, id="there is no server's gradient"),
        # a second time before the ReLU; the norm's input, too, may be there only then
        pytest.param(Levers(recompute=1.0), BACK, id="the ReLU's output is made again"),
        # then the convolution is fullest, done again on the way back: beside the image its output,
        # its scratch and the gradient that waits for it
        pytest.param(
            Levers(relu_bits=True, recompute=1.0),
            PARAMETERS + IMAGE + NORM + MAP + SCRATCH + MAP,
            id="the convolution is done again",
        ),
        # its 2304 MACs are more than a quarter of 2304 + 640
        pytest.param(
            Levers(relu_bits=True, recompute=0.25), BACK + BITS, id="which is not allowed"
        ),
        # the output is a float32 again before the gradient is there: one map less at once
        pytest.param(
            all_levers(0.0), IMAGE + MAP + NORM + POOL + MAP + BITS, id="all but doing again"
        ),
    ],
)
def test_the_arena_of_a_stem_is_what_pencil_and_paper_say(pulled: Levers, size: int) -> None:
    steps = schedule(stem(), 3, momentum=False, levers=pulled)
    found = plan(steps)
    assert (found.lower_bound, found.size) == (size, size)
    again = pulled.recompute == 1.0
    assert steps.macs_again == (2304 if again else 0)


@pytest.mark.parametrize("capacity", [1, 3])
def test_a_relu_keeps_a_bit_an_element_in_whole_bytes(capacity: int) -> None:
    steps = schedule(resnet_graph(), capacity, False, levers=Levers(relu_bits=True))
    bits = {name: size for name, size in steps.sizes.items() if name.endswith(":bits")}
    elements = {"stem.2": 256, "layer1.0.relu1": 256, "layer1.0.relu2": 256,
                "layer2.0.relu1": 128, "layer2.0.relu2": 128}  # fmt: skip
    assert bits == {f"{n}:bits": capacity * size // 8 for n, size in elements.items()}


@pytest.mark.parametrize(("capacity", "size"), [(1, 2), (3, 4), (8, 9)])
def test_a_byte_is_begun_for_the_last_bits(capacity: int, size: int) -> None:
    builder = Builder((1, 3, 3))
    builder.exit(builder.add("relu6", [builder.conv("input", 1, 3, 1, bias=False)]))
    steps = schedule(builder.graph(), capacity, False, levers=Levers(relu_bits=True))
    assert steps.sizes["relu61:bits"] == size


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_with_a_fused_update_each_layer_has_room_for_its_own_gradients(norm: str) -> None:
    steps = schedule(resnet_graph(norm, "layer1"), 3, True, levers=Levers(fused_update=True))
    assert steps.lasting == (("momentum",) if norm == "group" else ("momentum", "statistics"))
    assert "gradients" not in plan(steps).offsets
    own = {name: size for name, size in steps.sizes.items() if name.endswith(":gradients")}
    conv, linear = 4 * 4 * 3 * 3, 64 * 10 + 10
    values = {"stem.0": 4 * 3 * 3, "stem.1": 4 + 4, "exits.stem.linear": linear,
              "layer1.0.conv1": conv, "layer1.0.norm1": 4 + 4, "layer1.0.conv2": conv,
              "layer1.0.norm2": 4 + 4, "exits.layer1.linear": linear}  # fmt: skip
    assert own == {f"{name}:gradients": 4 * count for name, count in values.items()}
    # none outlives its update, which comes before anything else learns
    for name in own:
        using = [(i, s) for i, s in enumerate(steps.steps) if name in s.touched]
        (first, learns), (last, update) = using
        assert (update.action, update.touched) == ("update", (name,))
        between = steps.steps[first + 1 : last]
        assert [s.action for s in between] in ([], ["backward_input"])
        assert all(s.op is learns.op for s in between)


def test_a_segment_built_for_its_own_exits_has_no_gradient_of_the_servers() -> None:
    graph = resnet_graph(cut="layer1")
    found = {local: schedule(graph, 3, False, levers=Levers(local_only=local))
             for local in (False, True)}  # fmt: skip
    actions = {local: [s.action for s in steps.steps] for local, steps in found.items()}
    assert [actions[local].count("weigh") for local in (False, True)] == [1, 0]
    # and where the cut moves, the server may be asked at any
    moving = [schedule(graph, 3, False, moves=True, levers=Levers(local_only=local))
              for local in (False, True)]  # fmt: skip
    assert moving[0] == moving[1]
    assert sum(s.action == "weigh" for s in moving[1].steps) == 2


ZOO = {"none": Levers(), "all": all_levers(0.5)}


@pytest.mark.parametrize("pulled", ZOO)
@pytest.mark.parametrize("moves", [False, True], ids=["one cut", "every cut"])
@pytest.mark.parametrize(("name", "deepest"), [("resnet8", 3), ("resnet18", 4), ("resnet20", 4)])
def test_the_zoo_is_scheduled_right_and_planned_close_to_the_bound(
    name: str, deepest: int, moves: bool, pulled: str
) -> None:
    network = Network(zoo.build(name, width=8, norm="group"), (3, 32, 32))
    # with levers, the search for what to make again takes seconds at deeper cuts
    cuts = network.cuts[: deepest + 1] if pulled == "all" else network.cuts
    for cut in cuts:
        graph = capture(segment_at(network, cut.name, upto=moves), CLASSES)
        steps = schedule(graph, 1, False, moves=moves, levers=ZOO[pulled])
        replays(steps, graph, ZOO[pulled], moves=moves)
        found = plan(steps)
        assert verify(steps, found) == []
        assert found.size <= 1.02 * found.lower_bound, cut.name


KIB = 1024


@pytest.mark.parametrize(
    ("width", "side", "size"),
    [(16, 32, 256 * KIB - 8 * KIB), (8, 32, 128 * KIB - 7 * KIB), (8, 16, 64 * KIB - 7 * KIB)],
    ids=["256 KB", "128 KB", "64 KB"],
)
@pytest.mark.parametrize("norm", zoo.NORMS)
def test_a_first_stage_learns_within_the_memory_of_a_small_board(
    width: int, side: int, size: int, norm: str
) -> None:
    network = Network(zoo.build("resnet8", width=width, norm=norm), (3, side, side))
    graph = capture(segment_at(network, "layer1"), CLASSES)
    steps = schedule(graph, 1, momentum=False, levers=TARGET)
    replays(steps, graph, TARGET)
    found = plan(steps)
    assert verify(steps, found) == []
    # what is subtracted is the firmware's own, its stack and running statistics
    assert found.size + 4 * graph.parameter_size <= size


def residual(**pulled: bool) -> Pass:
    """A walk through conv, conv, their sum, relu and an exit."""
    convolution = {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "groups": 1}
    weights = {
        "a.w": np.zeros((2, 2, 3, 3), np.float32),
        "b.w": np.zeros((2, 2, 3, 3), np.float32),
        "l.w": np.zeros((3, 32), np.float32),
    }
    ops = (
        Op("conv2d", "a", ("input",), convolution, {"weight": "a.w"}),
        Op("conv2d", "b", ("a",), convolution, {"weight": "b.w"}),
        Op("add", "sum", ("b", "a")),
        Op("relu", "relu", ("sum",)),
        Op("branch", "exit", ("relu",)),
        Op("linear", "l", ("exit",), {}, {"weight": "l.w"}),
    )
    graph = Graph("input", (2, 4, 4), ops, weights, {}, "relu", {"x": "l"}, 3)
    return Pass(graph, 1, moves=False, distills=False, levers=Levers(**pulled))


def test_nothing_is_forgotten_that_would_be_wanted_in_place_twice() -> None:
    walk = residual()
    assert fullness(walk.again(frozenset())).most < math.inf
    # the relu's gradient is that of the sum, made where the output's is: not from one kept
    assert fullness(walk.again(frozenset({"d(b)", "d(sum)"}))).most == math.inf


def test_nothing_is_forgotten_that_would_be_made_again_of_weights_that_have_learnt() -> None:
    forgotten = frozenset({"b", "sum", "relu"})
    assert fullness(residual().again(forgotten)).most < math.inf
    # b learns before its output is wanted for the relu's gradient
    walk = residual(fused_update=True, local_only=True)
    forgotten |= {"d(exit)", "d(relu)", "d(sum)", "d(b)"}
    assert fullness(walk.again(forgotten)).most == math.inf
