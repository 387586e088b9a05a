"""TFLite files where they run: in LiteRT, and in TFLite Micro with the memory that it records.

``verify`` holds a file to both, and to what it was made from. TFLite Micro for this machine is the
package tflite-micro; where that is not installed, LiteRT alone has run a file, and no memory is
recorded.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from splitee.errors import ExportError, MissingTool
from splitee.ops import Array
from splitee_exporters.manifest import INT8_TOLERANCE, MEAN_SQUARE, Verified, error_of, hold
from splitee_exporters.tflite import LOGITS, Arena, Exported, first_installed, read

SPARE = 1 << 16  # bytes of TFLite Micro's arena beside planned tensors and tables of multipliers


def litert(exported: Exported, x: Array, *, reference: bool = False) -> dict[str, Array]:
    """Its int8 outputs for int8 samples x (n, height, width, channels), one by one, in LiteRT.

    reference: by the reference kernels, otherwise by those that it takes itself. Raises MissingTool
    where neither LiteRT nor its forerunners are installed.
    """
    module, _ = _interpreter()
    kind = module.OpResolverType
    with _standard_error():  # which kernels it takes is no news to a user
        interpreter = module.Interpreter(
            model_content=exported.data,
            num_threads=1,
            experimental_op_resolver_type=kind.BUILTIN_REF if reference else kind.AUTO,
        )
        interpreter.allocate_tensors()
    (put,) = (tensor["index"] for tensor in interpreter.get_input_details())
    get = [tensor["index"] for tensor in interpreter.get_output_details()]

    def run(sample: Array) -> list[Array]:
        interpreter.set_tensor(put, sample)
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in get]

    return _each(exported, x, run)


def micro(exported: Exported, x: Array) -> tuple[dict[str, Array], Arena]:
    """The same in TFLite Micro, and what it took of its arena.

    Raises MissingTool where tflite-micro is not installed.
    """
    try:
        runtime = importlib.import_module("tflite_micro.python.tflite_micro.runtime")
    except ModuleNotFoundError as error:
        raise MissingTool(
            "tflite-micro is not installed: pip install tflite-micro (there is one for Linux on "
            "x86-64 alone)"
        ) from error
    size = exported.plan.size + len(exported.data) + SPARE
    interpreter = runtime.Interpreter.from_bytes(exported.data, arena_size=size)

    def run(sample: Array) -> list[Array]:
        interpreter.set_input(sample, 0)
        interpreter.invoke()
        return [interpreter.get_output(i) for i in range(len(exported.outputs))]

    found = _each(exported, x, run)
    with _standard_error() as written:
        interpreter.print_allocations()
        lines = written.read_text()
    sizes = dict(re.findall(r"Arena allocation (head|tail|total) (\d+) bytes", lines))
    head, tail, total = (int(sizes[part]) for part in ("head", "tail", "total"))
    return found, Arena(head, tail, total, exported.plan.lower_bound)


def verify(
    exported: Exported,
    images: Array,
    expected: Mapping[str, Array],
    against: str,
    *,
    tolerance: float = INT8_TOLERANCE,
) -> tuple[Verified, Arena | None]:
    """Runs the file on uint8 images, and compares every output with what is expected, in floats.

    LiteRT's reference kernels, and TFLite Micro's where it is installed, have to answer bit for bit
    as the graph does. LiteRT's default kernels round otherwise: each by a step at most, which adds
    up behind many of them; they are held to what is expected alone. against: where that comes from,
    for the manifest. Raises ExportError, naming the output, where that is not so, or where an error
    is above the tolerance, by its root mean square, or no number.

    Returns what a manifest says of it, and what TFLite Micro took of its arena, if it has run.
    """
    if not len(images):
        raise ExportError(f"{exported.name}: there is nothing to hold it to: give it samples")
    read(exported.data)
    x = exported.graph.image(images)
    values = exported.graph.run(x)
    own = {name: values[tensor] for name, tensor in exported.outputs.items()}
    _same(exported, "LiteRT's reference kernels", litert(exported, x, reference=True), own)
    _, runtime = _interpreter()
    taken = None
    try:
        answers, taken = micro(exported, x)
    except MissingTool:
        pass
    else:
        _same(exported, "TFLite Micro", answers, own)
        runtime += f" and TFLite Micro {importlib.metadata.version('tflite-micro')}"
    default = litert(exported, x)
    steps = max(_steps(default[name], value) for name, value in own.items())
    worst = 0.0
    for name, tensor in exported.outputs.items():
        for who, answer in (("", own), ("default kernels' ", default)):
            real = exported.graph.dequantize(tensor, answer[name])
            error = error_of(real, expected[name], MEAN_SQUARE)
            worst = max(worst, error)
            hold(f"{exported.name}.tflite: {who}{name}", error, tolerance, against, MEAN_SQUARE)
    same = own[LOGITS].argmax(1) == expected[LOGITS].argmax(1)
    verified = Verified(
        runtime=f"{runtime}, bit for bit; default kernels within {steps} steps of 256",
        against=against,
        samples=len(x),
        batches=(1,),
        error=worst,
        measure=MEAN_SQUARE,
        tolerance=tolerance,
        same_class=float(same.mean()),
    )
    return verified, taken


def _interpreter() -> tuple[Any, str]:
    """The module that has an Interpreter, and what it is called."""
    module = first_installed(
        "ai_edge_litert.interpreter",
        "tflite_runtime.interpreter",
        "tensorflow.lite.python.interpreter",
    )
    name = importlib.metadata.packages_distributions()[module.__name__.split(".")[0]][0]
    return module, f"{name} {importlib.metadata.version(name)}"


def _each(exported: Exported, x: Array, run: Callable[[Array], list[Array]]) -> dict[str, Array]:
    answers = [run(x[i : i + 1]) for i in range(len(x))]
    return {
        name: np.concatenate([answer[i] for answer in answers])
        for i, name in enumerate(exported.outputs)
    }


def _steps(found: Array, own: Array) -> int:
    """By how many integers an output is off at most."""
    return int(np.abs(found.astype(int) - own).max())


def _same(
    exported: Exported, who: str, found: Mapping[str, Array], own: Mapping[str, Array]
) -> None:
    """Raises ExportError where somebody's answers are not the graph's, bit for bit."""
    for name, value in own.items():
        if steps := _steps(found[name], value):
            raise ExportError(
                f"{exported.name}.tflite: {who} answer {name} that are off by {steps} steps of "
                "256: the file does not compute what the network does"
            )


@contextmanager
def _standard_error() -> Iterator[Path]:
    """A file with what is written to standard error meanwhile, also by C++."""
    with tempfile.TemporaryDirectory(prefix="splitee-tflite-") as folder:
        path = Path(folder) / "written"
        kept = os.dup(2)
        try:
            with path.open("wb") as file:
                os.dup2(file.fileno(), 2)
            yield path
        finally:
            os.dup2(kept, 2)
            os.close(kept)
