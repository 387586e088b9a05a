"""What each codec sends, against raw images, and what is learnt through it, as JSON.

.venv/bin/python benchmarks/codecs.py > benchmarks/results/codecs.json

Three clients in torch, whose trunks learn from both their exits and the server, so that activations
and gradients both go through the codec; each row has the same rounds, seeds, data order and initial
weights. Beside them the same network trained on uploaded images, in one place, for as many epochs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
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


def fleet(codec: Kind, seed: int) -> Fleet:
    """The fleet whose every client has this codec, each way."""
    coded = {"codec": codec, "gradient_codec": codec, "top_k": TOP_K}
    return Fleet.model_validate(
        {
            "name": "codecs",
            "seed": seed,
            "rounds": ROUNDS,
            "batch": BATCH,
            "gradient": "both",
            "aggregate": "all",
            "exits": "upto",
            "model": {"name": "resnet8", "width": WIDTH, "norm": "group"},
            "optimizer": {"learning_rate": RATE, "momentum": MOMENTUM},
            "client": [{"name": cut, "cut": cut, **coded} for cut in CUTS],
        }
    )


def assemble(codec: Kind, seed: int) -> Assembly:
    """Its networks and shards."""
    known = load_boards()
    return Assembly(fleet(codec, seed), lambda name: look_up(known, name).for_assembly)


def raw_bytes(assembly: Assembly) -> int:
    """An uploaded image and its label."""
    return 1 + int(np.prod(assembly.dataset.shape))


def split(codec: Kind, seed: int) -> tuple[Assembly, float, float]:
    """A whole run: the assembly, and the mean accuracies of the exits and of the servers."""
    assembly = assemble(codec, seed)
    clients = [assembly.local(m) for m in assembly.members]
    for client, member in zip(clients, assembly.members, strict=True):
        client.start(member.state, member.images)
    strategy = assembly.strategy(clients)
    for _ in fit(strategy, ROUNDS):
        pass
    test = assembly.dataset.test
    answers = [evaluate(c, strategy.server(c.name), test) for c in clients]
    exits = statistics.mean(a.exit_accuracy for a in answers)
    return assembly, exits, statistics.mean(a.server_accuracy for a in answers)


def central(seed: int) -> float:
    """The accuracy of the whole network, trained in one place on uploaded images."""
    data = assemble("float32", seed).dataset
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


def row(codec: Kind, seeds: list[int]) -> dict[str, Any]:
    """One codec, over all seeds. Bytes are those of a sample with its label, frames aside."""
    runs = [split(codec, seed) for seed in seeds]
    assembly = runs[0][0]
    raw = raw_bytes(assembly)
    sent = {m.cut.name: m.build.bytes_up_per_sample(m.table.coding) for m in assembly.members}
    return {
        "codec": codec,
        "bytes_up": sent,
        "against_raw": {cut: round(size / raw, 2) for cut, size in sent.items()},
        "exit_accuracy": [round(exits, 4) for _, exits, _ in runs],
        "server_accuracy": [round(servers, 4) for _, _, servers in runs],
    }


def main() -> None:
    """Runs every codec with every seed and prints one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    head = ["git", "rev-parse", "--short", "HEAD"]
    made = subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = []
    for codec in KINDS:
        rows.append(row(codec, seeds))
        print(rows[-1], file=sys.stderr)
    accuracy = [round(central(seed), 4) for seed in seeds]
    raw = {"bytes_up": raw_bytes(assemble("float32", 0)), "accuracy": accuracy}
    print(json.dumps(
        {"commit": made.stdout.strip(), "rounds": ROUNDS, "seeds": seeds, "top_k": TOP_K,
         "raw": raw, "rows": rows},
        indent=1,
    ))  # fmt: skip


if __name__ == "__main__":
    main()
