"""What each way of sending takes, against raw images, and what is learnt through it, as JSON.

.venv/bin/python benchmarks/codecs.py > benchmarks/results/codecs.json

Three clients in torch, whose trunks learn from both their exits and the server, so that activations
and gradients both go through the codec; each row has the same rounds, seeds, data order and initial
weights. A bottleneck sends a third of the channels, or half of them and every second pixel; with
"unsure", samples go up that their exit is unsure of, and bytes are those of a mean sample. Beside
them the same network trained on uploaded images, in one place, for as many epochs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from splitee import zoo
from splitee.assemble import Assembly
from splitee.codec import KINDS, Kind
from splitee.data import draw_order
from splitee.fleet import Fleet
from splitee.train import evaluate, fit
from splitee_host.boards import load_boards, look_up

ROOT = Path(__file__).parents[1]
CUTS = ("layer1", "layer2", "layer3")
ROUNDS, BATCH, RATE, MOMENTUM, WIDTH, TOP_K = 6, 16, 0.04, 0.9, 6, 0.1
ENTROPY = 0.5


def ways() -> dict[str, dict[str, dict[str, Any]]]:
    """What is compared: the keys of each cut's client, by title."""
    channels = {cut: WIDTH << i for i, cut in enumerate(CUTS)}
    third = {cut: {"bottleneck": n // 3} for cut, n in channels.items()}
    half = {cut: {"bottleneck": n // 2, "bottleneck_stride": 2} for cut, n in channels.items()}
    unsure = {cut: {"send": "unsure"} for cut in CUTS}
    found: dict[str, dict[str, dict[str, Any]]]
    found = {kind: {cut: coded(kind) for cut in CUTS} for kind in KINDS}
    for title, tables in (
        ("bottleneck 1/3", third),
        ("bottleneck 1/2, stride 2", half),
        ("unsure", unsure),
    ):
        found[title] = tables
        found[f"{title}, int8"] = {cut: keys | coded("int8") for cut, keys in tables.items()}
    return found


def coded(kind: Kind) -> dict[str, Any]:
    """The keys of a client with this codec each way."""
    return {"codec": kind, "gradient_codec": kind, "top_k": TOP_K}


def fleet(tables: dict[str, dict[str, Any]], seed: int) -> Fleet:
    """The fleet with these clients."""
    return Fleet.model_validate(
        {
            "name": "codecs",
            "seed": seed,
            "rounds": ROUNDS,
            "batch": BATCH,
            "gradient": "both",
            "aggregate": "all",
            "exits": "upto",
            "entropy": ENTROPY,
            "model": {"name": "resnet8", "width": WIDTH, "norm": "group"},
            "optimizer": {"learning_rate": RATE, "momentum": MOMENTUM},
            "client": [{"name": cut, "cut": cut, **keys} for cut, keys in tables.items()],
        }
    )


def assemble(tables: dict[str, dict[str, Any]], seed: int) -> Assembly:
    """Its networks and shards."""
    known = load_boards()
    return Assembly(fleet(tables, seed), lambda name: look_up(known, name).for_assembly)


def raw_bytes(assembly: Assembly) -> int:
    """An uploaded image and its label."""
    return 1 + int(np.prod(assembly.dataset.shape))


@dataclass(frozen=True)
class Split:
    """A whole run: mean accuracies over its clients, and a sample's bytes up."""

    exits: float
    servers: float
    together: float  # the exit answers where it is sure, the server otherwise
    bytes_up: dict[str, float]  # by cut; frames aside


def split(tables: dict[str, dict[str, Any]], seed: int) -> Split:
    """A fleet with these clients, trained and tested."""
    assembly = assemble(tables, seed)
    clients = [assembly.local(m) for m in assembly.members]
    for client, member in zip(clients, assembly.members, strict=True):
        client.start(member.state, member.images)
    strategy = assembly.strategy(clients)
    for _ in fit(strategy, ROUNDS):
        pass
    trained = {m.name: ROUNDS * len(m.images) for m in assembly.members}
    test = assembly.dataset.test
    answers = [evaluate(c, strategy.server(c.name), test) for c in clients]
    return Split(
        statistics.mean(a.exit_accuracy for a in answers),
        statistics.mean(a.server_accuracy for a in answers),
        statistics.mean(a.early(ENTROPY)[1] for a in answers),
        {c.cut: c.traffic.activations_up / trained[c.name] for c in clients},
    )


def central(seed: int) -> float:
    """The accuracy of the whole network, trained in one place on uploaded images."""
    data = assemble(ways()["float32"], seed).dataset
    torch.manual_seed(seed)
    model = zoo.build(
        "resnet8", width=WIDTH, norm="group", classes=data.classes, channels=data.shape[0]
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    scale, shift = (torch.tensor(v)[:, None, None] for v in (data.scale, data.shift))
    for epoch in range(ROUNDS):
        order = draw_order(len(data.train), seed, epoch)
        for start in range(0, len(order), BATCH):
            part = data.train[order[start : start + BATCH]]
            loss = F.cross_entropy(
                model(torch.tensor(part.x) * scale + shift), torch.tensor(part.y).long()
            )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    with torch.no_grad():
        found = model.eval()(torch.tensor(data.test.x) * scale + shift).argmax(1).numpy()
    return float(np.mean(found == data.test.y))


def row(title: str, seeds: list[int]) -> dict[str, Any]:
    """One way of sending, over all seeds. Bytes are those of a sample with its label."""
    tables = ways()[title]
    runs = [split(tables, seed) for seed in seeds]
    raw = raw_bytes(assemble(tables, seeds[0]))
    sent = {cut: statistics.mean(run.bytes_up[cut] for run in runs) for cut in tables}
    return {
        "codec": title,
        "bytes_up": {cut: round(size) for cut, size in sent.items()},
        "against_raw": {cut: round(size / raw, 2) for cut, size in sent.items()},
        "exit_accuracy": [round(run.exits, 4) for run in runs],
        "server_accuracy": [round(run.servers, 4) for run in runs],
        "together_accuracy": [round(run.together, 4) for run in runs],
    }


def main() -> None:
    """Runs every way with every seed and prints one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    head = ["git", "rev-parse", "--short", "HEAD"]
    made = subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = []
    for title in ways():
        rows.append(row(title, seeds))
        print(rows[-1], file=sys.stderr)
    accuracy = [round(central(seed), 4) for seed in seeds]
    raw = {"bytes_up": raw_bytes(assemble(ways()["float32"], 0)), "accuracy": accuracy}
    print(json.dumps(
        {"commit": made.stdout.strip(), "rounds": ROUNDS, "seeds": seeds, "top_k": TOP_K,
         "entropy": ENTROPY, "raw": raw, "rows": rows},
        indent=1,
    ))  # fmt: skip


if __name__ == "__main__":
    main()
