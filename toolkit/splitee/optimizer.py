"""SGD or AdamW in torch, and what each of them remembers, by parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from splitee.state import Settings


def make(parameters: Iterable[nn.Parameter], settings: Settings) -> Optimizer:
    """The optimiser that the settings name."""
    kind = SGD if settings.adamw is None else AdamW
    return kind(parameters, **_options(settings))


def follow(optimizer: Optimizer, settings: Settings) -> None:
    """Learns by other settings from the next step on; it stays SGD or AdamW."""
    for group in optimizer.param_groups:
        group.update(_options(settings))


def _options(settings: Settings) -> dict[str, Any]:
    options = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.adamw is None:
        return options | {"momentum": settings.momentum}
    adamw = settings.adamw
    return options | {"betas": (adamw.beta1, adamw.beta2), "eps": adamw.eps}


def memory(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What it remembers of those parameters that have learnt.

    Of SGD the velocity, by the parameter's name; of AdamW "<name>.exp_avg", "<name>.exp_avg_sq"
    and "<name>.step".
    """
    found = {}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        for key, place in _places(optimizer, name).items():
            if state.get(key) is not None:
                found[place] = state[key]
    return found


def remember(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], memory: Mapping[str, Tensor]
) -> None:
    """Replaces what it remembers of these parameters by copies; what is not there begins anew."""
    for name, parameter in parameters.items():
        optimizer.state.pop(parameter, None)
        for key, place in _places(optimizer, name).items():
            if place in memory:
                # torch counts steps on the CPU, whatever device computes them
                shape, device = (
                    ((), "cpu") if key == "step" else (parameter.shape, parameter.device)
                )
                kept = memory[place].to(device, torch.float32, copy=True).reshape(shape)
                optimizer.state[parameter][key] = kept


def _places(optimizer: Optimizer, name: str) -> dict[str, str]:
    """Where the parts of torch's state of a parameter are in its memory."""
    if isinstance(optimizer, SGD):
        return {"momentum_buffer": name}
    return {key: f"{name}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
