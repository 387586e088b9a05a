"""What trains behind a link: all that ``serve`` knows of a client on an edge computer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from splitee.data import Images
from splitee.ops import Array
from splitee.state import Place, Settings, Stepped


class Learner(Protocol):
    """A segment with everything that is built in, in float32 arrays.

    What a method may be asked, and when, has been checked before it is called.
    """

    settings: Settings  # may be replaced between batches

    @property
    def place(self) -> Place:
        """Where it stands."""

    def begin(self, place: Place, images: Images) -> None:
        """Stands there, in this shard; where no step was taken, no layer has momentum."""

    def discard(self) -> None:
        """Forgets a batch that was not finished."""

    def move(self, cut: str, *, upto: bool) -> None:
        """Ends at that cut from the next batch on; see ``splitee.client.Client.move``."""

    def upcoming(self, count: int) -> Images:
        """The samples that the next forward pass takes."""

    def forward(self, count: int, batch: int) -> tuple[Array, Array]:
        """Activations at the cut and logits of the exit there, of the next samples.

        count: how many, as a part of a batch of batch samples.
        """

    def backward(self, gradient: Array | None) -> None:
        """Runs the last part backward; gradients add up.

        gradient: dLoss/dActivations, where the settings want one.
        """

    def step(self) -> Stepped:
        """Updates the weights. Raises NotFinite, and forgets the batch, where that cannot be."""

    def infer(self, images: Array) -> tuple[Array, Array]:
        """Activations and logits of uint8 images, with the statistics of training."""

    def weights(self) -> Mapping[str, Array]:
        """All parameters and statistics that are built in."""

    def load_weights(self, weights: Mapping[str, Array]) -> None:
        """Replaces them."""

    def momentum(self) -> Mapping[str, Array]:
        """Of all parameters; empty where the settings make no use of it."""

    def load_momentum(self, momentum: Mapping[str, Array]) -> None:
        """Replaces it."""

    def gradients(self) -> Mapping[str, Array]:
        """Of this batch so far, of all parameters: zeros where nothing came."""
