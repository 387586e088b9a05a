"""Pictures from files, as bytes of a network's input."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from splitee.errors import DataError
from splitee.ops import Array

MODES = {1: "L", 3: "RGB"}
_GREY = ("1", "L", "LA", "I;16")


def suffixes() -> set[str]:
    """How the names of files end that may be read, in small letters."""
    return set(Image.registered_extensions())


def read(file: Path | IO[bytes], name: str, shape: tuple[int, int, int] | None = None) -> Array:
    """A picture as uint8 (channels, height, width), brought to a shape or as it is.

    As it is, a grey one has one channel and any other three. Raises DataError, with the name, where
    it cannot be read.
    """
    try:
        with Image.open(file) as image:
            if shape is None:
                shape = (1 if image.mode in _GREY else 3, image.height, image.width)
            return _brought(image, shape)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: not an image that can be read: {error}") from error


def resized(x: Array, shape: tuple[int, int, int]) -> Array:
    """One image of uint8 (channels, height, width) as one of another shape."""
    pixels = x[0] if len(x) == 1 else x.transpose(1, 2, 0)
    return _brought(Image.fromarray(pixels), shape)


def _brought(image: Image.Image, shape: tuple[int, int, int]) -> Array:
    channels, height, width = shape
    if image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8).reshape(height, width, channels).transpose(2, 0, 1)
