"""ONNX with 8-bit integers: static quantisation (QDQ) of an exported segment by ONNX Runtime.

Weights have a scale per output channel, activations one per tensor, from images that are run for
that. Batch norms are folded into convolutions first; group norms, and what makes a network's input
of bytes, stay in float32. Input and outputs keep their types.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from splitee.edge import IMAGES
from splitee.errors import ExportError
from splitee.fold import fold
from splitee.ops import Array
from splitee.place import Build
from splitee_exporters.onnx import Exported, finished, read, segment_to_onnx

# behind the exporter, which says by name what is not installed
import onnx  # isort: skip
from onnx import helper, shape_inference  # isort: skip
from onnxruntime import quantization  # isort: skip

BATCH = 32  # images that run at once to calibrate


class _Images(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Hands out batches of images until there are none."""

    def __init__(self, images: Array) -> None:
        self._feeds: Iterator[dict[str, Array]] = (
            {IMAGES: images[i : i + BATCH]} for i in range(0, len(images), BATCH)
        )

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)


def segment_to_int8(build: Build, calibration: Array, cut: str | None = None) -> Exported:
    """As ``segment_to_onnx``, with weights and activations of 8 bits.

    calibration: uint8 images like those that it will see, (samples, channels, height, width). The
    more the better: what is larger than any value seen with them is clipped. Raises ExportError
    where there are none.
    """
    if not len(calibration):
        raise ExportError("segment-int8: there is nothing to calibrate with: give it images")
    plain = segment_to_onnx(build, cut)
    folded = read(segment_to_onnx(replace(build, graph=fold(plain.graph))))
    # says that nothing is left to prepare; otherwise ONNX Runtime warns of it
    helper.set_model_props(folded, {"onnx.quant.pre_process": "onnxruntime.quant"})
    with tempfile.TemporaryDirectory(prefix="splitee-int8-") as folder:
        path = Path(folder) / "segment.onnx"
        quantization.quantize_static(
            shape_inference.infer_shapes(folded),
            path,
            _Images(calibration),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=["images.cast", "images.mul", "images.add"],
        )
        model = onnx.load_model(path)
    return replace(plain, name="segment-int8", data=finished(model, plain.graph))
