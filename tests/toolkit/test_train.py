"""The loop: a split network trains as the whole one; passes and rounds add up."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from splitee.client import Client, Settings
from splitee.data import Images, draw_order
from splitee.server import Server
from splitee.state import Place
from splitee.train import (
    BatchDone,
    Event,
    RoundDone,
    batches,
    fit,
    train_batch,
    train_pass,
)
from toolkit.networks import (
    arrays,
    far,
    local_client,
    network_input,
    random_images,
    resnet,
    server_for,
    unequal,
)

RETURNED = Settings(0.05, 0.9, 1e-3, exit_weight=0.0, server_weight=1.0)  # gradient = "server"


def unsplit(model: nn.Module, images: Images, batches: list[list[int]]) -> list[float]:
    """Losses of the whole network under torch's SGD, over batches of samples."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    losses = []
    for places in batches:
        labels = torch.as_tensor(images.y[places]).long()
        loss = F.cross_entropy(model(network_input(images.x[places])), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def in_batches(samples: int, batch: int, epochs: int, seed: int = 7) -> list[list[int]]:
    """The samples of each batch; the last of an epoch may be smaller."""
    orders = [draw_order(samples, seed, epoch).tolist() for epoch in range(epochs)]
    return [order[i : i + batch] for order in orders for i in range(0, samples, batch)]


@pytest.mark.parametrize(
    ("norm", "cut", "capacity"),
    [
        ("group", "stem", 8),
        ("group", "layer2", 8),
        ("group", "layer2", 1),
        ("group", "layer3", 3),
        ("batch", "layer1", 8),
        ("batch", "layer3", 8),
    ],
)
def test_with_returned_gradients_the_halves_train_as_the_unsplit_network(
    norm: str, cut: str, capacity: int
) -> None:
    images = random_images(36)  # five batches an epoch, the last of four
    batches = in_batches(36, 8, epochs=4)
    model = resnet(norm=norm)
    whole = copy.deepcopy(model).train()
    expected = unsplit(whole, images, batches)

    client = local_client(model, cut, RETURNED, images, capacity=capacity)
    server = server_for(model, [cut], RETURNED)
    losses = [train_batch(client, server, len(places)).server_loss for places in batches]
    assert len(losses) == 20
    assert losses == pytest.approx(expected, rel=1e-5)
    halves = {n: t for n, t in client.segment.tensors().items() if not n.startswith("exits.")}
    both = arrays(halves | server.tensors())
    assert far(both, {n: a for n, a in arrays(whole.state_dict()).items() if n in both}, 1e-4) == {}
    assert set(both) == {n for n in whole.state_dict() if "num_batches" not in n}


def test_batches_end_where_an_epoch_does() -> None:
    fresh, inside = Place(10, seed=1), Place(10, seed=1, position=4)
    assert batches(fresh, 4) == [4, 4, 2]
    assert batches(Place(10, seed=1, position=10), 4) == [4, 4, 2]  # the next epoch's
    assert batches(inside, 4) == [4, 2]  # what is left of it
    assert batches(inside, 4, steps=1) == [4]
    assert batches(inside, 4, steps=4) == [4, 2, 4, 4]
    assert batches(Place(3, seed=1), 8, steps=2) == [3, 3]


def test_a_pass_uses_every_sample_once_and_its_last_batch_may_be_smaller() -> None:
    images = random_images(10)
    client = local_client(resnet(), "layer1", RETURNED, images, capacity=3)
    server = server_for(resnet(), ["layer1"], RETURNED)
    events: list[Event] = []
    done = train_pass(client, server, 2, [4, 4, 2], events.append)
    batches = [e for e in events if isinstance(e, BatchDone)]
    assert [b.samples for b in batches] == [4, 4, 2]
    assert (done.client, done.round, done.samples) == ("one", 2, 10)
    assert (client.place.position, client.place.steps) == (10, 3)
    assert done.state.place == client.place
    for key in ("exit_loss", "server_loss"):  # means over samples, not over batches
        first, second, third = (getattr(b, key) for b in batches)
        assert getattr(done, key) == pytest.approx((4 * first + 4 * second + 2 * third) / 10)
    assert done.exit_accuracy == sum(b.exit_correct for b in batches) / 10
    assert done.bytes_up == 10 * (4 * 4 * 8 * 8 + 1)
    assert done.bytes_down == 10 * (4 * 4 * 8 * 8)
    again = train_pass(client, server, 3, [4, 4, 2], events.append)
    assert again.bytes_up == done.bytes_up  # of this pass, not so far
    assert client.place.epoch == 1


def test_the_losses_of_a_smaller_batch_are_means_over_it() -> None:
    images = random_images(10)
    places = draw_order(10, 7, 0)[:2].tolist()
    expected = unsplit(copy.deepcopy(resnet()), images, [places])
    client = local_client(resnet(), "layer1", RETURNED, images, capacity=1)
    done = train_batch(client, server_for(resnet(), ["layer1"], RETURNED), 2)
    assert done.server_loss == pytest.approx(expected[0], rel=1e-5)


def test_the_server_forgets_a_batch_that_is_discarded() -> None:
    images = random_images(8)
    client = local_client(resnet(), "layer1", RETURNED, images, capacity=4)
    servers = [server_for(resnet(), ["layer1"], RETURNED) for _ in range(2)]
    part = client.forward(4, 4)
    servers[0].learn(part.activations * 2, part.labels, "layer1", 4, gradient=False)
    servers[0].discard()
    returned = [s.learn(part.activations, part.labels, "layer1", 4, gradient=True) for s in servers]
    first, second = (g for g in returned if g is not None)
    assert torch.equal(first, second)
    assert servers[0].step() == servers[1].step()
    assert unequal(*(arrays(s.tensors()) for s in servers)) == []


def test_the_server_returns_no_gradient_where_none_is_wanted() -> None:
    client = local_client(resnet(), "layer1", RETURNED, random_images(4), capacity=4)
    part = client.forward(4, 4)
    server = server_for(resnet(), ["layer1"], RETURNED)
    assert server.learn(part.activations, part.labels, "layer1", 4, gradient=False) is None
    assert not part.activations.requires_grad


def test_a_servers_momentum_is_that_of_the_stages_that_learnt() -> None:
    client = local_client(resnet(), "layer3", RETURNED, random_images(8), capacity=4)
    server = server_for(resnet(), ["stem", "layer3"], RETURNED)
    assert server.momentum() == {}
    train_batch(client, server, 4)
    assert set(server.momentum()) == {"fc.weight", "fc.bias"}


class Rounds:
    """A strategy whose clients leave after the second round."""

    def __init__(self) -> None:
        client: Client = local_client(resnet(), "stem", RETURNED, random_images(4), capacity=4)
        self.clients = [client]

    def server(self, client: str) -> Server:
        """Not asked for."""
        raise AssertionError(client)

    def round(self, number: int) -> Iterator[Event]:
        """Nothing but its end."""
        if number == 2:
            self.clients = []
        yield RoundDone(number, {})


def test_fit_runs_rounds_until_the_last_or_until_no_client_is_left() -> None:
    assert [e.round for e in fit(Rounds(), 1) if isinstance(e, RoundDone)] == [1]
    assert [e.round for e in fit(Rounds(), 9) if isinstance(e, RoundDone)] == [1, 2]
    assert [e.round for e in fit(Rounds(), 4, first=3) if isinstance(e, RoundDone)] == [3, 4]
    assert list(fit(Rounds(), 2, first=3)) == []
