"""A client's half of the network as data: what is planned, exported and compared.

A ``Graph`` is a tuple of operations in the order in which they run. It holds no torch object, so
that exporters and the memory plan need numpy only.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from splitee.ops import OPS, Array, Shape


@dataclass(frozen=True)
class Op:
    """One operation; the tensor that it makes carries its name."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)  # role -> name in Graph.weights


@dataclass(frozen=True)
class Stage:
    """What lies between two cuts, and the exit on top of it."""

    cut: str  # the name of the cut at its end
    point: str  # the tensor that is sent there
    logits: str
    trunk: tuple[Op, ...]
    exit: tuple[Op, ...]


@dataclass(frozen=True)
class Graph:
    """Trunk and exits of one client.

    An exit's operations stand directly behind the tensor that it is on top of, and weights in the
    order of the operations that use them: each stage's, and each exit's, are neighbours.
    """

    input: str
    input_shape: Shape  # of one sample: (channels, height, width)
    ops: tuple[Op, ...]
    parameters: Mapping[str, Array]  # trained, by state-dict name
    statistics: Mapping[str, Array]  # running statistics of norms
    cut: str  # the tensor that is sent
    exits: Mapping[str, str]  # name of a cut -> its logits; the last is the exit at this cut
    classes: int

    @cached_property
    def weights(self) -> dict[str, Array]:
        """Parameters, then statistics: everything the client's state holds beside momentum."""
        return {**self.parameters, **self.statistics}

    def holding(self, weights: Mapping[str, Array]) -> Graph:
        """This graph with other values of all its weights; further names are left out."""
        return replace(
            self,
            parameters={name: weights[name] for name in self.parameters},
            statistics={name: weights[name] for name in self.statistics},
        )

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """The shape of one sample of every tensor."""
        shapes: dict[str, Shape] = {self.input: self.input_shape}
        for op in self.ops:
            weights = {role: self.weights[name].shape for role, name in op.weights.items()}
            inputs = [shapes[name] for name in op.inputs]
            shapes[op.name] = OPS[op.kind].shape(op.attrs, inputs, weights)
        return shapes

    @property
    def logits(self) -> str:
        """The logits of the exit at the cut."""
        return list(self.exits.values())[-1]

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What each cut adds to the one below; only cuts with an exit count."""
        names = {logits: cut for cut, logits in self.exits.items()}
        stages: list[Stage] = []
        trunk: list[Op] = []
        exit: list[Op] = []
        for op in self.ops:
            in_exit = op.kind == "branch" or any(e.name in op.inputs for e in exit)
            (exit if in_exit else trunk).append(op)
            if op.name in names:
                point = exit[0].inputs[0]
                stages.append(Stage(names[op.name], point, op.name, tuple(trunk), tuple(exit)))
                trunk, exit = [], []
        return tuple(stages)

    @property
    def joined(self) -> Stage:
        """All stages as one, for a cut that stays where it is: lower exits belong to the trunk."""
        last = self.stages[-1]
        return replace(last, trunk=self.ops[: -len(last.exit)])

    def at(self, cut: str, *, upto: bool) -> Graph:
        """The part of this graph that runs with a shallower cut, values shared.

        upto: with every exit up to that cut, not only with the one at it.
        """
        depth = [stage.cut for stage in self.stages].index(cut) + 1
        chosen = self.stages[:depth]
        ops: list[Op] = []
        for stage in chosen:
            ops += [*stage.trunk, *(stage.exit if upto or stage.cut == cut else ())]
        used = {name for op in ops for name in op.weights.values()}
        kept = {op.name for op in ops}
        return replace(
            self,
            ops=tuple(ops),
            parameters={n: v for n, v in self.parameters.items() if n in used},
            statistics={n: v for n, v in self.statistics.items() if n in used},
            cut=chosen[-1].point,
            exits={name: logits for name, logits in self.exits.items() if logits in kept},
        )

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each of the weights begins in the one vector that a device keeps."""
        ends = accumulate((w.size for w in self.weights.values()), initial=0)
        return dict(zip(self.weights, ends, strict=False))

    def parameter_at(self, place: int) -> str:
        """The parameter whose values that place of the vector is among."""
        return [name for name in self.parameters if self.places[name] <= place][-1]

    def ranges(self, names: Iterable[str]) -> list[slice]:
        """The parts of that vector in which those weights lie, neighbours as one part.

        names: in the order of this graph.
        """
        found: list[slice] = []
        for name in names:
            start = self.places[name]
            stop = start + self.weights[name].size
            if found and found[-1].stop == start:
                start = found.pop().start
            found.append(slice(start, stop))
        return found

    def elements(self, tensor: str) -> int:
        """Values per sample of a tensor."""
        return math.prod(self.shapes[tensor])

    @cached_property
    def parameter_size(self) -> int:
        """Number of trained values."""
        return sum(p.size for p in self.parameters.values())

    @cached_property
    def weight_size(self) -> int:
        """Number of trained values and statistics."""
        return sum(w.size for w in self.weights.values())

    def needs_gradient(self, tensor: str) -> bool:
        """Whether anything that learns lies above the tensor."""
        return tensor in self._learning

    @cached_property
    def _learning(self) -> frozenset[str]:
        learning: set[str] = set()
        for op in self.ops:
            if op.weights or learning.intersection(op.inputs):
                learning.add(op.name)
        return frozenset(learning)

    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates of one sample, (forward, backward), convolutions and linear layers.

        Backward computes a gradient of the weights everywhere and one of the input where
        something above learns.
        """
        forward = backward = 0
        for op in self.ops:
            weights = {role: self.weights[name].shape for role, name in op.weights.items()}
            macs = OPS[op.kind].macs(self.shapes[op.name], weights)
            forward += macs
            backward += macs * (1 + self.needs_gradient(op.inputs[0]))
        return forward, backward

    def run(self, x: Array) -> dict[str, Array]:
        """Every tensor for a batch x (n, channels, height, width), in the dtype of x."""
        values: dict[str, Array] = {self.input: x}
        for op in self.ops:
            weights = {
                role: self.weights[name].astype(x.dtype) for role, name in op.weights.items()
            }
            inputs = [values[name] for name in op.inputs]
            values[op.name] = OPS[op.kind].run(op.attrs, inputs, weights)
        return values

    def flatten(self, weights: Mapping[str, Array]) -> Array:
        """Weights as the one float32 vector that a device keeps, in the graph's order."""
        return _flatten(weights, self.weights)

    def unflatten(self, vector: Array) -> dict[str, Array]:
        """The inverse of flatten."""
        return _unflatten(vector, self.weights)

    def flatten_parameters(self, values: Mapping[str, Array]) -> Array:
        """The same for one value per parameter, such as gradients or momentum."""
        return _flatten(values, self.parameters)

    def unflatten_parameters(self, vector: Array) -> dict[str, Array]:
        """The inverse of flatten_parameters."""
        return _unflatten(vector, self.parameters)

    def checksum(self, **build: int) -> int:
        """CRC-32 of the structure and of build settings; the values of weights do not count."""
        structure = [
            self.input_shape,
            [[o.kind, o.name, o.inputs, dict(o.attrs), dict(o.weights)] for o in self.ops],
            [[name, w.shape] for name, w in self.weights.items()],
            [self.cut, dict(self.exits), self.classes, build],
        ]
        return zlib.crc32(json.dumps(structure, sort_keys=True).encode())


def _flatten(values: Mapping[str, Array], names: Mapping[str, Array]) -> Array:
    vectors = [np.asarray(values[name], np.float32).ravel() for name in names]
    return np.concatenate([np.zeros(0, np.float32), *vectors])


def _unflatten(vector: Array, like: Mapping[str, Array]) -> dict[str, Array]:
    ends = np.cumsum([a.size for a in like.values()])
    parts = np.split(vector, ends[:-1]) if like else []
    return {n: p.reshape(like[n].shape).copy() for n, p in zip(like, parts, strict=True)}
