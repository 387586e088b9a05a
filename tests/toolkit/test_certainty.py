"""How sure an exit is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from splitee.certainty import entropy, log_softmax, unsure
from splitee.client import unsure_of


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], 1.0),  # nothing known
        ([3.0, 3.0, -1e9, -1e9], 0.5),  # one bit of two
        ([1e9, 0.0, 0.0, 0.0], 0.0),  # certain
        # p = 1/2, 1/4, 1/8, 1/8: 1.75 bits of two
        ([math.log(4), math.log(2), 0.0, 0.0], 0.875),
    ],
)
def test_entropy_is_a_share_of_the_most_there_can_be(logits: list[float], expected: float) -> None:
    assert entropy(np.array([logits])).tolist() == pytest.approx([expected], abs=1e-6)


def test_entropy_is_that_of_each_row() -> None:
    assert entropy(np.array([[0.0, 0.0], [1e9, 0.0]])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_temperature_divides_the_logits(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (50, 7)).astype(np.float32)
    expected = torch.distributions.Categorical(logits=torch.tensor(logits).double() / temperature)
    wanted = (expected.entropy() / math.log(7)).numpy()  # type: ignore[no-untyped-call]
    assert entropy(logits, temperature) == pytest.approx(wanted, abs=1e-12)
    wanted = torch.log_softmax(torch.tensor(logits).double() / temperature, 1).numpy()
    assert log_softmax(logits, temperature) == pytest.approx(wanted, abs=1e-12)


def test_what_is_no_number_is_unsure_whatever_the_threshold() -> None:
    logits = np.array([[9, 0, 0], [np.nan, 0, 0], [np.inf, 0, 0], [0, 0, 0]], np.float32)
    for threshold, expected in (
        (0.5, [False, True, True, True]),
        (1.0, [False, True, True, False]),
    ):
        assert unsure(entropy(logits), threshold).tolist() == expected
        assert unsure_of(torch.from_numpy(logits), threshold).tolist() == expected
