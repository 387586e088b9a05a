"""The server's half: learns from activations, and returns gradients where they are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from splitee import optimizer, step
from splitee.client import Settings
from splitee.model import Tail


@dataclass(frozen=True)
class Snapshot:
    """All that a server has learnt at one moment, bit for bit."""

    tensors: Mapping[str, Tensor]
    momentum: Mapping[str, Tensor]


class Server:
    """The stages behind the cuts, and their optimiser; entered at any client's cut."""

    def __init__(
        self, tail: Tail, settings: Settings, device: str = "cpu", *, name: str = "the server"
    ) -> None:
        """name: what errors call it."""
        self.tail = tail.to(device).train()
        self.device = device
        self.name = name
        self._clip = settings.clip
        self._optimizer = optimizer.make(self.tail.parameters(), settings)
        self._kept = step.Kept(self.tail)
        self._tensors = self.tail.tensors()  # looked up once: the tail stays what it is
        self._loss = 0.0

    def awake(self) -> AbstractContextManager[Server]:
        """Held during a pass: it always is."""
        return nullcontext(self)

    def set_rate(self, rate: float) -> None:
        """Learns at this rate from the next step on."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def learn(
        self,
        activations: Tensor,
        labels: Tensor,
        cut: str,
        batch: int,
        *,
        gradient: bool,
        client: str = "",
    ) -> Tensor | None:
        """Adds up the gradients of a part of a batch of batch samples.

        client: whose they are; with a bottleneck, its mirror learns, too. Returns
        dLoss/dActivations, of the loss as a mean over the whole batch, when gradient is true.
        Nothing is updated before ``step``.
        """
        self._kept.keep()
        x = activations.to(self.device).requires_grad_(gradient)
        logits = self.tail(x, cut, client)
        loss = F.cross_entropy(logits, labels.to(self.device), reduction="sum") / batch
        torch.autograd.backward(loss)
        self._loss += loss.item()
        return x.grad

    def divide(self, samples: int) -> None:
        """Makes means over so many samples of sums: of what ``learn`` took for batches of one."""
        for parameter in self.tail.parameters():
            if parameter.grad is not None:
                parameter.grad /= samples
        self._loss /= samples

    def check(self) -> None:
        """Raises NotFinite where a gradient of this batch, or its loss, is not finite."""
        step.check(self.name, self._tensors, self._loss)

    def step(self) -> float:
        """Updates the stages that this batch went through; returns the batch's mean loss, nats."""
        step.clip(self.tail.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._kept.forget()
        loss, self._loss = self._loss, 0.0
        return loss

    def discard(self) -> None:
        """Forgets a batch that was not finished."""
        self._optimizer.zero_grad()
        self._kept.restore()
        self._loss = 0.0

    @torch.no_grad()
    def infer(self, activations: Tensor, cut: str, client: str = "") -> Tensor:
        """Logits (batch, classes), with the statistics of training."""
        self.tail.eval()
        logits: Tensor = self.tail(activations.to(self.device), cut, client)
        self.tail.train()
        return logits

    def tensors(self, cut: str | None = None) -> dict[str, Tensor]:
        """The live parameters and statistics (behind the cut, if given) by name."""
        return self.tail.tensors(cut) if cut else dict(self._tensors)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Replaces those parameters and statistics that are given; others stay."""
        for name, tensor in self.tensors().items():
            if name in weights:
                tensor.copy_(weights[name])

    def momentum(self) -> dict[str, Tensor]:
        """The optimiser's memory of parameters that have learnt (``optimizer.memory``)."""
        return optimizer.memory(self._optimizer, self.tensors())

    def load_momentum(self, momentum: Mapping[str, Tensor]) -> None:
        """Replaces the optimiser's memory; parameters that are not named begin anew."""
        optimizer.remember(self._optimizer, self.tensors(), momentum)

    def snapshot(self) -> Snapshot:
        """What it has learnt so far; it has to be between two batches."""
        tensors = {n: t.detach().clone() for n, t in self.tensors().items()}
        return Snapshot(tensors, {n: v.clone() for n, v in self.momentum().items()})

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot, from wherever it is."""
        self.discard()
        self.load(snapshot.tensors)
        self.load_momentum(snapshot.momentum)
