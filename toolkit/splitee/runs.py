"""A run's folder: the fleet file as run, metrics as they come, the checkpoint, the summary."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as pack

from splitee.client import Place, State
from splitee.errors import CheckpointError
from splitee.ops import Array
from splitee.server import Server
from splitee.train import BatchDone, ClientDone, ClientLost, Event, RoundDone


@dataclass(frozen=True)
class ClientSummary:
    """A client's line at the end of a run."""

    name: str
    tier: str
    board: str
    link: str
    cut: str
    parameters: int
    arena_bytes: int
    flash_bytes: int  # 0 where nothing is flashed, or what was built elsewhere
    bytes_up_per_sample: float  # training batches, frames included
    ms_per_sample: float  # training, waiting included
    exit_accuracy: float
    server_accuracy: float
    lost: str | None = None  # why it did not finish
    memory: dict[str, int | bool | None] | None = None  # that its firmware takes, by part


@dataclass(frozen=True)
class Checkpoint:
    """A complete round: everything that training goes on from."""

    round: int
    states: Mapping[str, State]  # by client
    servers: Mapping[str, Mapping[str, Array]]  # weights by server, as the strategy names them
    server_momentum: Mapping[str, Mapping[str, Array]]


class Run:
    """The folder of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._began = time.perf_counter()
        self._round: list[dict[str, Any]] = []  # records of the round that is not complete yet

    @property
    def fleet_file(self) -> Path:
        """The fleet file as run."""
        return self.folder / "fleet.toml"

    @property
    def checkpoint_file(self) -> Path:
        """The last complete round."""
        return self.folder / "checkpoint.safetensors"

    @property
    def metrics_file(self) -> Path:
        """A JSON object per line: each client's pass, losses and lost clients, as they came."""
        return self.folder / "metrics.jsonl"

    def begin(self, fleet_text: str) -> None:
        """Makes the folder, in place of an earlier run of the same name."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in ("metrics.jsonl", "checkpoint.safetensors", "summary.json", "summary.png"):
                (self.folder / old).unlink(missing_ok=True)
            self.fleet_file.write_text(fleet_text, encoding="utf-8")
            self._began = time.perf_counter()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{error.filename or self.folder}: {error.strerror}: free some space or choose a "
            "folder that you may write to; what was saved before is untouched"
        )

    def log(self, event: Event) -> None:
        """Notes what a curve or a post-mortem needs; states go into the checkpoint instead.

        A round is written when it is complete, its clients by name: the file does not depend on
        who answered first.
        """
        if isinstance(event, BatchDone):
            return
        record: dict[str, Any] = {"event": type(event).__name__}
        if isinstance(event, ClientDone | ClientLost):
            record |= {k: v for k, v in vars(event).items() if k != "state"}
        else:
            record |= {"round": event.round, "clients": sorted(event.states)}
        record["at_seconds"] = round(time.perf_counter() - self._began, 3)
        self._round.append(record)
        if not isinstance(event, RoundDone):
            return
        self._round.sort(
            key=lambda r: r.get("client", "~")
        )  # no name begins with ~: the round last
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in self._round)
        except OSError as error:
            raise self._unwritable(error) from error
        self._round.clear()

    def save(self, number: int, states: Mapping[str, State], servers: Mapping[str, Server]) -> None:
        """Replaces the checkpoint; if that fails, the one before is intact."""
        tensors: dict[str, Array] = {}
        for name, state in states.items():
            tensors |= {f"client/{name}/{k}": v for k, v in state.weights.items()}
            tensors |= {f"client-momentum/{name}/{k}": v for k, v in state.momentum.items()}
        for name, server in servers.items():
            weights, momentum = server.tensors(), server.momentum()
            tensors |= {f"server/{name}/{k}": v.detach().cpu().numpy() for k, v in weights.items()}
            tensors |= {f"server-momentum/{name}/{k}": v.cpu().numpy() for k, v in momentum.items()}
        places = {name: asdict(state.place) for name, state in states.items()}
        # one entry: safetensors writes several in another order each time
        metadata = {"run": json.dumps({"round": number, "places": places}, sort_keys=True)}
        content = pack({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata)
        self._replace(self.checkpoint_file, content)

    def _replace(self, path: Path, content: bytes) -> None:
        """Writes a file whole or not at all."""
        temporary = path.with_name(path.name + ".new")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise self._unwritable(error) from error

    def load(self) -> Checkpoint:
        """The last complete round. Raises CheckpointError when there is none to read."""
        path = self.checkpoint_file
        if not path.exists():
            raise CheckpointError(f"{path}: no checkpoint: is {self.folder} the folder of a run?")
        groups: dict[str, dict[str, dict[str, Array]]] = {}
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata()
                for key in file.keys():  # noqa: SIM118 - it is no dict
                    group, owner, name = key.split("/", 2)
                    tensors = groups.setdefault(group, {}).setdefault(owner, {})
                    tensors[name] = file.get_tensor(key)
            run = json.loads(metadata["run"])
            number, places = int(run["round"]), run["places"]
            weights, momentum = groups.get("client", {}), groups.get("client-momentum", {})
            states = {
                name: State(weights[name], momentum.get(name, {}), Place(**place))
                for name, place in places.items()
            }
        except (SafetensorError, OSError, LookupError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: not a checkpoint of ours: {error}") from error
        return Checkpoint(
            number, states, groups.get("server", {}), groups.get("server-momentum", {})
        )

    def metrics(self) -> list[dict[str, Any]]:
        """The records of all complete rounds."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def finish(self, seconds: float, rounds: int, clients: list[ClientSummary]) -> None:
        """Writes summary.json and summary.png."""
        rows = [{k: v for k, v in asdict(c).items() if v is not None} for c in clients]
        summary = {"wall_s": seconds, "rounds": rounds, "clients": rows}
        self._replace(self.folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        self._draw(clients)

    def _draw(self, clients: list[ClientSummary]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        done = [r for r in self.metrics() if r["event"] == "ClientDone"]
        figure = Figure(figsize=(11, 6.5), layout="constrained")
        FigureCanvasAgg(figure)
        panels = (
            ("exit_loss", "loss at the exit, nats"),
            ("server_loss", "loss through the server, nats"),
            ("exit_accuracy", "accuracy at the exit on training images, %"),
        )
        axes = figure.subplots(2, 2)
        for axis, (key, title) in zip(axes.flat, panels, strict=False):
            for i, client in enumerate(clients):
                mine = [r for r in done if r["client"] == client.name]
                label = f"{client.name} ({client.board}, {client.cut})"
                values = [r[key] * (100 if "accuracy" in key else 1) for r in mine]
                axis.plot([r["round"] for r in mine], values, f"C{i}.-", label=label)
            axis.set_title(title)
            axis.set_xlabel("round")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
        axes[0][0].legend()
        self._draw_accuracies(axes[1][1], clients)
        image = io.BytesIO()
        figure.savefig(image, dpi=120)
        self._replace(self.folder / "summary.png", image.getvalue())

    @staticmethod
    def _draw_accuracies(axis: Any, clients: list[ClientSummary]) -> None:
        for offset, (key, label, shade) in enumerate(
            (("exit_accuracy", "exit", 0.55), ("server_accuracy", "server", 1.0))
        ):
            for i, client in enumerate(clients):
                value = 100 * getattr(client, key)
                bars = axis.bar(i + 0.4 * offset - 0.2, value, 0.38, color=f"C{i}", alpha=shade)
                axis.bar_label(bars, [f"{label}\n{value:.1f}"], fontsize=8, padding=2)
        axis.set_xticks(range(len(clients)), [c.name for c in clients])
        axis.set_ylim(0, 125)
        axis.set_yticks(range(0, 101, 20))
        axis.set_title("accuracy on test images at the end, %")
        axis.set_axisbelow(True)
        axis.grid(alpha=0.3, axis="y")
