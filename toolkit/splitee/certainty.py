"""How sure an exit is of its answers, by numpy alone: every client, with torch or without."""

from __future__ import annotations

import math

import numpy as np

from splitee.ops import Array


def log_softmax(logits: Array, temperature: float = 1.0) -> Array:
    """ln softmax(logits / temperature) of each row, in float64."""
    z = np.asarray(logits, np.float64) / temperature
    with np.errstate(invalid="ignore"):  # what is not finite becomes no number
        z = z - z.max(-1, keepdims=True)
        shifted: Array = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return shifted


def entropy(logits: Array, temperature: float = 1.0) -> Array:
    """Normalised entropy H(softmax(logits / temperature)) / ln K of each row, float64, in [0, 1].

    0 is certainty. Of logits that are not finite it is no number.
    """
    log_p = log_softmax(logits, temperature)
    with np.errstate(invalid="ignore"):
        found: Array = -(np.exp(log_p) * log_p).sum(-1) / math.log(log_p.shape[-1])
    return found


def unsure(entropies: Array, threshold: float) -> Array:
    """Of which samples an exit's normalised entropy is too high for it to answer, (samples,).

    Those whose entropy is no number are among them.
    """
    left: Array = ~(entropies <= threshold)
    return left
