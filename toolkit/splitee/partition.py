"""Which client holds which training images; drawn from a seed, none lost and none twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from splitee.data import Dataset, draw_order
from splitee.errors import FleetError
from splitee.ops import Array

if TYPE_CHECKING:
    from splitee.fleet import DataTable


def places(
    dataset: Dataset, table: DataTable, shares: Mapping[str, float], seed: int
) -> dict[str, Array]:
    """Each client's places among the training images, as the fleet file's table says.

    shares: of the images, by client, relative to the others. Raises FleetError where a client
    would have none, or an image would be nobody's.
    """
    labels, weights = dataset.train.y, np.array(list(shares.values()))
    match table.partition:
        case "iid":
            parts = iid(len(labels), weights, seed)
        case "dirichlet":
            parts = dirichlet(labels, weights, table.alpha, seed)
        case "classes":
            parts = by_classes(labels, weights, table.classes_per_client, seed)
        case "folder":
            assert dataset.owners is not None, "its folders are read with partition = folder"
            parts = by_owner(dataset.owners, shares)
    for name, part in zip(shares, parts, strict=True):
        if len(part) == 0:
            raise FleetError(
                f'client "{name}": its share is less than one sample: give it a larger one, or '
                f"take more than {len(labels)} training images"
            )
    return dict(zip(shares, parts, strict=True))


def iid(count: int, shares: Array, seed: int) -> list[Array]:
    """Drawn at random whatever the classes, in proportion to the shares."""
    return _cut(draw_order(count, seed, 0), shares)


def dirichlet(labels: Array, shares: Array, alpha: float, seed: int) -> list[Array]:
    """Each class is cut by proportions drawn from a Dirichlet distribution.

    Their means are the clients' shares, and their concentration alpha for each client, as in Li et
    al., arXiv 2102.02079: a small alpha leaves a client few classes, a large one tends to iid. How
    many samples a client has varies, too; who would have none gets one of those of who has most.
    """
    random = np.random.default_rng(seed)
    concentration = alpha * len(shares) * shares / shares.sum()
    dealt = [
        _cut(random.permutation(np.flatnonzero(labels == label)), random.dirichlet(concentration))
        for label in np.unique(labels)
    ]
    parts = [np.concatenate(pieces) for pieces in zip(*dealt, strict=True)]
    for i in (i for i, part in enumerate(parts) if len(part) == 0):
        most = max(range(len(parts)), key=lambda j: len(parts[j]))
        if len(parts[most]) > 1:
            parts[i], parts[most] = parts[most][-1:], parts[most][:-1]
    return [np.sort(part) for part in parts]


def by_classes(labels: Array, shares: Array, each: int, seed: int) -> list[Array]:
    """Every client has as many classes as each says, and every class as many clients, or one more.

    The shards of McMahan et al., arXiv 1602.05629, with the classes of a client told apart: a class
    is cut among its clients in proportion to their shares. Raises FleetError where a class would be
    nobody's.
    """
    classes = np.unique(labels)
    if each > len(classes) or each * len(shares) < len(classes):
        least = -(-len(classes) // len(shares))
        raise FleetError(
            f"data.classes_per_client: {len(shares)} clients of {each} classes cannot share "
            f"{len(classes)} classes: take from {least} to {len(classes)}"
        )
    random = np.random.default_rng(seed)
    holders: list[list[int]] = [[] for _ in classes]
    for client in random.permutation(len(shares)):
        held = np.array([len(holder) for holder in holders])
        for place in np.lexsort((random.random(len(classes)), held))[:each]:
            holders[place].append(int(client))
    parts: list[list[Array]] = [[] for _ in shares]
    for label, holder in zip(classes, holders, strict=True):
        members = random.permutation(np.flatnonzero(labels == label))
        for client, piece in zip(holder, _cut(members, shares[holder]), strict=True):
            parts[client].append(piece)
    return [np.sort(np.concatenate(pieces)) for pieces in parts]


def by_owner(owners: Array, names: Sequence[str] | Mapping[str, float]) -> list[Array]:
    """As the folders of the images say, whatever the shares.

    Raises FleetError where a folder is no client's, or a client has none.
    """
    folders = set(owners.tolist())
    for name in names:
        if name not in folders:
            raise FleetError(
                f'client "{name}": partition = "folder", and train/{name}/ has no images that are '
                "used: add some, or take more samples"
            )
    if strange := sorted(folders - set(names)):
        raise FleetError(
            f'partition = "folder": train/{strange[0]}/ is the folder of no client: name one so, '
            "or take it out of train"
        )
    return [np.flatnonzero(owners == name) for name in names]


def _cut(places: Array, weights: Array) -> list[Array]:
    """Neighbouring pieces of an array, in proportion to the weights, to the nearest place."""
    ends = np.cumsum([0.0, *weights])
    return [places[a:b] for a, b in pairwise(np.round(ends / ends[-1] * len(places)).astype(int))]
