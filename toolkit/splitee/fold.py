"""Folding: batch norms become part of the convolutions before them, for files that only infer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from splitee.graph import Graph, Op
from splitee.ops import Array


def fold(graph: Graph) -> Graph:
    """The same function, without the batch norms that directly follow a convolution.

    The convolution takes the norm's name, and so the place of its tensor. A convolution that
    anything else reads keeps its norm.
    """
    made = {op.name: op for op in graph.ops}
    readers = Counter(x for op in graph.ops for x in op.inputs)
    readers.update([graph.cut, *graph.exits.values()])
    norms = {
        op.inputs[0]: op
        for op in graph.ops
        if op.kind == "batch_norm"
        and op.inputs[0] in made
        and made[op.inputs[0]].kind == "conv2d"
        and readers[op.inputs[0]] == 1
    }
    folded = {norm.name for norm in norms.values()}
    weights = dict(graph.weights)
    ops: list[Op] = []
    for op in graph.ops:
        if op.name in norms:
            ops.append(_joined(op, norms[op.name], weights))
        elif op.name not in folded:
            ops.append(op)
    used = [name for op in ops for name in op.weights.values()]
    return replace(
        graph,
        ops=tuple(ops),
        parameters={n: weights[n] for n in used if n not in graph.statistics},
        statistics={n: weights[n] for n in used if n in graph.statistics},
    )


def _joined(conv: Op, norm: Op, weights: dict[str, Array]) -> Op:
    """Convolution and norm as one convolution, whose weights replace those there are."""
    scale, shift, mean, variance = (
        weights[norm.weights[role]].astype(np.float64)
        for role in ("weight", "bias", "mean", "variance")
    )
    scale = scale / np.sqrt(variance + norm.attrs["epsilon"])
    kernel = conv.weights["weight"]
    bias = conv.weights.get("bias", norm.weights["bias"])
    before = weights[bias] if "bias" in conv.weights else 0.0
    weights[kernel] = (weights[kernel] * scale[:, None, None, None]).astype(np.float32)
    weights[bias] = ((before - mean) * scale + shift).astype(np.float32)
    return Op("conv2d", norm.name, conv.inputs, conv.attrs, {"weight": kernel, "bias": bias})
