"""The arithmetic of 8 bits, by hand; TensorFlow Lite's own kernels hold it in test_tflite.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from splitee.int8 import Int8Graph, Int8Op, Scale, multiply, quantize_multiplier
from splitee.ops import Array


@pytest.mark.parametrize(
    ("real", "expected"),
    [
        (0.5, (1 << 30, 0)),
        (1.0, (1 << 30, 1)),
        (0.75, (3 << 29, 0)),
        (3.0, (3 << 29, 2)),
        (0.125, (1 << 30, -2)),
        (1 - 2.0**-40, (1 << 30, 1)),  # rounds up to one
        (2.0**-33, (0, 0)),
        (0.0, (0, 0)),
    ],
)
def test_a_multiplier_has_31_bits_and_a_shift(real: float, expected: tuple[int, int]) -> None:
    assert quantize_multiplier(real) == expected


@pytest.mark.parametrize(
    ("x", "real", "expected"),
    [
        (100, 0.5, 50),
        (1, 0.5, 1),  # the first rounding takes halves up
        (-1, 0.5, 0),
        (3, 0.25, 1),  # 1.5 is 2, and 1 a half up
        (2, 0.25, 1),  # the second takes halves away from zero
        (-2, 0.25, -1),
        (-6, 0.25, -2),
        (7, 0.125, 1),  # 0.875
        (-3, 4.0, -12),
        (1000, 0.3, 300),
        (12345, 0.0, 0),
    ],
)
def test_sums_are_rounded_twice(x: int, real: float, expected: int) -> None:
    multiplier, shift = quantize_multiplier(real)
    found = multiply(np.array([x]), np.array([multiplier]), np.array([shift]))
    assert found.tolist() == [expected]


def small() -> Int8Graph:
    """A convolution of two pixels into one, with ReLU6, and a linear layer."""
    ops = (
        Int8Op(
            "conv2d",
            "conv",
            ("input",),
            {
                "kernel": [1, 2],
                "stride": [1, 1],
                "padding": [0, 0],
                "groups": 1,
                "activation": "relu6",
            },
            {"weight": "conv.weight", "bias": "conv.bias"},
        ),
        Int8Op(
            "linear",
            "linear",
            ("conv",),
            {"activation": "none"},
            {"weight": "linear.weight", "bias": "linear.bias"},
        ),
    )
    weights: dict[str, Array] = {
        "conv.weight": np.array([[[[10], [-20]]]], np.int8),
        "conv.bias": np.array([100], np.int32),
        "linear.weight": np.array([[32], [-32]], np.int8),
        "linear.bias": np.array([0, 32], np.int32),
    }
    scales = {"input": Scale(0.5, -10), "conv": Scale(0.0625, -20), "linear": Scale(0.125, 3)}
    one = np.array([0.25], np.float32)
    return Int8Graph(
        input="input",
        input_shape=(1, 2, 1),
        table=np.arange(-128, 128, dtype=np.int8)[None],
        ops=ops,
        weights=weights,
        weight_scales={"conv.weight": one / 8, "linear.weight": one / 4},
        scales=scales,
        cut="conv",
        logits="linear",
        classes=2,
    )


def test_a_small_segment_is_what_it_is_by_hand() -> None:
    graph = small()
    values = graph.run(np.array([-10, -30, 30, 0], np.int8).reshape(2, 1, 2, 1))
    # 0 * 10 + -20 * -20 + 100 = 500 and 40 * 10 + 10 * -20 + 100 = 300, times 0.5 / 32 / 0.0625,
    # which is 0.25; six is 96 steps above the zero point
    assert values["conv"].ravel().tolist() == [96 - 20, 75 - 20]
    # times 32, in units of 0.0625 / 16, which are 1 / 32 of 0.125; the second with 32 more
    assert values["linear"].tolist() == [[96 + 3, -95 + 3], [75 + 3, -74 + 3]]


def test_the_clamp_of_an_activation_is_in_its_tensors_steps() -> None:
    graph = small()
    conv, linear = graph.ops
    assert graph.clamp(conv) == (-20, 76)
    assert graph.clamp(linear) == (-128, 127)
    relu = replace(conv, attrs={**conv.attrs, "activation": "relu"})
    assert graph.clamp(relu) == (-20, 127)


def test_images_become_input_by_the_table_of_their_channel() -> None:
    table = np.stack([np.arange(-128, 128), np.arange(127, -129, -1)]).astype(np.int8)
    graph = replace(small(), input_shape=(1, 3, 2), table=table)
    images = np.array([[[[0, 128, 255]], [[0, 128, 255]]]], np.uint8)
    assert graph.image(images).tolist() == [[[[-128, 127], [0, -1], [127, -128]]]]


def test_shapes_and_costs_are_those_of_one_sample() -> None:
    graph = small()
    assert graph.shapes == {"input": (1, 2, 1), "conv": (1, 1, 1), "linear": (2,)}
    assert graph.macs == 2 + 2


@pytest.mark.parametrize("what", ["weight", "bias", "scale", "zero_point", "unit", "table", "op"])
def test_the_checksum_tells_whatever_an_answer_depends_on(what: str) -> None:
    graph = small()
    match what:
        case "weight" | "bias":
            changed = graph.weights[f"conv.{what}"] + 1
            other = replace(graph, weights={**graph.weights, f"conv.{what}": changed})
        case "scale":
            other = replace(graph, scales={**graph.scales, "conv": Scale(0.125, -20)})
        case "zero_point":
            other = replace(graph, scales={**graph.scales, "conv": Scale(0.0625, -21)})
        case "unit":
            units = {**graph.weight_scales, "conv.weight": np.array([0.5], np.float32)}
            other = replace(graph, weight_scales=units)
        case "table":
            other = replace(graph, table=graph.table + 1)
        case _:
            attrs = {**graph.ops[0].attrs, "activation": "relu"}
            other = replace(graph, ops=(replace(graph.ops[0], attrs=attrs), graph.ops[1]))
    assert other.checksum != graph.checksum
    assert small().checksum == graph.checksum
