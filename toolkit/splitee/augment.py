"""What changes training images anew in every epoch: torchvision's augmentations, by name.

What is drawn for a sample depends on its client's seed, the epoch and its place in the epoch's
order alone: not on how a batch is cut into parts, nor on other threads. So a pass that is replayed,
and a second run, see the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from splitee import vision
from splitee.ops import Array
from splitee.state import Place

Augmentation = Literal["crop", "flip", "jitter", "erase", "auto", "rand", "trivial"]
PADDING = 4  # pixels around an image that "crop" cuts from, as in He et al., arXiv 1512.03385


def augmented(x: Array, names: Sequence[str], start: Place) -> Array:
    """Changed images, uint8 (samples, channels, height, width).

    x: the samples that follow one another in the order of an epoch. start: where the first stands.
    Raises MissingTool where one of the names needs torchvision, which is not installed.
    """
    for stage, name in enumerate(names):
        # Philox counts in steps of four numbers: a step is a sample, so each has its own
        drawn = np.random.Philox(
            key=[start.seed, start.epoch], counter=[start.position, stage, 0, 0]
        ).random_raw(4 * len(x))
        change = {"crop": _crop, "flip": _flip}.get(name) or partial(_torchvision, name)
        x = change(x, drawn.reshape(len(x), 4))
    return x


# These two are torchvision's RandomCrop and RandomHorizontalFlip of all samples at once, in an
# eighth of the time: a GPU would wait for them.


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


@cache
def _transform(name: str) -> Any:
    """torchvision's transform of that name, as its papers or its own examples set it."""
    t = vision.part("transforms")
    match name:
        case "jitter":
            return t.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)
        case "erase":
            return t.RandomErasing()
        case "auto":
            return t.AutoAugment(t.AutoAugmentPolicy.CIFAR10)
        case "rand":
            return t.RandAugment()
        case "trivial":
            return t.TrivialAugmentWide()
    raise AssertionError(name)


def _torchvision(name: str, x: Array, drawn: Array) -> Array:
    """Each image by a transform that draws from numbers of its own."""
    transform, generator = _transform(name), torch.Generator()
    changed = np.empty_like(x)
    with _DrawingFrom(generator):
        for image, seed, place in zip(torch.from_numpy(x), drawn[:, 0], changed, strict=True):
            generator.manual_seed(int(seed))
            place[:] = transform(image).numpy()
    return changed


class _DrawingFrom(TorchFunctionMode):
    """In this thread alone, what draws from torch's global state draws from a generator instead.

    Transforms have no other way to be given one, and clients in other threads draw, too.
    """

    _DRAWING = (
        torch.rand, torch.randint, torch.randperm, torch.randn,
        torch.Tensor.uniform_, torch.Tensor.normal_,
    )  # fmt: skip

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in self._DRAWING:
            given["generator"] = self._generator
        return func(*args, **given)
