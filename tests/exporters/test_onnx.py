"""ONNX files: what ONNX Runtime computes from them is what PyTorch does, and what the files say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from splitee import data, zoo
from splitee.bottleneck import Bottleneck
from splitee.capture import capture, capture_tail
from splitee.client import LocalClient, Settings
from splitee.errors import ExportError, ModelError
from splitee.exits import Exit
from splitee.model import Cut, Network, Segment, Tail
from splitee.ops import OPS, Array
from splitee.place import Build
from step_harness import case, local, mobilenet, pools, vgg
from toolkit import networks
from toolkit.mobilenet import MobileNetV2

onnx: Any = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from splitee_exporters import manifest  # noqa: E402
from splitee_exporters import onnx as exporter  # noqa: E402  it needs them
from splitee_exporters.onnx import Exported, segment_to_onnx, tail_to_onnx, verify  # noqa: E402

BATCHES = (1, 7, 2, 30)


@dataclass(frozen=True)
class Halves:
    """A network cut in two, with what both halves compute in PyTorch."""

    build: Build
    cut: Cut
    client: LocalClient
    tail: Tail

    def expected(self, images: Array) -> dict[str, Array]:
        """What the client computes, and the server's logits of it."""
        activations, logits = self.client.infer(images)
        with torch.no_grad():
            whole = self.tail.eval()(activations, self.cut.name)
        tensors = {"activations": activations, "logits": logits, "server's": whole}
        return {name: tensor.numpy() for name, tensor in tensors.items()}


def small_mobilenet() -> nn.Module:
    """MobileNetV2 for digits; some of what comes to a ReLU6 is above six."""
    model = MobileNetV2(0.125, 4, channels=1, classes=10)
    for module in model.modules():
        if isinstance(module, nn.Sequential) and isinstance(module[-1], nn.ReLU6):
            norm = module[1]
            assert isinstance(norm, nn.BatchNorm2d)
            nn.init.constant_(norm.bias, 4.0)
    return model


def resnet(name: str, norm: str) -> nn.Module:
    """One of the bundled networks, narrow."""
    return zoo.build(name, width=6, norm=norm, classes=10, channels=1)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "resnet8-group": (partial(resnet, "resnet8", "group"), (1, 8, 8)),
    "resnet8-batch": (partial(resnet, "resnet8", "batch"), (1, 8, 8)),
    "resnet18-group": (partial(resnet, "resnet18", "group"), (1, 8, 8)),
    "resnet18-batch": (partial(resnet, "resnet18", "batch"), (1, 8, 8)),
    "mobilenet": (small_mobilenet, (1, 8, 8)),
    "vgg": (networks.vgg, (1, 8, 8)),
    "mobilenet-odd": (mobilenet, (3, 11, 12)),
    "vgg-odd": (vgg, (2, 13, 11)),
    "pools-odd": (pools, (2, 13, 11)),
}
CUTS = [
    (kind, number) for kind, depth in (
        ("resnet8-group", 3), ("resnet8-batch", 3), ("resnet18-group", 4), ("resnet18-batch", 4),
        ("mobilenet", 5), ("vgg", 2), ("mobilenet-odd", 5), ("vgg-odd", 2), ("pools-odd", 2),
    ) for number in (1, depth)
]  # fmt: skip


@cache
def halves(kind: str, number: int) -> Halves:
    """A network cut there, with weights that hide no mistake."""
    make, shape = NETWORKS[kind]
    torch.manual_seed(11)
    model = make()
    network = Network(model, shape)
    cut = network.cut(number)
    classes = {"pools-odd": 3, "vgg-odd": 3}.get(kind, 10)
    exit = Exit((cut.shape[0], cut.shape[1], cut.shape[2]), classes)
    segment, tail = Segment(network, cut, {cut.name: exit}), Tail(network, [cut])
    with torch.no_grad():  # norms that only scale by one and add zero would hide mistakes
        for name, tensor in {**segment.tensors(), **tail.tensors()}.items():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
            if name.endswith("running_var"):
                tensor.abs_()
    channels = shape[0]
    scale = tuple(1 / (64 + 8 * c) for c in range(channels))
    shift = tuple(-2.0 + 0.5 * c for c in range(channels))
    build = Build(capture(segment, classes), 8, False, 1, scale, shift)
    client = LocalClient("one", segment, Settings(0.1), capacity=8, scale=scale, shift=shift)
    return Halves(build, cut, client, tail)


def images_for(shape: Sequence[int], count: int = 64) -> Array:
    """Digits that nothing has trained on, or noise where the network takes other images."""
    if tuple(shape) == (1, 8, 8):
        return data.load("digits").test.x[:count]
    return np.random.default_rng(5).integers(0, 256, (count, *shape), np.uint8)


