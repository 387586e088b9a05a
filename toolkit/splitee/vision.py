"""torchvision, also beside a torch that lacks the operators it was built with."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

from splitee.errors import MissingTool

# What torchvision says at import about operators that its own library defines, where it has one.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[Any] = []  # a definition lasts as long as its library


def part(name: str) -> ModuleType:
    """``torchvision.<name>``: models, datasets, transforms.

    Raises MissingTool where torchvision is not installed.

    A torchvision that was built for CUDA does not load its library beside a torch for CPUs, and
    then fails over operators of detection, which no network for classes has.
    """
    try:
        return importlib.import_module(f"torchvision.{name}")
    except ModuleNotFoundError as error:
        raise MissingTool(f"{error.name} is not installed: pip install torchvision") from error
    except RuntimeError:
        if torch.version.cuda is not None or _kept:
            raise
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    _kept.append(library)
    return importlib.import_module(f"torchvision.{name}")
