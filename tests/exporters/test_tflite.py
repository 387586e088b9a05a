"""TFLite files: LiteRT's reference kernels, TFLite Micro and our numbers are the same bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from int8_random import norm_inputs, random_norm, random_scale
from splitee import arena, zoo
from splitee.capture import capture
from splitee.client import LocalClient, Settings
from splitee.errors import ExportError, FitError, ModelError
from splitee.exits import Exit
from splitee.int8 import ACTIVATIONS, Int8Graph, Int8Op, Scale
from splitee.model import Network, Segment
from splitee.ops import Array
from splitee.place import Build
from step_harness import mobilenet, pools, vgg

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")

from splitee_exporters import manifest, tflite_run
from splitee_exporters.tflite import Arena, Exported, read, schema, segment_to_tflite, to_tflite
from splitee_exporters.tflite_run import litert, micro, verify


def plain_vgg() -> nn.Module:
    """A chain in which padded pools of both kinds cannot be TensorFlow's own."""
    model = pools()
    assert isinstance(model, nn.Sequential)
    model[1] = nn.BatchNorm2d(5)
    return model


def wide() -> nn.Module:
    """A layer whose mean needs more memory for its sums than the layer for its input."""
    return nn.Sequential(nn.Conv2d(1, 64, 1), nn.ReLU(), nn.Conv2d(64, 4, 1))


