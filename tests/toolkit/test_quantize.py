"""Quantisation: what becomes of each layer, and how near 8 bits come to the network."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from splitee.capture import capture
from splitee.errors import ModelError
from splitee.graph import Graph
from splitee.int8 import Int8Graph
from splitee.model import Network
from splitee.ops import OPS, Array
from splitee.quantize import quantize
from toolkit.networks import SCALE, SHAPE, SHIFT, random_images, resnet, segment_at, vgg

IMAGES = random_images(40).x


def graph_of(model: nn.Module, cut: str | int) -> Graph:
    """A network's segment up to a cut, its norms with statistics that are not their first."""
    torch.manual_seed(4)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("running_mean", "bias")):
                tensor.normal_(0.0, 0.3)
            if name.endswith(("running_var", "norm1.weight", "norm2.weight")):
                tensor.uniform_(0.5, 1.5)
    return capture(segment_at(Network(model, SHAPE), cut), 10)


def real_input() -> Array:
    """The images as the float network sees them."""
    return (IMAGES * np.float32(SCALE[0]) + np.float32(SHIFT[0])).astype(np.float32)


def eight(graph: Graph) -> Int8Graph:
    """A graph, quantised with the images."""
    return quantize(graph, IMAGES, SCALE, SHIFT)


def kinds(graph: Int8Graph) -> list[tuple[str, str, str]]:
    """Kind, name and activation of its operations."""
    return [(op.kind, op.name, op.attrs["activation"]) for op in graph.ops]


def worst(graph: Graph, graph8: Int8Graph) -> dict[str, float]:
    """The largest error of each tensor that both have, in steps of its scale."""
    values, real = graph8.run(graph8.image(IMAGES)), graph.run(real_input())
    return {
        name: float(
            np.abs(graph8.dequantize(name, q) - real[name]).max() / graph8.scales[name].scale
        )
        for name, q in values.items()
    }


@cache
def resnet_graph() -> Graph:
    return graph_of(resnet(norm="batch"), "layer2")


def test_norms_and_activations_become_part_of_what_is_before_them() -> None:
    graph8 = eight(resnet_graph())
    assert kinds(graph8) == [
        ("conv2d", "stem.2", "relu"),
        ("conv2d", "layer1.0.relu1", "relu"),
        ("conv2d", "layer1.0.norm2", "none"),
        ("add", "layer1.0.relu2", "relu"),
        ("conv2d", "layer2.0.relu1", "relu"),
        ("conv2d", "layer2.0.norm2", "none"),
        ("conv2d", "layer2.0.shortcut.1", "none"),
        ("add", "layer2.0.relu2", "relu"),
        ("linear", "exits.layer2.linear", "none"),  # its pool, of single pixels, changes nothing
    ]
    assert (graph8.cut, graph8.logits) == ("layer2.0.relu2", "exits.layer2.linear")


def test_every_tensor_is_near_the_networks() -> None:
    graph = resnet_graph()
    errors = worst(graph, eight(graph))
    assert errors["input"] <= 0.5 + 1e-3
    assert max(errors.values()) <= 4, errors


def test_a_weight_that_is_off_is_seen() -> None:
    graph = resnet_graph()
    graph8 = eight(graph)
    spoilt = dict(graph8.weights)
    spoilt["layer2.0.conv2.weight"] = np.flip(spoilt["layer2.0.conv2.weight"], 1)
    assert max(worst(graph, replace(graph8, weights=spoilt)).values()) > 8


def test_zero_is_exact_and_what_was_seen_is_not_clipped() -> None:
    graph = resnet_graph()
    graph8 = eight(graph)
    real = graph.run(real_input())
    for name, scale in graph8.scales.items():
        assert -128 <= scale.zero_point <= 127
        low, high = (scale.scale * (q - scale.zero_point) for q in (-128, 127))
        slack = 0.51 * scale.scale  # of the zero point's rounding
        assert low - slack <= min(real[name].min(), 0.0)
        assert high + slack >= real[name].max()


def test_weights_are_symmetric_with_a_scale_for_each_output_channel() -> None:
    graph = resnet_graph()
    graph8 = eight(graph)
    weight = graph8.weights["layer2.0.conv1.weight"]
    assert weight.shape == (8, 3, 3, 4)
    assert np.abs(weight).reshape(8, -1).max(1).tolist() == [127] * 8
    linear = graph8.weights["exits.layer2.linear.weight"]
    assert np.abs(linear).max() == 127
    assert graph8.weight_scales["exits.layer2.linear.weight"].shape == (1,)
    real = graph.weights["exits.layer2.linear.weight"].reshape(10, 8, 4, 4)
    scale = graph8.weight_scales["exits.layer2.linear.weight"][0]
    assert np.abs(linear.reshape(10, 4, 4, 8) * scale - real.transpose(0, 2, 3, 1)).max() < scale


