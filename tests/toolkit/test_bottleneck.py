"""A learned bottleneck at a cut: both halves learn as one module, and stay a client's own."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splitee.assemble import Assembly, Board
from splitee.bottleneck import Bottleneck, is_private
from splitee.capture import capture
from splitee.client import LocalClient, Place, Settings, State
from splitee.data import draw_order
from splitee.errors import FleetError, ModelError
from splitee.exits import Exit
from splitee.fleet import parse
from splitee.means import cross_layer_mean
from splitee.model import Network, Segment, Tail
from splitee.runs import Run
from splitee.server import Server
from splitee.strategies import Strategy
from splitee.train import RoundDone, evaluate, fit, train_batch
from toolkit.networks import (
    CLASSES,
    SCALE,
    SHAPE,
    SHIFT,
    arrays,
    far,
    network_input,
    random_images,
    resnet,
    unequal,
)
from toolkit.rounds import everything

RETURNED = Settings(0.05, 0.9, 1e-3, exit_weight=0.0, server_weight=1.0)  # gradient = "server"

# cut, channels sent, stride: 4x8x8, 4x8x8, 8x4x4 (of which six rows come back), 16x2x2 there
NARROW = [("stem", 2, 1), ("layer1", 3, 2), ("layer2", 2, 3), ("layer3", 20, 1)]


def halves(
    cut: str, bottleneck: Bottleneck, settings: Settings, *, capacity: int = 8, samples: int = 36
) -> tuple[LocalClient, Server]:
    """A client whose cut has a bottleneck, and its server."""
    model = resnet()
    torch.manual_seed(3)
    network = Network(copy.deepcopy(model), SHAPE)
    shape = network.cut(cut).shape
    head = Exit(bottleneck.shape(shape), CLASSES)
    segment = Segment(network, network.cut(cut), {cut: head}, bottleneck.narrow(shape))
    client = LocalClient("one", segment, settings, capacity=capacity, scale=SCALE, shift=SHIFT)
    weights = arrays(segment.tensors())
    client.start(State(weights, {}, Place(samples, 7)), random_images(samples))
    behind = Network(copy.deepcopy(model), SHAPE)
    tail = Tail(behind, [behind.cut(cut)], {"one": bottleneck.mirror(shape)})
    return client, Server(tail, settings)


class Unsplit(nn.Module):
    """The whole network with both halves of the bottleneck in it, in torch's own operations."""

    def __init__(self, cut: str, stride: int, client: LocalClient, server: Server) -> None:
        super().__init__()
        self.model = resnet()
        self.cut, self.stride = cut, stride
        own = client.segment.tensors() | server.tensors()
        self.own = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(tensor.detach().clone())
                for name, tensor in own.items()
                if is_private(name) and "exit" not in name
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        for name in ("stem", "layer1", "layer2", "layer3"):
            x = getattr(self.model, name)(x)
            if name == self.cut:
                _, _, height, width = x.shape
                own = self.own
                x = x[:, :, :: self.stride, :: self.stride]
                x = F.conv2d(x, own["bottleneck/weight"], own["bottleneck/bias"])
                weight = own["bottleneck/one/widen/weight"]
                x = F.conv_transpose2d(x, weight, own["bottleneck/one/widen/bias"], self.stride)
                x = x[:, :, :height, :width]
        return self.model.fc(x.mean((2, 3)))  # type: ignore[no-any-return]

    def tensors(self) -> dict[str, Tensor]:
        """Its parameters by the names that the halves have for them."""
        own = {name.replace("/", "."): t for name, t in self.own.items()}
        return {**dict(self.model.named_parameters()), **own}


