"""The loop, written once: one batch, a client's pass of a round, a whole training, a test."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from splitee.certainty import entropy, unsure
from splitee.client import Client
from splitee.data import Images
from splitee.errors import Late, NotFinite
from splitee.events import (
    BatchDone,
    ClientBack,
    ClientDone,
    ClientLost,
    Evaluated,
    Event,
    RoundDone,
    RoundFailed,
)
from splitee.ops import Array
from splitee.server import Server
from splitee.state import Place

__all__ = [
    "Answers",
    "BatchDone",
    "ClientBack",
    "ClientDone",
    "ClientLost",
    "Evaluated",
    "Event",
    "RoundDone",
    "RoundFailed",
    "Rounds",
    "batches",
    "evaluate",
    "fit",
    "train_batch",
    "train_pass",
]


class Rounds(Protocol):
    """What ``fit`` needs of a strategy."""

    @property
    def clients(self) -> Sequence[Client]:
        """Those that are not away, in the fleet file's order."""

    def round(self, number: int) -> Iterator[Event]:
        """One round; ends with a RoundDone, unless every client was lost in it."""


def train_batch(client: Client, server: Server, batch: int) -> BatchDone:
    """One step of both halves on the client's next batch samples, in parts of its capacity.

    Where only samples are sent that the exit is unsure of, the server learns from the mean over
    those, and takes no step where there are none. Raises NotFinite where a gradient or the loss of
    a half is not; neither takes a step then.
    """
    left, sent = batch, 0
    # how many are sent of a batch in parts is known at its end
    sums = client.unsure is not None and client.capacity < batch
    assert not (sums and client.settings.wants_gradient), "a gradient has to be of the mean"
    came: list[Tensor] = []
    while left:
        part = client.forward(min(left, client.capacity), batch)
        came.append(part.activations)
        gradient = None
        if count := len(part.labels):
            gradient = server.learn(
                part.activations,
                part.labels,
                client.cut,
                batch if client.unsure is None else 1 if sums else count,
                gradient=client.settings.wants_gradient,
                client=client.name,
            )
        client.backward(gradient)
        sent += count
        left -= part.count
    if sums and sent:
        server.divide(sent)
    try:
        server.check()  # before the client's step: both halves take theirs, or neither does
    except NotFinite:
        if not all(activations.isfinite().all() for activations in came):
            client.step()  # it was sent what is not finite: the client says where that began
        raise
    stepped = client.step()
    loss = server.step() if sent else None
    return BatchDone(client.name, batch, sent, stepped.loss, stepped.correct, loss)


def batches(place: Place, batch: int, steps: int | None = None) -> list[int]:
    """How many samples the batches of a pass have, for a client at that place.

    steps: as many batches, over as many epochs as they take; None: what is left of the epoch, or
    all of the next where one has ended. The last batch of an epoch may be smaller.
    """
    sizes: list[int] = []
    used = place.position % place.samples
    while steps is None or len(sizes) < steps:
        sizes.append(min(batch, place.samples - used))
        used = (used + sizes[-1]) % place.samples
        if steps is None and used == 0:
            break
    return sizes


def train_pass(
    client: Client,
    server: Server,
    number: int,
    sizes: Sequence[int],
    emit: Callable[[Event], None],
) -> ClientDone:
    """A client's whole pass of a round, in batches of those sizes.

    Raises LinkError when the client is lost, Late when its deadline comes first.
    """
    began = time.perf_counter()
    before = replace(client.traffic)
    exit_loss = server_loss = 0.0
    samples = sum(sizes)
    correct = sent = trained = 0
    for size in sizes:
        if client.deadline is not None and time.monotonic() >= client.deadline:
            raise Late(
                f'client "{client.name}": {trained} of {samples} samples were done at the '
                "deadline: give it a smaller share or a shallower cut, or the round more time "
                "(round_deadline)"
            )
        done = train_batch(client, server, size)
        trained += size
        exit_loss += done.exit_loss * done.samples
        server_loss += (done.server_loss or 0.0) * done.sent
        sent += done.sent
        correct += done.exit_correct
        emit(done)
    state = client.state()
    return ClientDone(
        client=client.name,
        round=number,
        samples=samples,
        sent=sent,
        exit_loss=exit_loss / samples,
        exit_accuracy=correct / samples,
        server_loss=server_loss / sent if sent else None,
        seconds=time.perf_counter() - began,
        bytes_up=client.traffic.up - before.up,
        bytes_down=client.traffic.down - before.down,
        activations_up=client.traffic.activations_up - before.activations_up,
        state=state,
    )


def fit(strategy: Rounds, rounds: int, first: int = 1) -> Generator[Event, None, None]:
    """Trains for rounds first..rounds, until every client is lost, or until it is closed."""
    for number in range(first, rounds + 1):
        yield from strategy.round(number)
        if not strategy.clients:
            return


@dataclass(frozen=True)
class Answers:
    """What a client and its server say of test images."""

    labels: Array  # (samples,)
    exit_logits: Array  # (samples, classes)
    server_logits: Array  # (samples, classes)
    client_seconds: float = 0.0  # for all samples, a link's time included
    server_seconds: float = 0.0

    @property
    def exit_accuracy(self) -> float:
        """At the exit at the client's cut, 0..1."""
        return float((self.exit_logits.argmax(1) == self.labels).mean())

    @property
    def server_accuracy(self) -> float:
        """Through the server, 0..1."""
        return float((self.server_logits.argmax(1) == self.labels).mean())

    @property
    def server_loss(self) -> float:
        """Mean cross-entropy through the server, nats."""
        logits, labels = torch.as_tensor(self.server_logits), torch.as_tensor(self.labels).long()
        return float(F.cross_entropy(logits, labels))

    def early(self, threshold: float, temperature: float = 1.0) -> tuple[float, float]:
        """The share of samples that the exit answers, and the accuracy of all.

        An exit whose normalised entropy is at most threshold answers, the server all others.
        temperature: of the exit's softmax.
        """
        asked = unsure(entropy(self.exit_logits, temperature), threshold)
        chosen = np.where(asked[:, None], self.server_logits, self.exit_logits).argmax(1)
        return 1 - float(asked.mean()), float((chosen == self.labels).mean())


def evaluate(client: Client, server: Server, images: Images) -> Answers:
    """Runs test images through the client and on through the server, and measures how long."""
    exits: list[Tensor] = []
    servers: list[Tensor] = []
    seconds = [0.0, 0.0]
    for start in range(0, len(images), client.capacity):
        began = time.perf_counter()
        activations, logits = client.infer(images.x[start : start + client.capacity])
        exits.append(logits.cpu())
        there = time.perf_counter()
        servers.append(server.infer(activations, client.cut, client.name).cpu())
        seconds[0] += there - began
        seconds[1] += time.perf_counter() - there
    exit_logits, server_logits = torch.cat(exits).numpy(), torch.cat(servers).numpy()
    return Answers(images.y, exit_logits, server_logits, *seconds)
