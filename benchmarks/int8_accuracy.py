"""What 8 bits cost in accuracy: exits, and servers behind int8 activations, as JSON.

.venv/bin/python benchmarks/int8_accuracy.py --cifar cifar10-jpeg.tar.xz \
    > benchmarks/results/int8_accuracy.json

A ResNet-8 with an exit on every cut, once with batch norms and once with group norms, learns the
digits, and CIFAR-10 from an archive of JPEG files (train/<class>/*.jpg, test/<class>/*.jpg),
briefly. Then each segment is quantised, with training
images, and answers for the test images: the float ones from PyTorch, the 8-bit ones from the graph
that files are written from. A server gets what the segment sends, as real numbers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from splitee import datasets, zoo
from splitee.capture import capture
from splitee.data import Dataset, draw_order, load
from splitee.exits import Exit
from splitee.fleet import DataTable
from splitee.model import Network, Segment, Tail
from splitee.ops import Array
from splitee.quantize import quantize

ROOT = Path(__file__).parents[1]
CUTS = ("layer1", "layer2", "layer3")
BATCH, MOMENTUM, DECAY = 64, 0.9, 5e-4


@dataclass(frozen=True)
class Plan:
    """How one dataset is learnt and quantised."""

    width: int
    epochs: int
    rate: float
    calibration: int  # training images that are run for ranges


PLANS = {"digits": Plan(8, 8, 0.05, 1437), "cifar10-jpeg": Plan(16, 2, 0.05, 512)}


def cifar(archive: Path, samples: int | None = None, test_samples: int | None = None) -> Dataset:
    """CIFAR-10 (JPEG) from an archive in the layout of an ImageFolder, or so many images of it."""
    table = DataTable(name="folder", path=str(archive), samples=samples, test_samples=test_samples)
    return replace(datasets.load(table), name="cifar10-jpeg")


def network_input(data: Dataset, x: Array) -> Tensor:
    """What a network sees of uint8 images."""
    scale, shift = (torch.tensor(v)[:, None, None] for v in (data.scale, data.shift))
    return torch.tensor(x) * scale + shift


def learn(data: Dataset, plan: Plan, norm: str, seed: int) -> tuple[Segment, Tail]:
    """A segment with all exits and the server's half, learnt together in one place."""
    torch.manual_seed(seed)
    model = zoo.build(
        "resnet8", width=plan.width, norm=norm, classes=data.classes, channels=data.shape[0]
    )
    network = Network(model, data.shape)
    cuts = [network.cut(name) for name in CUTS]
    exits = {c.name: Exit((c.shape[0], c.shape[1], c.shape[2]), data.classes) for c in cuts}
    segment, tail = Segment(network, cuts[-1], exits), Tail(network, cuts)
    parameters = [*segment.parameters(), *tail.stages[-1].parameters()]
    optimizer = torch.optim.SGD(parameters, plan.rate, MOMENTUM, weight_decay=DECAY)
    steps = plan.epochs * (len(data.train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * plan.rate, total_steps=steps)
    for epoch in range(plan.epochs):
        order = draw_order(len(data.train), seed, epoch)
        for start in range(0, len(order) - BATCH + 1, BATCH):
            part = data.train[order[start : start + BATCH]]
            points, logits = segment(network_input(data, part.x))
            y = torch.tensor(part.y).long()
            answers = [*logits, tail(points[-1], CUTS[-1])]
            optimizer.zero_grad()
            torch.autograd.backward([F.cross_entropy(a, y) for a in answers])
            optimizer.step()
            schedule.step()
        print(data.name, norm, "epoch", epoch + 1, file=sys.stderr)
    return segment.eval(), tail.eval()


def rows(data: Dataset, plan: Plan, norm: str, seed: int) -> list[dict[str, Any]]:
    """The accuracies at each cut, in floats and in 8 bits, in percent."""
    segment, tail = learn(data, plan, norm, seed)
    graph = capture(segment, data.classes)
    calibration = data.train.x[draw_order(len(data.train), seed, 0)[: plan.calibration]]
    found = []
    for i, cut in enumerate(CUTS):
        graph8 = quantize(graph.at(cut, upto=False), calibration, data.scale, data.shift)
        right = dict.fromkeys(("exit_float", "exit_int8", "server_float", "server_int8"), 0)
        for start in range(0, len(data.test), 250):
            part = data.test[slice(start, start + 250)]
            values = graph8.run(graph8.image(part.x))
            sent = torch.tensor(graph8.dequantize(graph8.cut, values[graph8.cut]))
            with torch.no_grad():
                points, logits = segment(network_input(data, part.x))
                answers = {
                    "exit_float": logits[i].numpy(),
                    "exit_int8": values[graph8.logits],
                    "server_float": tail(points[i], cut).numpy(),
                    "server_int8": tail(sent, cut).numpy(),
                }
            for name, answer in answers.items():
                right[name] += int((answer.argmax(1) == part.y).sum())
        percent = {name: round(100 * count / len(data.test), 2) for name, count in right.items()}
        found.append({"cut": cut, **percent})
        print(data.name, found[-1], file=sys.stderr)
    return found


def main() -> None:
    """Runs both datasets and prints one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, help="the archive; without it the digits alone run")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    head = ["git", "rev-parse", "--short", "HEAD"]
    made = subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=True)
    datasets = [load("digits"), *([cifar(arguments.cifar)] if arguments.cifar else [])]
    results = [
        {
            "data": data.name,
            "model": "resnet8",
            "norm": norm,
            **vars(PLANS[data.name]),
            "test_images": len(data.test),
            "cuts": rows(data, PLANS[data.name], norm, arguments.seed),
        }
        for data in datasets
        for norm in zoo.NORMS
    ]
    print(json.dumps(
        {"commit": made.stdout.strip(), "seed": arguments.seed, "results": results}, indent=1
    ))  # fmt: skip


if __name__ == "__main__":
    main()
