"""One training step twice, on a device and in PyTorch, compared tensor by tensor.

The device runs its release firmware: the host lets it take one step of its segment at a time
(``Run``) and reads each tensor from the arena as soon as it is complete. PyTorch computes the same
step in float64, by autograd and torch.optim.SGD.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from splitee.data import Images, draw_order
from splitee.graph import Graph
from splitee.model import Segment
from splitee.norms import FrozenBatchNorm2d
from splitee.ops import Array
from splitee.place import Build
from splitee.state import Place, Settings
from splitee.steps import gradient, tensor_of
from splitee_host.device import Device
from splitee_host.learner import Learner
from splitee_host.wire import messages as m

TOLERANCE = 1e-5
TOLERANCE_FLOAT16 = 5e-3  # where activations wait for backward as float16
FLOOR = 1e-3  # of the largest gradient in the model: smaller tensors are measured against that


@dataclass(frozen=True)
class Difference:
    """How far a tensor of the device is from PyTorch's."""

    tensor: str
    error: float  # largest difference, relative (see relative_error)
    tolerance: float = TOLERANCE

    @property
    def good(self) -> bool:
        """Whether it is as close as it has to be (a NaN is not)."""
        return self.error <= self.tolerance


def compare(
    device: Device, segment: Segment, images: Images, settings: Settings, count: int, seed: int
) -> list[Difference]:
    """Trains one batch of count samples on a started device and in torch; the worst tensor first.

    What is compared is the step at the device's cut. segment: all that is built in, with the
    weights that the device started from. images: its shard. seed: of its data order, at whose
    beginning it stands.
    """
    sent = None
    if settings.wants_gradient:
        sent = _from_server(count, device.graph.shapes[device.graph.cut])
    mine = step_on_device(device, count, sent)
    part = images[draw_order(len(images), seed, 0)[:count]]
    active = segment.at(device.cut, upto=device.upto)
    theirs = step_in_torch(active, device.build, part, settings, sent)
    compared = names(device.graph, momentum=device.build.momentum)
    bar = tolerance(device.build)
    found = [Difference(n, relative_error(mine, theirs, n), bar) for n in compared]
    # NaN is the worst of all, and sorts nowhere by itself
    return sorted(found, key=lambda d: -np.inf if np.isnan(d.error) else -d.error)


def compare_learner(
    learner: Learner, segment: Segment, build: Build, images: Images, settings: Settings, count: int
) -> list[Difference]:
    """The same for a client of this process, at its deepest cut: what goes in and out of a step.

    It is left with other weights, and in another place. segment: with the weights to begin with.
    """
    cut = build.stages[-1].cut
    learner.move(cut, upto=True)
    graph, place = build.graph, Place(len(images), seed=0)
    sent = _from_server(count, graph.shapes[graph.cut]) if settings.wants_gradient else None
    learner.load_weights({n: t.detach().cpu().numpy() for n, t in segment.tensors().items()})
    learner.settings = settings
    learner.begin(place, images)
    sizes = [min(build.capacity, count - i) for i in range(0, count, build.capacity)]
    mine = step_of_learner(learner, sizes, sent)
    part = images[draw_order(place.samples, place.seed, place.epoch)[:count]]
    theirs = step_in_torch(segment, build, part, settings, sent)
    found = [Difference(n, relative_error(mine, theirs, n)) for n in mine]
    return sorted(found, key=lambda d: -np.inf if np.isnan(d.error) else -d.error)


def _from_server(count: int, shape: tuple[int, ...]) -> Tensor:
    """Something that the server could send."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1)) / count


def tolerance(build: Build) -> float:
    """How far a tensor of a segment may be from PyTorch's."""
    return TOLERANCE_FLOAT16 if build.levers.float16 else TOLERANCE


def names(graph: Graph, *, momentum: bool) -> list[str]:
    """The tensors of a step that both sides have, in the order in which they are computed."""
    made = [op.name for op in graph.ops]
    # a branch makes none of its own
    found = ["sent", *(op.name for op in graph.ops if op.kind != "branch"), "loss"]
    found += [gradient(n) for n in reversed(made)]
    for parameter in graph.parameters:
        found += [f"gradient of {parameter}", f"updated {parameter}"]
        found += [f"momentum of {parameter}"] if momentum else []
    return found + [f"updated {statistic}" for statistic in graph.statistics]


def relative_error(mine: dict[str, Array], reference: dict[str, Array], name: str) -> float:
    """Largest difference of a tensor over the largest value of the reference.

    A reference whose values are all tiny counts as FLOOR x the largest gradient in the model.
    """
    largest = max(np.abs(v).max() for n, v in reference.items() if n.startswith("gradient of "))
    scale = max(np.abs(reference[name]).max(), FLOOR * largest)
    return float(np.abs(mine[name].astype(np.float64) - reference[name]).max() / scale)


