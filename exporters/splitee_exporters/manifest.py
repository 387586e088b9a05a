"""manifest.json: what an export's files are, what they were made from, and what verified them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from splitee.errors import ExportError
from splitee.graph import Graph
from splitee.ops import Array

NAME = "manifest.json"
FORMAT = 1
LARGEST = "largest difference, as a share of the largest value"
MEAN_SQUARE = "root mean square of the differences, as a share of that of the values"
TOLERANCE = 1e-5  # of a float32 output
INT8_TOLERANCE = 0.1  # of an output in 8 bits, by MEAN_SQUARE
LEARNING_TOLERANCE = 1e-4  # of what a float32 weight learns, from PyTorch's float32
CURES = {
    LARGEST: "it is not fit for use",
    MEAN_SQUARE: "calibrate with more images, like those that it will see",
}
FLOOR = 1e-3  # of the largest weight: what learns from nothing but rounding is smaller


@dataclass(frozen=True)
class Verified:
    """How an export was held to what it was made from, and how far off it was."""

    runtime: str
    against: str
    samples: int
    batches: tuple[int, ...]  # sizes in which they ran
    error: float  # the worst of any output
    measure: str  # of that error: LARGEST or MEAN_SQUARE
    tolerance: float
    same_class: float | None  # share of samples whose largest logit is the same; None: not asked


@dataclass(frozen=True)
class File:
    """One file of an export."""

    name: str
    data: bytes
    graph: Graph
    interface: Mapping[str, Any]  # inputs, outputs and whatever else its kind of file has
    verified: Verified


def error_of(found: Array, expected: Array, measure: str = LARGEST, floor: float = 0.0) -> float:
    """How far an output is off; infinite where shapes differ. Values below floor count as floor.

    In 8 bits it is MEAN_SQUARE that tells: a value that calibration has not seen is clipped.
    """
    if found.shape != expected.shape:
        return float("inf")
    wide = expected.astype(np.float64)

    def size(x: Array) -> float:
        return float(np.abs(x).max() if measure == LARGEST else np.sqrt(np.mean(x**2)))

    whole, difference = max(size(wide), floor), size(found - wide)
    return difference / whole if whole else difference


def hold(what: str, error: float, tolerance: float, against: str, measure: str = LARGEST) -> None:
    """Raises ExportError where what a file answers is off by more than the tolerance."""
    if not error <= tolerance:
        kind = " (root mean square)" if measure == MEAN_SQUARE else ""
        raise ExportError(
            f"{what}: off by {error:.1e} from {against}{kind}, and {tolerance:.0e} is allowed: "
            f"{CURES[measure]}"
        )


def learning_errors(found: Mapping[str, Array], learnt: Mapping[str, Array]) -> dict[str, float]:
    """How far each weight is off from what it should have learnt.

    A weight whose values are all tiny counts as FLOOR times the largest: a bias in front of a norm
    learns nothing but what is lost in rounding.
    """
    floor = FLOOR * max(float(np.abs(value).max()) for value in learnt.values())
    return {name: error_of(value, learnt[name], floor=floor) for name, value in found.items()}


def made_by() -> tuple[str, str]:
    """Name and version of what writes the files."""
    return "hetero-splitee", importlib.metadata.version("hetero-splitee")


def write(
    folder: Path,
    model: str,
    cut: str,
    files: Sequence[File],
    beside: Mapping[str, bytes] | None = None,
) -> Path:
    """Writes the files, and manifest.json beside them; returns its path.

    model: what the network is called. beside: further files that are needed, by their path. All are
    written before any takes the place of what is there. Raises ExportError where they cannot be.
    """
    beside = beside or {}
    manifest = {
        "format": FORMAT,
        "made_by": " ".join(made_by()),
        "model": model,
        "cut": cut,
        "files": [_entry(file) for file in files],
        "beside": {path: _digest(data) for path, data in sorted(beside.items())},
    }
    contents = {file.name: file.data for file in files} | dict(beside)
    contents[NAME] = (json.dumps(manifest, indent=2) + "\n").encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as name:
            new = Path(name)
            for path, data in contents.items():
                (new / path).parent.mkdir(parents=True, exist_ok=True)
                (new / path).write_bytes(data)
            for path in contents:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (new / path).replace(folder / path)
    except OSError as error:
        raise ExportError(
            f"{folder}: {error.strerror or error}: free some space or choose a folder that you may "
            "write to; what was there is untouched"
        ) from error
    return folder / NAME


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _entry(file: File) -> dict[str, Any]:
    graph = file.graph
    return {
        "file": file.name,
        "bytes": len(file.data),
        "sha256": _digest(file.data),
        **file.interface,
        "operations": dict(sorted(Counter(op.kind for op in graph.ops).items())),
        "weights": graph.weight_size,
        "macs_per_sample": graph.macs()[0],
        "graph_checksum": f"{graph.checksum():08x}",
        "verified": asdict(file.verified),
    }
