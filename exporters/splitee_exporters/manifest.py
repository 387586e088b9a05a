"""manifest.json: what an export's files are, what they were made from, and what verified them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from splitee.graph import Graph
from splitee.ops import Array

NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Verified:
    """How an export was held to what it was made from, and how far off it was."""

    runtime: str
    against: str
    samples: int
    batches: tuple[int, ...]  # sizes in which they ran
    error: float  # the worst of any output, as a share of its largest value
    tolerance: float
    same_class: float  # share of samples whose largest logit is the same


@dataclass(frozen=True)
class File:
    """One file of an export."""

    name: str
    data: bytes
    graph: Graph
    interface: Mapping[str, Any]  # inputs, outputs and whatever else its kind of file has
    verified: Verified


def relative_error(found: Array, expected: Array) -> float:
    """The largest difference as a share of the largest value; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    wide = expected.astype(np.float64)
    largest = float(np.abs(wide).max())
    difference = float(np.abs(found - wide).max())
    return difference / largest if largest else difference


def made_by() -> tuple[str, str]:
    """Name and version of what writes the files."""
    return "hetero-splitee", importlib.metadata.version("hetero-splitee")


def write(folder: Path, model: str, cut: str, files: Sequence[File]) -> Path:
    """Writes the files, and manifest.json beside them; returns its path.

    model: what the network is called.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_bytes(file.data)
    manifest = {
        "format": FORMAT,
        "made_by": " ".join(made_by()),
        "model": model,
        "cut": cut,
        "files": [_entry(file) for file in files],
    }
    path = folder / NAME
    path.write_text(json.dumps(manifest, indent=2) + "\n")
    return path


def _entry(file: File) -> dict[str, Any]:
    graph = file.graph
    return {
        "file": file.name,
        "bytes": len(file.data),
        "sha256": hashlib.sha256(file.data).hexdigest(),
        **file.interface,
        "operations": dict(sorted(Counter(op.kind for op in graph.ops).items())),
        "weights": graph.weight_size,
        "macs_per_sample": graph.macs()[0],
        "graph_checksum": f"{graph.checksum():08x}",
        "verified": asdict(file.verified),
    }
