"""A network cut in two for export: both halves' graphs, and what PyTorch computes with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from splitee import data, zoo
from splitee.assemble import Assembly, Member
from splitee.capture import capture, capture_tail
from splitee.data import Images
from splitee.edge import Deployed
from splitee.errors import ModelError
from splitee.exits import Exit, losses
from splitee.graph import Graph
from splitee.model import Cut, Network, Segment, Tail
from splitee.norms import frozen_norms
from splitee.ops import Array
from splitee.place import Build
from splitee.runs import Checkpoint

LEARNING_RATE = 0.05  # of the step that exports which learn are held to
CALIBRATED = 512  # images, at most, that 8 bits are calibrated with
CAPACITY = 8  # samples that a segment of no fleet holds at once


@dataclass(frozen=True)
class Halves:
    """One client's segment and its server's half, at one cut, with the weights that they have."""

    name: str
    model: str  # what the network is called
    cut: Cut
    segment: Segment
    tail: Tail
    build: Build  # of the segment; its graph holds the same weights
    client_build: Build  # of all that the client has, with every cut that it was built with
    upto: bool  # whether all exits up to the cut learn, or only the one at it
    calibration: Images
    samples: Images  # to check with
    distill: float = 0.0  # share of the deepest exit's answer in what the shallower learn from
    deployed: Deployed | None = None  # of a run: how it answers, and how the run's server knows it

    @property
    def cut_name(self) -> str:
        """Where the segment ends."""
        return self.cut.name

    @property
    def learning_rate(self) -> float:
        """Of the step that ``learnt`` has taken."""
        return LEARNING_RATE

    @cached_property
    def tail_graph(self) -> Graph:
        """The server's half. Raises ModelError, naming the layer, for one without operation."""
        return capture_tail(self.tail, self.cut, self.build.graph.classes, self.name)

    @torch.no_grad()
    def answers(self, images: Array, *, exact: bool = False) -> dict[str, Array]:
        """PyTorch's activations at the cut, and logits of the exit there, for uint8 images.

        exact: in float64.
        """
        kind = torch.float64 if exact else torch.float32
        segment = copy.deepcopy(self.segment).to(kind).eval()
        points, logits = segment(self._input(images, kind))
        return {"activations": points[-1].numpy(), "logits": logits[-1].numpy()}

    @torch.no_grad()
    def server_answers(self, activations: Array, *, exact: bool = False) -> Array:
        """PyTorch's logits of the server's half; exact: in float64."""
        kind = torch.float64 if exact else torch.float32
        tail = copy.deepcopy(self.tail).to(kind).eval()
        logits: Array = tail(torch.tensor(activations).to(kind), self.cut.name, self.name).numpy()
        return logits

    def learnt(self, *, exact: bool = False) -> dict[str, Array]:
        """PyTorch's weights after one step on the first samples, as many as it holds at once.

        Plain SGD at LEARNING_RATE, from the exits' loss; exact: in float64.
        """
        kind = torch.float64 if exact else torch.float32
        segment = copy.deepcopy(self.segment).to(kind).train()
        first = self.samples[: self.build.capacity]
        labels = torch.tensor(first.y).long()
        _, logits = segment(self._input(first.x, kind))
        total = torch.stack(losses(logits, labels, self.distill)).sum()
        torch.autograd.backward(total / len(labels))
        torch.optim.SGD(segment.parameters(), lr=LEARNING_RATE).step()
        for norm in frozen_norms(segment):
            norm.follow()
        return {name: tensor.detach().numpy() for name, tensor in segment.tensors().items()}

    def _input(self, images: Array, kind: torch.dtype) -> Tensor:
        scale, shift = (
            torch.tensor(values, dtype=torch.float32).to(kind)[:, None, None]
            for values in (self.build.scale, self.build.shift)
        )
        return torch.tensor(images) * scale + shift


def of_model(
    model: str,
    cut: str | int,
    shape: tuple[int, int, int],
    images: Images,
    *,
    norm: str = "batch",
    width: int | None = None,
    classes: int = 10,
    capacity: int = CAPACITY,
    seed: int = 0,
) -> Halves:
    """A network with weights that are drawn here.

    model: as ``zoo.build`` takes it. shape: of an image, as images have it. Raises ModelError where
    it cannot be made, CutError where it cannot be cut there.
    """
    if len(images) and int(images.y.max()) >= classes:
        raise ModelError(
            f"the images have class {int(images.y.max())}, and the network {classes} classes, "
            f"counted from 0: take classes = {int(images.y.max()) + 1}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = zoo.build(model, norm=norm, width=width, classes=classes, channels=shape[0])
        network = Network(made, shape)
        at = network.cut(cut)
        if len(at.shape) != 3:
            raise ModelError(f'cut "{at.name}" sends no image, and an exit needs one')
        channels, height, line = at.shape
        segment = Segment(network, at, {at.name: Exit((channels, height, line), classes)})
    scale, shift = data.constants(images)
    build = Build(capture(segment, classes), capacity, True, 0, scale, shift)
    check, rest = images[: _held_out(images)], images[_held_out(images) :]
    tail = Tail(network, [at])
    return Halves("client", model, at, segment, tail, build, build, True, rest[:CALIBRATED], check)


def _held_out(images: Images) -> int:
    """How many of the images are for checking: a fifth, 256 at most."""
    return min(256, max(1, len(images) // 5))


def of_fleet(assembly: Assembly, checkpoint: Checkpoint | None = None) -> list[Halves]:
    """Every client of a fleet, as it is in a checkpoint, or as it begins.

    A client that the checkpoint does not know is left out. Calibrated with the fleet's training
    images and checked on its test images.
    """
    members = [m for m in assembly.members if checkpoint is None or m.name in checkpoint.states]
    strategy = assembly.strategy([assembly.local(m) for m in members])
    if checkpoint:
        strategy.load(checkpoint.servers)
    states = checkpoint.states if checkpoint else {m.name: m.state for m in members}
    return [
        _of_member(assembly, m, states[m.name].weights, strategy.server(m.name).tail)
        for m in members
    ]


def calibration_of(assembly: Assembly) -> Images:
    """The images that a fleet's segments are calibrated with: of those that it trains on."""
    return assembly.dataset.train[:CALIBRATED]


def _of_member(
    assembly: Assembly, member: Member, weights: Mapping[str, Array], tail: Tail
) -> Halves:
    segment = copy.deepcopy(member.segment).at(member.cut.name, upto=member.upto)
    with torch.no_grad():
        for name, tensor in segment.tensors().items():
            tensor.copy_(torch.as_tensor(weights[name]))
    graph = member.graph.holding({n: weights[n] for n in member.graph.weights})
    return Halves(
        name=member.name,
        model=assembly.fleet.model.name,
        cut=member.cut,
        segment=segment,
        tail=tail,
        build=replace(member.build, graph=graph, moves=False),
        client_build=replace(
            member.build,
            graph=member.build.graph.holding({**member.build.graph.weights, **weights}),
        ),
        upto=member.upto,
        calibration=calibration_of(assembly),
        samples=assembly.dataset.test,
        distill=assembly.fleet.distill,
    )
