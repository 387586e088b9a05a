"""send = "unsure": only samples that the exit is unsure of reach the server."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splitee.assemble import Assembly, Board
from splitee.client import Client, LocalClient, Part, Settings, Stepped, unsure_of
from splitee.codec import Coding
from splitee.data import draw_order
from splitee.errors import FleetError
from splitee.fleet import parse
from splitee.model import Network, Tail
from splitee.ops import Array
from splitee.server import Server
from splitee.train import BatchDone, Event, train_batch, train_pass
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

# ---- the server's mean, by hand ----


PLAIN_SGD = Settings(1.0)


def one_weight() -> Server:
    """A server of two logits w x, whose weights are 0: every answer is (1/2, 1/2)."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(1, 2, bias=False))
    network = Network(model, (1, 1, 1))
    server = Server(Tail(network, [network.cut("0")]), PLAIN_SGD)
    server.load({"2.weight": torch.zeros(2, 1)})
    return server


@dataclass
class Scripted:
    """A client whose parts are written down: activations and labels of what is sent."""

    parts: list[tuple[Sequence[float], Sequence[int]]]
    capacity: int
    unsure: float | None = 0.5
    name: str = "scripted"
    cut: str = "0"
    settings: Settings = PLAIN_SGD
    returned: list[Tensor | None] = field(default_factory=list)
    steps: int = 0

    def forward(self, count: int, batch: int) -> Part:
        """The next part."""
        values, labels = self.parts[len(self.returned)]
        return Part(torch.tensor(values).reshape(-1, 1, 1, 1), torch.tensor(labels).long(), count)

    def backward(self, gradient: Tensor | None) -> None:
        """Keeps what came back."""
        self.returned.append(gradient)

    def step(self) -> Stepped:
        """Counts."""
        self.steps += 1
        return Stepped(1.0, 2)


def taught(client: Scripted, server: Server, batch: int) -> tuple[BatchDone, list[float]]:
    """What a batch comes to, and the server's weights behind it."""
    done = train_batch(cast(Client, client), server, batch)
    return done, server.tensors()["2.weight"].flatten().tolist()


def test_the_server_learns_from_the_mean_over_those_sent() -> None:
    # of (1, label 0) and (3, label 1), p = 1/2: dw0 = ((1/2 - 1) 1 + (1/2) 3) / 2 = 1/2 = -dw1
    client = Scripted([((1.0, 3.0), (0, 1))], capacity=4)
    done, weights = taught(client, one_weight(), 4)
    assert weights == [-0.5, 0.5]
    assert (done.samples, done.sent) == (4, 2)
    assert done.server_loss == pytest.approx(math.log(2))
    assert (done.exit_loss, done.exit_correct) == (1.0, 2)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_the_mean_of_a_batch_in_parts_is_taken_at_its_end(empty: int) -> None:
    parts: list[tuple[Sequence[float], Sequence[int]]] = [((1.0,), (0,)), ((3.0,), (1,))]
    parts.insert(empty, ((), ()))
    client = Scripted(parts, capacity=2)
    done, weights = taught(client, one_weight(), 6)
    assert weights == [-0.5, 0.5]
    assert (done.samples, done.sent) == (6, 2)
    assert done.server_loss == pytest.approx(math.log(2))
    assert client.returned == [None] * 3


def test_a_clip_is_that_of_the_mean() -> None:
    server = one_weight()
    server._clip = math.sqrt(0.5)  # the norm of (1/2, -1/2): of sums it were twice that
    client = Scripted([((1.0,), (0,)), ((3.0,), (1,))], capacity=1)
    _, weights = taught(client, server, 2)
    assert weights == pytest.approx([-0.5, 0.5], rel=1e-5)


def test_the_gradient_that_is_returned_is_that_of_the_mean() -> None:
    server = one_weight()
    server.load({"2.weight": torch.tensor([[0.0], [math.log(3.0)]])})
    wants = Settings(1.0, exit_weight=0.5, server_weight=0.5)
    client = Scripted([((1.0, 0.0), (0, 1))], capacity=4, settings=wants)
    taught(client, server, 4)
    (gradient,) = client.returned
    assert gradient is not None
    # p of x = 1 is (1/4, 3/4), of x = 0 (1/2, 1/2): dx = ln 3 (p1 - y1) / 2
    expected = [math.log(3) * 0.75 / 2, math.log(3) * -0.5 / 2]
    assert gradient.flatten().tolist() == pytest.approx(expected)


