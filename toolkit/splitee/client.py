"""What a client is to a strategy, and the client that runs in this process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from splitee import certainty, optimizer, step
from splitee.augment import augmented
from splitee.codec import PLAIN, Codec, Coding
from splitee.data import Images, Shard
from splitee.errors import NotFinite
from splitee.exits import losses
from splitee.model import Segment
from splitee.norms import frozen_norms
from splitee.ops import Array
from splitee.state import Place, Settings, State, Stepped, Traffic, trunk_weights

__all__ = [
    "Client",
    "LocalClient",
    "Part",
    "Place",
    "Settings",
    "State",
    "Stepped",
    "Traffic",
    "spread",
    "trunk_weights",
    "unsure_of",
]


@dataclass(frozen=True)
class Part:
    """What a forward pass sends up: of all its samples, or of those that its exit is unsure of."""

    activations: Tensor  # float32, (sent, *shape)
    labels: Tensor  # int64, (sent,)
    count: int  # samples that ran


def unsure_of(logits: Tensor, threshold: float) -> Tensor:
    """Which samples an exit does not answer: (samples,) of bool; those without a number, too."""
    entropies = certainty.entropy(logits.detach().cpu().numpy())
    left = certainty.unsure(entropies, threshold)
    return torch.from_numpy(left).to(logits.device)


class Client(Protocol):
    """A device behind a link or a network in this process: strategies cannot tell.

    A method raises LinkError when the client is lost.
    """

    name: str
    cut: str
    capacity: int  # samples that it holds at once
    unsure: float | None  # sends what its exit's entropy is above this for; None: everything
    settings: Settings
    traffic: Traffic
    # time.monotonic() at which its pass of a round must be over: a request that waits then raises
    # Late; None: it may take as long as it does
    deadline: float | None

    def start(self, state: State, images: Images) -> None:
        """Makes it this client: sends what it lacks of the shard, then the state."""

    def rejoin(self, state: State, within: float) -> None:
        """Comes back after a LinkError, in exactly this state; the shard is that of ``start``.

        Raises LinkError when it is not back within so many seconds. Settings are no part of a
        state: give it the rate of the round again.
        """

    def move(self, cut: str, *, upto: bool) -> None:
        """Ends at another of the cuts that it was built with, from the next batch on.

        upto: all exits up to the cut learn, not only the one at it. Layers that take no part stay
        as they are; those that come in are as they were left, so give them their weights.
        """

    def forward(self, count: int, batch: int) -> Part:
        """Runs its next count samples forward, as a part of a batch of batch samples."""

    def backward(self, gradient: Tensor | None) -> None:
        """Runs the last part backward.

        gradient is dLoss/dActivations of what was sent, where it wants one and something was.
        """

    def step(self) -> Stepped:
        """Updates its weights with the gradients of the whole batch.

        Raises NotFinite where one of these, or the loss, is not finite: it stays as it was before
        the batch, but for its place in the data order.
        """

    def set_rate(self, rate: float) -> None:
        """Learns at this rate from the next step on; all else of its settings stays."""

    def infer(self, images: Array) -> tuple[Tensor, Tensor]:
        """Activations and logits of the exit at the cut, of at most capacity uint8 images."""

    def state(self) -> State:
        """Everything that it has learnt, and its place."""

    def load_weights(self, weights: Mapping[str, Array]) -> None:
        """Replaces its weights, after an aggregation."""

    def close(self) -> None:
        """Ends it."""


class _Weighted(torch.autograd.Function):
    """The identity, whose gradient is weighted on the way back (a branch of the graph)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.weight, None


def _weighted(x: Tensor, weight: float) -> Tensor:
    return _Weighted.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]


@dataclass
class _Pass:
    """What forward leaves for backward."""

    activations: Tensor
    loss: Tensor
    sent: Tensor | None  # which samples were, where not all are


