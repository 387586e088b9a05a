"""Segments of 8 bits on every board: bit for bit what they are in LiteRT; they learn nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert")  # the oracle

from int8_harness import Int8Case, int8_case, int8_device
from splitee.errors import DeviceRefused, Mismatch, MissingTool
from splitee.ops import Array
from splitee_exporters.c_int8 import KINDS as OPERATIONS
from splitee_exporters.c_int8 import to_c
from splitee_host import boards
from splitee_host.int8_device import Int8Device
from splitee_host.wire import messages as m

KINDS = ("resnet8-batch", "resnet8", "vgg", "windows", "mobilenet")
BUILD = int8_case("resnet8-batch").build
EMULATED = ("qemu-m3", "qemu-m4", "qemu-m7", "qemu-m33", "qemu-m55", "qemu-rv32f", "qemu-rv32")


def answered(device: Int8Device, x: Array) -> dict[str, Array]:
    """Activations and logits of int8 inputs, in parts of the device's capacity."""
    logits, sent = [], []
    for start in range(0, len(x), device.capacity):
        part = x[start : start + device.capacity]
        logits.append(device.run(part))
        sent.append(device.sent(np.ones(len(part), bool)))
    graph = device.graph
    return {graph.cut: np.concatenate(sent), graph.logits: np.concatenate(logits)}


def differing(found: dict[str, Array], the_case: Int8Case) -> dict[str, int]:
    """By who says so, and of which tensor, how many values are others."""
    return {
        f"{tensor} of {oracle}": int((found[tensor] != values).sum())
        for oracle, tensors in the_case.answers.items()
        for tensor, values in tensors.items()
        if not np.array_equal(found[tensor], values)
    }


def on(board: str, the_case: Int8Case, folder: Path, source: str | None = None) -> dict[str, int]:
    """What is not on a board as it should be."""
    try:
        with int8_device(the_case.build, board, folder, source) as device:
            found = answered(device, the_case.x)
            stack = device.request(m.Stats(), m.Counters).stack_used
    except MissingTool as missing:
        pytest.skip(str(missing))
    assert board == "posix" or 0 < stack < boards.load_boards()[board].stack_bytes
    return differing(found, the_case)