def test_where_nothing_is_sent_the_server_takes_no_step() -> None:
    server = one_weight()
    server._optimizer.param_groups[0]["momentum"] = 0.9
    taught(Scripted([((1.0, 3.0), (0, 1))], capacity=4), server, 4)
    weights, velocity = arrays(server.tensors()), arrays(server.momentum())
    client = Scripted([((), ()), ((), ())], capacity=2)
    done, _ = taught(client, server, 4)
    assert (done.sent, done.server_loss, client.steps) == (0, None, 1)
    assert unequal(arrays(server.tensors()), weights) == []
    assert unequal(arrays(server.momentum()), velocity) == []


def test_the_losses_of_a_pass_are_means_over_what_was_sent() -> None:
    images = random_images(24)
    client = local_client(resnet(), "layer1", BOTH, images, capacity=8)
    client.unsure = middle(client)
    events: list[Event] = []
    done = train_pass(client, server_for(resnet(), ["layer1"], BOTH), 1, [8, 8, 8], events.append)
    batches = [e for e in events if isinstance(e, BatchDone)]
    assert done.sent == sum(b.sent for b in batches)
    assert 0 < done.sent < done.samples == 24
    total = sum((b.server_loss or 0.0) * b.sent for b in batches)
    assert done.server_loss == pytest.approx(total / done.sent)
    client.unsure = 2.0
    none = train_pass(client, server_for(resnet(), ["layer1"], BOTH), 2, [8, 8, 8], events.append)
    assert (none.sent, none.server_loss) == (0, None)


# ---- a client in this process ----

BOTH = Settings(0.05, 0.9, 1e-3, exit_weight=0.3, server_weight=0.7)


def entropies(logits: Array) -> Array:
    """Normalised entropies, in numpy's float64."""
    e = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    found: Array = -(p * np.log(p)).sum(1) / math.log(logits.shape[1])
    return found


def middle(client: LocalClient) -> float:
    """An entropy between those of the client's shard."""
    _, logits = client.infer(client._shard.images.x)
    return float(np.median(entropies(logits.numpy())))


def test_unsure_is_what_the_exit_would_not_answer() -> None:
    logits = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, math.log(3.0)], [math.nan, 0.0]])
    # of (1/4, 3/4): (ln 4 / 4 + 3 / 4 ln 4 / 3) / ln 2 = 0.8113
    assert unsure_of(logits, 0.811).tolist() == [True, False, True, True]
    assert unsure_of(logits, 0.812).tolist() == [True, False, False, True]


def test_sends_what_its_exit_is_unsure_of_and_counts_what_that_takes() -> None:
    images = random_images(8)
    client, plain = (local_client(resnet(), "layer1", BOTH, images, capacity=8) for _ in range(2))
    threshold = client.unsure = middle(client)
    client.coding = Coding("int8", "int8")
    part, whole = client.forward(8, 8), plain.forward(8, 8)
    order = draw_order(8, 7, 0)
    _, logits = plain.infer(images.x[order])
    chosen = entropies(logits.numpy()) > threshold
    assert chosen.sum() == 4
    assert part.count == 8
    assert part.labels.tolist() == images.y[order][chosen].tolist()
    codec = client.coding.up(4 * 8 * 8)
    coded = codec.decode(codec.encode(whole.activations[chosen].numpy().reshape(4, -1)))
    np.testing.assert_array_equal(part.activations.numpy().reshape(4, -1), coded)
    # labels, logits, codes; zeros come down for what was not sent
    assert client.traffic.up == client.traffic.activations_up == 8 + 8 * 40 + 4 * codec.size
    client.backward(torch.zeros_like(part.activations))
    assert client.traffic.down == 8 * codec.size


@pytest.mark.parametrize("cut", ["stem", "layer2"])
def test_the_trunk_learns_from_all_at_its_exit_and_from_those_sent_at_the_server(cut: str) -> None:
    images = random_images(8)
    model = resnet()
    client = local_client(model, cut, BOTH, images, capacity=8)
    threshold = client.unsure = middle(client)
    server = server_for(model, [cut], BOTH)

    order = draw_order(8, 7, 0)
    x, labels = network_input(images.x[order]), torch.as_tensor(images.y[order]).long()
    head = client.segment.exits[0]
    stages = ("stem", "layer1", "layer2", "layer3")
    point = x
    for name in stages[: stages.index(cut) + 1]:
        point = getattr(model, name)(point)
    logits = head(point)
    chosen = torch.from_numpy(entropies(logits.detach().numpy()) > threshold)
    behind = point[chosen]
    for name in stages[stages.index(cut) + 1 :]:
        behind = getattr(model, name)(behind)
    server_loss = F.cross_entropy(model.fc(behind.mean((2, 3))), labels[chosen])
    exit_loss = F.cross_entropy(logits, labels)
    trunk = [p for n, p in model.named_parameters() if n in client.segment.tensors()]
    mixed = 0.3 * exit_loss + 0.7 * server_loss
    expected = {
        n: g.numpy()
        for n, g in zip(
            (n for n, _ in model.named_parameters() if n in client.segment.tensors()),
            torch.autograd.grad(mixed, trunk),
            strict=True,
        )
    }

    part = client.forward(8, 8)
    sent = len(part.labels)
    assert sent == 4
    gradient = server.learn(part.activations, part.labels, cut, sent, gradient=True)
    client.backward(gradient)
    found = {n: g for n, g in client.gradients().items() if n in expected}
    assert far(found, expected) == {}


