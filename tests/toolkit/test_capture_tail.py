"""The server's half as a graph: the same function as in PyTorch, from whichever cut."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from splitee.bottleneck import Bottleneck
from splitee.capture import capture_tail
from splitee.model import Network, Tail
from toolkit import networks

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet8": networks.resnet,
    "resnet18-batch": lambda: networks.resnet("resnet18", norm="batch"),
    "vgg": networks.vgg,
    "mobilenet": networks.MobileNet,
}


@pytest.mark.parametrize("first", [0, -1])
@pytest.mark.parametrize("model", MODELS)
def test_the_graph_of_the_servers_half_computes_what_pytorch_does(model: str, first: int) -> None:
    torch.manual_seed(2)
    network = Network(MODELS[model](), networks.SHAPE)
    cut = network.cuts[first]
    tail = Tail(network, network.cuts).eval()
    with torch.no_grad():
        for name, tensor in tail.tensors(cut.name).items():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
            if name.endswith("running_var"):
                tensor.abs_()
        x = torch.randn(3, *cut.shape)
        expected = tail(x, cut.name).numpy()
    graph = capture_tail(tail, cut, networks.CLASSES)
    assert graph.cut == graph.input
    assert set(graph.weights) == set(tail.tensors(cut.name))
    assert graph.shapes[graph.logits] == (networks.CLASSES,)
    found = graph.run(x.double().numpy())[graph.logits]
    assert not networks.far({"logits": found}, {"logits": expected})
    statistics = {n for n in graph.weights if n.endswith(("running_mean", "running_var"))}
    assert set(graph.statistics) == statistics


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_bottlenecks_mirror_comes_first(stride: int) -> None:
    torch.manual_seed(4)
    network = Network(networks.resnet(), networks.SHAPE)
    cut, bottleneck = network.cut(1), Bottleneck(2, stride)
    tail = Tail(network, [cut], {"one": bottleneck.mirror(cut.shape)}).eval()
    sent = torch.randn(3, *bottleneck.shape(cut.shape))
    graph = capture_tail(tail, cut, networks.CLASSES, "one")
    assert {"bottleneck.one.widen.weight", "bottleneck.one.widen.bias"} <= set(graph.parameters)
    found = graph.run(sent.double().numpy())[graph.logits]
    with torch.no_grad():
        expected = tail(sent, cut.name, "one").numpy()
    assert not networks.far({"logits": found}, {"logits": expected})
    assert not any("bottleneck" in n for n in capture_tail(tail, cut, 10, "two").weights)


def test_a_graph_holds_other_weights_by_name() -> None:
    network = Network(networks.resnet(norm="batch"), networks.SHAPE)
    cut = network.cut(1)
    graph = capture_tail(Tail(network, [cut]), cut, networks.CLASSES)
    doubled = {name: 2 * value for name, value in graph.weights.items()}
    held = graph.holding({**doubled, "of another": np.zeros(1)})
    assert not networks.unequal(held.weights, doubled)
    assert list(held.weights) == list(graph.weights)