class LocalClient:
    """A client in this process, in torch.

    It is made for its deepest cut, and can be moved to any with an exit in that segment. What is
    said of its layers means those up to its cut, unless every is true.
    """

    def __init__(
        self,
        name: str,
        segment: Segment,
        settings: Settings,
        *,
        capacity: int,
        scale: tuple[float, ...],
        shift: tuple[float, ...],
        device: str = "cpu",
        coding: Coding = PLAIN,
        unsure: float | None = None,
        augment: Sequence[str] = (),
    ) -> None:
        """coding: what crosses its cut is what a device with these codecs would send and get.

        unsure: normalised entropy of the exit at the cut, above which samples are sent; None: all.
        augment: what changes its images in each epoch, as for ``augmented``.
        """
        self.name = name
        self.coding = coding
        self.unsure = unsure
        self.augment = tuple(augment)
        self.logits = torch.zeros(0)  # of the exit at the cut, of the last forward
        self.cut = segment.cut.name
        self.capacity = capacity
        self.traffic = Traffic()
        self.deadline: float | None = None
        self.device = device
        self._whole = segment.to(device).train()
        self._use(self._whole)
        self._optimizer = optimizer.make(_parameters_of(segment).values(), settings)
        self._settings = settings
        self._scale = torch.tensor(scale, device=device)[:, None, None]
        self._shift = torch.tensor(shift, device=device)[:, None, None]
        self._shard = Shard()
        self._pass: _Pass | None = None
        self._loss = 0.0
        self._correct = 0

    @property
    def settings(self) -> Settings:
        """What it learns with; may be replaced between batches."""
        return self._settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self._settings = settings
        optimizer.follow(self._optimizer, settings)

    @property
    def place(self) -> Place:
        """Where it stands."""
        return self._shard.place

    @place.setter
    def place(self, place: Place) -> None:
        self._shard.place = place

    def set_rate(self, rate: float) -> None:
        """Learns at this rate from the next step on."""
        self.settings = replace(self.settings, learning_rate=rate)

    def awake(self) -> AbstractContextManager[LocalClient]:
        """Held during a pass: it always is."""
        return nullcontext(self)

    def start(self, state: State, images: Images) -> None:
        """Takes over shard and state."""
        self._shard.images = images
        self.load_state(state)

    def rejoin(self, state: State, within: float) -> None:
        """Is in this state at once: it cannot be lost."""
        self.load_state(state)

    def move(self, cut: str, *, upto: bool) -> None:
        """Ends at another cut; see ``Client.move``."""
        held = [self._pass, *(p.grad for p in self._parameters(every=True).values())]
        assert all(h is None for h in held), "a cut moves between batches"
        self._use(self._whole.at(cut, upto=upto))
        self.cut = cut

    def _use(self, segment: Segment) -> None:
        """Runs that part of the whole; what a step needs of it is looked up once."""
        self.segment = segment  # up to the cut
        self._learning = _parameters_of(segment)
        self._frozen = frozen_norms(segment)
        self._kept = step.Kept(segment)

    def _tensors(self, *, every: bool) -> dict[str, Tensor]:
        return (self._whole if every else self.segment).tensors()

    def _parameters(self, *, every: bool) -> dict[str, nn.Parameter]:
        return _parameters_of(self._whole) if every else self._learning

    def load_state(self, state: State) -> None:
        """Replaces weights, momentum and place; at the first step no layer has momentum."""
        self.discard()
        if state.place.steps == 0:
            self._optimizer.state.clear()
        self.load_weights(state.weights)
        if state.place.steps:
            self.load_momentum(state.momentum)
        self.place = state.place

    def discard(self) -> None:
        """Forgets a batch that was not finished."""
        self._optimizer.zero_grad()
        self._kept.restore()
        for norm in self._frozen:
            norm.forget()
        self._pass = None
        self._loss, self._correct = 0.0, 0

    def load_momentum(self, momentum: Mapping[str, Array], *, every: bool = False) -> None:
        """Replaces the optimiser's memory; parameters that are not named begin anew."""
        memory = {n: torch.as_tensor(a) for n, a in momentum.items()}
        optimizer.remember(self._optimizer, self._parameters(every=every), memory)

    def load_weights(self, weights: Mapping[str, Array], *, every: bool = False) -> None:
        """Replaces parameters and statistics."""
        with torch.no_grad():
            for name, tensor in self._tensors(every=every).items():
                tensor.copy_(torch.as_tensor(weights[name]))

    def state(self, *, every: bool = False) -> State:
        """Everything that it has learnt, and its place."""
        weights = {n: _array(t) for n, t in self._tensors(every=every).items()}
        parameters = self._parameters(every=every)
        memory = optimizer.memory(self._optimizer, parameters)
        momentum = {n: _array(t) for n, t in memory.items()}
        if self.settings.adamw is None:  # as on a device: a velocity of every parameter, or none
            momentum = {
                n: momentum[n] if n in momentum else np.zeros(p.shape, np.float32)
                for n, p in parameters.items()
                if self.settings.momentum
            }
        return State(weights, momentum, self.place)

    def upcoming(self, count: int) -> Images:
        """The next count samples of the data order; a new epoch begins where one has ended."""
        return self._shard.upcoming(count)

    def _input(self, images: Array) -> Tensor:
        return torch.tensor(images, device=self.device) * self._scale + self._shift

    def forward(self, count: int, batch: int) -> Part:
        """Runs its next count samples forward."""
        part = self._shard.take(count)
        start = replace(self.place, position=self.place.position - len(part))
        images = augmented(part.x, self.augment, start)
        labels = torch.as_tensor(part.y, device=self.device).long()
        self._kept.keep()
        points = self.segment.trunk(self._input(images))
        exit_weight = self.settings.exit_weight
        logits = [
            head(_weighted(point, exit_weight) if exit_weight else point.detach())
            for head, point in zip(self.segment.exits, points, strict=True)
        ]
        each = [loss / batch for loss in losses(logits, labels, self.settings.distill)]
        self._loss += each[-1].item()
        self._correct += int((logits[-1].argmax(1) == labels).sum())
        self.logits, activations = logits[-1].detach(), points[-1].detach()
        size, sent = len(part), None  # a label is a byte
        if self.unsure is not None:
            sent = unsure_of(self.logits, self.unsure)
            activations, labels = activations[sent], labels[sent]
            size += 4 * self.logits.numel()  # by which the host chooses
        self._pass = _Pass(points[-1], torch.stack(each).sum(), sent)
        arrived, coded = _through(self.coding.up(points[-1][0].numel()), activations)
        self.traffic.activations_up += size + coded
        self.traffic.up += size + coded
        return Part(arrived, labels, len(part))

    def backward(self, gradient: Tensor | None) -> None:
        """Runs the last part backward; gradients add up."""
        assert self._pass is not None, "backward comes after forward"
        tensors, gradients = [self._pass.loss], [torch.ones_like(self._pass.loss)]
        if self._pass.sent is not None and self.settings.wants_gradient:
            gradient = spread(gradient, self._pass.sent, self._pass.activations.shape[1:])
        if gradient is not None:
            came, size = _through(self.coding.down(gradient[0].numel()), gradient)
            self.traffic.down += size
            tensors.append(self._pass.activations)
            gradients.append(came.to(self.device) * self.settings.server_weight)
        torch.autograd.backward(tensors, gradients)
        self._pass = None

    def step(self) -> Stepped:
        """One step of the optimiser; parameters that nothing taught keep still."""
        parameters = self._parameters(every=False)
        try:
            step.check(f'client "{self.name}"', parameters, self._loss)
        except NotFinite:
            self.discard()
            raise
        step.clip(parameters.values(), self.settings.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._kept.forget()
        for norm in self._frozen:
            norm.follow()
        self.place = replace(self.place, steps=self.place.steps + 1)
        result = Stepped(self._loss, self._correct)
        self._loss, self._correct = 0.0, 0
        return result

    @torch.no_grad()
    def infer(self, images: Array) -> tuple[Tensor, Tensor]:
        """Activations and logits, with the statistics of training."""
        self.segment.eval()
        points, logits = self.segment(self._input(images))
        self.segment.train()
        sent, _ = _through(self.coding.up(points[-1][0].numel()), points[-1])
        return sent, logits[-1]

    def gradients(self, *, every: bool = False) -> dict[str, Array]:
        """Gradients of this batch so far, by parameter (zeros where nothing came)."""
        return {
            n: np.zeros(p.shape, np.float32) if p.grad is None else _array(p.grad)
            for n, p in self._parameters(every=every).items()
        }

    def close(self) -> None:
        """Nothing to end."""


def _parameters_of(segment: Segment) -> dict[str, nn.Parameter]:
    return {n: t for n, t in segment.tensors().items() if isinstance(t, nn.Parameter)}


def spread(gradient: Tensor | None, sent: Tensor, shape: Iterable[int]) -> Tensor:
    """The gradient of a whole part: zero for the samples that were not sent."""
    whole = torch.zeros(len(sent), *shape)
    if gradient is not None:
        whole[sent.cpu()] = gradient.cpu()
    return whole


def _through(codec: Codec, tensor: Tensor) -> tuple[Tensor, int]:
    """What comes out at the other end of a codec, and the bytes in between."""
    size = len(tensor) * codec.size
    if codec.kind == "float32" or size == 0:
        return tensor, size
    values = codec.decode(codec.encode(tensor.cpu().numpy().reshape(len(tensor), -1)))
    return torch.from_numpy(values).reshape(tensor.shape).to(tensor.device), size


def _array(tensor: Tensor) -> Array:
    return tensor.detach().cpu().numpy().astype(np.float32, copy=True)
