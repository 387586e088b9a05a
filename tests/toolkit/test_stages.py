"""Stages and shallower cuts: of a graph, and of the segment that it was captured from."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitee.capture import capture
from splitee.graph import Graph
from splitee.model import Network, Segment
from toolkit.graphs import graphs
from toolkit.networks import CLASSES, SHAPE, resnet, segment_at

CUTS: tuple[str, ...] = ("stem", "layer1", "layer2")
EXITS = pytest.mark.parametrize("upto", [False, True], ids=["own", "upto"])


def whole(norm: str = "batch") -> Segment:
    """Up to layer2, with every exit."""
    return segment_at(Network(resnet(norm=norm), SHAPE), "layer2", upto=True)


graph = partial(capture, classes=CLASSES)


def test_a_stage_is_what_a_cut_adds_and_its_exit() -> None:
    stages = graph(whole()).stages
    assert [(s.cut, s.point, s.logits) for s in stages] == [
        ("stem", "stem.2", "exits.stem.linear"),
        ("layer1", "layer1.0.relu2", "exits.layer1.linear"),
        ("layer2", "layer2.0.relu2", "exits.layer2.linear"),
    ]
    for stage in stages:
        assert {op.name.split(".")[0] for op in stage.trunk} == {stage.cut}
        names = [op.name for op in stage.exit]
        assert names == [f"exits.{stage.cut}{part}" for part in ("", ".pool", ".linear")]


def test_joined_stages_are_all_operations_with_the_last_exit_apart() -> None:
    whole_graph = graph(whole())
    joined, last = whole_graph.joined, whole_graph.stages[-1]
    assert (joined.cut, joined.point, joined.logits, joined.exit) == (
        last.cut, last.point, last.logits, last.exit,
    )  # fmt: skip
    assert (*joined.trunk, *joined.exit) == whole_graph.ops


def test_weights_stand_in_the_order_of_use_stage_by_stage() -> None:
    places = list(graph(whole()).parameters)
    owners = [n.split(".")[0] if n[:5] != "exits" else "exit of " + n.split(".")[1] for n in places]
    assert list(dict.fromkeys(owners)) == [
        "stem", "exit of stem", "layer1", "exit of layer1", "layer2", "exit of layer2",
    ]  # fmt: skip
    assert owners == sorted(owners, key=list(dict.fromkeys(owners)).index)


@EXITS
@pytest.mark.parametrize("cut", CUTS)
def test_a_part_of_a_graph_is_what_is_captured_from_that_cut(cut: str, upto: bool) -> None:
    network = Network(resnet(), SHAPE)
    part = graph(segment_at(network, "layer2", upto=True)).at(cut, upto=upto)
    alone = graph(segment_at(network, cut, upto=upto))
    assert part.checksum() == alone.checksum()  # operations, names, shapes
    trunk = [n for n in part.weights if not n.startswith("exits.")]
    assert all(np.array_equal(part.weights[n], alone.weights[n]) for n in trunk)


@given(graphs(), st.data())
@settings(deadline=None)
def test_ranges_are_where_the_weights_of_a_part_lie(whole: Graph, data: st.DataObject) -> None:
    cut = data.draw(st.sampled_from([s.cut for s in whole.stages]))
    part = whole.at(cut, upto=data.draw(st.booleans()))
    vector = np.random.default_rng(0).standard_normal(whole.weight_size, np.float32)
    expected = {n: v for n, v in whole.unflatten(vector).items() if n in part.weights}
    ranges = whole.ranges(part.weights)
    values = np.concatenate([np.zeros(0, np.float32), *(vector[r] for r in ranges)])
    found = part.unflatten(values)
    assert list(found) == list(expected)
    assert all(np.array_equal(found[n], expected[n]) for n in found)
    for left, right in pairwise(ranges):
        assert left.stop < right.start  # neighbours are one range


@given(graphs())
@settings(deadline=None)
def test_with_all_exits_parameters_are_one_range(whole: Graph) -> None:
    for stage in whole.stages:
        ranges = whole.ranges(whole.at(stage.cut, upto=True).parameters)
        assert len(ranges) <= 1
        assert all(r.start == 0 for r in ranges)


def outputs(segment: Segment) -> list[torch.Tensor]:
    """The tensors at every exit of a batch, and the logits."""
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(2))
    points, logits = segment(x)
    return [*points, *logits]


@EXITS
@pytest.mark.parametrize("cut", CUTS)
def test_a_part_of_a_segment_computes_what_the_whole_does_there(cut: str, upto: bool) -> None:
    segment = whole()
    depth = CUTS.index(cut) + 1
    part = segment.at(cut, upto=upto)
    chosen = slice(0 if upto else depth - 1, depth)
    expected = outputs(copy.deepcopy(segment))
    found = outputs(part)
    assert (part.cut.name, part.exit_names) == (cut, CUTS[chosen])
    for mine, theirs in zip(found, [*expected[:3][chosen], *expected[3:][chosen]], strict=True):
        assert torch.equal(mine, theirs)


@EXITS
@pytest.mark.parametrize("cut", CUTS)
def test_a_part_of_a_segment_shares_its_tensors_and_ends_at_its_cut(cut: str, upto: bool) -> None:
    segment = whole()
    tensors, part = segment.tensors(), segment.at(cut, upto=upto).tensors()
    assert all(tensor is tensors[name] for name, tensor in part.items())
    reached = {n.split(".")[0] for n in part if not n.startswith("exits.")}
    assert reached == set(CUTS[: CUTS.index(cut) + 1])


def test_a_part_of_a_part_is_a_part() -> None:
    segment = whole()
    twice = segment.at("layer1", upto=True).at("stem", upto=True)
    assert list(twice.tensors()) == list(segment.at("stem", upto=True).tensors())


def test_a_part_leaves_the_modes_of_layers_alone() -> None:
    segment: Any = whole()
    norm = segment.trunk.get_submodule("stem.1")
    norm.eval()
    segment.at("stem", upto=True)
    assert not norm.training
    assert segment.training
