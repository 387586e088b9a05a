"""A run's folder: the fleet file as run, what happens as it does, the checkpoint, the summary."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as pack

from splitee.errors import CheckpointError
from splitee.events import BatchDone, Event, RoundDone
from splitee.ops import Array
from splitee.progress import Progress
from splitee.state import Place, State

if TYPE_CHECKING:  # who watches a run needs no torch
    from torch import Tensor

Record = Mapping[str, Any]  # a line of metrics.jsonl: an event, its fields but for states, a time

_PROGRESS_AGAIN = 0.5  # seconds between two notes of the progress in a round
_OURS_SOON = 1.0  # seconds in which a folder that somebody looks into is free again

# what was made of the last checkpoint, and is of no other
_OF_A_CHECKPOINT = ("calibration.json", "eval.csv", "eval.png")


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
    lost: str | None = None  # why it was not there at the end
    memory: dict[str, int | bool | None] | None = None  # that its firmware takes, by part


class Learnt(Protocol):
    """What a checkpoint has of a server."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and statistics by name."""

    def momentum(self) -> Mapping[str, Tensor]:
        """What its optimiser remembers."""


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
        self._noted = -math.inf  # when the progress was, last

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
        """A JSON object per line: each client's pass, losses and lost clients, as they come."""
        return self.folder / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        """The clients at the end; there once the run has ended."""
        return self.folder / "summary.json"

    @property
    def progress_file(self) -> Path:
        """Where the training stands, for who watches it."""
        return self.folder / "progress.json"

    @property
    def _lock_file(self) -> Path:
        """Who trains in the folder holds it; a file, since network drives lock no folders."""
        return self.folder / "lock"

    @property
    def curves(self) -> Path:
        """The folder with TensorBoard's files."""
        return self.folder / "tb"

    @contextlib.contextmanager
    def ours(self) -> Iterator[None]:
        """Holds the folder, which is made if need be, for this training alone.

        The system lets go of it however the process ends. Raises CheckpointError where another
        process trains in it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self._lock_file.open("a")
        except OSError as error:
            raise self._unwritable(error, self._lock_file) from error
        with file:
            end = time.monotonic() + _OURS_SOON
            while not _locked(file, fcntl.LOCK_EX):
                if time.monotonic() > end:  # nobody only looks for as long as that
                    raise CheckpointError(
                        f"{self.folder}: another process trains in it: wait until it has ended, "
                        "or take another folder (--runs, or another name in the fleet file)"
                    )
                time.sleep(_OURS_SOON / 100)
            yield

    def is_training(self) -> bool:
        """Whether some process trains in the folder at this moment."""
        try:
            with self._lock_file.open() as file:
                return not _locked(file, fcntl.LOCK_SH)
        except OSError:
            return False  # none ever did

    def begin(self, fleet_text: str) -> None:
        """Makes the folder, in place of an earlier run of the same name."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error, self.folder) from error
        # the checkpoint first: a fleet file and a checkpoint that are there belong together
        self._forget(
            "checkpoint.safetensors", "metrics.jsonl", "progress.json", "summary.json",
            "summary.png",
        )  # fmt: skip
        shutil.rmtree(self.curves, ignore_errors=True)
        self._forget(*_OF_A_CHECKPOINT)
        self._replace(self.fleet_file, fleet_text.encode())
        self._began = time.perf_counter()

    def resume(self, complete: int) -> None:
        """Goes on behind a complete round (0: none): what was noted of later ones is dropped."""
        kept = [r for r in self.metrics() if r["round"] <= complete]
        self._replace(self.metrics_file, b"".join(_line(r) for r in kept))
        self._forget("summary.json", "summary.png", *_OF_A_CHECKPOINT)
        self._began = time.perf_counter() - self.seconds()

    def _forget(self, *names: str) -> None:
        """Removes files, and what a process that was killed has left of them."""
        try:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
                (self.folder / f"{name}.new").unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error, self.folder) from error

    def _unwritable(self, error: OSError, path: Path) -> CheckpointError:
        return CheckpointError(
            f"{error.filename or path}: {error.strerror}: free some space or choose a "
            "folder that you may write to; what was saved before is untouched"
        )

    def log(self, event: Event) -> Record | None:
        """Notes at once what a curve or a post-mortem needs, and gives it back; None: nothing.

        States go into the checkpoint instead, batches into the progress alone.
        """
        if isinstance(event, BatchDone):
            return None
        record: dict[str, Any] = {"event": type(event).__name__}
        if isinstance(event, RoundDone):
            record |= {"round": event.round, "clients": sorted(event.clients)}
            if event.missing:
                record["missing"] = dict(event.missing)
        else:
            record |= {k: v for k, v in vars(event).items() if k != "state"}
        record["at_seconds"] = round(time.perf_counter() - self._began, 3)
        try:
            with self.metrics_file.open("ab") as file:
                file.write(_line(record))
                if isinstance(event, RoundDone):
                    file.flush()
                    _onto_disk(file.fileno())  # before the checkpoint of the round is
        except OSError as error:
            raise self._unwritable(error, self.metrics_file) from error
        return record

    def note(self, progress: Progress, *, now: bool = False) -> None:
        """Tells who watches where the training stands; in a round, twice a second at most."""
        if not now and time.monotonic() < self._noted + _PROGRESS_AGAIN:
            return
        self._noted = time.monotonic()
        temporary = self.folder / "progress.json.new"
        # what can be shown again later is not worth a round: a full disk is metrics' to tell
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(progress.to_json()) + "\n")
            temporary.rename(self.progress_file)  # in the place of the one before

    def save(self, number: int, states: Mapping[str, State], servers: Mapping[str, Learnt]) -> None:
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
        """Writes a file whole or not at all, also where the power fails."""
        temporary = path.with_name(path.name + ".new")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                _onto_disk(file.fileno())
            temporary.replace(path)
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                _onto_disk(folder)  # its new name, too
            finally:
                os.close(folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise self._unwritable(error, temporary) from error

    def write(self, name: str, content: bytes) -> None:
        """Puts a file into the folder, whole or not at all, in place of one that is there."""
        self._replace(self.folder / name, content)

    def fingerprint(self) -> int:
        """CRC-32 of the checkpoint's file: two ends with the same one have the same weights."""
        return zlib.crc32(self.checkpoint_file.read_bytes())

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
            raise self._no_checkpoint(error) from error
        return Checkpoint(
            number, states, groups.get("server", {}), groups.get("server-momentum", {})
        )

    def _no_checkpoint(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.checkpoint_file}: not a checkpoint of ours: {error}")

    def complete(self) -> int:
        """How many rounds the checkpoint has behind it; 0 where there is none."""
        if not self.checkpoint_file.exists():
            return 0
        try:
            with safe_open(self.checkpoint_file, framework="numpy") as file:
                return int(json.loads(file.metadata()["run"])["round"])
        except (SafetensorError, OSError, LookupError, ValueError, TypeError) as error:
            raise self._no_checkpoint(error) from error

    def metrics(self) -> list[dict[str, Any]]:
        """The records of all complete rounds, of each by client, whoever answered first."""
        records: list[dict[str, Any]] = []
        lines = self.metrics_file.read_bytes().splitlines() if self.metrics_file.exists() else []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # it was cut short, and so is the last
                break
            if record["event"] == "RoundFailed":  # what was learnt in it is undone
                undone = ("ClientDone", record["round"])
                records = [r for r in records if (r["event"], r["round"]) != undone]
            records.append(record)
        complete = {r["round"] for r in records if r["event"] == "RoundDone"}

        def place(record: Record) -> tuple[int, str]:
            return record["round"], record.get("client", "~")  # no name begins with ~: rounds last

        return sorted((r for r in records if r["round"] in complete), key=place)

    def follow(self) -> Generator[list[Record], None, None]:
        """The records that are new since the one before, at each step; at first, all there are.

        Where a run goes on behind a complete round, what it does again is new.
        """
        told = 0  # complete rounds
        while True:
            try:
                file = self.metrics_file.open("rb")
            except FileNotFoundError:  # no event yet, or a new run begins
                told = 0
                yield []
                continue
            with file:
                before, rest = told, b""
                while _is_at(file, self.metrics_file):
                    *lines, rest = (rest + file.read()).split(b"\n")
                    records = [json.loads(line) for line in lines]
                    for record in records:
                        if record["event"] == "RoundDone":
                            told = max(told, record["round"])
                    yield [r for r in records if r["round"] > before]

    def progress(self) -> Progress:
        """Where the training stands, or stood when it ended.

        Raises CheckpointError where no run has begun.
        """
        path = self.progress_file
        try:
            noted = json.loads(path.read_bytes())
            return Progress.from_json(noted, clock=time.time if self.is_training() else None)
        except OSError as error:
            raise CheckpointError(
                f"{path}: {error.strerror}: is {self.folder} the folder of a run?"
            ) from error
        except (LookupError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: no progress of ours: {error}") from error

    def summary(self) -> tuple[float, list[ClientSummary]] | None:
        """The seconds of the whole run and its clients at the end; None: it has not ended."""
        try:
            summary = json.loads(self.summary_file.read_bytes())
            return float(summary["wall_s"]), [ClientSummary(**row) for row in summary["clients"]]
        except FileNotFoundError:
            return None
        except (OSError, LookupError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self.summary_file}: no summary of ours: {error}") from error

    def seconds(self) -> float:
        """How long training took up to the end of the last round that is noted."""
        return max((float(r["at_seconds"]) for r in self.metrics()), default=0.0)

    def took_part(self) -> list[dict[str, Any]]:
        """Of every complete round who took part, and who did not and why."""
        rounds = [r for r in self.metrics() if r["event"] == "RoundDone"]
        return [{k: r[k] for k in ("round", "clients", "missing") if k in r} for r in rounds]

    def finish(self, seconds: float, clients: list[ClientSummary]) -> None:
        """Writes summary.json and summary.png. seconds: of the whole run."""
        rows = [{k: v for k, v in asdict(c).items() if v is not None} for c in clients]
        rounds = self.took_part()
        summary = {
            "wall_s": seconds, "rounds": len(rounds), "clients": rows, "took_part": rounds
        }  # fmt: skip
        self._draw(clients)
        # last: where it is, the run has ended
        self._replace(self.summary_file, (json.dumps(summary, indent=2) + "\n").encode())

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
                scale = 100 if "accuracy" in key else 1
                # of a round in which nothing was sent there is no loss
                values = [math.nan if r[key] is None else r[key] * scale for r in mine]
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


def check(
    found: Mapping[str, Mapping[str, Array]],
    expected: Mapping[str, Mapping[str, Array | Tensor]],
) -> None:
    """Raises CheckpointError unless tensors by owner, from a checkpoint, are those of a fleet."""
    cure = "take the fleet file that it was trained with"
    if set(found) != set(expected):
        raise CheckpointError(
            f"the checkpoint is of {', '.join(sorted(found)) or 'nobody'}, the fleet file asks "
            f"for {', '.join(sorted(expected))}: {cure}"
        )
    for owner, tensors in expected.items():
        mine = {n: a.shape for n, a in found[owner].items()}
        theirs = {n: tuple(t.shape) for n, t in tensors.items()}
        wrong = [n for n in sorted({*mine, *theirs}) if mine.get(n) != theirs.get(n)]
        if wrong:
            raise CheckpointError(
                f"the checkpoint's {owner} has other layers than the fleet file asks for "
                f"({wrong[0]}): {cure}"
            )


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _locked(file: IO[str], how: int) -> bool:
    """Locks a file until it is closed; False where somebody else's lock is in the way."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _onto_disk(file: int) -> None:
    """Waits until a file, or a folder's names, are where a loss of power leaves them."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
