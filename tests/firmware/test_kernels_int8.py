"""The plain C kernels in 8 bits, held to LiteRT's reference kernels bit for bit."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firmware.int8_cases import CASES, Addend, Call, Norm, Numbers, Output, case, rng
from firmware.int8_oracle import Array, Operator, Tensor, model, quantize_multiplier, run
from firmware.kernels_harness import KERNELS, Image, Kernels, build, guarded


class COutput(ctypes.Structure):
    """`struct int8_output` of int8.h."""

    _fields_ = (
        ("multiplier", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        *((name, ctypes.c_int8) for name in ("zero", "min", "max")),
    )


class CAddend(ctypes.Structure):
    """`struct int8_addend` of int8.h."""

    _fields_ = (
        ("multiplier", ctypes.c_int32),
        *((name, ctypes.c_int8) for name in ("shift", "zero")),
    )


class CNorm(ctypes.Structure):
    """`struct int8_norm` of int8.h."""

    _fields_ = (
        *((f"{what}_multiplier", ctypes.c_int32) for what in ("mean", "square")),
        *((f"{what}_shift", ctypes.c_int8) for what in ("mean", "square")),
        *((f"{what}_scale", ctypes.c_float) for what in ("mean", "square")),
        *((role, ctypes.c_void_p) for role in ("epsilon", "floor", "factor", "shift")),
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return build(tmp_path_factory.mktemp("int8") / "kernels.so", KERNELS.glob("int8*.c"))


@pytest.fixture
def kernels(library: Kernels, capfd: pytest.CaptureFixture[str]) -> Iterator[Kernels]:
    """The library; the test fails if the sanitizer had something to say."""
    yield library
    assert "runtime error" not in capfd.readouterr().err


def converted(call: Call) -> list[Any]:
    """The arguments as C takes them."""
    found: list[Any] = []
    for argument in call.arguments:
        match argument:
            case np.ndarray():
                found.append(guarded(argument))
            case Output(multiplier, shift, zero, low, high):
                pointers = multiplier.ctypes.data, shift.ctypes.data
                found.append(COutput(*pointers, zero, low, high))
            case Addend(multiplier, shift, zero):
                found.append(CAddend(multiplier, shift, zero))
            case Norm(numbers, scales, epsilon, floor, factor, shift):
                arrays = epsilon, floor, factor, shift
                found.append(CNorm(*numbers, *scales, *(a.ctypes.data for a in arrays)))
            case Image():
                depthwise = call.kernel == "int8_depthwise"
                found.append(argument.window(argument.channels if depthwise else argument.out))
            case _:
                found.append(argument)
    return found


def answer(kernels: Kernels, call: Call) -> Array:
    """What the kernel makes of a call's arguments."""
    y = guarded(np.full(call.expected.shape, 0x5A, np.int8))
    room = [guarded(np.zeros(call.scratch, np.int8))] if call.scratch else []
    kernels.call(call.kernel, y, *converted(call), *room)
    return y


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_answered_as_by_litert(kernels: Kernels, name: str) -> None:
    np.testing.assert_array_equal(answer(kernels, case(name)), case(name).expected)


def test_every_kernel_has_a_case() -> None:
    declared = (KERNELS / "int8.h").read_text()
    assert {case(name).kernel for name in CASES} == {
        line.split("(")[0].removeprefix("void ")
        for line in declared.splitlines()
        if line.startswith("void ")
    }


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("add", "rescale", "group"))])
def test_an_output_may_take_the_place_of_an_input(kernels: Kernels, name: str) -> None:
    call = case(name)
    arguments = converted(call)
    room = [guarded(np.zeros(call.scratch, np.int8))] if call.scratch else []
    kernels.call(call.kernel, arguments[0], *arguments, *room)
    np.testing.assert_array_equal(arguments[0], call.expected)


def test_a_factor_rounds_twice(kernels: Kernels) -> None:
    # an eighth: half of 3 is 2, halves going up, and a quarter of 2 is 1, halves going away from 0
    x = np.array([3, -3, 4, -4, 5, -5, 0], np.int8)
    eighth = Output(np.array([1 << 30], np.int32), np.array([-2], np.int8), 0, -128, 127)
    call = Call("int8_rescale", (x, 0, eighth, x.size), 0, x)
    np.testing.assert_array_equal(answer(kernels, call), [1, 0, 1, -1, 1, -1, 0])


@pytest.mark.parametrize(("width", "out", "n"), [(10, 5, 3), (67, 17, 2), (256, 10, 1)])
def test_a_linear_layer_is_answered_as_by_tflite_micro(
    kernels: Kernels, width: int, out: int, n: int
) -> None:
    runtime = pytest.importorskip("tflite_micro").runtime
    generator, numbers = rng(width, out, n), Numbers(zero=-9, output_zero=4)
    x, w = numbers.values(generator, n, width), numbers.weights(generator, out, width)
    b = generator.integers(-2000, 2001, out).astype(np.int32)
    scale = np.float32(0.0013)
    file = model(
        Operator("FULLY_CONNECTED", "FullyConnectedOptions", {}, 4),
        [Tensor(x, 1.0, numbers.zero)],
        [Tensor(w, scale), Tensor(b, scale)],
        Tensor(np.zeros((n, out), np.int8), 1.0, numbers.output_zero),
    )
    interpreter = runtime.Interpreter.from_bytes(file)
    interpreter.set_input(x, 0)
    interpreter.invoke()
    folded = (b - numbers.zero * w.sum(axis=1, dtype=np.int32)).astype(np.int32)
    output = numbers.output([float(scale)])
    call = Call("int8_linear", (x, w, folded, width, out, output, n), 0, interpreter.get_output(0))
    np.testing.assert_array_equal(answer(kernels, call), call.expected)


