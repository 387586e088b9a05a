"""One training step twice: by the firmware, single-stepped over the wire, and by PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from splitee import zoo
from splitee.arena import GRADIENTS, MOMENTUM, gradient
from splitee.capture import capture
from splitee.client import LocalClient, Place, Settings, State
from splitee.data import Images
from splitee.exits import Exit
from splitee.model import Network, Segment
from splitee.ops import Array
from splitee.place import Build
from splitee_exporters.c import to_c
from splitee_host import boards
from splitee_host.device import Device
from splitee_host.wire import messages as m

TOLERANCE = 1e-5
SETTINGS = Settings(learning_rate=0.1, momentum=0.9, weight_decay=0.01)


@dataclass(frozen=True)
class Case:
    """A segment with its data: everything that both sides start from."""

    segment: Segment
    build: Build
    images: Images
    state: State


def pools() -> nn.Module:
    """Layers that resnets have not: biases, max and average pools, odd sizes."""
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, 2, 1),
        nn.GroupNorm(1, 5),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(5, 7, (3, 2), (1, 2), (0, 1)),
        nn.ReLU(),
        nn.AvgPool2d(2, 1, 1),
        nn.Conv2d(7, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def case(kind: str, *, capacity: int = 8, samples: int = 24, momentum: bool = True) -> Case:
    """resnet8 up to layer2, or the network of pools up to its second stage, exits at every cut."""
    torch.manual_seed(7)
    if kind == "resnet8":
        shape, classes, depth = (1, 8, 8), 10, 3
        model: nn.Module = zoo.build("resnet8", width=6, norm="group", channels=1)
    else:
        shape, classes, depth = (2, 13, 11), 3, 2
        model = pools()
    network = Network(model, shape)
    cuts = network.cuts[:depth]
    segment = Segment(network, cuts[-1], {c.name: Exit(_image(c.shape), classes) for c in cuts})
    with torch.no_grad():  # norms that only scale by one and add zero would hide mistakes
        for tensor in segment.tensors().values():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
    channels = shape[0]
    build = Build(
        capture(segment, classes),
        capacity,
        momentum,
        samples,
        scale=(1 / 64,) * channels,
        shift=(-2.0,) * channels,
    )
    rng = np.random.default_rng(3)
    images = Images(
        rng.integers(0, 256, (samples, *shape), np.uint8),
        rng.integers(0, classes, samples, np.uint8),
    )
    weights = {n: t.detach().numpy().copy() for n, t in segment.tensors().items()}
    return Case(segment, build, images, State(weights, {}, Place(samples, seed=5)))


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, height, width


@contextmanager
def device(
    case: Case, board: str, folder: Path, settings: Settings, *, source: str | None = None
) -> Iterator[Device]:
    """The case's firmware, built and running on a board; source replaces the generated C."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "segment.c").write_text(source or to_c(case.build))
    known = boards.load_boards()[board]
    firmware = boards.build(known, folder, folder, sanitize=board == "posix")
    with boards.start(known, firmware) as running:
        device = Device(board, running.link, case.build, settings, close=running.close)
        device.start(case.state, case.images)
        yield device


def local(case: Case, settings: Settings) -> LocalClient:
    """The same client in torch."""
    b = case.build
    client = LocalClient(
        "local",
        copy.deepcopy(case.segment),
        settings,
        capacity=b.capacity,
        scale=b.scale,
        shift=b.shift,
    )
    client.start(case.state, case.images)
    return client


def on_device(device: Device, count: int, sent: Tensor | None) -> dict[str, Array]:
    """Every tensor of one step, read as soon as it is complete."""
    build = device.build
    graph, plan = build.graph, build.plan
    part = device.forward(count, count)
    tensors: dict[str, Array] = {"sent": part.activations.numpy()}
    lasting = {GRADIENTS, MOMENTUM}
    for i, step in enumerate(build.schedule.steps):
        if step.action == "weigh" and sent is not None:
            device.write(m.Region.GRADIENT, sent.numpy().astype("<f4").tobytes())
        device.request(m.Run(i, i + 1), m.Done)
        for name in {*step.writes, *step.adds, *step.clears} - lasting:
            tensor = name[2:-1] if name.startswith("d(") else name
            if tensor in graph.shapes:
                size = count * graph.elements(tensor)
                data = device.read(m.Region.ARENA, plan.offsets[name], 4 * size)
                shape = (count, *graph.shapes[tensor])
                tensors[name] = np.frombuffer(data, "<f4").reshape(shape)
    tensors |= {f"gradient of {n}": g for n, g in device.gradients().items()}
    stepped = device.step()
    tensors["loss"] = np.array(stepped.loss)
    state = device.state()
    tensors |= {f"updated {n}": w for n, w in state.weights.items()}
    tensors |= {f"momentum of {n}": v for n, v in state.momentum.items()}
    return tensors