def group_norms() -> nn.Module:
    """Group norms behind images, convolutions and pools, of one group, of several, and of each."""
    return nn.Sequential(
        nn.GroupNorm(1, 2),
        nn.Conv2d(2, 6, 3, 2, 1),
        nn.GroupNorm(3, 6, eps=0.1),
        nn.ReLU6(),
        nn.MaxPool2d(2, 1),
        nn.GroupNorm(2, 6),
        nn.Conv2d(6, 6, 3, 1, 1, groups=6, bias=False),
        nn.GroupNorm(6, 6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], int]] = {
    **{
        name: (partial(zoo.build, name, width=6, channels=1), (1, 8, 8), 10)
        for name in ("resnet8", "resnet18", "resnet20")
    },
    "mobilenet": (mobilenet, (3, 27, 24), 10),
    "vgg": (vgg, (2, 13, 11), 3),
    "pools": (plain_vgg, (2, 13, 11), 3),
    "wide": (wide, (1, 5, 5), 10),
    "resnet8-group": (
        partial(zoo.build, "resnet8", width=6, norm="group", channels=1), (1, 8, 8), 10
    ),
    "group_norms": (group_norms, (2, 13, 11), 3),
}  # fmt: skip
CASES = [
    ("resnet8", "stem"), ("resnet8", "layer1"), ("resnet8", "layer3"),
    ("resnet18", "layer1"), ("resnet18", "layer2"), ("resnet18", "layer4"),
    ("resnet20", "layer1"), ("resnet20", "layer2"), ("resnet20", "layer3"),
    ("mobilenet", "features.1"), ("mobilenet", "features.4"), ("mobilenet", "features.14"),
    ("vgg", "2"), ("vgg", "6"), ("vgg", "10"),
    ("pools", "3"), ("pools", "6"), ("pools", "8"),
    ("wide", "1"),
    ("resnet8-group", "stem"), ("resnet8-group", "layer1"), ("resnet8-group", "layer3"),
    ("group_norms", "0"), ("group_norms", "1"), ("group_norms", "5"), ("group_norms", "8"),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A segment, its images, and what PyTorch makes of them."""

    build: Build
    images: Array
    expected: dict[str, Array]
    exported: Exported


@cache
def case(kind: str, cut_name: str) -> Case:
    """A network cut there, its weights such that they hide no mistake."""
    make, shape, classes = NETWORKS[kind]
    torch.manual_seed(11)
    network = Network(make(), shape)
    cut = network.cut(cut_name)
    exit = Exit((cut.shape[0], cut.shape[1], cut.shape[2]), classes)
    segment = Segment(network, cut, {cut.name: exit})
    with torch.no_grad():  # norms that only scale by one and add zero would hide mistakes
        for name, tensor in segment.tensors().items():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
            if name.endswith("running_var"):
                tensor.abs_()
    scale = tuple(1 / (64 + 8 * c) for c in range(shape[0]))
    shift = tuple(-2.0 + 0.3 * c for c in range(shape[0]))
    build = Build(capture(segment, classes), 8, False, 1, scale, shift)
    client = LocalClient("one", segment, Settings(0.1), capacity=8, scale=scale, shift=shift)
    images = np.random.default_rng(5).integers(0, 256, (24, *shape), np.uint8)
    activations, logits = client.infer(images)
    expected = {"activations": activations.numpy(), "logits": logits.numpy()}
    return Case(build, images, expected, segment_to_tflite(build, images))


def ours(exported: Exported, x: Array) -> dict[str, Array]:
    """What the graph computes, by the names of the file's outputs."""
    values = exported.graph.run(x)
    return {name: values[tensor] for name, tensor in exported.outputs.items()}


def different(found: dict[str, Array], expected: dict[str, Array]) -> dict[str, int]:
    """The outputs that are not the same bit for bit, and by how many steps at most."""
    assert set(found) == set(expected)
    assert all(found[name].shape == expected[name].shape for name in expected)
    steps = {n: int(np.abs(found[n].astype(int) - expected[n]).max()) for n in expected}
    return {name: worst for name, worst in steps.items() if worst}


def in_micro(exported: Exported, x: Array) -> dict[str, Array]:
    pytest.importorskip("tflite_micro", reason="tflite-micro is not installed")
    return micro(exported, x)[0]


@pytest.mark.parametrize(("kind", "cut"), CASES)
def test_reference_kernels_micro_and_our_numbers_are_the_same_bits(kind: str, cut: str) -> None:
    exported = case(kind, cut).exported
    x = exported.graph.image(case(kind, cut).images)
    own = ours(exported, x)
    assert len(np.unique(own["activations"])) > 20
    assert different(litert(exported, x, reference=True), own) == {}
    assert different(in_micro(exported, x), own) == {}


@pytest.mark.parametrize(("kind", "cut"), CASES)
def test_default_kernels_are_near_and_within_two_steps_where_few_operations_add_up(
    kind: str, cut: str
) -> None:
    exported = case(kind, cut).exported
    x = exported.graph.image(case(kind, cut).images)
    found, own = litert(exported, x), ours(exported, x)
    # a group norm brings what one value is off by to all of its group
    spreads = "group_norm" in {op.kind for op in exported.graph.ops}
    if len(exported.graph.ops) <= 12 and not spreads:
        assert max(different(found, own).values(), default=0) <= 2
    for name, value in own.items():
        off = np.sqrt(((found[name].astype(float) - value) ** 2).mean())
        assert off <= (2 if spreads else 1)


@pytest.mark.parametrize(("kind", "cut"), CASES)
def test_is_near_pytorch(kind: str, cut: str) -> None:
    the = case(kind, cut)
    verified, _ = verify(
        the.exported, the.images[:8], {n: e[:8] for n, e in the.expected.items()}, "PyTorch"
    )
    assert verified.error <= 0.06


def test_default_kernels_that_answer_something_else_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    the = case("resnet8", "layer1")

    def spoilt(exported: Exported, x: Array, *, reference: bool = False) -> dict[str, Array]:
        found = litert(exported, x, reference=reference)
        return found if reference else {n: np.maximum(v, 0) for n, v in found.items()}

    monkeypatch.setattr(tflite_run, "litert", spoilt)
    with pytest.raises(ExportError, match=r"tflite: default kernels' activations: off by"):
        verify(the.exported, the.images, the.expected, "PyTorch")


def most_alive(data: bytes) -> int:
    """The most bytes that tensors and reductions' scratch take at once, read from the file alone.

    A tensor that is another in a new shape takes none, but for an output of the file.
    """
    model = read(data)
    graph = model.subgraphs[0]
    kinds = schema.BuiltinOperator
    codes = [code.builtinCode for code in model.operatorCodes]
    sizes = {
        i: -(
            -int(np.prod(tensor.shape)) * (1 if tensor.type == schema.TensorType.INT8 else 4) // 16
        )
        for i, tensor in enumerate(graph.tensors)
        if model.buffers[tensor.buffer].data is None
    }
    same = {i: i for i in range(len(graph.tensors))}
    for operator in graph.operators:
        (made,) = operator.outputs
        if codes[operator.opcodeIndex] == kinds.RESHAPE and made not in graph.outputs:
            same[made] = same[operator.inputs[0]]
            del sizes[made]
    first = dict.fromkeys(graph.inputs, 0)
    last = dict.fromkeys(graph.outputs, len(graph.operators))
    for i, operator in enumerate(graph.operators):
        for tensor in (same[t] for t in (*operator.inputs, *operator.outputs)):
            first.setdefault(tensor, i)
            last[tensor] = max(last.get(tensor, 0), i)
    found = 0
    for i, operator in enumerate(graph.operators):
        alive = sum(size for t, size in sizes.items() if first[t] <= i <= last[t])
        if codes[operator.opcodeIndex] in (kinds.MEAN, kinds.SUM):
            (sums,) = (int(np.prod(graph.tensors[t].shape)) for t in operator.outputs)
            alive += -(-4 * sums // 16) + 1 + 1
        found = max(found, alive)
    return 16 * found


@pytest.mark.parametrize(("kind", "cut"), CASES)
def test_micro_takes_our_plan_which_is_near_what_is_alive_at_once(kind: str, cut: str) -> None:
    pytest.importorskip("tflite_micro", reason="tflite-micro is not installed")
    exported = case(kind, cut).exported
    x = exported.graph.image(case(kind, cut).images[:1])
    _, taken = micro(exported, x)
    least = most_alive(exported.data)
    assert taken.lower_bound == least
    assert least <= taken.head == exported.plan.size <= 1.02 * least
    assert taken.head + taken.tail == taken.total


def random_graph(seed: int) -> Int8Graph:
    """Every kind of operation in a row, with shapes, scales and activations drawn at random."""
    random = np.random.default_rng(seed)
    height, width, channels = (int(n) for n in random.integers((3, 3, 1), (8, 8, 7)))
    weights: dict[str, Array] = {}
    units: dict[str, Array] = {}
    scales = {"input": random_scale(random, 0.001, 0.1)}
    ops: list[Int8Op] = []

    def pair(low: int, high: int) -> list[int]:
        return [int(n) for n in random.integers(low, high, 2)]

    def weighted(name: str, shape: tuple[int, ...], outputs: int, count: int) -> dict[str, str]:
        weights[f"{name}.weight"] = random.integers(-127, 128, shape).astype(np.int8)
        weights[f"{name}.bias"] = random.integers(-3000, 3000, outputs).astype(np.int32)
        units[f"{name}.weight"] = np.exp(random.uniform(-9, -5, count)).astype(np.float32)
        return {"weight": f"{name}.weight", "bias": f"{name}.bias"}

    def add(kind: str, name: str, inputs: tuple[str, ...], roles: Any = (), **attrs: Any) -> None:
        same = kind.endswith("pool") or (attrs.get("activation") == "relu6" and kind == "relu")
        scales[name] = scales[inputs[0]] if same else random_scale(random, 0.03, 0.3)
        attrs = {"activation": str(random.choice(ACTIVATIONS)), **attrs}
        ops.append(Int8Op(kind, name, inputs, attrs, dict(roles)))

    def conv(name: str, x: str, outputs: int, groups: int, kernel: list[int], **attrs: Any) -> None:
        shape = (outputs, *kernel, channels // groups)
        if groups == channels == outputs > 1:
            shape = (1, *kernel, outputs)
        roles = weighted(name, shape, outputs, outputs)
        add("conv2d", name, (x,), roles, kernel=kernel, groups=groups, **attrs)

    one = {"stride": [1, 1]}
    groups = int(random.choice([1, channels]))
    conv("a", "input", channels, groups, pair(1, 4), stride=pair(1, 3), padding=[1, 1])
    conv("b", "a", 4, 1, [3, 3], padding=[1, 1], **one)
    conv("c", "a", 4, 1, [1, 1], padding=[0, 0], **one)
    add("add", "d", ("b", "c"))
    add("relu", "e", ("d",), activation=str(random.choice(ACTIVATIONS[1:])))
    pool = ("max_pool", "avg_pool")[seed % 2]
    add(pool, "f", ("e",), kernel=[2, 2], stride=pair(1, 3), padding=[1, seed // 2 % 2])
    add("mean", "g", ("f",), activation="none")
    add("linear", "h", ("g",), weighted("h", (5, 4), 5, 1), activation="none")
    table = np.zeros((channels, 256), np.int8)
    return Int8Graph(
        "input", (height, width, channels), table, tuple(ops), weights, units, scales, "g", "h", 5
    )


@pytest.mark.parametrize("cut", ["d", "e", "f", "g"])
@pytest.mark.parametrize("seed", range(5))
def test_every_operation_is_the_same_bits_with_any_numbers(seed: int, cut: str) -> None:
    graph = replace(random_graph(seed), cut=cut)
    exported = to_tflite(graph, cut)
    x = np.random.default_rng(seed).integers(-128, 128, (8, *graph.input_shape)).astype(np.int8)
    own = ours(exported, x)
    assert different(litert(exported, x, reference=True), own) == {}
    assert different(in_micro(exported, x), own) == {}


@pytest.mark.parametrize("seed", range(8))
def test_a_group_norm_is_the_same_bits_with_any_numbers(seed: int) -> None:
    graph = random_norm(seed)
    x = norm_inputs(seed, graph)
    graph = replace(graph, input="x", input_shape=graph.shapes["x"], ops=graph.ops[1:])
    exported = to_tflite(graph, "y")
    own = ours(exported, x)["activations"]
    assert (litert(exported, x, reference=True)["activations"] == own).all()
    assert (in_micro(exported, x)["activations"] == own).all()


def alone(graph: Int8Graph, op: Int8Op) -> Int8Graph:
    """One operation of a graph, all its inputs the same tensor."""
    x = op.inputs[0]
    return replace(
        graph,
        input=x,
        input_shape=graph.shapes[x],
        ops=(replace(op, inputs=(x,) * len(op.inputs)),),
        cut=op.name,
        logits=op.name,
    )


@pytest.mark.parametrize("name", "abcdefgh")
@pytest.mark.parametrize("seed", range(3))
def test_default_kernels_of_one_operation_are_within_a_step(seed: int, name: str) -> None:
    graph = random_graph(seed)
    (op,) = (op for op in graph.ops if op.name == name)
    graph = alone(graph, op)
    exported = to_tflite(graph, name)
    x = np.random.default_rng(seed).integers(-128, 128, (8, *graph.input_shape)).astype(np.int8)
    found, own = litert(exported, x)["activations"], ours(exported, x)["activations"]
    assert np.abs(found.reshape(own.shape).astype(int) - own).max() <= 1


def test_a_linear_layer_rounds_as_its_sums_do_everywhere() -> None:
    random = np.random.default_rng(3)
    weights: dict[str, Array] = {
        "l.weight": random.integers(-127, 128, (64, 1)).astype(np.int8),
        "l.bias": random.integers(-5000, 5000, 64).astype(np.int32),
    }
    graph = Int8Graph(
        "input", (1, 1, 1), np.zeros((1, 256), np.int8),
        (
            Int8Op("relu", "r", ("input",), {"activation": "relu"}),
            Int8Op(
                "linear", "l", ("r",), {"activation": "none"},
                {"weight": "l.weight", "bias": "l.bias"},
            ),
        ),
        weights, {"l.weight": np.array([0.0021], np.float32)},
        {"input": Scale(0.03, -128), "r": Scale(0.03, -128), "l": Scale(0.0173, 5)},
        "r", "l", 64,
    )  # fmt: skip
    exported = to_tflite(graph, "r")
    x = np.arange(-128, 128).astype(np.int8).reshape(-1, 1, 1, 1)
    own = ours(exported, x)
    assert different(litert(exported, x, reference=True), own) == {}
    assert different(in_micro(exported, x), own) == {}


def test_a_file_says_what_it_takes_and_gives() -> None:
    exported = case("mobilenet", "features.4").exported
    model = read(exported.data)
    graph = model.subgraphs[0]

    def told(places: list[int]) -> list[tuple[bytes, list[int], int]]:
        tensors = [graph.tensors[i] for i in places]
        return [(t.name, list(t.shape), t.type) for t in tensors]

    int8 = schema.TensorType.INT8
    assert told(graph.inputs) == [(b"images", [1, 27, 24, 3], int8)]
    assert told(graph.outputs) == [
        (b"activations", [1, 4, 3, 4], int8),
        (b"logits", [1, 10], int8),
    ]
    assert model.description.decode().startswith("hetero-splitee ")
    assert f"{exported.graph.checksum:08x}" in model.description.decode()
    assert exported.data[4:8] == b"TFL3"
    assert {t.type for t in graph.tensors} == {int8, schema.TensorType.INT32}


def test_all_values_are_in_the_file_and_begin_at_multiples_of_16() -> None:
    data = case("resnet8", "layer3").exported.data
    model = read(data)
    values = [bytes(b.data) for b in model.buffers if b.data is not None]
    assert len(values) > 10
    for value in (v for v in values if len(v) >= 16):
        assert data.index(value) % 16 == 0
    assert all(buffer.offset <= 1 for buffer in model.buffers)


def test_refuses_a_file_whose_values_lie_outside() -> None:
    model = read(case("resnet8", "stem").exported.data)
    model.buffers[2].data, model.buffers[2].offset, model.buffers[2].size = None, 4096, 64
    from splitee_exporters.tflite import flatbuffers

    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    with pytest.raises(ExportError, match="buffer 2 lies outside of the flatbuffer"):
        read(bytes(builder.Output()))


def test_the_same_segment_is_the_same_file() -> None:
    the = case("resnet8", "layer1")
    assert segment_to_tflite(the.build, the.images).data == the.exported.data


@pytest.mark.parametrize("name", ["images", "activations", "logits"])
def test_a_layer_may_be_called_as_an_input_or_output(name: str) -> None:
    model = nn.Sequential()
    for part, layer in ((name, nn.Conv2d(1, 2, 3)), ("pool", nn.MaxPool2d(2)), ("last", nn.ReLU())):
        model.add_module(part, layer)
    network = Network(model, (1, 8, 8))
    cut = network.cut("pool")
    segment = Segment(network, cut, {cut.name: Exit((2, 3, 3), 10)})
    build = Build(capture(segment, 10), 8, False, 1, (1 / 64,), (-2.0,))
    images = np.random.default_rng(1).integers(0, 256, (4, 1, 8, 8), np.uint8)
    exported = segment_to_tflite(build, images)
    x = exported.graph.image(images)
    assert different(litert(exported, x, reference=True), ours(exported, x)) == {}


def test_refuses_what_has_no_operator_by_name() -> None:
    graph = case("vgg", "6").exported.graph
    ops = (replace(graph.ops[0], kind="softmax"), *graph.ops[1:])
    with pytest.raises(ModelError, match=r"^2: the TFLite exporter has no softmax; it has conv2d"):
        to_tflite(replace(graph, ops=ops), "6")


def test_refuses_a_segment_without_a_trunk() -> None:
    graph = case("vgg", "6").exported.graph
    with pytest.raises(ModelError, match="this one has no trunk"):
        to_tflite(replace(graph, cut=graph.input), "6")


@pytest.mark.parametrize("spoilt", ["weight", "bias", "multiplier"])
def test_a_file_with_other_numbers_is_not_verified(spoilt: str) -> None:
    the = case("resnet8", "layer1")
    graph = the.exported.graph
    name = "layer1.0.conv2.weight"
    match spoilt:
        case "weight":
            changed = np.flip(graph.weights[name], 0)
            other = replace(graph, weights={**graph.weights, name: changed})
        case "bias":
            bias = graph.ops[2].weights["bias"]
            changed = graph.weights[bias].copy()
            changed[0] += 4096
            other = replace(graph, weights={**graph.weights, bias: changed})
        case _:
            units = graph.weight_scales[name] * np.float32(1.25)
            other = replace(graph, weight_scales={**graph.weight_scales, name: units})
    wrong = replace(the.exported, graph=other)
    with pytest.raises(
        ExportError, match=r"LiteRT's reference kernels answer \w+ that are off by \d"
    ):
        verify(wrong, the.images, the.expected, "PyTorch")


def test_a_plan_in_which_tensors_overlap_is_seen_in_micro(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tflite_micro", reason="tflite-micro is not installed")
    the = case("resnet8", "layer1")
    plan = the.exported.plan
    monkeypatch.setattr(arena, "verify", lambda schedule, plan: [])
    flat = replace(plan, offsets={**plan.offsets, "layer1.0.relu1.out": plan.offsets["stem.2.out"]})
    monkeypatch.setattr(arena, "plan", lambda schedule: flat)
    wrong = to_tflite(the.exported.graph, "layer1")
    with pytest.raises(ExportError, match=r"TFLite Micro answer \w+ that are off by \d"):
        verify(wrong, the.images, the.expected, "PyTorch")


@pytest.mark.parametrize("output", ["activations", "logits"])
@pytest.mark.parametrize("wrong", [1.5, float("nan")])
def test_an_output_that_is_off_is_an_error_that_names_it(output: str, wrong: float) -> None:
    the = case("resnet8", "layer1")
    expected = {**the.expected, output: the.expected[output] * wrong}
    with pytest.raises(ExportError, match=rf"^segment-int8\.tflite: {output}: off by"):
        verify(the.exported, the.images, expected, "PyTorch")


def test_what_ran_on_no_sample_is_not_verified() -> None:
    the = case("resnet8", "layer1")
    with pytest.raises(ExportError, match="there is nothing to hold it to"):
        verify(the.exported, the.images[:0], {}, "PyTorch")


def test_micro_leaves_standard_error_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    exported = case("vgg", "6").exported
    in_micro(exported, exported.graph.image(case("vgg", "6").images[:1]))
    assert "Arena" not in capfd.readouterr().err


def test_an_arena_larger_than_the_board_is_refused_with_both_sizes() -> None:
    taken = Arena(head=60 << 10, tail=8 << 10, total=68 << 10, lower_bound=60 << 10)
    taken.check("segment-int8", "big", 68 << 10)
    with pytest.raises(FitError, match=r"needs an arena of 68 KB \(tensors: 60 KB\), small has 64"):
        taken.check("segment-int8", "small", 64 << 10)


def test_the_manifest_tells_what_there_is_and_what_verified_it(tmp_path: Path) -> None:
    pytest.importorskip("tflite_micro", reason="tflite-micro is not installed")
    the = case("resnet8", "layer1")
    verified, taken = verify(the.exported, the.images, the.expected, "PyTorch")
    file = the.exported.file(the.build, verified, taken)
    path = manifest.write(tmp_path / "export", "resnet8", "layer1", [file])
    (told,) = json.loads(path.read_text())["files"]
    written = (path.parent / "segment-int8.tflite").read_bytes()
    assert told["sha256"] == hashlib.sha256(written).hexdigest()
    assert told["input"] == {
        "name": "images", "type": "int8", "shape": [1, 8, 8, 1],
        "scale": the.exported.graph.scales["input"].scale,
        "zero_point": the.exported.graph.scales["input"].zero_point,
        "bytes": {"scale": [1 / 64], "shift": [-2.0]},
    }  # fmt: skip
    assert [o["shape"] for o in told["outputs"]] == [[1, 8, 8, 6], [1, 10]]
    assert told["operators"] == {"ADD": 1, "AVERAGE_POOL_2D": 1, "CONV_2D": 4, "RESHAPE": 1}
    assert told["arena"]["head"] == told["planned_head"] == told["arena"]["lower_bound"] == 1152
    assert told["operations"]["batch_norm"] == 3
    assert told["verified"]["against"] == "PyTorch"
    assert "TFLite Micro" in told["verified"]["runtime"]
