"""The head of an exit, and how sure it is."""

from __future__ import annotations

import math

import pytest
import torch

from splitee.exits import Exit, entropy, grid_for


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
    assert entropy(torch.tensor([logits])).tolist() == pytest.approx([expected], abs=1e-6)


def test_entropy_is_that_of_each_row() -> None:
    assert entropy(torch.tensor([[0.0, 0.0], [1e9, 0.0]])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 8, 8), (4, 4)),
        ((4, 2, 2), (2, 2)),
        ((4, 1, 1), (1, 1)),
        ((4, 6, 9), (3, 3)),
        ((4, 7, 5), (1, 1)),
        ((4, 10, 12), (2, 4)),
    ],
)
def test_the_grid_of_an_exit_divides_the_image(
    shape: tuple[int, int, int], expected: tuple[int, int]
) -> None:
    assert grid_for(shape) == expected
    assert Exit(shape, 3)(torch.zeros(2, *shape)).shape == (2, 3)
    assert Exit(shape, 3).linear.in_features == 4 * expected[0] * expected[1]
