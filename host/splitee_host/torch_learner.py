"""A client in torch, as ``serve`` has it train behind a link."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from splitee.client import LocalClient
from splitee.codec import PLAIN
from splitee.data import Images
from splitee.ops import Array
from splitee.state import Place, Settings, State, Stepped


class TorchLearner:
    """A ``LocalClient`` whose activations leave by a link: they are coded, and chosen, there."""

    def __init__(self, client: LocalClient) -> None:
        client.coding, client.unsure = PLAIN, None
        self._client = client

    @property
    def settings(self) -> Settings:
        """What it learns with."""
        return self._client.settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self._client.settings = settings

    @property
    def place(self) -> Place:
        """Where it stands."""
        return self._client.place

    def begin(self, place: Place, images: Images) -> None:
        """Stands there, in this shard."""
        state = self._client.state()
        momentum = state.momentum if place.steps else {}
        self._client.start(State(state.weights, momentum, place), images)

    def discard(self) -> None:
        """Forgets a batch that was not finished."""
        self._client.discard()

    def move(self, cut: str, *, upto: bool) -> None:
        """Ends at that cut."""
        self._client.move(cut, upto=upto)

    def upcoming(self, count: int) -> Images:
        """The samples that the next forward pass takes."""
        return self._client.upcoming(count)

    def forward(self, count: int, batch: int) -> tuple[Array, Array]:
        """Activations and logits of the next samples."""
        part = self._client.forward(count, batch)
        return _array(part.activations), _array(self._client.logits)

    def backward(self, gradient: Array | None) -> None:
        """Runs the last part backward."""
        self._client.backward(None if gradient is None else torch.from_numpy(gradient))

    def step(self) -> Stepped:
        """Updates the weights."""
        return self._client.step()

    def infer(self, images: Array) -> tuple[Array, Array]:
        """Activations and logits of images."""
        activations, logits = self._client.infer(images)
        return _array(activations), _array(logits)

    def weights(self) -> Mapping[str, Array]:
        """All parameters and statistics."""
        return self._client.state(every=True).weights

    def load_weights(self, weights: Mapping[str, Array]) -> None:
        """Replaces them."""
        self._client.load_weights(weights, every=True)

    def momentum(self) -> Mapping[str, Array]:
        """Of all parameters."""
        return self._client.state(every=True).momentum

    def load_momentum(self, momentum: Mapping[str, Array]) -> None:
        """Replaces it."""
        self._client.load_momentum(momentum, every=True)

    def gradients(self) -> Mapping[str, Array]:
        """Of this batch so far, of all parameters."""
        return self._client.gradients(every=True)


def _array(tensor: Tensor) -> Array:
    return tensor.detach().cpu().numpy()
