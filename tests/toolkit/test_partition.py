"""Which client holds what: nothing lost or doubled, in the proportions that were asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitee import partition
from splitee.data import Dataset, Images
from splitee.errors import FleetError
from splitee.fleet import DataTable
from splitee.ops import Array

SEED = st.integers(0, 2**31 - 1)
SHARES = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)
LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=300).map(np.array)


def whole(parts: list[Array]) -> list[int]:
    """All places that were dealt, sorted."""
    return sorted(np.concatenate(parts).tolist())


def classes(labels: Array, parts: list[Array]) -> Array:
    """How many of each class each part has: (parts, classes)."""
    return np.array([np.bincount(labels[p], minlength=labels.max() + 1) for p in parts])


# ---- iid ----


@given(st.integers(1, 300), SHARES, SEED)
def test_iid_loses_nothing_and_gives_everyone_its_share(
    count: int, shares: list[float], seed: int
) -> None:
    parts = partition.iid(count, np.array(shares), seed)
    assert whole(parts) == list(range(count))
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - count * share / sum(shares)) <= 1 + 1e-6


def test_iid_is_drawn_at_random_from_the_seed() -> None:
    first, again, other = (
        [p.tolist() for p in partition.iid(40, np.array([3, 1]), seed)] for seed in (0, 0, 1)
    )
    assert first == again
    assert [len(p) for p in first] == [len(p) for p in other] == [30, 10]
    assert first != other
    assert first[0] != sorted(first[0])


# ---- dirichlet ----


@given(LABELS, SHARES, st.floats(0.001, 100), SEED)
def test_dirichlet_loses_nothing_and_leaves_nobody_without(
    labels: Array, shares: list[float], alpha: float, seed: int
) -> None:
    parts = partition.dirichlet(labels, np.array(shares), alpha, seed)
    assert whole(parts) == list(range(len(labels)))
    assert min(len(p) for p in parts) >= min(1, len(labels) // len(shares))
    again = partition.dirichlet(labels, np.array(shares), alpha, seed)
    assert [p.tolist() for p in parts] == [p.tolist() for p in again]


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_proportions_have_the_mean_and_the_variance_of_the_distribution(alpha: float) -> None:
    labels, shares = np.arange(10).repeat(1000), np.array([2.0, 1.0, 1.0])
    drawn = np.concatenate(
        [
            classes(labels, partition.dirichlet(labels, shares, alpha, seed)).T / 1000
            for seed in range(400)
        ]
    )  # (4000, 3): one draw for each class and seed
    mean = shares / shares.sum()
    variance = mean * (1 - mean) / (3 * alpha + 1)
    assert drawn.mean(0) == pytest.approx(mean, abs=5 * np.sqrt(variance.max() / 4000))
    assert drawn.var(0) == pytest.approx(variance, rel=0.1)


def test_a_client_that_draws_nothing_gets_one_of_who_has_most() -> None:
    labels = np.zeros(20, int)
    parts = partition.dirichlet(labels, np.ones(5), 0.001, seed=0)
    assert sorted(len(p) for p in parts) == [1, 1, 1, 1, 16]


# ---- classes ----


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), SEED, st.data())
def test_everyone_has_as_many_classes_and_every_class_somebody(
    clients: int, count: int, each: int, seed: int, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(100, 130), min_size=count, max_size=count))
    labels = np.random.default_rng(seed).permutation(np.arange(count).repeat(sizes))
    shares = np.array(data.draw(st.lists(st.floats(0.5, 2), min_size=clients, max_size=clients)))
    if each > count or each * clients < count:
        with pytest.raises(FleetError, match="cannot share"):
            partition.by_classes(labels, shares, each, seed)
        return
    parts = partition.by_classes(labels, shares, each, seed)
    assert whole(parts) == list(range(len(labels)))
    held = classes(labels, parts)
    assert (held > 0).sum(1).tolist() == [each] * clients
    holders = (held > 0).sum(0)
    assert holders.max() - holders.min() <= 1
    for label in range(count):
        there = held[:, label] > 0
        expected = sizes[label] * shares[there] / shares[there].sum()
        assert held[there, label] == pytest.approx(expected, abs=1)


def test_two_shards_a_client_are_those_of_mcmahan() -> None:
    # section 3 there: 100 clients, 200 shards of 300 of 60,000, most clients with two digits
    labels = np.arange(10).repeat(6000)
    held = classes(labels, partition.by_classes(labels, np.ones(100), 2, seed=0))
    assert set(held[held > 0].tolist()) == {300}
    assert held.sum(1).tolist() == [600] * 100


def test_too_few_or_too_many_classes_say_what_may_stand() -> None:
    message = "3 clients of {} classes cannot share 10 classes: take from 4 to 10$"
    for each in (3, 11):
        with pytest.raises(FleetError, match=message.format(each)):
            partition.by_classes(np.arange(10), np.ones(3), each, seed=0)


# ---- folder ----


def test_folders_say_whose_images_are_whose() -> None:
    owners = np.array(["b", "a", "b", "b"])
    assert [p.tolist() for p in partition.by_owner(owners, ["a", "b"])] == [[1], [0, 2, 3]]


def test_a_folder_of_nobody_and_a_client_without_one_are_refused() -> None:
    with pytest.raises(FleetError, match=r'^client "c": partition = "folder", and train/c/ has no'):
        partition.by_owner(np.array(["a", "b"]), ["a", "b", "c"])
    with pytest.raises(FleetError, match=r"train/b/ is the folder of no client"):
        partition.by_owner(np.array(["a", "b"]), ["a"])


# ---- all ----


def dataset(labels: Array) -> Dataset:
    """One pixel for each label."""
    images = Images(np.zeros((len(labels), 1, 1, 1), np.uint8), labels.astype(np.uint8))
    return Dataset("made", images, images, 10, (1.0,), (0.0,))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "classes"])
def test_who_has_less_than_one_sample_is_named(kind: str) -> None:
    table = DataTable.model_validate({"partition": kind, "classes_per_client": 1})
    with pytest.raises(FleetError, match=r'^client ".": its share is less than one sample: give'):
        partition.places(dataset(np.zeros(2)), table, {"a": 1, "b": 1, "c": 1}, seed=0)


def test_the_table_says_how_images_are_dealt() -> None:
    made, shares = dataset(np.arange(10).repeat(50)), {"a": 1.0, "b": 1.0, "c": 2.0}

    def held(**table: object) -> list[list[int]]:
        places = partition.places(made, DataTable.model_validate(table), shares, seed=3)
        assert list(places) == ["a", "b", "c"]
        return [p.tolist() for p in places.values()]

    weights = np.array([1.0, 1.0, 2.0])
    expected = {
        "iid": partition.iid(500, weights, 3),
        "dirichlet": partition.dirichlet(made.train.y, weights, 0.2, 3),
        "classes": partition.by_classes(made.train.y, weights, 4, 3),
    }
    for kind, parts in expected.items():
        table = {"partition": kind, "alpha": 0.2, "classes_per_client": 4}
        assert held(**table) == [p.tolist() for p in parts]
