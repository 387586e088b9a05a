"""segment.c in 8 bits: what is written into it, and what is refused by name."""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from splitee.errors import ModelError
from splitee.int8 import Int8Graph, Int8Op
from splitee.place_int8 import Int8Build, scratch_bytes
from splitee.quantize import quantize
from splitee_exporters.c_int8 import KINDS, TAPS_MAX, to_c
from splitee_host import boards
from step_harness import case

CASES = ("resnet8-batch", "resnet8", "vgg", "windows", "mobilenet")


def build(kind: str) -> Int8Build:
    made = case(kind)
    b = made.build
    return Int8Build(quantize(b.graph, made.images.x, b.scale, b.shift), b.stages[-1].cut)


def numbers(text: str, name: str) -> list[int]:
    """The values of an array in C."""
    body = text.split(f" {name}[] = {{", 1)[1].split("}", 1)[0]
    return [int(value) for value in body.split(",")]


def test_weights_stand_in_the_file_as_they_are() -> None:
    made = build("resnet8-batch")
    text = to_c(made)
    for i, op in enumerate(made.graph.ops):
        if "weight" in op.weights:
            weight = made.graph.weights[op.weights["weight"]]
            assert numbers(text, f"weight_{i}") == weight.ravel().tolist()


@pytest.mark.parametrize("kind", CASES)
def test_a_bias_has_what_the_inputs_zero_would_add(kind: str) -> None:
    made = build(kind)
    text, graph = to_c(made), made.graph
    for i, op in enumerate(graph.ops):
        if "weight" not in op.weights:
            continue
        weight, bias = (graph.weights[op.weights[role]] for role in ("weight", "bias"))
        zero = graph.scales[op.inputs[0]].zero_point
        rows = weight[0].reshape(-1, len(bias)).T if graph.depthwise(op) else weight
        for channel, folded in enumerate(numbers(text, f"bias_{i}")):
            sees = [int(w) * zero for w in rows[channel].ravel()]
            assert folded == int(bias[channel]) - sum(sees)


def test_the_same_segment_is_the_same_text() -> None:
    assert to_c(build("resnet8-batch")) == to_c(build("resnet8-batch"))


def test_all_that_is_constant_stays_in_flash() -> None:
    variables = re.findall(r"^static (?!const)(.*?)\[", to_c(build("mobilenet")), re.MULTILINE)
    assert variables == ["_Alignas(16) int8_t arena"]


def test_a_convolution_of_each_channel_is_depthwise() -> None:
    made = build("mobilenet")
    calls = re.findall(r"int8_(conv2d|depthwise)\(", to_c(made))
    each = [op.attrs["groups"] > 1 for op in made.graph.ops if op.kind == "conv2d"]
    assert calls == ["depthwise" if alone else "conv2d" for alone in each]
    assert len(set(calls)) == 2


def with_first(graph: Int8Graph, op: Int8Op) -> Int8Graph:
    return replace(graph, ops=(op, *graph.ops[1:]))


def test_refuses_what_has_no_kernel_by_name() -> None:
    made = build("resnet8-batch")
    first = made.graph.ops[0]
    strange = replace(made, graph=with_first(made.graph, replace(first, kind="softmax")))
    words = rf"^{re.escape(first.name)}: the C exporter has no softmax in 8 bits; it has conv2d, "
    with pytest.raises(ModelError, match=words):
        to_c(strange)


def test_refuses_a_depthwise_window_that_is_too_large() -> None:
    made = build("mobilenet")
    i, op = next((i, op) for i, op in enumerate(made.graph.ops) if made.graph.depthwise(op))
    attrs = {**op.attrs, "kernel": [9, 9], "padding": [4, 4]}
    ops = (*made.graph.ops[:i], replace(op, attrs=attrs), *made.graph.ops[i + 1 :])
    words = rf"^{re.escape(op.name)}: a depthwise window of 9x9 is larger than the 49 taps"
    with pytest.raises(ModelError, match=words):
        to_c(replace(made, graph=replace(made.graph, ops=ops)))


def test_refuses_a_bias_that_32_bits_have_not() -> None:
    made = build("resnet8-batch")
    name = made.graph.ops[1].weights["bias"]  # behind a ReLU: its zero is -128
    bias = np.full_like(made.graph.weights[name], np.iinfo(np.int32).max)
    weight = np.full_like(made.graph.weights[made.graph.ops[1].weights["weight"]], 127)
    weights = {**made.graph.weights, name: bias, made.graph.ops[1].weights["weight"]: weight}
    with pytest.raises(ModelError, match="its biases need more than 32 bits"):
        to_c(replace(made, graph=replace(made.graph, weights=weights)))


SIZES = """\
#include "kernels/int8.h"
size_t sizes(const struct window *s, size_t groups);
size_t sizes(const struct window *s, size_t groups) {
    return groups == 0 ? INT8_TAPS : int8_conv2d_scratch(s, groups);
}
"""


def test_scratch_and_taps_are_those_of_the_header(tmp_path: Path) -> None:
    (tmp_path / "sizes.c").write_text(SIZES)
    library = tmp_path / "sizes.so"
    include = f"-I{boards.firmware_root()}"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", include, "-o", library, tmp_path / "sizes.c"], check=True
    )
    sizes = ctypes.CDLL(str(library)).sizes
    sizes.restype = ctypes.c_size_t
    assert sizes(None, ctypes.c_size_t(0)) == TAPS_MAX
    seen = set()
    for graph in [build(kind).graph for kind in CASES]:
        for op in graph.ops:
            if op.kind != "conv2d" or graph.depthwise(op):
                continue
            window = window_of(graph, op)
            needed = sizes(window, ctypes.c_size_t(op.attrs["groups"]))
            assert scratch_bytes(graph, op) == needed
            seen.add(needed)
    assert len(seen) > 5


def window_of(graph: Int8Graph, op: Int8Op) -> bytes:
    """struct window of kernels.h."""
    (in_h, in_w, in_c), (out_h, out_w, out_c) = (graph.shapes[t] for t in (op.inputs[0], op.name))
    sizes = (in_c, in_h, in_w, out_c, out_h, out_w)
    a = op.attrs
    return struct.pack("<6H6B", *sizes, *a["kernel"], *a["stride"], *a["padding"])


def test_every_kind_has_its_call() -> None:
    asked = {op.kind for kind in CASES for op in build(kind).graph.ops}
    assert asked == set(KINDS)
