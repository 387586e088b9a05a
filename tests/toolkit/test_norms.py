"""Frozen batch norm: fixed during a batch, following once after the step, parts or no parts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from splitee.client import LocalClient, Settings, State
from splitee.model import Network
from splitee.norms import FrozenBatchNorm2d, freeze, frozen_norms
from splitee.ops import Array
from splitee.train import train_batch
from toolkit.layers import randomise
from toolkit.networks import (
    SHAPE,
    far,
    local_client,
    network_input,
    random_images,
    resnet,
    segment_at,
    server_for,
    unequal,
)

CUT = "layer2"
SETTINGS = Settings(0.05, momentum=0.9, weight_decay=1e-3, exit_weight=0.5, server_weight=0.5)


def norm() -> nn.BatchNorm2d:
    """A batch norm with weights and statistics of its own."""
    layer = nn.BatchNorm2d(3, eps=1e-3, momentum=0.3)
    randomise(layer)
    return layer


def statistics(layer: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of its running mean and variance."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean.clone(), layer.running_var.clone()


def batch(count: int, seed: int = 0) -> torch.Tensor:
    """Images of 3 channels whose means and spreads differ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 4, 5, generator=generator)
    return (
        x * torch.tensor([1.0, 2.0, 0.5])[:, None, None]
        + torch.tensor([0.0, 3.0, -1.0])[:, None, None]
    )


def client(capacity: int, *, seed: int = 0) -> LocalClient:
    """A client whose batch norms are frozen."""
    return local_client(
        randomise(resnet(norm="batch", seed=seed)), CUT, SETTINGS, random_images(20),
        capacity=capacity, upto=True, frozen=True,
    )  # fmt: skip


def test_training_gives_what_torchs_evaluation_gives_gradients_included() -> None:
    reference = norm().eval()
    frozen = FrozenBatchNorm2d.of(copy.deepcopy(reference)).train()
    x, wanted = (batch(6).requires_grad_() for _ in range(2))
    up = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(3))
    torch.autograd.backward(frozen(x), up)
    torch.autograd.backward(reference(wanted), up)
    assert torch.equal(frozen(x), reference(wanted))
    assert x.grad is not None
    assert wanted.grad is not None
    assert torch.equal(x.grad, wanted.grad)
    for mine, theirs in zip(frozen.parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("parts", [(8,), (3, 5), (1,) * 8], ids=str)
def test_statistics_follow_those_of_all_parts_as_torchs_follow_the_batch(
    parts: tuple[int, ...],
) -> None:
    reference = norm().double().train()
    frozen = FrozenBatchNorm2d.of(norm()).train()
    before = statistics(frozen)
    x = batch(8)
    for part in torch.split(x, list(parts)):
        frozen(part)
    assert all(map(torch.equal, statistics(frozen), before))  # fixed until the step
    frozen.follow()
    reference(x.double())
    for mine, theirs in zip(statistics(frozen), statistics(reference), strict=True):
        torch.testing.assert_close(mine.double(), theirs)


def test_a_single_element_moves_the_mean_and_not_the_variance() -> None:
    frozen = FrozenBatchNorm2d(1, momentum=0.25).train()
    frozen(torch.full((1, 1, 1, 1), 8.0))
    frozen.follow()
    assert [value.item() for value in statistics(frozen)] == [2.0, 1.0]


def test_nothing_measured_moves_nothing() -> None:
    frozen = FrozenBatchNorm2d.of(norm())
    before = {n: t.clone() for n, t in frozen.state_dict().items()}
    frozen.follow()  # nothing passed
    frozen.train()(batch(4))
    frozen.forget()
    frozen.follow()  # forgotten
    frozen.eval()(batch(4))
    frozen.follow()  # images are answered, nothing is learnt from them
    assert all(torch.equal(t, before[n]) for n, t in frozen.state_dict().items())


def test_freezing_keeps_names_order_and_the_very_tensors() -> None:
    segment = segment_at(Network(resnet(norm="batch"), SHAPE), CUT, upto=True)
    before = segment.tensors()
    freeze(segment)
    after = segment.tensors()
    assert list(after) == list(before)
    assert all(after[n] is before[n] for n in before)
    assert len(frozen_norms(segment)) == 6  # the stem's, two in layer1, three in layer2
    assert not any(type(m) is nn.BatchNorm2d for m in segment.modules())


def trained(capacity: int) -> tuple[dict[str, Array], State]:
    """Gradients of a batch of 8 in parts of the capacity, and the state after its step."""
    one = client(capacity)
    for count in [capacity] * (8 // capacity) + [8 % capacity] * (8 % capacity > 0):
        sent = one.forward(count, 8).activations
        one.backward(sent.sign() / 8)  # any gradient that is each sample's own
    gradients = one.gradients()
    one.step()
    return gradients, one.state()


@pytest.mark.parametrize("capacity", [1, 3])
def test_a_batch_in_parts_is_the_whole_batch(capacity: int) -> None:
    gradients, state = trained(capacity)
    whole_gradients, whole = trained(8)
    assert far(gradients, whole_gradients) == {}
    assert far(dict(state.weights), dict(whole.weights)) == {}
    assert far(dict(state.momentum), dict(whole.momentum)) == {}


def test_running_statistics_follow_what_came_to_each_norm() -> None:
    one = client(8)
    before = one.state().weights
    segment = copy.deepcopy(one.segment).double().eval()
    inputs: dict[str, torch.Tensor] = {}
    for name, layer in segment.trunk.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda _, x, y, name=name: inputs.update({name: x[0]}))
    segment(network_input(one.upcoming(8).x).double())
    one.forward(8, 8)
    one.backward(None)
    one.step()
    after = one.state().weights
    assert len(inputs) == 6
    for name, x in inputs.items():
        for statistic, measured in (("mean", x.mean((0, 2, 3))), ("var", x.var((0, 2, 3)))):
            key = f"{name}.running_{statistic}"
            expected = 0.9 * before[key] + 0.1 * measured.detach().numpy()
            np.testing.assert_allclose(after[key], expected, rtol=1e-5, atol=1e-6, err_msg=key)


def test_answering_images_between_two_parts_disturbs_nothing() -> None:
    states = []
    for asked in (False, True):
        one = client(5)
        for count in (5, 3):
            one.forward(count, 8)
            one.backward(None)
            if asked:
                one.infer(random_images(5, seed=9).x)
        one.step()
        states.append(one.state().weights)
    assert unequal(*map(dict, states)) == []


def test_a_batch_left_half_done_leaves_nothing() -> None:
    one, other = client(4), client(4)
    start = one.state()
    one.forward(4, 8)
    one.backward(None)
    one.load_state(start)
    server = server_for(resnet(norm="batch"), [CUT], SETTINGS)
    assert train_batch(one, copy.deepcopy(server), 8) == train_batch(other, server, 8)
    assert unequal(dict(one.state().weights), dict(other.state().weights)) == []


def test_it_goes_on_from_a_state_bit_for_bit() -> None:
    one, stranger = client(3), client(3, seed=1)
    server = server_for(resnet(norm="batch"), [CUT], SETTINGS)
    for _ in range(3):
        train_batch(one, server, 8)
    stranger.start(one.state(), random_images(20))
    its_server = copy.deepcopy(server)
    assert train_batch(stranger, its_server, 8) == train_batch(one, server, 8)
    assert unequal(dict(stranger.state().weights), dict(one.state().weights)) == []