def test_litert_rounds_a_fully_connected_layer_otherwise() -> None:
    # why a linear layer's oracle above is a convolution: once this fails, it need not be one
    x = np.arange(-128, 128, dtype=np.int8).reshape(256, 1)
    w, b, scale = np.ones((1, 1), np.int8), np.zeros(1, np.int32), 0.5
    operator = Operator("FULLY_CONNECTED", "FullyConnectedOptions", {}, 4)
    tensors = [Tensor(w, scale), Tensor(b, scale)]
    file = model(operator, [Tensor(x, 1.0)], tensors, Tensor(np.zeros_like(x), 1.0))
    away = np.copysign(np.floor(np.abs(x) * 0.5 + 0.5), x)
    np.testing.assert_array_equal(run(file, x), away)
    assert quantize_multiplier(scale) == (1 << 30, 0)  # which rounds halves up


# ---- the tests themselves ----


@dataclass(frozen=True)
class Fault:
    """One change of the kernels' text, and a case that has to notice it."""

    file: str
    old: str
    new: str
    noticed: str


FAULTS = {
    "halves towards 0": Fault(
        "int8_scale.h", "(mask >> 1) + (value < 0)", "(mask >> 1) + 1", "conv2d 3 to 16"
    ),
    "one rounding less": Fault("int8_scale.h", "* b + (1 << 30)", "* b", "add unequal scales"),
    "no shift to the left": Fault(
        "int8_scale.h", "sum << f.left", "sum << 0", "conv2d 3 to 16, factors above 1"
    ),
    "the largest output": Fault(
        "int8_scale.h", "value > to.max", "value > 127", "conv2d 3 to 16, relu6"
    ),
    "padding that is 0": Fault(
        "int8_conv2d.c",
        "int8_fill(to, v->zero, first * v->channels)",
        "int8_fill(to, 0, first * v->channels)",
        "conv2d 3 to 16, zero points",
    ),
    "a row above the image": Fault(
        "int8_conv2d.c", "int8_fill(to, v->zero, v->row)", "", "conv2d 17 to 5, zero points"
    ),
    "another group's factors": Fault("int8_conv2d.c", "m.to.shift += out;", "", "conv2d 2 groups"),
    "another group's inputs": Fault(
        "int8_conv2d.c", "x + group * channels", "x", "conv2d a group for each channel"
    ),
    "padding of a depthwise convolution": Fault(
        "int8_depthwise.c", "int8_fill(scratch, zero, channels)", "", "depthwise 3x3, zero points"
    ),
    "neighbours of a depthwise convolution": Fault(
        "int8_depthwise.c",
        "from += s->stride_width * channels",
        "from += channels",
        "depthwise stride 2",
    ),
    "padding of neighbours": Fault(
        "int8_conv2d.c", "int8_fill(put, v->zero, v->row)", "", "conv2d 3 to 16, zero points"
    ),
    "a factor for each output": Fault(
        "int8_rows.c", "channel * m->step", "channel", "linear 67 to 17, zero points at the ends"
    ),
    "the other addend's zero": Fault(
        "int8_elementwise.c", "b[i] - zero_b", "b[i] - zero_a", "add unequal scales"
    ),
    "a mean around 0": Fault(
        "int8_pool.c", "[i * channels + channel] - zero", "[i * channels + channel]", "mean 1x1"
    ),
    "a mean of 0": Fault(
        "int8_group_norm.c", "* (float)int8_put(sum, of_sum, MEAN)", "* 0.0f", "group norm"
    ),
    "a variance around 0": Fault(
        "int8_group_norm.c", "square - product(mean, mean)", "square", "group norm"
    ),
    "no least variance": Fault(
        "int8_group_norm.c", ": norm->floor[group]", ": 1e-9f", "group norm"
    ),
    "weights that are cut off": Fault(
        "int8_group_norm.c", "(rest >= 0.5f) - (rest <= -0.5f)", "0", "group norm"
    ),
    "the smallest of a window": Fault(
        "int8_pool.c", "from[i] > to[i]", "from[i] < to[i]", "MAX pool odd sizes"
    ),
    "padding that does not count": Fault(
        "int8_pool.c", "int32_t sum = padding", "int32_t sum = 0", "AVERAGE pool 3x3 stride 2"
    ),
    "halves of an average": Fault(
        "int8_pool.c", "sum - count / 2", "sum + count / 2", "AVERAGE pool 2x2"
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_noticed(fault: Fault, tmp_path: Path) -> None:
    sources = Path(shutil.copytree(KERNELS, tmp_path / "kernels"))
    text = (sources / fault.file).read_text()
    assert text.count(fault.old) == 1, "the text to change is not there, or not alone"
    (sources / fault.file).write_text(text.replace(fault.old, fault.new))
    faulty = build(tmp_path / "faulty.so", sources.glob("int8*.c"), ("-O0",))
    call = case(next(name for name in CASES if name.startswith(fault.noticed)))
    assert (answer(faulty, call) != call.expected).any()
