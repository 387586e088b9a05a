"""What changes training images anew in every epoch, by torchvision's names and meanings.

What is drawn for a sample depends on its client's seed, the epoch and its place in the epoch's
order alone: not on how a batch is cut into parts, nor on other threads. So a pass that is replayed,
and a second run, see the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from splitee.ops import Array
from splitee.state import Place

PADDING = 4  # pixels around an image that "crop" cuts from, as in He et al., arXiv 1512.03385


def augmented(x: Array, names: Sequence[str], start: Place) -> Array:
    """Changed images, uint8 (samples, channels, height, width).

    x: the samples that follow one another in the order of an epoch. start: where the first stands.
    """
    for stage, name in enumerate(names):
        # Philox counts in steps of four numbers: a step is a sample, so each has its own
        drawn = np.random.Philox(
            key=[start.seed, start.epoch], counter=[start.position, stage, 0, 0]
        ).random_raw(4 * len(x))
        x = _STAGES[name](x, drawn.reshape(len(x), 4))
    return x


def _crop(x: Array, drawn: Array) -> Array:
    """A window of the image's size, anywhere in the image with black around it."""
    height, width = x.shape[2:]
    around = [(0, 0), (0, 0), (PADDING, PADDING), (PADDING, PADDING)]
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, around), (height, width), axis=(2, 3)
    )
    down, right = (drawn[:, :2] % (2 * PADDING + 1)).astype(np.intp).T
    return windows[np.arange(len(x)), :, down, right]


def _flip(x: Array, drawn: Array) -> Array:
    """Left and right change places in every other image."""
    return np.where((drawn[:, 0] % 2 == 1)[:, None, None, None], x[..., ::-1], x)


_STAGES: dict[str, Callable[[Array, Array], Array]] = {"crop": _crop, "flip": _flip}
