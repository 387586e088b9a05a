"""What a graph knows of itself: cost, checksum, weights as one vector, what has to learn."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from splitee.capture import capture
from splitee.graph import Graph
from splitee.model import Network
from toolkit.networks import CLASSES, SHAPE, resnet, segment_at


def graph_at(cut: str, *, upto: bool = False, classes: int = CLASSES, **network: Any) -> Graph:
    """The graph of a narrow resnet8 up to a cut."""
    return capture(segment_at(Network(resnet(**network), SHAPE), cut, upto=upto), classes)


# resnet8 of width 4 on 1x8x8 images, multiply-accumulates of one sample
STEM = 4 * 8 * 8 * (1 * 3 * 3)  # outputs times what each sums: 2,304
LAYER1 = 2 * 4 * 8 * 8 * (4 * 3 * 3)  # two convolutions: 18,432
LAYER2 = 8 * 4 * 4 * (4 * 3 * 3) + 8 * 4 * 4 * (8 * 3 * 3) + 8 * 4 * 4 * 4  # 4,608 + 9,216 + 512
EXITS = {"stem": 4 * 16 * 10, "layer1": 4 * 16 * 10, "layer2": 8 * 16 * 10}  # a 4x4 grid


@pytest.mark.parametrize(
    ("cut", "upto", "forward", "backward"),
    [
        # the image needs no gradient: the stem costs its weights' gradient only, all others twice
        ("stem", False, STEM + EXITS["stem"], STEM + 2 * EXITS["stem"]),
        ("layer1", False, 21_376, 40_448),
        ("layer2", False, 36_352, 70_400),
        (
            "layer2",
            True,
            STEM + LAYER1 + LAYER2 + sum(EXITS.values()),
            STEM + 2 * (LAYER1 + LAYER2 + sum(EXITS.values())),
        ),
    ],
)
def test_the_cost_is_what_pencil_and_paper_say(
    cut: str, upto: bool, forward: int, backward: int
) -> None:
    assert graph_at(cut, upto=upto).macs() == (forward, backward)


def test_the_checksum_does_not_change_with_the_values_of_weights() -> None:
    for norm in ("group", "batch"):
        first, second = (graph_at("layer2", norm=norm, seed=seed) for seed in (1, 2))
        assert not np.array_equal(first.weights["stem.0.weight"], second.weights["stem.0.weight"])
        assert first.checksum(capacity=4) == second.checksum(capacity=4)


def test_the_checksum_changes_with_structure_and_build_settings() -> None:
    graph = graph_at("layer1")
    first, *others = graph.ops
    longer = dataclasses.replace(first, attrs={**first.attrs, "stride": [2, 2]})
    different = {
        "as it is": graph.checksum(capacity=4),
        "capacity": graph.checksum(capacity=8),
        "no capacity": graph.checksum(),
        "a further setting": graph.checksum(capacity=4, momentum=1),
        "another cut": graph_at("layer2").checksum(capacity=4),
        "further exits": graph_at("layer1", upto=True).checksum(capacity=4),
        "width": graph_at("layer1", width=8).checksum(capacity=4),
        "norm": graph_at("layer1", norm="batch").checksum(capacity=4),
        "classes": graph_at("layer1", classes=CLASSES + 1).checksum(capacity=4),
        "an attribute": dataclasses.replace(graph, ops=(longer, *others)).checksum(capacity=4),
    }
    assert len(set(different.values())) == len(different), different
    assert all(0 <= checksum < 2**32 for checksum in different.values())


def test_weights_lie_in_one_vector_in_the_order_of_the_state() -> None:
    graph = graph_at("stem", norm="batch")
    assert {name: array.size for name, array in graph.weights.items()} == {
        "stem.0.weight": 36, "stem.1.weight": 4, "stem.1.bias": 4,
        "exits.stem.linear.weight": 640, "exits.stem.linear.bias": 10,
        "stem.1.running_mean": 4, "stem.1.running_var": 4,
    }  # fmt: skip
    assert (graph.parameter_size, graph.weight_size) == (694, 702)
    values = {name: np.full(a.shape, i) for i, (name, a) in enumerate(graph.weights.items())}
    vector = graph.flatten(values)
    assert vector.dtype == np.float32
    assert (
        vector.tolist() == [0] * 36 + [1] * 4 + [2] * 4 + [3] * 640 + [4] * 10 + [5] * 4 + [6] * 4
    )
    assert graph.flatten_parameters(values).tolist() == vector[:694].tolist()


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_vector_becomes_the_same_weights_again(norm: str) -> None:
    graph = graph_at("layer2", upto=True, norm=norm)
    vector = np.random.default_rng(0).standard_normal(graph.weight_size, np.float32)
    weights = graph.unflatten(vector)
    assert {n: a.shape for n, a in weights.items()} == {
        n: a.shape for n, a in graph.weights.items()
    }
    assert np.array_equal(graph.flatten(weights), vector)
    parameters = graph.unflatten_parameters(vector[: graph.parameter_size])
    assert list(parameters) == list(graph.parameters)
    assert np.array_equal(graph.flatten_parameters(parameters), vector[: graph.parameter_size])


def test_unflattened_weights_do_not_change_with_the_vector() -> None:
    graph = graph_at("stem")
    vector = np.zeros(graph.weight_size, np.float32)
    weights = graph.unflatten(vector)
    vector += 1
    assert not any(array.any() for array in weights.values())


def test_only_the_input_needs_no_gradient_where_every_layer_learns() -> None:
    graph = graph_at("layer1")
    assert [name for name in graph.shapes if not graph.needs_gradient(name)] == ["input"]
