"""Scales and group norms in 8 bits with numbers drawn at random, which hide no mistake."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from splitee.int8 import ACTIVATIONS, Int8Graph, Int8Op, Scale
from splitee.ops import Array


def random_scale(random: np.random.Generator, low: float, high: float) -> Scale:
    scale = np.float32(np.exp(random.uniform(np.log(low), np.log(high))))
    return Scale(float(scale), int(random.integers(-128, 128)))


def random_norm(seed: int) -> Int8Graph:
    """A group norm with any numbers, on a convolution of single pixels."""
    random = np.random.default_rng(seed)
    height, width, groups, size = (int(n) for n in random.integers((1, 1, 1, 1), (9, 9, 5, 5)))
    channels = groups * size
    each = {"kernel": [1, 1], "stride": [1, 1], "padding": [0, 0], "groups": 1}

    def floats(low: float, high: float, count: int) -> Array:
        return np.exp(random.uniform(np.log(low), np.log(high), count)).astype(np.float32)

    signs = random.choice([-1, 1], channels).astype(np.float32)
    weights: dict[str, Array] = {
        "x.weight": random.integers(-127, 128, (channels, 1, 1, 1)).astype(np.int8),
        "x.bias": random.integers(-3000, 3000, channels).astype(np.int32),
        "y.epsilon": random.integers(0, 1000, channels).astype(np.int32),
        "y.floor": floats(1e-4, 1e2, groups),
        "y.factor": floats(10, 1e4, channels) * signs,
        "y.shift": floats(1, 1e4, channels) * random.choice([-1, 1], channels),
    }
    weights["y.shift"] = weights["y.shift"].astype(np.float32)
    scales = {
        "input": random_scale(random, 0.001, 0.1),
        "x": replace(random_scale(random, 0.002, 0.1), zero_point=0),
        "y": random_scale(random, 0.0002, 0.002),
        "y.means": replace(random_scale(random, 0.05, 2.0), zero_point=0),
        "y.squares": replace(random_scale(random, 1.0, 100.0), zero_point=-128),
    }
    units = {"x.weight": floats(1e-4, 1e-2, channels), "y.factor": floats(1e-4, 1e-2, channels)}
    roles = {role: f"y.{role}" for role in ("epsilon", "floor", "factor", "shift")}
    activation = str(random.choice(ACTIVATIONS))
    ops = (
        Int8Op(
            "conv2d", "x", ("input",), {**each, "activation": "none"},
            {"weight": "x.weight", "bias": "x.bias"},
        ),
        Int8Op("group_norm", "y", ("x",), {"groups": groups, "activation": activation}, roles),
    )  # fmt: skip
    return Int8Graph(
        "input", (height, width, 1), np.zeros((1, 256), np.int8), ops, weights, units, scales,
        "y", "y", height * width * channels,
    )  # fmt: skip


def norm_inputs(seed: int, graph: Int8Graph) -> Array:
    """int8 samples of a tensor x: channels around different means, and one without variance."""
    random = np.random.default_rng(seed)
    shape = graph.shapes["x"]
    x = random.integers(-90, 91, (3, 1, 1, shape[-1])) + random.integers(-35, 36, (3, *shape))
    x[0] = 7
    return x.astype(np.int8)
