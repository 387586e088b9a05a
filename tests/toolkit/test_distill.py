"""What a client's shallower exits learn from its deepest, held to autograd tensor by tensor."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splitee.certainty import entropy
from splitee.client import Settings, unsure_of
from splitee.data import Images, draw_order
from splitee.exits import losses
from splitee.model import Network
from splitee.ops import Array
from splitee.train import train_batch
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

BATCH = 8
IMAGES = random_images(20)
FIRST = IMAGES[draw_order(20, 7, 0)[:BATCH]]  # what a client of seed 7 trains on first
MODES = {"local": (1.0, 0.0), "server": (0.0, 1.0), "both": (0.3, 0.7)}
HALF = Settings(0.05, 0.9, 1e-3, exit_weight=0.3, server_weight=0.7, distill=0.5)


def test_the_gradient_of_a_shallow_exit_is_what_is_worked_out_by_hand() -> None:
    # the softmax of (0, ln 3) is (1/4, 3/4), that of (ln 4, 0) is (4/5, 1/5)
    shallow = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64, requires_grad=True)
    deepest = torch.tensor([[math.log(4), 0.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0])
    for distill, target in ((0.0, 1.0), (0.25, 0.95), (1.0, 0.8)):
        both = torch.stack(losses([shallow, deepest], labels, distill)).sum()
        learnt, taught = torch.autograd.grad(both, [shallow, deepest])
        assert learnt.tolist()[0] == pytest.approx([0.25 - target, target - 0.25])
        # the deepest learns from the label alone, whatever the others learn from it
        assert taught.tolist()[0] == pytest.approx([-0.2, 0.2])


def of_exits(logits: list[Tensor], labels: Tensor, distill: float) -> Tensor:
    """The sum of all exits' losses, in the batch's mean, as it is defined."""
    *shallower, deepest = logits
    total = F.cross_entropy(deepest, labels)
    teacher = F.log_softmax(deepest.detach(), 1)
    for z in shallower:
        apart = F.kl_div(F.log_softmax(z, 1), teacher, reduction="batchmean", log_target=True)
        total = total + (1 - distill) * F.cross_entropy(z, labels) + distill * apart
    return total


def by_autograd(
    model: nn.Module, cut: str, batch: Images, settings: Settings, sent: Tensor | None = None
) -> dict[str, Array]:
    """Gradients of a client in float64, from the definition; sent: which samples go up."""
    segment = segment_at(Network(copy.deepcopy(model), SHAPE), cut, upto=True).double()
    tail = server_for(model, [cut], Settings(0.05)).tail.double()
    x, labels = network_input(batch.x).double(), torch.as_tensor(batch.y).long()
    points, logits = segment(x)
    chosen = torch.ones(len(labels), dtype=torch.bool) if sent is None else sent
    exits = of_exits(logits, labels, settings.distill)
    server = F.cross_entropy(tail(points[-1][chosen], cut), labels[chosen])
    gradients: dict[str, Array] = {}
    for name, parameter in segment.tensors().items():
        if isinstance(parameter, nn.Parameter):
            own, theirs = (
                torch.autograd.grad(loss, parameter, retain_graph=True, materialize_grads=True)[0]
                for loss in (exits, server)
            )
            mixed = settings.exit_weight * own + settings.server_weight * theirs
            gradients[name] = (own if name.startswith("exits.") else mixed).numpy()
    return gradients


@pytest.mark.parametrize("distill", [0.3, 1.0])
@pytest.mark.parametrize("capacity", [3, BATCH], ids=lambda c: f"capacity-{c}")
@pytest.mark.parametrize("mode", MODES)
def test_every_gradient_is_that_of_the_definition(mode: str, capacity: int, distill: float) -> None:
    model = resnet()
    settings = Settings(0.05, 0.0, 0.0, *MODES[mode], distill=distill)
    client = local_client(model, "layer2", settings, IMAGES, capacity=capacity, upto=True)
    server = server_for(model, ["layer2"], settings)
    for start in range(0, BATCH, capacity):
        part = client.forward(min(capacity, BATCH - start), BATCH)
        wants = settings.wants_gradient
        client.backward(
            server.learn(part.activations, part.labels, "layer2", BATCH, gradient=wants)
        )
    assert far(client.gradients(), by_autograd(model, "layer2", FIRST, settings)) == {}


def test_loss_and_hits_stay_those_of_the_exit_at_the_cut() -> None:
    model = resnet()
    client = local_client(model, "layer2", HALF, IMAGES, capacity=BATCH, upto=True)
    segment = segment_at(Network(copy.deepcopy(model), SHAPE), "layer2", upto=True).double()
    logits = segment(network_input(FIRST.x).double())[1][-1]
    labels = torch.as_tensor(FIRST.y).long()
    done = train_batch(client, server_for(model, ["layer2"], HALF), BATCH)
    assert done.exit_loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert done.exit_correct == int((logits.argmax(1) == labels).sum())


def test_who_teaches_is_the_exit_where_the_cut_is() -> None:
    model = resnet()
    for cut in ("stem", "layer1", "layer2"):
        moving = local_client(model, "layer2", HALF, IMAGES, capacity=BATCH, upto=True)
        moving.move(cut, upto=True)
        part, server = moving.forward(BATCH, BATCH), server_for(model, [cut], HALF)
        gradient = server.learn(part.activations, part.labels, cut, BATCH, gradient=True)
        moving.backward(gradient)
        assert far(moving.gradients(), by_autograd(model, cut, FIRST, HALF)) == {}


def test_an_exit_that_is_alone_learns_as_without() -> None:
    states = []
    for settings in (HALF, replace(HALF, distill=0.0)):
        client = local_client(resnet(), "layer2", settings, IMAGES, capacity=BATCH, upto=True)
        client.move("layer1", upto=False)
        server = server_for(resnet(), ["layer1"], settings)
        for _ in range(3):
            train_batch(client, server, BATCH)
        states.append(client.state())
    assert unequal(states[0].weights, states[1].weights) == []


def test_samples_that_are_not_sent_are_distilled_too() -> None:
    model = resnet()
    client = local_client(model, "layer2", HALF, IMAGES, capacity=BATCH, upto=True)
    _, logits = client.infer(FIRST.x)
    client.unsure = float(np.quantile(entropy(logits.numpy()), 0.5, method="lower"))
    part, server = client.forward(BATCH, BATCH), server_for(model, ["layer2"], HALF)
    sent = unsure_of(client.logits, client.unsure)
    assert len(part.labels) == BATCH // 2
    client.backward(
        server.learn(part.activations, part.labels, "layer2", BATCH // 2, gradient=True)
    )
    assert far(client.gradients(), by_autograd(model, "layer2", FIRST, HALF, sent)) == {}


def test_shallow_exits_come_to_answer_as_the_deepest_does() -> None:
    """With labels that say nothing: only what the deepest exit answers can be learnt."""
    settings = Settings(0.05, 0.9, distill=1.0)
    client = local_client(resnet(), "layer2", settings, IMAGES, capacity=20, upto=True)

    def apart() -> list[float]:
        x = network_input(IMAGES.x)
        with torch.no_grad():
            *shallower, deepest = (z.log_softmax(1) for z in client.segment(x)[1])
        return [
            float(F.kl_div(z, deepest, reduction="batchmean", log_target=True)) for z in shallower
        ]

    before = apart()
    for _ in range(60):
        client.forward(20, 20)
        client.backward(None)
        client.step()
    assert all(late < 0.5 * early for early, late in zip(before, apart(), strict=True))
