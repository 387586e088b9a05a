"""What a client learns with, where it stands, what it has learnt and sent; numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from splitee.ops import Array


@dataclass(frozen=True)
class AdamW:
    """What AdamW has beside the rate and the decay (Loshchilov and Hutter, arXiv 1711.05101)."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of a client or a server, and what a client's trunk learns from."""

    learning_rate: float
    momentum: float = 0.0  # of SGD
    weight_decay: float = 0.0
    exit_weight: float = 1.0  # of the exits' gradient in the trunk
    server_weight: float = 0.0  # of the server's gradient in the trunk
    clip: float = 0.0  # largest norm of all gradients of a step together; 0: any
    adamw: AdamW | None = None  # None: SGD, all that a device learns by
    distill: float = 0.0  # share of the deepest exit's answer in what the shallower learn from

    @property
    def wants_gradient(self) -> bool:
        """Whether the server has to return dLoss/dActivations."""
        return self.server_weight != 0.0


def trunk_weights(gradient: str, exit_weight: float = 0.5) -> tuple[float, float]:
    """(exit_weight, server_weight) of a gradient mode: local, server or both.

    The exits themselves learn from their own loss in full whatever the mode: an exit_weight of 0
    is then exactly server, and one of 1 exactly local.
    """
    mixed = (exit_weight, 1.0 - exit_weight)
    return {"local": (1.0, 0.0), "server": (0.0, 1.0), "both": mixed}[gradient]


@dataclass(frozen=True)
class Place:
    """Where a client stands: samples held, place in its data order, steps taken."""

    samples: int
    seed: int
    epoch: int = 0
    position: int = 0  # samples of this epoch already used
    steps: int = 0


@dataclass(frozen=True)
class State:
    """All of a client that a reset, a resume or an aggregation needs."""

    weights: Mapping[str, Array]  # float32 parameters and statistics by name
    # what the optimiser remembers: of SGD by parameter, empty without momentum; of AdamW by
    # parameter and moment (splitee.optimizer)
    momentum: Mapping[str, Array]
    place: Place


@dataclass(frozen=True)
class Stepped:
    """A batch at the exit at the cut, measured before the step."""

    loss: float  # mean cross-entropy, nats
    correct: int


@dataclass
class Traffic:
    """Bytes that crossed a client's link."""

    up: int = 0
    down: int = 0
    activations_up: int = 0  # the share of up that training batches sent
