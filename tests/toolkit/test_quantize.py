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
from splitee.int8 import Int8Graph, of_means
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
        if name in real  # what group norms are given is not the network's
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


# ---- group norms ----


def mixed_norms() -> nn.Module:
    """Group norms behind a convolution, behind a pool, and behind what something else reads too."""
    first = nn.Conv2d(1, 8, 3, padding=1, bias=False)
    with torch.no_grad():  # groups of very different size, which a norm does not care for
        first.weight[4:] *= 1000.0
    return nn.Sequential(
        first,
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.GroupNorm(4, 8, eps=0.05),
        nn.Conv2d(8, 8, 1),
        nn.GroupNorm(8, 8),
        nn.ReLU6(),
        nn.Conv2d(8, 4, 1),
    )


def test_a_group_norm_has_a_convolution_of_its_own_and_takes_its_activation() -> None:
    graph8 = eight(graph_of(mixed_norms(), "7"))
    assert kinds(graph8)[:7] == [
        ("conv2d", "1.centred", "none"),
        ("group_norm", "2", "relu"),
        ("max_pool", "3", "none"),
        ("conv2d", "4.centred", "none"),
        ("group_norm", "4", "none"),
        ("conv2d", "6.centred", "none"),
        ("group_norm", "7", "relu6"),
    ]
    assert graph8.depthwise(graph8.ops[3])
    assert all(graph8.scales[f"{name}.centred"].zero_point == 0 for name in "146")


class Preactivation(nn.Module):
    """A block whose norm has an input that is added again behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.GroupNorm(3, 6)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.after = nn.ReLU()
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.after(self.conv(self.relu(self.norm(x))) + x)
        return self.last(y)  # type: ignore[no-any-return]


def test_a_convolution_that_something_else_reads_keeps_its_values_in_front_of_a_norm() -> None:
    graph = graph_of(Preactivation(), "after")
    graph8 = eight(graph)
    assert [(op.kind, op.name, op.inputs) for op in graph8.ops][:3] == [
        ("conv2d", "stem", ("input",)),
        ("conv2d", "norm.centred", ("stem",)),
        ("group_norm", "relu", ("norm.centred",)),
    ]
    assert max(worst(graph, graph8).values()) <= 6


def norm_errors(graph: Graph, graph8: Int8Graph) -> dict[str, float]:
    """The root mean square of each norm's error, as a share of its values'."""
    values, real = graph8.run(graph8.image(IMAGES)), graph.run(real_input())
    found = {}
    for op in graph8.ops:
        if op.kind == "group_norm":
            error = graph8.dequantize(op.name, values[op.name]) - real[op.name]
            found[op.name] = float(np.sqrt((error**2).mean() / (real[op.name] ** 2).mean()))
    return found


@pytest.mark.parametrize("kind", ["resnet8", "mixed"])
def test_what_group_norms_make_is_near_the_networks(kind: str) -> None:
    model, cut = (resnet(norm="group"), "layer2") if kind == "resnet8" else (mixed_norms(), "7")
    graph = graph_of(model, cut)
    graph8 = eight(graph)
    errors = norm_errors(graph, graph8)
    assert len(errors) == len([op for op in graph.ops if op.kind == "group_norm"])
    assert max(errors.values()) <= 0.06, errors
    # each of what a norm has counts
    norm = graph8.ops[1]
    for role in ("factor", "shift"):
        name = norm.weights[role]
        other = replace(graph8, weights={**graph8.weights, name: 0.7 * graph8.weights[name]})
        assert norm_errors(graph, other)[norm.name] > 0.1, role
    means = replace(graph8.scales[of_means(norm.name)], scale=1e-6)
    scales = {**graph8.scales, of_means(norm.name): means}
    assert norm_errors(graph, replace(graph8, scales=scales))[norm.name] > errors[norm.name]


def test_a_group_norm_of_what_is_always_the_same_is_its_bias() -> None:
    graph = graph_of(resnet(norm="group"), "layer1")
    weights = {name: value.copy() for name, value in graph.weights.items()}
    weights["layer1.0.conv2.weight"][:] = 0
    changed = graph.holding(weights)
    assert max(norm_errors(changed, eight(changed)).values()) <= 0.06


def test_an_image_that_a_group_sees_nothing_in_clips_alone() -> None:
    graph = graph_of(resnet(norm="group"), "layer1")
    images = IMAGES.copy()
    images[0] = 128
    graph8 = quantize(graph, images, SCALE, SHIFT)
    assert max(norm_errors(graph, graph8).values()) <= 0.06


def test_refuses_a_group_norm_of_an_image_that_is_too_large() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.GroupNorm(1, 2), nn.ReLU())
    network = Network(model, (1, 260, 260))
    graph = capture(segment_at(network, "1"), 10)
    images = np.zeros((1, 1, 260, 260), np.uint8)
    with pytest.raises(ModelError, match=r"^1: .* at most 65536 pixels"):
        quantize(graph, images, SCALE, SHIFT)


def test_exits_below_the_cut_are_left_out() -> None:
    network = Network(resnet(norm="batch"), SHAPE)
    graph = capture(segment_at(network, "layer2", upto=True), 10)
    assert not [op.name for op in eight(graph).ops if op.name.startswith("exits.layer1")]


def test_refuses_what_it_does_not_know_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "silu", OPS["relu"])
    graph = resnet_graph()
    ops = tuple(replace(op, kind="silu") if op.name == "stem.2" else op for op in graph.ops)
    with pytest.raises(ModelError, match=r"^stem\.2: 8 bits have no silu; they have conv2d, lin"):
        eight(replace(graph, ops=ops))


def test_refuses_to_calibrate_with_nothing() -> None:
    with pytest.raises(ModelError, match="nothing to calibrate 8 bits with: give it images"):
        quantize(resnet_graph(), IMAGES[:0], SCALE, SHIFT)
