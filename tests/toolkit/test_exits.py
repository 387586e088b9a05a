"""The head of an exit."""

from __future__ import annotations

import pytest
import torch

from splitee.exits import Exit, grid_for


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