@pytest.mark.parametrize("capacity", [8, 3])
@pytest.mark.parametrize(("cut", "channels", "stride"), NARROW)
def test_with_returned_gradients_the_halves_train_as_one_module_with_the_bottleneck(
    cut: str, channels: int, stride: int, capacity: int
) -> None:
    client, server = halves(cut, Bottleneck(channels, stride), RETURNED, capacity=capacity)
    whole = Unsplit(cut, stride, client, server)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    images, step = random_images(36), 0
    for epoch in range(4):
        order = draw_order(36, 7, epoch)
        for start in range(0, 36, 8):
            part = images[order[start : start + 8]]
            found = train_batch(client, server, len(part)).server_loss
            labels = torch.as_tensor(part.y).long()
            loss = F.cross_entropy(whole(network_input(part.x)), labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            assert found == pytest.approx(loss.item(), rel=1e-5), step
            step += 1
    assert step == 20
    ours = arrays(client.segment.tensors() | server.tensors())
    theirs = arrays(whole.tensors())
    assert {n for n in ours if "exit" not in n} == set(theirs)
    assert far({n: ours[n] for n in theirs}, theirs, 1e-4) == {}


@pytest.mark.parametrize(("cut", "channels", "stride"), NARROW)
def test_the_exits_loss_trains_the_clients_half(cut: str, channels: int, stride: int) -> None:
    client, server = halves(cut, Bottleneck(channels, stride), Settings(0.05))  # local
    before = arrays(client.segment.tensors())
    train_batch(client, server, 8)
    after = arrays(client.segment.tensors())
    assert all((before[n] != after[n]).any() for n in before), "all of it learns"


@pytest.mark.parametrize("shape", [(5, 4, 6), (1, 1, 1)])
def test_at_a_stride_of_1_the_mirror_is_a_1x1_convolution(shape: tuple[int, int, int]) -> None:
    mirror = Bottleneck(3).mirror(shape)
    sent = torch.randn(2, 3, *shape[1:])
    weight = mirror.widen.weight.transpose(0, 1)
    torch.testing.assert_close(mirror(sent), F.conv2d(sent, weight, mirror.widen.bias))


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [(5, 8), (4, 4)])
def test_what_is_sent_is_as_large_as_said_and_comes_back_as_large_as_it_was(
    stride: int, size: tuple[int, int]
) -> None:
    bottleneck = Bottleneck(2, stride)
    shape = (3, *size)
    sent = bottleneck.narrow(shape)(torch.randn(1, *shape))
    assert tuple(sent.shape) == (1, *bottleneck.shape(shape))
    assert tuple(bottleneck.mirror(shape)(sent).shape) == (1, *shape)


