"""Early exits at work: an exit answers what it is sure of, the server the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

from splitee.certainty import entropy, unsure
from splitee.ops import Array
from splitee_host.learner import Learner


class Holder(Protocol):
    """What holds a client's segment: torch, ONNX Runtime, or a board in 8 bits."""

    @property
    def capacity(self) -> int:
        """Samples that it takes at once."""

    def infer(self, images: Array) -> Array:
        """The logits of the exit at the cut, (n, classes), of uint8 images."""

    def activations(self, chosen: Array) -> Array:
        """Of the images asked last the activations of some, float32; chosen: (n,) of bool."""


class LearnerHolder:
    """A ``Learner`` that learns nothing any more."""

    def __init__(self, learner: Learner, capacity: int) -> None:
        self.capacity = capacity
        self._learner = learner
        self._activations: Array = np.zeros(0, np.float32)

    def infer(self, images: Array) -> Array:
        """The logits."""
        self._activations, logits = self._learner.infer(images)
        return logits

    def activations(self, chosen: Array) -> Array:
        """Those of the chosen."""
        return self._activations[chosen]


Ask = Callable[[Array], Array | None]
"""The server's logits for activations; None where it cannot be reached."""


@dataclass(frozen=True)
class Answered:
    """How images were answered; every array has a value for each."""

    classes: Array
    exit_classes: Array  # the exit's own answers, whether or not it was sure
    entropies: Array  # of the exit, at its temperature
    unsure: Array  # bool: the exit was
    served: Array  # bool: the server answered

    @property
    def share_at_exit(self) -> float:
        """Of the samples those that the exit was sure of, 0..1."""
        return 1 - float(self.unsure.mean())


def answer(
    holder: Holder, ask: Ask | None, images: Array, threshold: float, temperature: float = 1.0
) -> Iterator[Answered]:
    """Answers images, as many at a time as the holder takes.

    The exit answers up to an entropy of threshold, at its temperature. The activations of all other
    samples go to the server; where there is none, the exit's answers have to do for them.
    """
    for start in range(0, len(images), holder.capacity):
        logits = holder.infer(images[start : start + holder.capacity])
        entropies = entropy(logits, temperature)
        asked = unsure(entropies, threshold)
        classes = logits.argmax(1)
        exit_classes, served = classes.copy(), np.zeros(len(logits), bool)
        if ask is not None and asked.any():
            found = ask(holder.activations(asked))
            if found is not None:
                classes[asked], served = found.argmax(1), asked
        yield Answered(classes, exit_classes, entropies, asked, served)


def joined(parts: Sequence[Answered]) -> Answered:
    """What was answered in parts, as one."""
    names = [field.name for field in fields(Answered)]
    return Answered(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