def tail_of(the: Halves) -> Exported:
    """The server's half, exported."""
    graph = capture_tail(the.tail, the.cut, the.build.graph.classes)
    return tail_to_onnx(graph, the.cut.name)


@pytest.mark.parametrize(("kind", "number"), CUTS)
def test_a_segment_computes_what_pytorch_does(kind: str, number: int) -> None:
    the = halves(kind, number)
    images = images_for(the.build.graph.input_shape)
    found = verify(
        segment_to_onnx(the.build), images, the.expected(images), "PyTorch", batches=BATCHES
    )
    assert found.error <= 1e-5
    assert found.samples == 64


@pytest.mark.parametrize(("kind", "number"), CUTS)
def test_the_servers_half_computes_what_pytorch_does(kind: str, number: int) -> None:
    the = halves(kind, number)
    expected = the.expected(images_for(the.build.graph.input_shape))
    logits = {"logits": expected["server's"]}
    found = verify(tail_of(the), expected["activations"], logits, "PyTorch", batches=BATCHES)
    assert found.error <= 1e-5


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_servers_half_widens_what_a_bottleneck_sends(stride: int) -> None:
    torch.manual_seed(4)
    network = Network(resnet("resnet8", "group"), (1, 8, 8))
    cut, bottleneck = network.cut(1), Bottleneck(3, stride)
    tail = Tail(network, [cut], {"one": bottleneck.mirror(cut.shape)}).eval()
    sent = torch.randn(9, *bottleneck.shape(cut.shape))
    with torch.no_grad():
        expected = {"logits": tail(sent, cut.name, "one").numpy()}
    exported = tail_to_onnx(capture_tail(tail, cut, 10, "one"), cut.name)
    assert exported.nodes["ConvTranspose"] == 1
    assert verify(exported, sent.numpy(), expected, "PyTorch").error <= 1e-5


def test_frozen_norms_and_a_bottleneck_are_in_the_file() -> None:
    frozen = case("resnet8-batch-frozen", bottleneck=Bottleneck(3, 2))
    activations, logits = local(frozen, Settings(0.1)).infer(frozen.images.x)
    expected = {"activations": activations.numpy(), "logits": logits.numpy()}
    exported = segment_to_onnx(frozen.build)
    verify(exported, frozen.images.x, expected, "PyTorch", batches=(5,))
    assert expected["activations"].shape[1:] == (3, 2, 2)
    assert "bottleneck.weight" in initialisers(exported)


def test_the_cut_can_be_any_of_those_built_in() -> None:
    the_case = case("resnet8", moves=True)
    client = local(the_case, Settings(0.1))
    for stage in the_case.build.stages:
        client.move(stage.cut, upto=False)
        activations, logits = client.infer(the_case.images.x)
        expected = {"activations": activations.numpy(), "logits": logits.numpy()}
        exported = segment_to_onnx(the_case.build, stage.cut)
        verify(exported, the_case.images.x, expected, "PyTorch")
        others = [cut for cut in the_case.build.graph.exits if cut != stage.cut]
        assert not any(f"exits.{cut}." in name for name in initialisers(exported) for cut in others)


def initialisers(exported: Exported) -> dict[str, Array]:
    """The values in a file, by name."""
    model = onnx.load_model_from_string(exported.data)
    return {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}


def test_weights_have_their_names_and_their_bits() -> None:
    build = case("vgg").build
    graph = build.graph.at(build.stages[-1].cut, upto=False)
    found = initialisers(segment_to_onnx(build))
    assert not networks.unequal({n: found[n] for n in graph.weights}, graph.weights)
    assert set(found) - set(graph.weights) == {"images.scale", "images.shift"}


def test_other_weights_of_the_same_graph_are_written() -> None:
    build = case("resnet8").build
    doubled = {name: 2 * value for name, value in build.graph.weights.items()}
    found = initialisers(segment_to_onnx(replace(build, graph=build.graph.holding(doubled))))
    assert np.array_equal(found["stem.0.weight"], doubled["stem.0.weight"])


def test_the_same_segment_is_the_same_file() -> None:
    assert (
        segment_to_onnx(case("resnet8").build).data == segment_to_onnx(case("resnet8").build).data
    )


