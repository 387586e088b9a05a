"""What the tests of segments of 8 bits share: quantised networks, and the firmware with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from splitee.ops import Array
from splitee.place_int8 import Int8Build
from splitee_exporters.c_int8 import to_c
from splitee_exporters.tflite import Exported, segment_to_tflite
from splitee_exporters.tflite_run import litert
from splitee_host.int8_device import Int8Device
from step_harness import case, running


@dataclass(frozen=True)
class Int8Case:
    """A segment in 8 bits, and what it is asked."""

    build: Int8Build
    file: Exported  # the same numbers as a .tflite
    images: Array  # uint8, channels first
    x: Array  # int8: these images, and what no image is

    @cached_property
    def answers(self) -> dict[str, dict[str, Array]]:
        """Activations and logits, by who says so: LiteRT's reference kernels are not ours."""
        graph, reference = self.build.graph, litert(self.file, self.x, reference=True)
        values = graph.run(self.x)
        return {
            "numpy": {tensor: values[tensor] for tensor in self.file.outputs.values()},
            "LiteRT": {tensor: reference[name] for name, tensor in self.file.outputs.items()},
        }


@cache
def int8_case(kind: str) -> Int8Case:
    """A segment of ``step_harness.case`` in 8 bits, two samples at a time."""
    the_case = case(kind)
    images = the_case.images.x
    file = segment_to_tflite(the_case.build, images)
    build = Int8Build(file.graph, the_case.build.stages[-1].cut, capacity=2)
    # what was not seen in calibration saturates here and there
    strange = np.random.default_rng(11).integers(-128, 128, (2, *build.graph.input_shape), np.int8)
    x = np.concatenate([build.graph.image(images[:3]), strange])
    return Int8Case(build, file, images[:3], x)


@contextmanager
def int8_device(
    build: Int8Build, board: str, folder: Path, source: str | None = None
) -> Iterator[Int8Device]:
    """Its firmware, built and running on a board; source replaces the generated C."""
    with running(board, folder, source or to_c(build)) as on:
        device = Int8Device(board, on.link, build, close=on.close)
        device.hello()
        yield device
