"""The digits, and the order in which a client uses its samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from splitee import data
from splitee.data import Images, constants, draw_order
from splitee.errors import SpliteeError
from splitee.ops import Array

# Drawn by ``order_by_definition`` below, and by no other program.
ORDERS = {
    (8, 1, 0): [5, 3, 1, 4, 7, 6, 2, 0],
    (12, 4097, 3): [10, 5, 9, 4, 6, 7, 3, 0, 2, 11, 8, 1],
}


def order_by_definition(size: int, seed: int, epoch: int) -> list[int]:
    """The same order from the definitions, in numpy's wrapping 32-bit integers.

    Durstenfeld's shuffle from the end down, with the 32-bit xorshift of Marsaglia (2003; shifts 13,
    17, 5), begun at MurmurHash3's finaliser. A draw below n is the high word of 32 bits times n.
    """

    def fmix32(h: np.uint32) -> np.uint32:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
        return h

    with np.errstate(over="ignore"):
        state = fmix32(np.uint32(seed) ^ fmix32(np.uint32(epoch) + np.uint32(1)))
        state = state or np.uint32(1)
        left = list(range(size))
        drawn: list[int] = []
        while left:
            for shift in (13, -17, 5):
                by = np.uint32(abs(shift))
                state = state ^ (state << by if shift > 0 else state >> by)
            place = int(state) * len(left) // 2**32
            left[place], left[-1] = left[-1], left[place]
            drawn.append(left.pop())
    return drawn[::-1]


@pytest.mark.parametrize(("size", "seed", "epoch"), ORDERS)
def test_the_order_of_an_epoch_is_the_one_on_paper(size: int, seed: int, epoch: int) -> None:
    assert order_by_definition(size, seed, epoch) == ORDERS[size, seed, epoch]
    assert draw_order(size, seed, epoch).tolist() == ORDERS[size, seed, epoch]


U32 = st.integers(0, 2**32 - 1)


@given(st.integers(0, 200), U32, U32)
def test_an_order_is_a_permutation_and_follows_the_definition(
    size: int, seed: int, epoch: int
) -> None:
    order = draw_order(size, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(size))
    assert order.tolist() == order_by_definition(size, seed, epoch)


def test_neighbouring_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = [draw_order(50, seed, epoch).tolist() for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16


def test_every_sample_comes_first_about_as_often() -> None:
    firsts = np.bincount([draw_order(8, seed, 0)[0] for seed in range(4000)], minlength=8)
    # 500 each; the standard deviation is 21
    assert firsts.min() > 400
    assert firsts.max() < 600


def test_the_digits_are_scikit_learns_in_a_fixed_split() -> None:
    digits = data.load("digits")
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert (digits.shape, digits.classes) == ((1, 8, 8), 10)
    assert digits.train.x.dtype == digits.train.y.dtype == np.uint8

    def rows(x: Array, y: Array) -> list[bytes]:
        return sorted(bytes([label, *image.ravel()]) for image, label in zip(x, y, strict=True))

    source = load_digits()
    images = np.round(source.images / 16 * 255).astype(np.uint8)
    both = [np.concatenate(pair) for pair in
            ((digits.train.x, digits.test.x), (digits.train.y, digits.test.y))]  # fmt: skip
    assert rows(*both) == rows(images, source.target)  # none lost, none twice
    again = data.load("digits")
    assert np.array_equal(digits.train.x, again.train.x)
    assert np.array_equal(digits.test.y, again.test.y)


def test_both_parts_of_the_digits_hold_every_class() -> None:
    digits = data.load("digits")
    assert np.bincount(digits.train.y).min() > 100
    assert np.bincount(digits.test.y).min() > 20


def test_the_constants_give_zero_mean_and_unit_variance() -> None:
    digits = data.load("digits")
    x = digits.train.x.astype(np.float64) * digits.scale[0] + digits.shift[0]
    assert x.mean() == pytest.approx(0, abs=1e-6)
    assert x.std() == pytest.approx(1, abs=1e-6)


def test_the_constants_are_those_of_each_channel_and_exact_in_float32() -> None:
    x = np.zeros((2, 2, 1, 2), np.uint8)
    x[:, 0] = [[[0, 2]], [[0, 2]]]  # mean 1, deviation 1
    x[:, 1] = [[[10, 10]], [[50, 50]]]  # mean 30, deviation 20
    scale, shift = constants(Images(x, np.zeros(2, np.uint8)))
    assert scale == (1.0, float(np.float32(0.05)))
    assert shift == (-1.0, -1.5)


def test_unknown_data_list_what_there_is() -> None:
    with pytest.raises(SpliteeError, match=r'^data "cifar" is unknown: take one of digits$'):
        data.load("cifar")


def numbered(count: int) -> Images:
    """Images that can be told apart by their only pixel and half by their label."""
    places = np.arange(count)
    return Images((places % 256).astype(np.uint8).reshape(-1, 1, 1, 1), places.astype(np.int64))


def test_images_are_chosen_by_places_and_by_a_slice() -> None:
    images = numbered(10)
    assert images[np.array([3, 1])].y.tolist() == [3, 1]
    assert images[np.array([3, 1])].x.ravel().tolist() == [3, 1]
    assert images[4:6].y.tolist() == [4, 5]
    assert len(images[4:6]) == 2
