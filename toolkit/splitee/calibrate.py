"""Temperatures of exits: what makes their entropies mean the same (Guo et al., ICML 2017).

An exit's logits are divided by its temperature before the softmax: one number for each exit, that
with the least cross-entropy on images that nobody was trained on. No answer changes, only how sure
it is said to be.
"""

from __future__ import annotations

import numpy as np

from splitee.certainty import log_softmax
from splitee.ops import Array

BOUNDS = (0.1, 10.0)
"""Temperatures that are looked at: an exit that makes no mistake on few images is not certain."""

BINS = 15  # of ``error``, as in the paper


def loss(logits: Array, labels: Array, temperature: float) -> float:
    """Mean cross-entropy of logits / temperature, nats."""
    log_p = log_softmax(logits, temperature)
    return float(-np.take_along_axis(log_p, labels.astype(int)[:, None], 1).mean())


def fit(logits: Array, labels: Array) -> float:
    """The temperature with the least cross-entropy, within BOUNDS.

    The loss is convex in 1 / temperature, so that its slope has one zero: it is bisected.
    """
    z = np.asarray(logits, np.float64)
    own = np.take_along_axis(z, labels.astype(int)[:, None], 1)[:, 0]

    def slope(inverse: float) -> float:
        """Of the loss over 1 / temperature: the mean logit expected, less the label's."""
        return float(((np.exp(log_softmax(z, 1 / inverse)) * z).sum(1) - own).mean())

    low, high = 1 / BOUNDS[1], 1 / BOUNDS[0]
    for _ in range(60):
        middle = (low * high) ** 0.5
        if slope(middle) > 0:
            high = middle
        else:
            low = middle
    return float(1 / low)


def error(logits: Array, labels: Array, temperature: float = 1.0) -> float:
    """The expected calibration error, 0..1: how far confidence and accuracy lie apart.

    Samples are put into BINS of equal width by their largest probability; of each bin the distance
    between its mean and the share of right answers counts, by its number of samples.
    """
    p = np.exp(log_softmax(logits, temperature))
    confidence, right = p.max(1), p.argmax(1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, right - confidence, BINS)  # of a bin, summed
    return float(np.abs(gaps).sum() / len(labels))
