"""Images that exports are calibrated with and checked on, brought to a network's input."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from splitee import data, pixels
from splitee.data import Images
from splitee.errors import SpliteeError


def load(source: str, shape: tuple[int, int, int]) -> Images:
    """Images of a (channels, height, width), resized where they are of another size.

    source: a bundled dataset; a .npz file with uint8 x (samples, channels, height, width) and, if
    there are any, labels y; or a folder with images, in one folder for each class or none. Images
    without a class are of class 0. Raises SpliteeError, naming source or file, where there are none
    or one cannot be read.
    """
    if source in data.DATASETS:
        images = data.load(source).train
    else:
        path = Path(source)
        if path.is_dir():
            return _folder(path, shape)
        if not path.exists():
            raise SpliteeError(
                f'data "{source}" is unknown: take one of {", ".join(data.DATASETS)}, a .npz file '
                "or a folder with images"
            )
        images = _npz(path)
    if len(images) and images.x.shape[1:] == shape:
        return images
    return Images(np.stack([pixels.resized(x, shape) for x in images.x]), images.y)


def _npz(path: Path) -> Images:
    try:
        with np.load(path) as file:
            x = file["x"]
            y = file["y"] if "y" in file else np.zeros(len(x))
    except (OSError, ValueError, KeyError) as error:
        raise SpliteeError(f"{path}: no .npz file with images x: {error}") from error
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1] not in pixels.MODES or not len(x):
        raise SpliteeError(
            f"{path}: x is {x.dtype} of {x.shape}: give it uint8 images, (samples, 1 or 3 "
            "channels, height, width)"
        )
    if len(y) != len(x):
        raise SpliteeError(f"{path}: {len(x)} images x and {len(y)} labels y: give each its own")
    return Images(x, y.astype(np.uint8))


def _folder(path: Path, shape: tuple[int, int, int]) -> Images:
    known = pixels.suffixes()
    files = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in known and f.is_file()]
    if not files:
        raise SpliteeError(f"{path}: there are no images in it")
    classes = sorted({f.parent for f in files})
    x = np.stack([pixels.read(file, str(file), shape) for file in files])
    return Images(x, np.array([classes.index(f.parent) for f in files], np.uint8))
