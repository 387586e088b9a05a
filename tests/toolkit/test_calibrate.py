"""Temperatures of exits, held to a search that looks at many, and to figures worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from splitee import calibrate
from splitee.ops import Array


def overconfident(samples: int, classes: int, factor: float) -> tuple[Array, Array]:
    """Logits that are factor times those of the probabilities that labels are drawn by."""
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 1.5, (samples, classes))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.choice(classes, p=row) for row in p], np.uint8)
    return (factor * logits).astype(np.float32), labels


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_the_temperature_is_that_of_least_loss_of_all_that_a_search_tries(factor: float) -> None:
    logits, labels = overconfident(400, 5, factor)
    tried = np.geomspace(0.2, 8, 3001)
    x, y = torch.tensor(logits).double(), torch.tensor(labels).long()
    losses = [float(F.cross_entropy(x / t, y)) for t in tried]
    expected = tried[int(np.argmin(losses))]
    found = calibrate.fit(logits, labels)
    assert found == pytest.approx(expected, rel=2e-3)
    assert calibrate.loss(logits, labels, found) <= min(losses) + 1e-9
    assert calibrate.loss(logits, labels, 1.0) == pytest.approx(float(F.cross_entropy(x, y)))


def test_it_finds_the_factor_that_logits_are_too_large_by() -> None:
    logits, labels = overconfident(20_000, 4, 2.5)
    assert calibrate.fit(logits, labels) == pytest.approx(2.5, rel=0.05)


def test_without_a_mistake_to_learn_from_it_stays_within_its_bounds() -> None:
    labels = np.array([0, 1] * 60, np.uint8)
    right = np.where(np.arange(2) == labels[:, None], 1, 0).astype(np.float32)
    assert calibrate.fit(right, labels) == pytest.approx(calibrate.BOUNDS[0])
    assert calibrate.fit(-right, labels) == pytest.approx(calibrate.BOUNDS[1])


def test_the_calibration_error_is_what_confidence_and_accuracy_differ_by() -> None:
    # two bins: four samples of confidence 0.9, of which two are right, and four of 0.6, three right
    confident, doubtful = np.log([0.9, 0.1]), np.log([0.6, 0.4])
    logits = np.stack([confident] * 4 + [doubtful] * 4)
    labels = np.array([0, 0, 1, 1, 0, 0, 0, 1], np.uint8)
    expected = 4 / 8 * abs(2 / 4 - 0.9) + 4 / 8 * abs(3 / 4 - 0.6)
    assert calibrate.error(logits, labels) == pytest.approx(expected)
    # at a temperature of 2, 0.9 becomes 3 / (3 + 1)
    assert calibrate.error(logits[:4], labels[:4], 2.0) == pytest.approx(abs(2 / 4 - 0.75))


def test_certain_and_right_is_no_error() -> None:
    logits = np.array([[100.0, 0.0], [0.0, 100.0]])
    assert calibrate.error(logits, np.array([0, 1])) == pytest.approx(0)
    assert calibrate.error(logits, np.array([1, 0])) == pytest.approx(1)