def step_on_device(device: Device, count: int, sent: Tensor | None) -> dict[str, Array]:
    """Every tensor of one step on count samples; sent is the server's gradient."""
    build = device.build
    graph, plan = build.graph, build.plan
    part = device.forward(count, count)
    tensors: dict[str, Array] = {"sent": part.activations.numpy()}
    done = 0
    for i in device.steps_at_cut():
        step = build.schedule.steps[i]
        if step.action == "weigh" and sent is not None:
            device.write(m.Region.GRADIENT, sent.numpy().astype("<f4").tobytes())
        # with those in between that take no part: the device leaves them out, or it is noticed
        device.request(m.Run(done, i + 1), m.Done)
        done = i + 1
        for name in {*step.writes, *step.adds, *step.clears}:
            value = tensor_of(name)
            tensor = value[2:-1] if value.startswith("d(") else value
            if tensor in graph.shapes:  # not a buffer of ours alone, such as a norm's mean
                size = count * graph.elements(tensor)
                data = device.read(m.Region.ARENA, plan.offsets[name], 4 * size)
                shape = (count, *graph.shapes[tensor])
                tensors[value] = np.frombuffer(data, "<f4").reshape(shape)
    tensors |= {f"gradient of {n}": g for n, g in device.gradients().items()}
    tensors["loss"] = np.array(device.step().loss)
    state = device.state()
    tensors |= {f"updated {n}": w for n, w in state.weights.items()}
    tensors |= {f"momentum of {n}": v for n, v in state.momentum.items()}
    return tensors


def step_of_learner(
    learner: Learner, sizes: Sequence[int], sent: Tensor | None
) -> dict[str, Array]:
    """What goes in and out of one step on a batch in parts; sent is the server's gradient."""
    activations: list[Array] = []
    start = 0
    for size in sizes:
        activations.append(learner.forward(size, sum(sizes))[0])
        part = None if sent is None else sent[start : start + size].numpy()
        learner.backward(part)
        start += size
    tensors: dict[str, Array] = {"sent": np.concatenate(activations)}
    learnt = learner.gradients()
    tensors["loss"] = np.array(learner.step().loss)
    for what, values in (
        ("gradient of", learnt),
        ("updated", learner.weights()),
        ("momentum of", learner.momentum()),
    ):
        tensors |= {f"{what} {name}": value for name, value in values.items()}
    return tensors


def step_in_torch(
    segment: Segment,
    build: Build,
    part: Images,
    settings: Settings,
    sent: Tensor | None,
    momentum: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """The same step in float64; the segment given is left as it is.

    momentum: what each parameter has already, where there is any.
    """
    segment = copy.deepcopy(segment).double()
    for path, norm in list(segment.named_modules()):
        if isinstance(norm, FrozenBatchNorm2d):
            segment.set_submodule(path, _fixed(norm))
    parameters = {n: t for n, t in segment.tensors().items() if isinstance(t, nn.Parameter)}
    optimizer = torch.optim.SGD(
        parameters.values(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    for name, value in (momentum or {}).items():
        buffer = torch.tensor(value, dtype=torch.float64)
        optimizer.state[parameters[name]]["momentum_buffer"] = buffer
    scale = torch.tensor(build.scale, dtype=torch.float64)[:, None, None]
    shift = torch.tensor(build.shift, dtype=torch.float64)[:, None, None]
    x = torch.from_numpy(part.x).double() * scale + shift
    labels = torch.from_numpy(part.y).long()

    tensors: dict[str, Tensor] = {}
    points = _Recorder(segment.trunk, tensors).run(x)
    logits = []
    for prefix, head, point in zip(segment.exit_prefixes, segment.exits, points, strict=True):
        tensors[prefix] = y = point.detach().requires_grad_()
        for child_name, child in head.named_children():
            y = child(y)
            y.retain_grad()
            tensors[f"{prefix}.{child_name}"] = y
        logits.append(y)
    losses = [F.cross_entropy(y, labels) for y in logits]
    loss, teacher = losses[-1], F.log_softmax(logits[-1].detach(), 1)
    for number, y in enumerate(logits[:-1]):
        own = F.log_softmax(y, 1)
        apart = F.kl_div(own, teacher, reduction="batchmean", log_target=True)
        losses[number] = (1 - settings.distill) * losses[number] + settings.distill * apart
    torch.autograd.backward(losses)
    returned = [settings.exit_weight * _gradient(tensors[p]) for p in segment.exit_prefixes]
    if sent is not None:
        returned[-1] = returned[-1] + settings.server_weight * sent.double()
    torch.autograd.backward(points, returned)

    shapes = build.graph.shapes
    result = {"sent": points[-1], "loss": loss}
    for name, tensor in tensors.items():
        if name in shapes:
            assert shapes[name] == tuple(tensor.shape)[1:], name
            result[name] = tensor
            if tensor.grad is not None:
                result[gradient(name)] = tensor.grad
    result |= {
        f"gradient of {n}": p.grad.clone() for n, p in parameters.items() if p.grad is not None
    }
    if settings.clip:
        nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
    optimizer.step()
    for op in build.graph.ops:
        if op.kind == "batch_norm" and op.attrs["frozen"]:
            # in training, torch's batch norm follows at once
            segment.trunk.get_submodule(op.name).train()(tensors[op.inputs[0]].detach())
    result |= {f"updated {n}": t for n, t in segment.tensors().items()}
    if settings.momentum:
        result |= {
            f"momentum of {n}": optimizer.state[p]["momentum_buffer"] for n, p in parameters.items()
        }
    return {name: value.detach().numpy() for name, value in result.items()}


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _fixed(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """torch's own batch norm as it is outside of training: by the running statistics."""
    fixed = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, dtype=torch.float64)
    fixed.load_state_dict(norm.state_dict())
    return fixed.eval()


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
