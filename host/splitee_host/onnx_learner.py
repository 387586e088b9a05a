"""A client without torch: trains a segment in ONNX Runtime, by the graphs of its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from splitee import edge
from splitee.data import Images, Shard
from splitee.errors import ExportError, MissingTool, NotFinite
from splitee.ops import Array
from splitee.place import Build
from splitee.state import Place, Settings, Stepped

try:
    import onnxruntime
except ModuleNotFoundError as error:
    raise MissingTool(
        f"{error.name} is not installed: pip install 'hetero-splitee[edge]'"
    ) from error

# Values are ONNX Runtime's own (OrtValue), so that none is copied on its way to the next graph.
Values = dict[str, Any]


class OnnxLearner:
    """The segment of an exported folder, as ``serve`` has it train behind a link."""

    def __init__(self, folder: Path) -> None:
        """Raises ExportError where the folder is not what was exported, or not all of it."""
        self.build: Build = edge.read(folder)
        self._folder = folder
        self._known: dict[str, _Passes] = {}
        graph = self.build.graph
        self._weights = _values(graph.weights)
        self._velocity = _values(_zeros(graph.parameters))
        self._gradients: Values = {}  # of this batch, where something has come
        self._measured: Values = {}  # by batch norms, of this batch
        self._kept: Values = {}  # by the last forward pass, for backward
        self._seen = 0  # samples of this batch
        self._loss, self._correct = 0.0, 0
        self._shard = Shard()
        self.settings = Settings(0.0)
        self.move(self.build.stages[-1].cut, upto=True)

    @property
    def place(self) -> Place:
        """Where it stands."""
        return self._shard.place

    def begin(self, place: Place, images: Images) -> None:
        """Stands there, in this shard."""
        self.discard()
        if place.steps == 0:
            self._velocity = _values(_zeros(self.build.graph.parameters))
        self._shard.images, self._shard.place = images, place

    def discard(self) -> None:
        """Forgets a batch that was not finished."""
        self._gradients, self._measured, self._kept = {}, {}, {}
        self._seen, self._loss, self._correct = 0, 0.0, 0

    def move(self, cut: str, *, upto: bool) -> None:
        """Ends at that cut."""
        variant = edge.variant(self.build, cut, upto=upto)
        if variant.folder not in self._known:
            self._known[variant.folder] = _Passes(self._folder, variant)
        self._passes = self._known[variant.folder]

    def upcoming(self, count: int) -> Images:
        """The samples that the next forward pass takes."""
        return self._shard.upcoming(count)

    def forward(self, count: int, batch: int) -> tuple[Array, Array]:
        """Activations and logits of the next samples."""
        part = self._shard.take(count)
        labels = _values({edge.LABELS: part.y.astype(np.int64)})
        numbers = _numbers({edge.BATCH: batch, edge.SEEN: self._seen})
        so_far = self._measured or _values(_zeros(self._passes.measured))
        found = self._passes.forward.run(
            self._weights,
            _values({edge.IMAGES: part.x}),
            labels,
            numbers,
            {edge.before(name): value for name, value in so_far.items()},
        )
        self._measured = {name: found[name] for name in self._passes.measured}
        self._kept = {**found, **labels, **numbers}
        self._seen += len(part)
        self._loss += float(_array(found[edge.LOSS]))
        self._correct += int(_array(found[edge.CORRECT]))
        return _array(found[edge.ACTIVATIONS]), _array(found[edge.LOGITS])

    def backward(self, gradient: Array | None) -> None:
        """Runs the last part backward."""
        if gradient is None:
            gradient = np.zeros(self._kept[edge.ACTIVATIONS].shape(), np.float32)
        graph, settings = self._passes.graph, self.settings
        so_far = self._gradients or _values(_zeros(graph.parameters))
        found = self._passes.backward.run(
            self._weights,
            self._kept,
            _values({edge.SERVER_GRADIENT: gradient}),
            _numbers(asdict(settings)),
            {edge.before(edge.gradient(name)): value for name, value in so_far.items()},
        )
        self._kept = {}
        self._gradients = {name: found[edge.gradient(name)] for name in graph.parameters}

    def step(self) -> Stepped:
        """Updates the weights, if all of the gradients and the loss are numbers."""
        try:
            self._check()
        except NotFinite:
            self.discard()
            raise
        graph = self._passes.graph
        found = self._passes.step.run(
            self._weights,
            _numbers({**asdict(self.settings), edge.SEEN: self._seen}),
            {edge.gradient(name): value for name, value in self._gradients.items()},
            {edge.before(edge.momentum(name)): v for name, v in self._velocity.items()},
            self._measured,
        )
        self._weights |= {name: found[edge.after(name)] for name in graph.weights}
        if self.build.momentum and self.settings.momentum:  # without, nothing is remembered
            self._velocity |= {name: found[edge.momentum(name)] for name in graph.parameters}
        place = self._shard.place
        self._shard.place = replace(place, steps=place.steps + 1)
        result = Stepped(self._loss, self._correct)
        self.discard()
        return result

    def _check(self) -> None:
        """Raises NotFinite for the first value of a gradient, or else the loss, that is not."""
        owner = f'the client of "{self._folder}"'
        for name, value in self._gradients.items():
            good = np.isfinite(_array(value))
            if not good.all():
                raise NotFinite(owner, name, int(np.flatnonzero(~good)[0]))
        if not math.isfinite(self._loss):
            raise NotFinite(owner)

    def infer(self, images: Array) -> tuple[Array, Array]:
        """Activations and logits of images."""
        found = self._passes.infer.run(self._weights, _values({edge.IMAGES: images}))
        return _array(found[edge.ACTIVATIONS]), _array(found[edge.LOGITS])

    def weights(self) -> Mapping[str, Array]:
        """All parameters and statistics."""
        return {name: _array(value) for name, value in self._weights.items()}

    def load_weights(self, weights: Mapping[str, Array]) -> None:
        """Replaces them."""
        self._weights = _values({name: weights[name] for name in self._weights})

    def momentum(self) -> Mapping[str, Array]:
        """Of all parameters."""
        if not self.settings.momentum:
            return {}
        return {name: _array(value) for name, value in self._velocity.items()}

    def load_momentum(self, momentum: Mapping[str, Array]) -> None:
        """Replaces it."""
        self._velocity = _values({name: momentum[name] for name in self._velocity})

    def gradients(self) -> Mapping[str, Array]:
        """Of this batch so far, of all parameters."""
        found = {name: _array(value) for name, value in self._gradients.items()}
        return _zeros(self.build.graph.parameters) | found


class _Passes:
    """The graphs of a cut, loaded."""

    def __init__(self, folder: Path, variant: edge.Variant) -> None:
        self.graph = variant.graph
        self.measured = {edge.measured(n): v for n, v in self.graph.statistics.items()}
        graphs = [variant.exit, *[variant.graph] * 3]
        self.infer, self.forward, self.backward, self.step = (
            _Pass(folder / variant.folder / f"{name}.onnx", graph.checksum())
            for name, graph in zip(edge.PASSES, graphs, strict=True)
        )


class _Pass:
    """A graph that is loaded."""

    def __init__(self, path: Path, checksum: int) -> None:
        """Raises ExportError where there is none, or one that was not made of that graph."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # sums in one order
        if not path.exists():
            raise ExportError(f"{path}: no such file: {_AGAIN}")
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's have no common class
            raise ExportError(f"{path}: ONNX Runtime cannot load it ({error}): {_AGAIN}") from error
        told = self._session.get_modelmeta().custom_metadata_map.get("graph_checksum")
        if told != f"{checksum:08x}":
            raise ExportError(f"{path}: it belongs to another export than {edge.NAME}: {_AGAIN}")
        self._inputs = [x.name for x in self._session.get_inputs()]
        self._outputs = [x.name for x in self._session.get_outputs()]

    def run(self, *given: Values) -> Values:
        """Its outputs; of what is given, it takes its inputs."""
        found = {name: value for values in given for name, value in values.items()}
        taken = {name: found[name] for name in self._inputs}
        values = self._session.run_with_ort_values(self._outputs, taken)
        return dict(zip(self._outputs, values, strict=True))


_AGAIN = "export the client again (`splitee export`) and bring all of its folder"


def _values(arrays: Mapping[str, Array]) -> Values:
    make = onnxruntime.OrtValue.ortvalue_from_numpy
    return {name: make(np.asarray(array, order="C")) for name, array in arrays.items()}


def _numbers(numbers: Mapping[str, float]) -> Values:
    return _values({name: np.array(value, np.float32) for name, value in numbers.items()})


def _array(value: Any) -> Array:
    return np.array(value.numpy())  # a copy: what numpy() gives may end with the value


def _zeros(like: Mapping[str, Array]) -> dict[str, Array]:
    return {name: np.zeros_like(value) for name, value in like.items()}