def test_pools_keep_their_inputs_scale_and_a_global_one_is_a_mean() -> None:
    model = vgg()
    model[7] = nn.BatchNorm2d(8)
    graph = graph_of(model, "10")  # the global pool
    graph8 = eight(graph)
    assert kinds(graph8) == [
        ("conv2d", "2", "relu"),
        ("conv2d", "4", "relu"),
        ("max_pool", "5", "none"),
        ("conv2d", "8", "relu"),
        ("avg_pool", "9", "none"),
        ("mean", "10", "none"),
        ("linear", "exits.10.linear", "none"),
    ]
    assert graph8.scales["5"] == graph8.scales["4"]
    assert graph8.scales["9"] == graph8.scales["8"] != graph8.scales["10"]
    assert max(worst(graph, graph8).values()) <= 4


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()])
def test_activations_and_norms_that_nothing_can_take_stand_alone(activation: nn.Module) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(4),
        nn.MaxPool2d(3, 1, 1),
        activation,
        nn.Conv2d(4, 4, 1),
    )
    graph = graph_of(model, "4")
    graph8 = eight(graph)
    name = type(activation).__name__.lower()
    assert kinds(graph8)[:5] == [
        ("conv2d", "0", "none"),
        ("max_pool", "1", "none"),
        ("conv2d", "2", "none"),
        ("max_pool", "3", "none"),
        ("relu", "4", name),
    ]
    assert graph8.depthwise(graph8.ops[2])
    assert (graph8.scales["4"] == graph8.scales["3"]) == (name == "relu6")
    assert max(worst(graph, graph8).values()) <= 3


def test_a_tensor_that_something_else_reads_keeps_its_activation_apart() -> None:
    graph = graph_of(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ReLU()), "0")
    assert kinds(eight(graph))[0] == ("conv2d", "0", "none")


def test_dead_channels_and_large_biases_overflow_nothing() -> None:
    graph = resnet_graph()
    weights = {name: value.copy() for name, value in graph.weights.items()}
    weights["stem.0.weight"][0] = 0
    weights["layer1.0.conv1.weight"][1] = 1e-12
    weights["layer1.0.norm1.bias"][1] = 5.0
    weights["layer1.0.conv2.weight"][:] = 0
    changed = graph.holding(weights)
    graph8 = eight(changed)
    assert max(worst(changed, graph8).values()) <= 4
    for op in graph8.ops:
        _, shifts = graph8.requant(op)
        assert (shifts <= 1).all(), op.name


def test_a_network_that_answers_nothing_is_zero() -> None:
    graph = resnet_graph()
    empty = graph.holding({n: np.zeros_like(v) for n, v in graph.weights.items()})
    graph8 = eight(empty)
    values = graph8.run(graph8.image(IMAGES))
    assert not graph8.dequantize(graph8.logits, values[graph8.logits]).any()


def test_exits_below_the_cut_are_left_out() -> None:
    network = Network(resnet(norm="batch"), SHAPE)
    graph = capture(segment_at(network, "layer2", upto=True), 10)
    assert not [op.name for op in eight(graph).ops if op.name.startswith("exits.layer1")]


def test_refuses_a_group_norm_by_name_and_says_what_to_do() -> None:
    with pytest.raises(ModelError, match=r'^stem\.1: 8 bits have no group_norm.* norm = "batch"'):
        eight(graph_of(resnet(norm="group"), "layer1"))


def test_refuses_what_it_does_not_know_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "silu", OPS["relu"])
    graph = resnet_graph()
    ops = tuple(replace(op, kind="silu") if op.name == "stem.2" else op for op in graph.ops)
    with pytest.raises(ModelError, match=r"^stem\.2: 8 bits have no silu; they have conv2d, lin"):
        eight(replace(graph, ops=ops))


def test_refuses_to_calibrate_with_nothing() -> None:
    with pytest.raises(ModelError, match="nothing to calibrate 8 bits with: give it images"):
        quantize(resnet_graph(), IMAGES[:0], SCALE, SHIFT)
