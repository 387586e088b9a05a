"""Cross-layer aggregation, worked out by hand."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from splitee.means import Copy, cross_layer_mean
from toolkit.networks import arrays, unequal


def layer(*values: float) -> Tensor:
    """A layer of these values."""
    return torch.tensor(values, dtype=torch.float32)


def copies(*owners: tuple[int, dict[str, Tensor]]) -> list[Copy]:
    """Each owner's samples and layers."""
    return [{name: (t, samples) for name, t in layers.items()} for samples, layers in owners]


def test_each_layer_is_averaged_over_its_owners_by_samples() -> None:
    # Three clients cut behind stages 1, 2 and 3 of a network of four, with 10, 30 and 60 samples:
    # their replicas own stages 2-4, 3-4 and 4.
    means = cross_layer_mean(
        copies(
            (10, {"stage2": layer(1, 5), "stage3": layer(8), "stage4": layer(-1, 0, 1)}),
            (30, {"stage3": layer(4), "stage4": layer(3, 2, 1)}),
            (60, {"stage4": layer(5, 0, 2)}),
        )
    )
    assert {name: mean.tolist() for name, mean in means.items()} == {
        "stage2": [1, 5],  # one owner
        "stage3": [5],  # (10 x 8 + 30 x 4) / 40
        # (10 x -1 + 30 x 3 + 60 x 5) / 100; (30 x 2) / 100; (10 + 30 + 60 x 2) / 100
        "stage4": [np.float32(3.8), np.float32(0.6), np.float32(1.6)],
    }


def test_clients_own_their_layers_and_their_exits_too() -> None:
    # With aggregate = "all": client one is cut behind stage 1, two and three behind stage 2.
    means = cross_layer_mean(
        copies(
            (20, {"stage2": layer(6)}),  # the replica of one
            (20, {"stage1": layer(1), "exits.stage1": layer(100)}),
            (20, {}),  # the replicas of two and three own stage 3 only
            (20, {"stage1": layer(3), "stage2": layer(3), "exits.stage2": layer(2)}),
            (60, {"stage1": layer(5), "stage2": layer(0), "exits.stage2": layer(4)}),
        )
    )
    assert {name: mean.tolist() for name, mean in means.items()} == {
        "stage1": [np.float32(3.8)],  # (20 x 1 + 20 x 3 + 60 x 5) / 100
        "stage2": [np.float32(1.8)],  # (20 x 6 + 20 x 3 + 60 x 0) / 100
        "exits.stage1": [100],
        "exits.stage2": [3.5],  # (20 x 2 + 60 x 4) / 80
    }


def test_a_layer_with_one_owner_is_that_owners_bit_for_bit() -> None:
    # 1/3 times 7 over 7 would round; so would nan and the sign of zero be at risk
    lonely = layer(1 / 3, 1e-42, -0.0, 3.4e38, float("inf"))
    (mean,) = cross_layer_mean(copies((7, {"stage1": lonely}), (5, {}))).values()
    assert mean.numpy().tobytes() == lonely.numpy().tobytes()
    lonely += 1
    assert mean[0] == np.float32(1 / 3)  # a copy


def test_copies_that_no_sample_trained_count_only_where_none_was_trained() -> None:
    means = cross_layer_mean(
        copies(
            (0, {"trained": layer(100), "untrained": layer(7)}),
            (3, {"trained": layer(1 / 3)}),
            (0, {"trained": layer(50), "untrained": layer(9)}),
        )
    )
    assert {name: mean.tolist() for name, mean in means.items()} == {
        "trained": [np.float32(1 / 3)],
        "untrained": [7],
    }


def test_sums_are_wider_than_the_weights() -> None:
    # in float32, 2^24 + 1 is 2^24 already: the mean of the three would be 2^24 / 3
    means = cross_layer_mean(
        copies(*((1, {"w": layer(value)}) for value in (2.0**24, 1.0, 1.0, -(2.0**24))))
    )
    assert means["w"].tolist() == [0.5]
    assert means["w"].dtype == torch.float32


def test_the_mean_of_equal_copies_is_the_copy() -> None:
    generator = torch.Generator().manual_seed(0)
    same = {"a": torch.randn(3, 4, generator=generator), "b": torch.randn(2, generator=generator)}
    means = cross_layer_mean(copies((3, same), (5, same), (11, same)))
    assert unequal(arrays(means), arrays(same)) == []