def test_a_file_says_what_it_takes_and_gives() -> None:
    the = halves("resnet8-group", 1)
    model = onnx.load_model_from_string(segment_to_onnx(the.build).data)
    values = [*model.graph.input, *model.graph.output]
    found = [
        (v.name, v.type.tensor_type.elem_type,
         [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values
    ]  # fmt: skip
    assert found == [
        ("images", onnx.TensorProto.UINT8, ["batch", 1, 8, 8]),
        ("activations", onnx.TensorProto.FLOAT, ["batch", 6, 8, 8]),
        ("logits", onnx.TensorProto.FLOAT, ["batch", 10]),
    ]
    assert (model.producer_name, model.ir_version) == ("hetero-splitee", 10)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]


def test_the_servers_half_takes_activations_and_gives_logits() -> None:
    exported = tail_of(halves("resnet8-group", 1))
    model = onnx.load_model_from_string(exported.data)
    assert [v.name for v in model.graph.input] == ["activations"]
    assert [v.name for v in model.graph.output] == ["logits"]
    assert "Cast" not in exported.nodes


@pytest.mark.parametrize("name", ["images", "activations", "logits"])
def test_a_layer_may_be_called_as_an_input_or_output(name: str) -> None:
    model = nn.Sequential()
    for part, layer in (("first", nn.Conv2d(1, 2, 3)), (name, nn.ReLU()), ("last", nn.ReLU())):
        model.add_module(part, layer)
    network = Network(model, (1, 8, 8))
    cut = network.cut(name)
    segment = Segment(network, cut, {name: Exit((2, 6, 6), 10)})
    build = Build(capture(segment, 10), 8, False, 1, (1 / 64,), (-2.0,))
    client = LocalClient("one", segment, Settings(0.1), capacity=8, scale=(1 / 64,), shift=(-2.0,))
    activations, logits = client.infer(images_for((1, 8, 8)))
    expected = {"activations": activations.numpy(), "logits": logits.numpy()}
    verify(segment_to_onnx(build), images_for((1, 8, 8)), expected, "PyTorch")


@pytest.mark.parametrize("kind", OPS)
def test_every_kind_of_operation_has_its_nodes(kind: str) -> None:
    assert kind in exporter.KINDS


def test_refuses_what_has_no_node_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "silu", OPS["relu"])
    build = case("pools").build
    ops = [replace(op, kind="silu") if op.name == "2" else op for op in build.graph.ops]
    with pytest.raises(ModelError, match=r"^2: the ONNX exporter has no silu; it has conv2d, lin"):
        segment_to_onnx(replace(build, graph=replace(build.graph, ops=tuple(ops))))


@pytest.mark.parametrize("output", ["activations", "logits"])
@pytest.mark.parametrize("wrong", [1.0001, float("nan")])
def test_an_output_that_is_off_is_an_error_that_names_it(output: str, wrong: float) -> None:
    the = halves("resnet8-batch", 1)
    images = images_for((1, 8, 8))
    expected = the.expected(images)
    place = np.unravel_index(np.abs(expected[output]).argmax(), expected[output].shape)
    expected[output] = expected[output].copy()
    expected[output][place] *= wrong
    with pytest.raises(ExportError, match=rf"^segment\.onnx: {output}: off by .* PyTorch"):
        verify(segment_to_onnx(the.build), images, expected, "PyTorch")


def test_what_ran_on_no_sample_is_not_verified() -> None:
    the = halves("resnet8-batch", 1)
    images = images_for((1, 8, 8), 0)
    with pytest.raises(ExportError, match="there is nothing to hold it to"):
        verify(segment_to_onnx(the.build), images, {}, "PyTorch")


def test_the_manifest_tells_what_there_is_and_what_verified_it(tmp_path: Path) -> None:
    the = halves("resnet8-group", 1)
    images = images_for((1, 8, 8))
    expected = the.expected(images)
    segment, tail = segment_to_onnx(the.build), tail_of(the)
    logits = {"logits": expected["server's"]}
    files = [
        segment.file(verify(segment, images, expected, "PyTorch", batches=BATCHES)),
        tail.file(verify(tail, expected["activations"], logits, "PyTorch")),
    ]
    path = manifest.write(tmp_path / "export", "resnet8", the.cut.name, files)
    told = json.loads(path.read_text())
    assert (told["model"], told["cut"]) == ("resnet8", "stem")
    first, second = told["files"]
    for entry in (first, second):
        written = (path.parent / entry["file"]).read_bytes()
        assert entry["bytes"] == len(written)
        assert entry["sha256"] == hashlib.sha256(written).hexdigest()
        assert entry["verified"]["error"] <= entry["verified"]["tolerance"] == 1e-5
    assert first["input"] == {
        "name": "images", "type": "uint8", "shape": ["batch", 1, 8, 8],
        "scale": [1 / 64], "shift": [-2.0],
    }  # fmt: skip
    assert [o["shape"] for o in first["outputs"]] == [["batch", 6, 8, 8], ["batch", 10]]
    assert first["operations"] == {
        "avg_pool": 1, "branch": 1, "conv2d": 1, "group_norm": 1, "linear": 1, "relu": 1,
    }  # fmt: skip
    assert first["verified"]["against"] == "PyTorch"
    assert first["verified"]["batches"] == [1, 2, 7, 14, 30]
    assert second["input"] == {
        "name": "activations",
        "type": "float32",
        "shape": ["batch", 6, 8, 8],
    }
