"""segment.c: what is written into it, and what is refused by name."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from splitee.errors import ModelError
from splitee.ops import OPS, SERVER_ONLY
from splitee_exporters.c import KINDS, to_c
from step_harness import case


def test_weights_stand_in_the_file_bit_for_bit() -> None:
    build = case("resnet8").build
    text = to_c(build)
    body = text.split("static float weights")[1].split("{", 1)[1].split("}", 1)[0]
    values = np.array([float.fromhex(v.strip().rstrip("f")) for v in body.split(",")], np.float32)
    assert values.tobytes() == build.graph.flatten(build.graph.weights).tobytes()


def test_the_same_segment_is_the_same_text() -> None:
    assert to_c(case("resnet8").build) == to_c(case("resnet8").build)


def test_every_step_of_the_schedule_is_a_case() -> None:
    build = case("resnet8").build
    cases = [int(n) for n in re.findall(r"^ +case (\d+):", to_c(build), flags=re.MULTILINE)]
    assert cases == list(range(len(build.schedule.steps)))


def test_no_momentum_takes_no_memory() -> None:
    build = replace(case("resnet8").build, momentum=False)
    assert ".momentum = NULL," in to_c(build)
    assert build.arena_bytes < case("resnet8").build.arena_bytes


def test_the_first_layer_computes_no_gradient_of_its_input() -> None:
    assert "conv2d_backward(NULL, " in to_c(case("resnet8").build)


@pytest.mark.parametrize("kind", [k for k in OPS if k not in SERVER_ONLY])
def test_every_kind_of_operation_has_its_calls(kind: str) -> None:
    assert kind in KINDS


def test_refuses_what_has_no_kernel_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "silu", OPS["relu"])
    build = case("pools").build
    ops = [replace(op, kind="silu") if op.name == "2" else op for op in build.graph.ops]
    with pytest.raises(ModelError, match=r"^2: the C exporter has no silu; it has conv2d, linear"):
        to_c(replace(build, graph=replace(build.graph, ops=tuple(ops))))


@pytest.mark.parametrize(
    ("kind", "kernels"),
    [
        ("resnet8", {"fast_conv2d"}),
        ("vgg", {"fast_conv2d", "grouped_conv2d"}),
        ("mobilenet", {"fast_conv2d", "fast_depthwise"}),
    ],
)
def test_a_convolution_is_written_as_what_it_is(kind: str, kernels: set[str]) -> None:
    text = to_c(case(kind).build)
    for action in ("forward", "backward"):
        assert set(re.findall(rf"(\w+(?:conv2d|depthwise))_{action}\(", text)) == kernels
