"""A network that is cut computes and learns exactly what the whole one does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splitee.model import Network, Tail, tensors_of
from toolkit.networks import (
    CLASSES,
    SHAPE,
    MobileNet,
    arrays,
    resnet,
    segment_at,
    unequal,
    vgg,
)

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet8-batch": partial(resnet, norm="batch"),
    "resnet8-group": partial(resnet, norm="group"),
    "resnet18-batch": partial(resnet, "resnet18", norm="batch", width=2),
    "resnet20-batch": partial(resnet, "resnet20", norm="batch", width=2),
    "vgg": vgg,
    "mobilenet": MobileNet,
}
# points that list_cuts does not list, by module path
FURTHER = {
    "resnet8-batch": ["stem.0", "stem.1", "pool", "flatten"],
    "vgg": ["0", "1", "3", "4", "6", "7", "8", "10", "11"],
    "mobilenet": ["features.0.0", "features.1.conv.0"],
}


def build(name: str) -> Any:
    """The network of that name, always with the same weights."""
    torch.manual_seed(5)
    return NETWORKS[name]().train()


def cuts_of(name: str, network: Network) -> list[str]:
    """Points where a network is cut here: those listed and the further ones."""
    return [*(c.name for c in network.cuts), *FURTHER.get(name, [])]


CUTS = [
    pytest.param(name, spec, id=f"{name}-{spec}")
    for name in NETWORKS
    for spec in cuts_of(name, Network(build(name), SHAPE))
]


def batch() -> tuple[Tensor, Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, *SHAPE, generator=generator)
    return x, torch.randint(0, CLASSES, (6,), generator=generator)


def whole(name: str) -> tuple[nn.Module, Tensor]:
    """The unsplit network after one backward pass in training, and its logits."""
    model = build(name)
    x, labels = batch()
    logits = model(x)
    torch.autograd.backward(F.cross_entropy(logits, labels))
    return model, logits


def gradients(model: nn.Module) -> dict[str, Any]:
    """The gradient of every parameter."""
    return arrays({n: p.grad for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize(("name", "spec"), CUTS)
def test_a_cut_network_computes_and_learns_bit_for_bit_what_the_whole_does(
    name: str, spec: str
) -> None:
    reference, expected = whole(name)
    model = build(name)
    network = Network(model, SHAPE)
    cut = network.cut(spec)
    x, labels = batch()

    (point,) = network.between(None, [cut])(x)
    sent = point.detach().requires_grad_()
    logits = Tail(network, [cut])(sent, cut.name)
    torch.autograd.backward(F.cross_entropy(logits, labels))
    torch.autograd.backward(point, sent.grad)

    assert torch.equal(logits, expected)
    assert len(gradients(model)) == len(list(model.parameters()))
    assert unequal(gradients(model), gradients(reference)) == []
    # running statistics and counters of batches
    buffers = (arrays(dict(m.named_buffers())) for m in (model, reference))
    assert unequal(*buffers) == []


@pytest.mark.parametrize("name", NETWORKS)
def test_the_halves_share_out_the_original_state_dict_keys(name: str) -> None:
    model = build(name)
    keys = model.state_dict()
    network = Network(model, SHAPE)
    for spec in cuts_of(name, network):
        cut = network.cut(spec)
        client = network.between(None, [cut]).state_dict()
        server = [stage.state_dict() for stage in Tail(network, [cut]).stages]
        assert sorted([*client, *(key for half in server for key in half)]) == sorted(keys), spec
        for half in (client, *server):  # shared, not copied
            assert all(half[key].data_ptr() == keys[key].data_ptr() for key in half), spec


@pytest.mark.parametrize("name", NETWORKS)
def test_one_tail_is_entered_at_every_cut(name: str) -> None:
    _, expected = whole(name)
    network = Network(build(name), SHAPE)
    tail = Tail(network, list(reversed(network.cuts)))
    for cut in network.cuts:
        (point,) = network.between(None, [cut])(batch()[0])
        assert torch.equal(tail(point, cut.name), expected), cut.name


def test_a_segment_returns_the_activations_and_logits_of_every_exit() -> None:
    model = build("resnet8-group")
    network = Network(model, SHAPE)
    segment = segment_at(network, "layer2", upto=True)
    x, _ = batch()
    points, logits = segment(x)
    by_hand = [
        model.stem(x),
        model.layer1(model.stem(x)),
        model.layer2(model.layer1(model.stem(x))),
    ]
    assert segment.exit_names == ("stem", "layer1", "layer2")
    assert all(torch.equal(p, b) for p, b in zip(points, by_hand, strict=True))
    weights = segment.tensors()
    for name, point, answer in zip(segment.exit_names, by_hand, logits, strict=True):
        linear = (weights[f"exits.{name}.linear.{role}"] for role in ("weight", "bias"))
        pooled = F.adaptive_avg_pool2d(point, 4).flatten(1)
        torch.testing.assert_close(answer, F.linear(pooled, *linear))


def test_a_segments_tensors_are_the_networks_and_its_exits_parameters_first() -> None:
    model = build("resnet8-batch")
    tensors = segment_at(Network(model, SHAPE), "layer1", upto=True).tensors()
    assert list(tensors) == [
        "stem.0.weight", "stem.1.weight", "stem.1.bias",
        "layer1.0.conv1.weight", "layer1.0.norm1.weight", "layer1.0.norm1.bias",
        "layer1.0.conv2.weight", "layer1.0.norm2.weight", "layer1.0.norm2.bias",
        "exits.stem.linear.weight", "exits.stem.linear.bias",
        "exits.layer1.linear.weight", "exits.layer1.linear.bias",
        "stem.1.running_mean", "stem.1.running_var",
        "layer1.0.norm1.running_mean", "layer1.0.norm1.running_var",
        "layer1.0.norm2.running_mean", "layer1.0.norm2.running_var",
    ]  # fmt: skip
    assert tensors["stem.0.weight"] is model.stem[0].weight


def test_a_tails_tensors_begin_behind_the_cut_that_is_asked_for() -> None:
    network = Network(build("resnet8-group"), SHAPE)
    tail = Tail(network, [network.cut("stem"), network.cut("layer3")])
    stages = {"layer1", "layer2", "layer3", "fc"}
    assert {n.split(".")[0] for n in tail.tensors()} == stages
    assert {n.split(".")[0] for n in tail.tensors("stem")} == stages
    assert set(tail.tensors("layer3")) == {"fc.weight", "fc.bias"}


def test_counters_of_batches_are_left_out_of_tensors() -> None:
    model = build("resnet8-batch")
    assert {"stem.1.num_batches_tracked"} < set(model.state_dict()) - set(tensors_of([("", model)]))