def test_a_mirror_keeps_the_spread_of_what_comes() -> None:
    torch.manual_seed(0)
    for channels, stride in ((4, 1), (4, 2), (16, 4)):
        shape = (64, 16, 16)
        mirror = Bottleneck(channels, stride).mirror(shape)
        spread = mirror(torch.randn(8, channels, 16 // stride, 16 // stride)).std()
        assert 0.4 < spread < 0.9  # a third of the variance, and the bias


def test_the_segments_graph_means_what_torch_computes() -> None:
    client, _ = halves("layer1", Bottleneck(3, 2), RETURNED)
    graph = capture(client.segment, CLASSES)
    assert (graph.cut, graph.shapes[graph.cut]) == ("bottleneck", (3, 4, 4))
    assert graph.logits == "bottleneck.exit.linear"
    assert list(graph.weights) == list(client.segment.tensors())
    x = network_input(random_images(4).x)
    (point,), (logits,) = client.segment(x)
    values = graph.run(x.numpy())
    np.testing.assert_allclose(values["bottleneck"], point.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(values[graph.logits], logits.detach().numpy(), atol=1e-5)


def test_both_halves_names_are_none_of_the_networks() -> None:
    client, server = halves("layer1", Bottleneck(2), RETURNED)
    ours = [n for n in client.segment.tensors() if is_private(n)]
    assert ours == [
        "bottleneck.weight", "bottleneck.bias",
        "bottleneck.exit.linear.weight", "bottleneck.exit.linear.bias",
    ]  # fmt: skip
    theirs = [n for n in server.tensors() if is_private(n)]
    assert theirs == ["bottleneck.one.widen.weight", "bottleneck.one.widen.bias"]
    network = {*client.segment.tensors(), *server.tensors()} - {*ours, *theirs}
    assert network == set(resnet().state_dict())
    assert not any(is_private(n) for n in server.tensors("layer1"))


@pytest.mark.parametrize("name", ["bottleneck", "exits"])
def test_refuses_a_network_with_a_part_that_is_called_as_ours_are(name: str) -> None:
    model = resnet()
    model.add_module(name, nn.Identity())
    with pytest.raises(ModelError, match=f'^the network has a part "{name}", as .*: rename it$'):
        Network(model, SHAPE)


def test_the_mirror_forgets_a_batch_that_is_discarded() -> None:
    client, server = halves("layer1", Bottleneck(2), RETURNED)
    before = arrays(server.tensors())
    part = client.forward(4, 4)
    server.learn(part.activations, part.labels, "layer1", 4, gradient=False, client="one")
    server.discard()
    server.step()
    assert unequal(arrays(server.tensors()), before) == []


def test_what_is_one_clients_alone_has_no_mean() -> None:
    ones = {"stem.0.weight": torch.ones(2), "bottleneck.weight": torch.ones(3)}
    threes = {"stem.0.weight": 3 * torch.ones(2), "bottleneck.weight": torch.ones(5)}
    copies = [{n: (t, 4) for n, t in tensors.items()} for tensors in (ones, threes)]
    assert {n: t.tolist() for n, t in cross_layer_mean(copies).items()} == {"stem.0.weight": [2, 2]}


# ---- fleets ----

THREE = """
name = "three"
gradient = "both"
aggregate = "all"
exits = "upto"
strategy = "{strategy}"
period = {period}
batch = 8

[data]
samples = 96

[model]
width = 4
norm = "group"

[[client]]
name = "items"
cut = "layer1"
bottleneck = 2

[[client]]
name = "weight"
cut = "layer1"
bottleneck = 3
bottleneck_stride = 2

[[client]]
name = "plain"
cut = "layer1"
"""
STRATEGIES = ("averaging", "sequential")


def assembled(text: str) -> Assembly:
    """A fleet without firmware."""
    return Assembly(parse(text), lambda board: Board(False, None))


def begun(assembly: Assembly) -> Strategy:
    """Its strategy, with clients that have their state."""
    clients = [assembly.local(m) for m in assembly.members]
    for client, member in zip(clients, assembly.members, strict=True):
        client.start(member.state, member.images)
    return assembly.strategy(clients)


@cache
def trained(strategy: str, period: int) -> Strategy:
    """The fleet behind its first round."""
    found = begun(assembled(THREE.format(strategy=strategy, period=period)))
    assert [e.round for e in fit(found, 1) if isinstance(e, RoundDone)] == [1]
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_aggregation_leaves_every_bottleneck_as_it_was(strategy: str) -> None:
    averaged, apart = (trained(strategy, period) for period in (1, 2))  # 2: not yet
    mean, own = (everything(s, s.states) for s in (averaged, apart))
    changed = {n for n in unequal(mean, own) if "momentum" not in n}
    private = {n for n in own if "/bottleneck." in n}
    owners = {n.split("/")[0] for n in private}
    servers = {"server"} if strategy == "sequential" else {"server.items", "server.weight"}
    assert owners == {"items", "weight", *servers}
    assert not changed & private
    assert {f"{c}/stem.0.weight" for c in ("items", "weight", "plain")} <= changed
    # an exit that no other client has is not averaged either
    assert {n for n in changed if "exits.layer1" in n} == set()
    assert {n for n in changed if "exits.stem" in n} == {
        f"{c}/exits.stem.linear.{role}"
        for c in ("items", "weight", "plain")
        for role in ("weight", "bias")
    }


def test_a_shared_server_has_a_mirror_for_each_client_that_learns_in_its_turn() -> None:
    strategy = begun(assembled(THREE.format(strategy="sequential", period=1)))
    server = strategy.server("items")
    before = arrays(server.tensors())
    train_batch(strategy.clients[0], server, 8)
    changed = {n for n in unequal(arrays(server.tensors()), before) if is_private(n)}
    assert changed == {"bottleneck.items.widen.weight", "bottleneck.items.widen.bias"}
    assert {n for n in server.momentum() if is_private(n)} == changed
    train_batch(strategy.clients[2], server, 8)  # it has none
    assert {n for n in server.momentum() if is_private(n)} == changed


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_keeps_both_halves(strategy: str, tmp_path: Path) -> None:
    before = trained(strategy, 1)
    run = Run(tmp_path)
    run.save(1, before.states, before.servers())
    checkpoint = run.load()
    assembly = assembled(THREE.format(strategy=strategy, period=1))
    after = begun(assembly)
    after.load(checkpoint.servers)
    for client, member in zip(after.clients, assembly.members, strict=True):
        client.start(checkpoint.states[client.name], member.images)
    test = assembly.dataset.test[:50]
    for old, new in zip(before.clients, after.clients, strict=True):
        a, b = (evaluate(c, s.server(c.name), test) for c, s in ((old, before), (new, after)))
        np.testing.assert_array_equal(a.exit_logits, b.exit_logits)
        np.testing.assert_array_equal(a.server_logits, b.server_logits)


def test_a_bottleneck_is_drawn_from_the_seed_and_changes_nothing_else() -> None:
    text = THREE.format(strategy="averaging", period=1)
    first, again = (assembled(text) for _ in range(2))
    plain = assembled(text.replace("bottleneck", "# bottleneck"))
    other = assembled(f"seed = 1\n{text}")
    for a, b, c, d in zip(*(x.members for x in (first, again, plain, other)), strict=True):
        assert unequal(dict(a.state.weights), dict(b.state.weights)) == []
        shared = {n: w for n, w in a.state.weights.items() if not is_private(n)}
        assert unequal(shared, {n: c.state.weights[n] for n in shared}) == []
        private = {n: w for n, w in a.state.weights.items() if is_private(n)}
        assert set(unequal(private, {n: d.state.weights[n] for n in private})) == set(private)
    servers = [begun(x).server("weight").tensors() for x in (first, again)]
    assert unequal(*map(arrays, servers)) == []


def test_clients_with_the_same_bottleneck_share_a_build_and_others_do_not() -> None:
    def build(bottleneck: str) -> int:
        text = THREE.format(strategy="averaging", period=1).replace("bottleneck = 2", bottleneck)
        return assembled(text).member("items").build.checksum

    assert build("bottleneck = 2") == build("bottleneck = 2\nbottleneck_stride = 1")
    other = ("", "bottleneck = 2", "bottleneck = 4", "bottleneck = 2\nbottleneck_stride = 2")
    assert len({build(text) for text in other}) == 4


ONE = '[model]\nwidth = 4\n[[client]]\nname = "a"\n'

REFUSED = {
    "a cut that moves": (
        "bottleneck = 2\ndeepest = 'layer2'",
        "bottleneck: it belongs to one cut, and with deepest the cut moves: leave one of them out",
    ),
    "a stride of nothing": (
        "bottleneck_stride = 2",
        "bottleneck_stride: there is no bottleneck: give it channels (bottleneck = ...), or leave "
        "the stride out",
    ),
    "a stride over the edge": (
        "bottleneck = 2\nbottleneck_stride = 5\ncut = 'layer2'",
        "bottleneck_stride = 5: the image at layer2 is 4x4: take a smaller stride or a shallower "
        "cut",
    ),
    "a stride over every edge": (
        "bottleneck = 2\nbottleneck_stride = 9",
        "bottleneck_stride = 9: the image at stem is 8x8: take a smaller stride or a shallower cut",
    ),
    "a codec of no use behind it": (
        "bottleneck = 1\nbottleneck_stride = 2\ncut = 'layer3'\ncodec = 'int8'",
        'codec = "int8" at layer3: int8 takes 5 bytes a sample, and float32 4: take another',
    ),
}


@pytest.mark.parametrize("title", REFUSED)
def test_refuses(title: str) -> None:
    keys, why = REFUSED[title]
    with pytest.raises(FleetError) as error:
        assembled(f'name = "x"\n{ONE}{keys}\n').member("a")
    assert str(error.value) == f'client "a": {why}'


@pytest.mark.parametrize(("stride", "cut"), [(2, "layer3"), (3, "layer2"), (8, "layer1")])
def test_auto_takes_a_cut_whose_image_the_stride_fits(stride: int, cut: str) -> None:
    keys = f"bottleneck = 2\nbottleneck_stride = {stride}"
    assert assembled(f'name = "x"\n{ONE}{keys}\n').member("a").cut.name == cut