class _Recorder(fx.Interpreter):
    """Keeps every tensor that a traced trunk computes, by the name of its operation."""

    def __init__(self, module: fx.GraphModule, tensors: dict[str, Tensor]) -> None:
        super().__init__(module)
        self.tensors = tensors

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_module":
            name = str(n.target)
        elif n.op == "call_function":
            name = f"{[p for p in n.meta['nn_module_stack'] if p][-1]}.add"
        else:
            return result
        if result.requires_grad:
            result.retain_grad()
        self.tensors[name] = result
        return result


def in_torch(case: Case, settings: Settings, count: int, sent: Tensor | None) -> dict[str, Array]:
    """The same step in float64, with autograd and torch.optim.SGD."""
    segment = copy.deepcopy(case.segment).double()
    parameters = dict(segment.tensors())
    optimizer = torch.optim.SGD(
        parameters.values(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    client = local(case, settings)  # for its data order only, which test_data.py checks
    part = client.upcoming(count)
    channels = case.images.x.shape[1]
    scale = torch.tensor(case.build.scale, dtype=torch.float64).reshape(channels, 1, 1)
    shift = torch.tensor(case.build.shift, dtype=torch.float64).reshape(channels, 1, 1)
    x = torch.from_numpy(part.x).double() * scale + shift
    labels = torch.from_numpy(part.y).long()

    tensors: dict[str, Tensor] = {}
    points = _Recorder(segment.trunk, tensors).run(x)
    returned = []
    losses = []
    for name, head, point in zip(segment.exit_names, segment.exits, points, strict=True):
        y = point.detach().requires_grad_()
        tensors[f"exits.{name}"] = y
        for child_name, child in head.named_children():
            y = child(y)
            y.retain_grad()
            if child_name != "flatten":
                tensors[f"exits.{name}.{child_name}"] = y
        loss = F.cross_entropy(y, labels)
        torch.autograd.backward(loss)
        losses.append(loss)
        entered = tensors[f"exits.{name}"].grad
        assert entered is not None
        returned.append(settings.exit_weight * entered)
    if sent is not None:
        returned[-1] = returned[-1] + settings.server_weight * sent.double()
    torch.autograd.backward(points, returned)

    result = {"sent": points[-1], "loss": losses[-1]}
    graph = case.build.graph
    for name, tensor in tensors.items():
        if name not in graph.shapes:
            continue
        if graph.shapes[name] != tuple(tensor.shape)[1:]:
            raise AssertionError(f"{name}: {tensor.shape} is not {graph.shapes[name]}")
        result[name] = tensor
        if tensor.grad is not None:
            result[gradient(name)] = tensor.grad
    result |= {f"gradient of {n}": p.grad for n, p in parameters.items() if p.grad is not None}
    optimizer.step()
    result |= {f"updated {n}": p for n, p in parameters.items()}
    for n, p in parameters.items():
        result[f"momentum of {n}"] = optimizer.state[p]["momentum_buffer"]
    return {name: value.detach().numpy() for name, value in result.items()}


def names(build: Build) -> list[str]:
    """The tensors of a step that both sides have."""
    graph = build.graph
    aliases = set(build.schedule.aliases)
    made = [op.name for op in graph.ops]
    found = ["sent", "loss", *(n for n in made if n not in aliases)]
    found += [gradient(n) for n in made]
    for parameter in graph.parameters:
        found += [f"gradient of {parameter}", f"updated {parameter}", f"momentum of {parameter}"]
    return found


def error(mine: dict[str, Array], reference: dict[str, Array], name: str) -> float:
    """Relative error of a tensor: largest difference over the largest value of the reference.

    A reference whose values are all tiny counts as 1e-3 of the largest gradient in the model.
    """
    largest = max(np.abs(v).max() for n, v in reference.items() if n.startswith("gradient of "))
    scale = max(np.abs(reference[name]).max(), 1e-3 * largest)
    return float(np.abs(mine[name].astype(np.float64) - reference[name]).max() / scale)
