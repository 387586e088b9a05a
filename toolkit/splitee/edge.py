"""The folder that an edge client trains from, made where the network is and taken to where it runs.

==================  ================================================================
client.json         the build: its graph, without values, and its settings
weights.npy         the values that it begins with, in one float32 vector
deployed.json       of a run: what its exit answers by, and how the run's server knows it
2-upto/infer.onnx   for each cut that is built in, by its number, with every exit up to
  forward.onnx      it (``upto``) or the one at it alone (``own``): the passes as ONNX
  backward.onnx     graphs, whose values are named below
  step.onnx
==================  ================================================================
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from splitee.codec import Codec, Coding
from splitee.errors import ExportError
from splitee.graph import Graph, Op
from splitee.place import Build
from splitee.steps import Levers

FORMAT = 2
NAME, VALUES, DEPLOYED = "client.json", "weights.npy", "deployed.json"
_AGAIN = "export the client again (`splitee export`) and bring all of its folder"
PASSES = ("infer", "forward", "backward", "step")

# What the graphs' values are called. Weights have their names of the state dict, all others are
# made of these or stand here.
IMAGES, LABELS = "images", "labels"  # uint8 (n, channels, height, width), int64 (n,)
BATCH = "batch size"  # float32: samples of the whole batch, of which these are a part
SEEN = "samples seen"  # float32: of this batch, before forward; in step, all of them
ACTIVATIONS, LOGITS = "activations", "logits"
LOSS = "loss"  # cross-entropy of the exit at the cut: summed, divided by the whole batch
CORRECT = "correct"  # int64: samples whose largest logit there is their label's
SERVER_GRADIENT = "server gradient"  # dLoss/dActivations
SETTINGS = (
    *("learning_rate", "momentum", "weight_decay"),
    *("exit_weight", "server_weight", "clip", "distill"),
)


def gradient(parameter: str) -> str:
    """Of the batch so far: from backward, for step."""
    return f"{parameter}.gradient"


def momentum(parameter: str) -> str:
    """The optimiser's velocity, for step."""
    return f"{parameter}.momentum"


def measured(statistic: str) -> str:
    """A running statistic's counterpart in the batch so far: from forward, for step."""
    return f"{statistic}.batch"


def before(value: str) -> str:
    """A value of the batch, or a velocity, as it goes in: what comes out goes on from it."""
    return f"{value}.before"


def after(weight: str) -> str:
    """A weight as it leaves step."""
    return f"{weight}.after"


@dataclass(frozen=True)
class Deployed:
    """A client of a run as it answers: what its exit goes by, and how the run's server knows it."""

    client: str
    number: int  # its place among the names of the checkpoint's clients, sorted; the first is 1
    checkpoint: int  # CRC-32 of the checkpoint that both halves are of
    cut: str
    entropy: float  # normalised, up to which the exit answers
    temperature: float  # of the exit
    coding: Coding  # of the activations that go to the server
    elements: int  # of a sample's activations
    classes: int

    @property
    def codec(self) -> Codec:
        """How the activations that go to the server are coded."""
        return self.coding.up(self.elements)


@dataclass(frozen=True)
class Variant:
    """A cut that is built in, and which exits run with it."""

    folder: str
    graph: Graph  # what runs in training
    exit: Graph  # what answers: the trunk, and the exit at the cut alone


def variant(build: Build, cut: str, *, upto: bool) -> Variant:
    """What a client trains at a cut. Raises CutError for one that is not built in."""
    number = build.number(cut, upto=True)
    every = upto or number == 1 or not build.moves
    return Variant(
        f"{number}-{'upto' if every else 'own'}",
        build.graph.at(cut, upto=every),
        build.graph.at(cut, upto=False),
    )


def variants(build: Build) -> Iterator[Variant]:
    """Everything that a client can be, each once."""
    for number, stage in enumerate(build.stages, 1):
        for upto in (True, False) if number > 1 else (True,):
            yield variant(build, stage.cut, upto=upto)


def files(build: Build) -> dict[str, bytes]:
    """The build and its values, by the names of their files; the passes are an exporter's."""
    graph = build.graph
    described = {
        "format": FORMAT,
        "checksum": f"{build.checksum:08x}",
        "graph": {
            "input": graph.input,
            "input_shape": graph.input_shape,
            "ops": [asdict(op) for op in graph.ops],
            "parameters": {name: value.shape for name, value in graph.parameters.items()},
            "statistics": {name: value.shape for name, value in graph.statistics.items()},
            "cut": graph.cut,
            "exits": dict(graph.exits),
            "classes": graph.classes,
        },
        "capacity": build.capacity,
        "momentum": build.momentum,
        "samples_max": build.samples_max,
        "scale": build.scale,
        "shift": build.shift,
        "moves": build.moves,
        "distills": build.distills,
        "levers": asdict(build.levers),
    }
    values = io.BytesIO()
    np.save(values, graph.flatten(graph.weights), allow_pickle=False)
    text = json.dumps(described, indent=1) + "\n"
    return {NAME: text.encode(), VALUES: values.getvalue()}


def read(folder: Path) -> Build:
    """The build in a folder, with its values.

    Raises ExportError where there is none, where it is of another version of this program, or where
    it is not what was written.
    """
    path = folder / NAME
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        if described["format"] != FORMAT:
            raise ExportError(
                f"{path}: it has format {described['format']}, and this program reads {FORMAT}: "
                f"{_AGAIN}"
            )
        build = _build(described, np.load(folder / VALUES, allow_pickle=False))
    except OSError as error:
        raise ExportError(f"{error.filename or path}: {error.strerror}: {_AGAIN}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{path}: not what was exported ({error!r}): {_AGAIN}") from error
    if f"{build.checksum:08x}" != described["checksum"]:
        raise ExportError(f"{path}: it was changed after it was exported: {_AGAIN}")
    return build


def deployed_file(deployed: Deployed) -> bytes:
    """The file of that name."""
    return (json.dumps(asdict(deployed), indent=1) + "\n").encode()


def read_deployed(folder: Path) -> Deployed:
    """How an exported client answers.

    Raises ExportError where that was not exported, or cannot be read.
    """
    path = folder / DEPLOYED
    if not path.exists():
        raise ExportError(
            f"{path}: no such file: to answer, a client has to be exported of a run, "
            "`splitee export runs/x`"
        )
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return Deployed(**{**told, "coding": Coding(**told["coding"])})
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror}: {_AGAIN}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path}: not what was exported ({error!r}): {_AGAIN}") from error


def _build(described: dict[str, Any], values: np.ndarray[Any, Any]) -> Build:
    told = described["graph"]
    shapes = {**told["parameters"], **told["statistics"]}
    empty = Graph(
        told["input"],
        tuple(told["input_shape"]),
        tuple(Op(**{**op, "inputs": tuple(op["inputs"])}) for op in told["ops"]),
        {name: np.zeros(shapes[name], np.float32) for name in told["parameters"]},
        {name: np.zeros(shapes[name], np.float32) for name in told["statistics"]},
        told["cut"],
        told["exits"],
        told["classes"],
    )
    if values.shape != (empty.weight_size,):
        raise ValueError(f"{VALUES} has {values.size} values, not {empty.weight_size}")
    return Build(
        empty.holding(empty.unflatten(values)),
        described["capacity"],
        described["momentum"],
        described["samples_max"],
        tuple(described["scale"]),
        tuple(described["shift"]),
        described["moves"],
        described["distills"],
        Levers(**described["levers"]),
    )