def test_where_nothing_is_sent_a_client_learns_from_its_exit_alone() -> None:
    images = random_images(8)
    model = resnet()
    states = []
    for settings, unsure in ((BOTH, 2.0), (Settings(0.05, 0.9, 1e-3, exit_weight=0.3), None)):
        client = local_client(model, "layer1", settings, images, capacity=8)
        client.unsure = unsure
        train_batch(client, server_for(model, ["layer1"], settings), 8)
        states.append(client.state())
    assert unequal(dict(states[0].weights), dict(states[1].weights)) == []


@pytest.mark.parametrize("settings", [BOTH, Settings(0.05, 0.9)], ids=["both", "local"])
def test_where_everything_is_sent_nothing_is_other_than_usual(settings: Settings) -> None:
    images = random_images(8)
    found = []
    for unsure in (-1.0, None):
        client = local_client(resnet(), "layer1", settings, images, capacity=8)
        client.unsure = unsure
        server = server_for(resnet(), ["layer1"], settings)
        losses = [train_batch(client, server, 8).server_loss for _ in range(3)]
        found.append((losses, dict(client.state().weights) | arrays(server.tensors())))
    assert found[0][0] == found[1][0]
    assert unequal(found[0][1], found[1][1]) == []


def test_a_batch_in_parts_is_the_whole_batch() -> None:
    local = Settings(0.05, 0.9, 1e-3, clip=0.5)
    images = random_images(12)
    found = []
    for capacity in (12, 5):
        client = local_client(resnet(), "layer1", local, images, capacity=capacity)
        client.unsure = 0.99 * middle(client) + 0.01
        server = server_for(resnet(), ["layer1"], local)
        done = train_batch(client, server, 12)
        found.append((done, arrays(server.tensors())))
    (whole, theirs), (parts, ours) = found
    assert 0 < whole.sent == parts.sent < 12
    assert parts.server_loss == pytest.approx(whole.server_loss, rel=1e-5)
    assert far(ours, theirs) == {}


# ---- what is refused ----


@pytest.mark.parametrize(
    ("gradient", "capacity", "exit_weight", "refused"),
    [
        ("both", 8, 0.5, True),
        ("server", 1, 0.5, True),
        ("both", 16, 0.5, False),
        ("both", 8, 1.0, False),  # nothing of the server's is wanted
        ("local", 1, 0.5, False),
    ],
)
def test_a_returned_gradient_needs_the_whole_batch_at_once(
    gradient: str, capacity: int, exit_weight: float, refused: bool
) -> None:
    fleet = parse(
        f'name = "x"\ngradient = "{gradient}"\nexit_weight = {exit_weight}\n[model]\nwidth = 4\n'
        f'norm = "group"\n[[client]]\nname = "a"\nsend = "unsure"\ncapacity = {capacity}\n'
    )
    assembly = Assembly(fleet, lambda board: Board(False, None))
    if not refused:
        assert assembly.local(assembly.member("a")).unsure == 0.5
        return
    with pytest.raises(FleetError) as error:
        assembly.member("a")
    assert str(error.value) == (
        f'client "a": send = "unsure": with gradient = "{gradient}" the server returns the '
        "gradient of a mean over the samples sent, and so has to know how many a batch sends: "
        "take capacity = 16"
    )


@pytest.mark.parametrize(("network", "refused"), [("resnet18", True), ("resnet8", False)])
def test_a_single_sample_is_too_little_for_batch_norms_of_1x1_images(
    network: str, refused: bool
) -> None:
    fleet = parse(
        f'name = "x"\n[model]\nname = "{network}"\nwidth = 1\nnorm = "batch"\n'
        '[[client]]\nname = "a"\ncut = 2\nsend = "unsure"\n'
    )
    assembly = Assembly(fleet, lambda board: Board(False, None))
    if not refused:
        assembly.member("a")
        return
    with pytest.raises(FleetError) as error:
        assembly.member("a")
    assert str(error.value) == (
        'client "a": send = "unsure": of a single sample, layer4.0.norm1 sees one value a channel, '
        'and batch norm needs more: take norm = "group"'
    )
