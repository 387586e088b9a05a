"""The C kernels as a shared library that takes numpy arrays, and how far two tensors may differ."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

KERNELS = Path(__file__).parents[2] / "firmware" / "kernels"
STRICT = (
    *("-Wall", "-Wextra", "-Wconversion", "-Wdouble-promotion", "-Wshadow", "-Wvla", "-Werror"),
    "-fsanitize=undefined",
)
TOLERANCE = 1e-5

Floats = NDArray[np.float32]

# What a kernel made of a tensor, and what it should be in float64, by the tensor's name.
Pairs = dict[str, tuple[NDArray[Any], NDArray[Any]]]

# Lies on either side of an array: signalling NaNs, which poison what is computed from them and
# change their bits (they become quiet) when something is added to them.
_GUARD = np.full(64, 0x7FA5A5A5, np.uint32).view(np.uint8)


class Window(ctypes.Structure):
    """`struct window` of kernels.h."""

    _fields_ = (
        *((name, ctypes.c_uint16) for name in ("in_channels", "in_height", "in_width")),
        *((name, ctypes.c_uint16) for name in ("out_channels", "out_height", "out_width")),
        *((name, ctypes.c_uint8) for name in ("kernel_height", "kernel_width")),
        *((name, ctypes.c_uint8) for name in ("stride_height", "stride_width")),
        *((name, ctypes.c_uint8) for name in ("padding_height", "padding_width")),
    )


def guarded(values: NDArray[Any]) -> NDArray[Any]:
    """A copy between two guards: who reads or writes beyond its ends is found out."""
    whole = np.concatenate([_GUARD, np.zeros(values.nbytes, np.uint8), _GUARD])
    inner = whole[_GUARD.size : -_GUARD.size].view(values.dtype).reshape(values.shape)
    inner[...] = values
    return inner


def _assert_guards_hold(array: NDArray[Any]) -> None:
    whole = array.base
    assert whole is not None, "kernels take guarded arrays"
    assert (whole[: _GUARD.size] == _GUARD).all(), "a kernel wrote before the start of an array"
    assert (whole[-_GUARD.size :] == _GUARD).all(), "a kernel wrote behind the end of an array"


class Kernels:
    """A built library: `kernels.call("relu_forward", y, x, size)`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def call(
        self, name: str, *arguments: NDArray[Any] | ctypes.Structure | int | float | None
    ) -> None:
        """Calls a kernel: int is size_t, None is NULL, arrays are guarded and changed in place."""
        converted: list[Any] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                assert argument.flags.c_contiguous
                converted.append(ctypes.c_void_p(argument.ctypes.data))
            elif isinstance(argument, ctypes.Structure):
                converted.append(ctypes.byref(argument))
            elif isinstance(argument, float):
                converted.append(ctypes.c_float(argument))
            elif isinstance(argument, int):
                converted.append(ctypes.c_size_t(argument))
            else:
                converted.append(ctypes.c_void_p(None))
        self._library[name](*converted)
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                _assert_guards_hold(argument)

    def size(self, name: str, s: Window) -> int:
        """What a function that makes a size_t of a window says."""
        function = self._library[name]
        function.restype = ctypes.c_size_t
        return int(function(ctypes.byref(s)))


def build(target: Path, sources: Iterable[Path], flags: tuple[str, ...] = STRICT) -> Kernels:
    """Compiles some of the kernels into a library; warnings are errors, as on a board."""
    sources = list(sources)
    # of the firmware, or of a copy with a planted fault
    root = next(folder.parent for folder in sources[0].parents if folder.name == "kernels")
    command = ["gcc", "-std=c11", "-O2", "-fPIC", "-shared", f"-I{root}", *flags]
    subprocess.run([*command, "-o", str(target), *map(str, sources), "-lm"], check=True)
    return Kernels(ctypes.CDLL(str(target)))


def relative_error(pairs: Pairs, tensor: str) -> float:
    """How far a tensor is off, against its largest element or 1/1000 of the largest gradient."""
    ours, theirs = pairs[tensor]
    assert ours.shape == theirs.shape
    gradients = [np.abs(pair[1]).max() for name, pair in pairs.items() if name.startswith("d")]
    scale = max(np.abs(theirs).max(), 1e-3 * max(gradients, default=0.0))
    return float(np.abs(ours - theirs).max() / scale)


def agrees(pairs: Pairs, tensor: str) -> bool:
    """Whether a tensor is as close to float64 as float32 arithmetic should bring it."""
    return relative_error(pairs, tensor) <= TOLERANCE  # false for NaN too


# ---- what both sides start from ----


def rng() -> np.random.Generator:
    return np.random.default_rng(20251209)


def randoms(generator: np.random.Generator, *shape: int) -> Floats:
    return guarded(generator.standard_normal(shape, np.float32))


def unassigned(*shape: int) -> Floats:
    return guarded(np.full(shape, np.nan, np.float32))


def wide(values: NDArray[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def narrow(tensor: torch.Tensor | None) -> NDArray[Any]:
    assert tensor is not None
    return np.asarray(tensor.detach())


def leaf(values: Floats, gradient: Floats) -> torch.Tensor:
    """A tensor whose gradient PyTorch adds to, from the same start as the kernel."""
    tensor = wide(values).requires_grad_()
    tensor.grad = wide(gradient)
    return tensor


@dataclass(frozen=True)
class Image:
    """Shapes of one convolution or pool; pairs are height, width."""

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    channels: int = 3
    out: int = 5
    n: int = 2
    groups: int = 1

    def out_size(self) -> tuple[int, int]:
        height, width = (
            (size + 2 * padding - kernel) // stride + 1
            for size, kernel, stride, padding in zip(
                self.size, self.kernel, self.stride, self.padding, strict=True
            )
        )
        return height, width

    def window(self, out: int) -> Window:
        sizes = (self.channels, *self.size, out, *self.out_size())
        return Window(*sizes, *self.kernel, *self.stride, *self.padding)


# ---- planted faults ----


@dataclass(frozen=True)
class Fault:
    """One change of the kernels' text, and the tensor whose comparison has to notice it."""

    file: str
    old: str
    new: str
    compare: Callable[[Kernels], Pairs]
    tensor: str


def build_faulty(folder: Path, file: str, old: str, new: str) -> Kernels:
    sources = Path(shutil.copytree(KERNELS, folder / "kernels"))
    text = (sources / file).read_text()
    assert text.count(old) == 1, "the text to change is not there, or not alone"
    (sources / file).write_text(text.replace(old, new))
    # the changed file is enough, unless others include it or it calls their kernels
    alone = file.endswith(".c") and file != "grouped_conv2d.c"
    changed = [sources / file] if alone else sources.glob("*.c")
    return build(folder / "faulty.so", changed, ("-O0",))


def notices(fault: Fault, folder: Path) -> bool:
    """Whether the comparison of the fault's tensor fails with it."""
    faulty = build_faulty(folder, fault.file, fault.old, fault.new)
    return not agrees(fault.compare(faulty), fault.tensor)


def ids(faults: list[Fault]) -> list[str]:
    """A name for each fault's test."""
    return [f"{fault.file}: {fault.new}" for fault in faults]
