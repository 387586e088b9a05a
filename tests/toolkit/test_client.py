"""The client in this process: its state, its data order, what it tells and counts."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from splitee.client import LocalClient, Place, Settings, Stepped
from splitee.data import Images, draw_order
from splitee.model import Network
from splitee.server import Server
from splitee.state import AdamW
from splitee.train import train_batch
from toolkit.networks import (
    CLASSES,
    SHAPE,
    local_client,
    network_input,
    random_images,
    resnet,
    segment_at,
    server_for,
    unequal,
)

CUT = "layer2"
SETTINGS = Settings(0.05, momentum=0.9, weight_decay=1e-3)


def batches(client: LocalClient, server: Server, count: int, batch: int = 4) -> list[Any]:
    """What count batches say."""
    return [train_batch(client, server, batch) for _ in range(count)]


OPTIMIZERS = {
    "plain": Settings(0.05, 0.0, 1e-3, 0.5, 0.5),
    "momentum": Settings(0.05, 0.9, 1e-3, 0.5, 0.5),
    "adamw": Settings(0.01, 0.0, 1e-3, 0.5, 0.5, adamw=AdamW()),
}


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_client_goes_on_from_its_state_bit_for_bit(norm: str, settings: Settings) -> None:
    images = random_images(12)
    model = resnet(norm=norm)
    client = local_client(model, CUT, settings, images, capacity=4, upto=True)
    server = server_for(model, [CUT], settings)
    batches(client, server, 5)  # into the second epoch
    state, its_server = client.state(), copy.deepcopy(server)
    expected = batches(client, server, 4)

    stranger = local_client(resnet(norm=norm, seed=1), CUT, settings, images, capacity=4, upto=True)
    batches(stranger, server_for(model, [CUT], settings), 2)
    stranger.start(state, images)
    assert batches(stranger, its_server, 4) == expected
    assert unequal(stranger.state().weights, client.state().weights) == []
    assert unequal(stranger.state().momentum, client.state().momentum) == []
    assert stranger.state().place == client.state().place


def test_a_state_holds_copies_in_float32() -> None:
    images = random_images(8)
    client = local_client(resnet(norm="batch"), CUT, SETTINGS, images, capacity=4)
    server = server_for(resnet(norm="batch"), [CUT], SETTINGS)
    batches(client, server, 1)
    state, again = client.state(), client.state()
    batches(client, server, 1)
    assert unequal(state.weights, again.weights) == unequal(state.momentum, again.momentum) == []
    assert len(unequal(client.state().weights, state.weights)) == len(state.weights)
    assert {a.dtype for a in (*state.weights.values(), *state.momentum.values())} == {
        np.dtype(np.float32)
    }


def test_a_state_that_was_loaded_does_not_learn_with_its_client() -> None:
    images = random_images(8)
    client = local_client(resnet(), CUT, SETTINGS, images, capacity=4)
    server = server_for(resnet(), [CUT], SETTINGS)
    batches(client, server, 1)
    state, kept = client.state(), client.state()
    client.load_state(state)
    batches(client, server, 1)
    assert unequal(state.weights, kept.weights) == unequal(state.momentum, kept.momentum) == []


def test_there_is_a_momentum_for_every_parameter_or_none_at_all() -> None:
    images = random_images(8)
    client = local_client(resnet(), CUT, SETTINGS, images, capacity=4)
    assert list(client.state().momentum) == list(client.gradients())
    assert not any(m.any() for m in client.state().momentum.values())
    plain = local_client(resnet(), CUT, replace(SETTINGS, momentum=0.0), images, capacity=4)
    assert plain.state().momentum == {}


def test_loading_weights_keeps_momentum_and_place() -> None:
    images = random_images(8)
    client = local_client(resnet(), CUT, SETTINGS, images, capacity=4)
    batches(client, server_for(resnet(), [CUT], SETTINGS), 1)
    before = client.state()
    other = local_client(resnet(seed=1), CUT, SETTINGS, images, capacity=4).state()
    client.load_weights(other.weights)
    after = client.state()
    assert unequal(after.weights, other.weights) == []
    assert unequal(after.momentum, before.momentum) == []
    assert after.place == before.place == Place(8, 7, epoch=0, position=4, steps=1)


def test_a_state_is_loaded_without_the_gradients_of_a_batch_left_half_done() -> None:
    images = random_images(8)
    client = local_client(resnet(), CUT, SETTINGS, images, capacity=2)
    start = client.state()
    client.forward(2, 4)
    client.backward(None)
    assert any(g.any() for g in client.gradients().values())
    client.load_state(start)
    assert not any(g.any() for g in client.gradients().values())
    one = local_client(resnet(), CUT, SETTINGS, images, capacity=2)
    servers = [server_for(resnet(), [CUT], SETTINGS) for _ in range(2)]
    assert batches(client, servers[0], 2) == batches(one, servers[1], 2)


def test_samples_come_in_the_order_drawn_and_a_new_epoch_follows_the_last() -> None:
    images = Images(random_images(10).x, np.arange(10, dtype=np.uint8))
    client = local_client(resnet(), "stem", SETTINGS, images, capacity=4, seed=3)
    seen: list[int] = []
    for count in (4, 4, 2) * 3:
        seen += client.forward(count, count).labels.tolist()
        client.backward(None)
        client.step()
    assert seen == [int(i) for epoch in range(3) for i in draw_order(10, 3, epoch)]
    assert client.place == Place(10, 3, epoch=2, position=10, steps=9)


def test_a_part_ends_with_its_epoch() -> None:
    images = Images(random_images(5).x, np.arange(5, dtype=np.uint8))
    client = local_client(resnet(), "stem", SETTINGS, images, capacity=4)
    server = server_for(resnet(), ["stem"], SETTINGS)
    assert [d.samples for d in batches(client, server, 2, batch=4)] == [4, 4]
    assert client.place == Place(5, 7, epoch=1, position=3, steps=2)


def test_a_step_tells_of_the_exit_at_the_cut_before_the_step() -> None:
    model, images = resnet(), random_images(8)
    segment = segment_at(Network(copy.deepcopy(model), SHAPE), CUT, upto=True)
    batch = images[draw_order(8, 7, 0)]
    _, logits = segment(network_input(batch.x))
    labels = torch.as_tensor(batch.y).long()
    client = local_client(model, CUT, SETTINGS, images, capacity=3, upto=True)
    for count in (3, 3, 2):
        client.forward(count, 8)
        client.backward(None)
    stepped = client.step()
    assert stepped.loss == pytest.approx(F.cross_entropy(logits[-1], labels).item(), rel=1e-6)
    assert stepped.correct == int((logits[-1].argmax(1) == labels).sum())
    assert client.step() == Stepped(0.0, 0)


def test_bytes_are_counted_up_and_down() -> None:
    images = random_images(8)
    elements = 8 * 4 * 4  # layer2, float32; a label is one byte
    for weight, down in ((0.0, 0), (1.0, 4 * elements * 6)):
        settings = Settings(0.05, server_weight=weight)
        client = local_client(resnet(), CUT, settings, images, capacity=4)
        batches(client, server_for(resnet(), [CUT], settings), 1, batch=6)
        assert client.traffic.up == client.traffic.activations_up == 6 * (4 * elements + 1)
        assert client.traffic.down == down


def test_inference_uses_the_statistics_of_training_and_changes_nothing() -> None:
    images = random_images(8)
    model = resnet(norm="batch")
    client = local_client(model, CUT, SETTINGS, images, capacity=8)
    batches(client, server_for(model, [CUT], SETTINGS), 2)
    before = client.state()
    reference = copy.deepcopy(client.segment).eval()
    activations, logits = client.infer(images.x)
    points, answers = reference(network_input(images.x))
    assert torch.equal(activations, points[-1])
    assert torch.equal(logits, answers[-1])
    assert logits.shape == (8, CLASSES)
    assert unequal(client.state().weights, before.weights) == []
    assert client.state().place == before.place
    assert client.segment.training


def test_settings_may_be_replaced_between_batches() -> None:
    images = random_images(8)
    client = local_client(resnet(), CUT, SETTINGS, images, capacity=4)
    server = server_for(resnet(), [CUT], SETTINGS)
    batches(client, server, 1)
    before = client.state()
    client.settings = Settings(0.0)
    batches(client, server, 1)
    assert unequal(client.state().weights, before.weights) == []
    assert client.state().momentum == {}
