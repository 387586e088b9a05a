"""Clients and servers that are live only while they train: a thousand of them fit one computer.

What one has learnt lies in memory as it came, shared with all that have the same (after an
aggregation, means). For a pass it borrows a live network of its kind, takes over all that it is,
trains, and gives it back: as many networks are alive as train at the same time. The results are
those of clients that are always live, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from torch import Tensor

from splitee.client import LocalClient, Part, Settings, State, Stepped, Traffic
from splitee.data import Images
from splitee.ops import Array
from splitee.server import Server, Snapshot

T = TypeVar("T")


class Pool(Generic[T]):
    """Live networks of one kind: copies of a pattern, made when there are too few."""

    def __init__(self, pattern: T) -> None:
        """pattern: for nobody else any more. Its copies are not traced anew, as no thread could."""
        self.pattern = pattern
        self._free: SimpleQueue[T] = SimpleQueue()
        self.made = 0

    @contextmanager
    def borrowed(self) -> Iterator[T]:
        """One of them, for as long as it is needed."""
        try:
            live = self._free.get_nowait()
        except Empty:
            live = copy.deepcopy(self.pattern)
            self.made += 1
        try:
            yield live
        finally:
            self._free.put(live)


class ParkedClient:
    """A ``LocalClient`` that is live between the two ends of ``awake``; it cannot be lost."""

    def __init__(self, name: str, pool: Pool[LocalClient]) -> None:
        """pool: of clients that are as this one, but for name, shard and state."""
        pattern = pool.pattern
        self.name = name
        self.cut, self.capacity, self.unsure = pattern.cut, pattern.capacity, pattern.unsure
        self.settings: Settings = pattern.settings
        self.traffic = Traffic()
        self.deadline: float | None = None
        self._pool = pool
        self._live: LocalClient | None = None

    @contextmanager
    def awake(self) -> Iterator[LocalClient]:
        """Live, in its state; its state is then what ``state`` said last."""
        with self._pool.borrowed() as live:
            live.name, live.traffic, live.settings = self.name, self.traffic, self.settings
            live.start(self._state, self._images)
            self._live = live
            try:
                yield live
            finally:
                self._live = None

    def _here(self) -> AbstractContextManager[LocalClient]:
        return self.awake() if self._live is None else nullcontext(self._live)

    def start(self, state: State, images: Images) -> None:
        """Takes over shard and state."""
        self._state, self._images = state, images

    def rejoin(self, state: State, within: float) -> None:
        """Is in this state at once."""
        self._state = state
        if self._live is not None:
            self._live.load_state(state)

    def move(self, cut: str, *, upto: bool) -> None:
        """Not for these: all that borrow of a pool have one cut."""
        raise AssertionError("a parked client stays at its cut")

    def forward(self, count: int, batch: int) -> Part:
        """Runs its next count samples forward."""
        return self._training.forward(count, batch)

    def backward(self, gradient: Tensor | None) -> None:
        """Runs the last part backward."""
        self._training.backward(gradient)

    def step(self) -> Stepped:
        """Updates its weights."""
        return self._training.step()

    @property
    def _training(self) -> LocalClient:
        assert self._live is not None, "a batch needs its client awake from its begin to its end"
        return self._live

    def set_rate(self, rate: float) -> None:
        """Learns at this rate from the next step on."""
        self.settings = replace(self.settings, learning_rate=rate)
        if self._live is not None:
            self._live.set_rate(rate)

    def infer(self, images: Array) -> tuple[Tensor, Tensor]:
        """Activations and logits, with the statistics of training."""
        with self._here() as live:
            return live.infer(images)

    def state(self) -> State:
        """Everything that it has learnt, and its place."""
        if self._live is not None:
            self._state = self._live.state()
        return self._state

    def load_weights(self, weights: Mapping[str, Array]) -> None:
        """Replaces parameters and statistics: by these themselves, so nobody may change them."""
        self._state = replace(self._state, weights=weights)
        if self._live is not None:
            self._live.load_weights(weights)

    def close(self) -> None:
        """Nothing to end."""


class ParkedServer(Server):
    """A ``Server`` that is live between the two ends of ``awake``."""

    def __init__(self, name: str, pool: Pool[Server], rate: float) -> None:
        """pool: its pattern is what this one begins as. rate: its learning rate."""
        self.name = name
        self._pool = pool
        self._parked = Snapshot(pool.pattern.tensors(), pool.pattern.momentum())
        self._rate = rate
        self._live: Server | None = None

    @contextmanager
    def awake(self) -> Iterator[Server]:
        """Live, and what it learns stays."""
        with self._pool.borrowed() as live:
            live.name = self.name
            live.restore(self._parked)
            live.set_rate(self._rate)
            self._live = live
            try:
                yield live
                self._parked = live.snapshot()
            finally:
                self._live = None

    def _here(self) -> AbstractContextManager[Server]:
        return self.awake() if self._live is None else nullcontext(self._live)

    @property
    def _training(self) -> Server:
        assert self._live is not None, "a batch needs its server awake from its begin to its end"
        return self._live

    def set_rate(self, rate: float) -> None:
        """Learns at this rate from the next step on."""
        self._rate = rate
        if self._live is not None:
            self._live.set_rate(rate)

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
        """Adds up the gradients of a part of a batch."""
        return self._training.learn(
            activations, labels, cut, batch, gradient=gradient, client=client
        )

    def divide(self, samples: int) -> None:
        """Makes means over so many samples of sums."""
        self._training.divide(samples)

    def check(self) -> None:
        """Raises NotFinite where a gradient of this batch, or its loss, is not finite."""
        self._training.check()

    def step(self) -> float:
        """Updates the stages that this batch went through."""
        return self._training.step()

    def discard(self) -> None:
        """Forgets a batch that was not finished; parked, it has none."""
        if self._live is not None:
            self._live.discard()

    def infer(self, activations: Tensor, cut: str, client: str = "") -> Tensor:
        """Logits (batch, classes), with the statistics of training."""
        with self._here() as live:
            return live.infer(activations, cut, client)

    def tensors(self, cut: str | None = None) -> dict[str, Tensor]:
        """Parameters and statistics by name; parked, they are not to be changed."""
        if self._live is not None:
            return self._live.tensors(cut)
        assert cut is None, "a parked server has one client, and all of it is behind its cut"
        return dict(self._parked.tensors)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Replaces those parameters and statistics that are given: by these themselves."""
        if self._live is not None:
            self._live.load(weights)
            return
        held = self._parked.tensors
        self._parked = replace(
            self._parked, tensors={n: weights.get(n, t) for n, t in held.items()}
        )

    def momentum(self) -> dict[str, Tensor]:
        """What the optimiser remembers."""
        return dict(self._parked.momentum) if self._live is None else self._live.momentum()

    def load_momentum(self, momentum: Mapping[str, Tensor]) -> None:
        """Replaces it."""
        if self._live is not None:
            self._live.load_momentum(momentum)
        else:
            self._parked = replace(self._parked, momentum=dict(momentum))

    def snapshot(self) -> Snapshot:
        """What it has learnt so far; it has to be between two batches."""
        return self._parked if self._live is None else self._live.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot."""
        if self._live is not None:
            self._live.restore(snapshot)
        else:
            self._parked = snapshot
