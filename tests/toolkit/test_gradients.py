"""What trunk, exits and server learn from in each mode, held to autograd tensor by tensor."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from splitee.client import Settings, trunk_weights
from splitee.data import Images, draw_order
from splitee.model import Network
from splitee.ops import Array
from toolkit.networks import (
    SHAPE,
    arrays,
    far,
    local_client,
    network_input,
    random_images,
    resnet,
    segment_at,
    server_for,
)

CUT = "layer2"
MODES = {
    "local": (1.0, 0.0),
    "server": (0.0, 1.0),
    "both": (0.3, 0.7),
}


def by_autograd(
    model: nn.Module, batch: Images, weights: tuple[float, float], *, upto: bool
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Gradients of client and server in float64, from the definition.

    The trunk learns from exit_weight x the exits' losses + server_weight x the server's, the exits
    from their own losses in full, the server from its own.
    """
    exit_weight, server_weight = weights
    segment = segment_at(Network(copy.deepcopy(model), SHAPE), CUT, upto=upto).double()
    tail = server_for(model, [CUT], Settings(0.05)).tail.double()
    x, labels = network_input(batch.x).double(), torch.as_tensor(batch.y).long()

    points, logits = segment(x)
    exits = torch.stack([F.cross_entropy(z, labels) for z in logits]).sum()
    server = F.cross_entropy(tail(points[-1], CUT), labels)

    parameters = {n: t for n, t in segment.tensors().items() if isinstance(t, nn.Parameter)}
    client: dict[str, Array] = {}
    for name, parameter in parameters.items():
        own, theirs = (
            torch.autograd.grad(loss, parameter, retain_graph=True, materialize_grads=True)[0]
            for loss in (exits, server)
        )
        mixed = own if name.startswith("exits.") else exit_weight * own + server_weight * theirs
        client[name] = mixed.numpy()
    behind = dict(tail.tensors())
    grads = torch.autograd.grad(server, list(behind.values()))
    return client, arrays(dict(zip(behind, grads, strict=True)))


@pytest.mark.parametrize("capacity", [1, 3, 8], ids=lambda c: f"capacity-{c}")
@pytest.mark.parametrize("exits", ["own", "upto"])
@pytest.mark.parametrize("mode", MODES)
def test_every_gradient_is_what_the_mode_says(mode: str, exits: str, capacity: int) -> None:
    model, images = resnet(), random_images(20)
    upto = exits == "upto"
    settings = Settings(0.05, 0.0, 0.0, *MODES[mode])
    client = local_client(model, CUT, settings, images, capacity=capacity, upto=upto)
    server = server_for(model, [CUT], settings)
    for start in range(0, 8, capacity):
        part = client.forward(min(capacity, 8 - start), 8)
        client.backward(
            server.learn(part.activations, part.labels, CUT, 8, gradient=settings.wants_gradient)
        )
    expected_client, expected_server = by_autograd(
        model, images[draw_order(20, 7, 0)[:8]], MODES[mode], upto=upto
    )
    assert far(client.gradients(), expected_client) == {}
    found = {n: t.grad for n, t in server.tensors().items() if t.grad is not None}
    assert far(arrays(found), expected_server) == {}


def test_the_modes_weigh_exits_and_server() -> None:
    assert trunk_weights("local", 0.3) == (1.0, 0.0)
    assert trunk_weights("server", 0.3) == (0.0, 1.0)
    assert trunk_weights("both", 0.3) == (0.3, 0.7)
    assert trunk_weights("both") == (0.5, 0.5)
    assert not Settings(0.1).wants_gradient
    assert Settings(0.1, server_weight=0.1).wants_gradient


def test_both_with_an_exit_weight_of_1_or_0_is_local_or_server() -> None:
    for weight, mode in ((1.0, "local"), (0.0, "server")):
        assert trunk_weights("both", weight) == trunk_weights(mode)
