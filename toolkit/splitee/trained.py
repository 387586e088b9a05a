"""A run's clients and servers as its checkpoint has them, to be tested, calibrated and asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from splitee import calibrate
from splitee.assemble import Assembly, Member
from splitee.client import LocalClient
from splitee.data import Images
from splitee.edge import Deployed
from splitee.ops import Array
from splitee.runs import Checkpoint, Run
from splitee.server import Server

_AT_ONCE = 64  # images: in this process no client is short of memory


@dataclass(frozen=True)
class Trained:
    """Both halves of a client, in this process."""

    member: Member
    client: LocalClient
    server: Server


@dataclass(frozen=True)
class Calibration:
    """How the temperature of a client's exit was fitted; losses in nats."""

    temperature: float
    images: int
    loss_before: float  # mean cross-entropy on these images, at a temperature of 1
    loss: float  # at the one fitted


def of_run(assembly: Assembly, checkpoint: Checkpoint, device: str = "cpu") -> list[Trained]:
    """Every client that the checkpoint knows, in the fleet file's order."""
    members = [m for m in assembly.members if m.name in checkpoint.states]
    clients = [assembly.local(m, device) for m in members]
    strategy = assembly.strategy(clients, device)
    strategy.load(checkpoint.servers)
    for member, client in zip(members, clients, strict=True):
        client.start(checkpoint.states[member.name], member.images)
    return [Trained(m, c, strategy.server(m.name)) for m, c in zip(members, clients, strict=True)]


def calibrations(
    run: Run, assembly: Assembly, trained: Sequence[Trained]
) -> dict[str, Calibration]:
    """How sure each client's exit may be; none where no images are held out.

    It is in the run's folder once it was fitted, and is fitted anew behind another checkpoint.
    """
    stamp, path = run.fingerprint(), run.folder / "calibration.json"
    if path.exists():
        stored = _read(path.read_bytes(), stamp)
        if stored is not None:
            return stored
    if len(assembly.held_out) == 0:
        return {}
    found = {t.member.name: _fitted(t.client, assembly.held_out) for t in trained}
    exits = {name: asdict(calibration) for name, calibration in found.items()}
    content = json.dumps({"checkpoint": f"{stamp:08x}", "exits": exits}, indent=2) + "\n"
    run.write(path.name, content.encode())
    return found


def numbers(checkpoint: Checkpoint) -> dict[str, int]:
    """By which the wire tells clients apart that ask: places of their sorted names, from 1 on."""
    return {name: number for number, name in enumerate(sorted(checkpoint.states), 1)}


def deployed(
    run: Run,
    assembly: Assembly,
    checkpoint: Checkpoint,
    trained: Sequence[Trained],
    entropy: float | None = None,
) -> dict[str, Deployed]:
    """What each client answers by, and how the server knows it.

    entropy: up to which exits answer; that of the fleet by default.
    """
    known = numbers(checkpoint)
    found = calibrations(run, assembly, trained)
    stamp = run.fingerprint()
    threshold = assembly.fleet.entropy if entropy is None else entropy
    return {
        t.member.name: Deployed(
            client=t.member.name,
            number=known[t.member.name],
            checkpoint=stamp,
            cut=t.client.cut,
            entropy=threshold,
            temperature=found[t.member.name].temperature if t.member.name in found else 1.0,
            coding=t.member.table.coding,
            elements=t.member.graph.elements(t.member.graph.cut),
            classes=t.member.graph.classes,
        )
        for t in trained
    }


def _read(content: bytes, stamp: int) -> dict[str, Calibration] | None:
    """What is stored, if it is of that checkpoint."""
    try:
        stored: dict[str, Any] = json.loads(content)
        if stored["checkpoint"] != f"{stamp:08x}":
            return None
        return {name: Calibration(**values) for name, values in stored["exits"].items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return None  # no file of ours, or of an earlier version


def _fitted(client: LocalClient, images: Images) -> Calibration:
    logits = _exit_logits(client, images)
    temperature = calibrate.fit(logits, images.y)
    before, after = (calibrate.loss(logits, images.y, t) for t in (1.0, temperature))
    return Calibration(temperature, len(images), before, after)


def _exit_logits(client: LocalClient, images: Images) -> Array:
    parts = range(0, len(images), _AT_ONCE)
    found = [client.infer(images.x[start : start + _AT_ONCE])[1] for start in parts]
    logits: Array = torch.cat(found).cpu().numpy()
    return logits