def test_all_kinds_of_operations_are_asked() -> None:
    asked = {op.kind for kind in KINDS for op in int8_case(kind).build.graph.ops}
    assert asked == set(OPERATIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_to_compare_with_are_many_numbers(kind: str) -> None:
    for tensors in int8_case(kind).answers.values():
        for values in tensors.values():
            assert len(np.unique(values)) > 10
            assert not (values[0] == values[1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_answers_what_litert_does(kind: str, tmp_path: Path) -> None:
    assert on("posix", int8_case(kind), tmp_path) == {}


@pytest.mark.parametrize("board", EMULATED)
@pytest.mark.parametrize("kind", ["resnet8-batch", "resnet8"])
def test_a_board_answers_what_litert_does(board: str, kind: str, tmp_path: Path) -> None:
    assert on(board, int8_case(kind), tmp_path) == {}


# ---- planted faults ----

FAULTS = {
    "an activation is left out": (r"(output_3 = \{multiplier_3, shift_3, )-128", r"\g<1>-60"),
    "an addend's zero is another": (r"(addend_7_1 = \{\d+, \d+, )(-\d+)", r"\1\2 - 3"),
    "an output's scale is twice as large": (r"(shift_1\[\] = \{\s*)(-\d+)", r"\1\2 + 1"),
    "padding is not the zero point": (r"(&window_2, 1, )-?\d+", r"\g<1>0"),
    "what is added is the input again": (
        r"(int8_add\(arena \+ \d+, )(arena \+ \d+)(, &\w+, )arena \+ \d+",
        r"\1\2\3\2",
    ),
    "a weight is another": (r"(weight_4\[\] = \{\s*)(-?\d+)", r"\1\2 ^ 64"),
    "the activations lie elsewhere": (r"(\.activations = arena \+ )", r"\g<1>16 + "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_generated_c_is_noticed(fault: str, tmp_path: Path) -> None:
    the_case = int8_case("resnet8-batch")
    source, planted_once = re.subn(*FAULTS[fault], to_c(the_case.build), count=1)
    assert planted_once
    assert on("posix", the_case, tmp_path, source) != {}


# ---- what it does not do ----


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Int8Device]:
    with int8_device(BUILD, "posix", tmp_path_factory.mktemp("int8")) as device:
        yield device


TRAINING: tuple[m.Message, ...] = (
    m.Settings(0.1, 0.9, 0.0, 1.0, 0.0, 0.0, 0.0),
    m.Place(0, 0, 1, 0, 0),
    m.Forward(1, 1),
    m.Backward(),
    m.Step(),
    m.Run(0, 1),
    m.Coding(m.Codec.INT8, m.Codec.FLOAT32, 0),
)


@pytest.mark.parametrize("message", TRAINING, ids=lambda message: type(message).__name__)
def test_it_refuses_to_train(message: m.Message, device: Int8Device) -> None:
    refused = device.request(message, m.Refused)
    assert refused == m.Refused(m.Error.INFERS_ONLY, 0)
    with pytest.raises(DeviceRefused, match=r"answers images only, in 8 bits: run `splitee build"):
        device.request(message, m.Done)


KEPT = {
    m.Region.INPUT: 2 * 64,
    m.Region.ACTIVATIONS: 2 * 12 * 4 * 4,
    m.Region.LOGITS: 2 * 10,
    m.Region.ARENA: BUILD.plan.size,
}


@pytest.mark.parametrize("region", m.Region, ids=lambda region: region.name)
def test_it_has_no_memories_but_those_of_inference(region: m.Region, device: Int8Device) -> None:
    size = KEPT.get(region, 0)
    assert len(device.read(region, 0, size)) == size
    assert device.request(m.Read(region, size, 1), m.Refused) == m.Refused(
        m.Error.OUT_OF_RANGE, size
    )


def test_no_more_samples_than_it_holds(device: Int8Device) -> None:
    for count in (0, 3):
        refused = device.request(m.Infer(count), m.Refused)
        assert refused == m.Refused(m.Error.TOO_MANY_SAMPLES, 2)


def test_it_says_hello_as_one_without_samples(device: Int8Device) -> None:
    welcome = device.hello()
    assert (welcome.segment, welcome.samples_max, welcome.samples, welcome.steps) == (
        BUILD.checksum,
        0,
        0,
        0,
    )


def test_another_segment_is_refused_with_both_checksums(device: Int8Device) -> None:
    other = replace(BUILD, capacity=3)
    stranger = Int8Device("a", device.link, other)
    with pytest.raises(Mismatch) as refused:
        stranger.hello()
    words = str(refused.value)
    assert f"its firmware holds segment {BUILD.checksum:08x}, {other.checksum:08x} is what" in words
    assert "run `splitee build RUN --int8` and load the new firmware" in words


def test_floats_come_back_channels_first(device: Int8Device) -> None:
    the_case, graph = int8_case("resnet8-batch"), BUILD.graph
    device.hello()
    images = the_case.images[:2]
    expected = the_case.answers["LiteRT"]
    scales = {name: graph.scales[name] for name in (graph.cut, graph.logits)}

    def real(name: str, samples: slice) -> Array:
        whole = expected[name][samples].astype(np.float32) - scales[name].zero_point
        return whole * np.float32(scales[name].scale)

    assert np.array_equal(device.infer(images), real(graph.logits, slice(2)))
    second = device.activations(np.array([False, True]))
    assert np.array_equal(second, real(graph.cut, slice(1, 2)).transpose(0, 3, 1, 2))
    assert device.activations(np.array([False, False])).shape == (0, 12, 4, 4)
