"""One client's export: its files are run and held to PyTorch, and only then written to a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from splitee import edge
from splitee.data import Images
from splitee.edge import Deployed
from splitee.errors import FitError
from splitee.graph import Graph
from splitee.ops import Array
from splitee.place import Build, Room
from splitee.place_int8 import Int8Build
from splitee.quantize import quantize
from splitee_exporters import library_int8, library_train, manifest
from splitee_exporters.manifest import File

# onnx and tflite are imported where they are needed: their packages are extras

Format = Literal["onnx", "tflite", "c"]
FORMATS: tuple[Format, ...] = get_args(Format)
TIERS: Mapping[str, Format] = {"mcu": "tflite", "edge": "onnx", "host": "onnx"}
CHECKED = 64  # samples that a file is held to PyTorch on
OWN = 4  # times that what PyTorch's float32 is off by from float64 is allowed
BATCHES = (1, 7, 24)  # sizes in which a file with a free batch runs them, in turn


class Subject(Protocol):
    """A client to export, with the answers of PyTorch (``splitee.halves.Halves``)."""

    @property
    def model(self) -> str:
        """What the network is called."""

    @property
    def cut_name(self) -> str:
        """Where the segment ends."""

    @property
    def build(self) -> Build:
        """Of the segment, with its weights."""

    @property
    def client_build(self) -> Build:
        """Of all that the client has, with every cut that it was built with."""

    @property
    def upto(self) -> bool:
        """Whether all exits up to the cut learn, or only the one at it."""

    @property
    def calibration(self) -> Images:
        """What 8 bits are calibrated with."""

    @property
    def samples(self) -> Images:
        """What files are checked on."""

    @property
    def tail_graph(self) -> Graph:
        """The server's half."""

    @property
    def deployed(self) -> Deployed | None:
        """Of a run: how the client answers, and how the run's server knows it."""

    @property
    def learning_rate(self) -> float:
        """Of the step that ``learnt`` has taken."""

    @property
    def distill(self) -> float:
        """What share of it is distilled."""

    def answers(self, images: Array, *, exact: bool = False) -> dict[str, Array]:
        """Activations and logits of uint8 images; exact: computed in float64."""

    def server_answers(self, activations: Array, *, exact: bool = False) -> Array:
        """The server's logits; exact: computed in float64."""

    def learnt(self, *, exact: bool = False) -> dict[str, Array]:
        """Weights after one step on the first samples; exact: computed in float64."""


@dataclass(frozen=True)
class Options:
    """What an export has beside the segment in its usual form."""

    firmware: Path  # the folder of the firmware's sources, for C
    int8: bool = False  # ONNX: also in 8 bits; C: in 8 bits, to answer only
    tail: bool = False  # also the server's half, as ONNX
    train: bool = False  # ONNX: also what `splitee client --runtime onnx` trains by
    board: str = ""  # whose memory it has to fit; "": any
    room: Room | None = None  # that memory; None: as much as a computer has

    def check(self, shortage: Callable[[Room], str | None]) -> None:
        """Raises FitError where shortage says that something is missing."""
        if self.room and (missing := shortage(self.room)):
            raise FitError(
                f"the segment {missing} on {self.board}: cut earlier, or take a narrower network"
            )


def export(subject: Subject, format: Format, folder: Path, options: Options) -> list[File]:
    """Makes a client's files, verifies them and writes them, with manifest.json beside them.

    Raises ExportError, before anything is written, where a file does not compute what PyTorch does,
    ModelError, naming the operation, where the format has none for it, and MissingTool where what
    writes or runs it is not installed.
    """
    writers: dict[Format, Callable[[Subject, Options], tuple[list[File], Mapping[str, bytes]]]] = {
        "onnx": _onnx,
        "tflite": _tflite,
        "c": _c,
    }
    files, beside = writers[format](subject, options)
    if options.tail:
        files.append(_tail(subject))
    manifest.write(folder, subject.model, subject.cut_name, files, beside)
    return files


def _expected(subject: Subject) -> tuple[Array, dict[str, Array]]:
    """Images, and what they are answered exactly."""
    images = subject.samples.x[:CHECKED]
    return images, subject.answers(images, exact=True)


def _allowed(exact: Mapping[str, Array], rounded: Mapping[str, Array]) -> float:
    """TOLERANCE, or some times what float32 itself is off by in PyTorch, where that is more."""
    own = max(manifest.error_of(rounded[name], exact[name]) for name in exact)
    return max(manifest.TOLERANCE, OWN * own)


def _learnt(subject: Subject) -> tuple[dict[str, Array], float]:
    """What the weights learn exactly, and how far one may be off from that."""
    exact = subject.learnt(exact=True)
    own = max(manifest.learning_errors(subject.learnt(), exact).values())
    return exact, max(manifest.LEARNING_TOLERANCE, OWN * own)


def _onnx(subject: Subject, options: Options) -> tuple[list[File], Mapping[str, bytes]]:
    from splitee_exporters import onnx

    images, expected = _expected(subject)
    allowed = _allowed(expected, subject.answers(images))
    exported = onnx.segment_to_onnx(subject.build)
    verified = onnx.verify(
        exported, images, expected, "PyTorch", batches=BATCHES, tolerance=allowed
    )
    files = [exported.file(verified)]
    if options.int8:
        from splitee_exporters import onnx_int8

        small = onnx_int8.segment_to_int8(subject.build, subject.calibration.x)
        verified = onnx.verify(
            small,
            images,
            expected,
            "PyTorch",
            batches=BATCHES,
            tolerance=manifest.INT8_TOLERANCE,
            measure=manifest.MEAN_SQUARE,
        )
        files.append(small.file(verified))
    if not options.train:
        return files, {}
    file, beside = _training(subject)
    return [*files, file], beside


def _training(subject: Subject) -> tuple[File, Mapping[str, bytes]]:
    """The folder of an edge client."""
    from splitee_exporters import onnx, onnx_train

    build = subject.client_build
    variant = edge.variant(build, subject.cut_name, upto=subject.upto)
    batch = subject.samples[: build.capacity]
    learnt, allowed = _learnt(subject)
    made = dict(onnx_train.client_files(build))
    verified = onnx_train.verify(
        made,
        variant,
        batch,
        learnt,
        subject.learning_rate,
        "PyTorch",
        distill=subject.distill,
        tolerance=allowed,
    )
    if subject.deployed is not None:
        made[edge.DEPLOYED] = edge.deployed_file(subject.deployed)
    interface = {
        "opset": onnx.OPSET,
        "trains": True,
        "capacity": build.capacity,
        "client_checksum": f"{build.checksum:08x}",
        "passes": {v.folder: list(v.graph.exits) for v in edge.variants(build)},
    }
    return File(edge.NAME, made.pop(edge.NAME), build.graph, interface, verified), made


def _tail(subject: Subject) -> File:
    from splitee_exporters import onnx

    activations = subject.answers(subject.samples.x[:CHECKED])["activations"]
    expected = {"logits": subject.server_answers(activations, exact=True)}
    allowed = _allowed(expected, {"logits": subject.server_answers(activations)})
    exported = onnx.tail_to_onnx(subject.tail_graph, subject.cut_name)
    verified = onnx.verify(
        exported, activations, expected, "PyTorch", batches=BATCHES, tolerance=allowed
    )
    return exported.file(verified)


def _tflite(subject: Subject, options: Options) -> tuple[list[File], Mapping[str, bytes]]:
    from splitee_exporters import tflite, tflite_run

    images, expected = _expected(subject)
    exported = tflite.segment_to_tflite(subject.build, subject.calibration.x)
    verified, arena = tflite_run.verify(exported, images, expected, "PyTorch")
    if arena and options.room:
        arena.check(exported.name, options.board, options.room.ram)
    return [exported.file(subject.build, verified, arena)], {}


def _c(subject: Subject, options: Options) -> tuple[list[File], Mapping[str, bytes]]:
    file, files = (_c_int8 if options.int8 else _c_train)(subject, options)
    return [file], {path: data for path, data in files.items() if path != file.name}


def _c_int8(subject: Subject, options: Options) -> tuple[File, Mapping[str, bytes]]:
    images, expected = _expected(subject)
    build = subject.build
    graph = quantize(build.graph, subject.calibration.x, build.scale, build.shift)
    build8 = Int8Build(graph, subject.cut_name)
    options.check(build8.shortage)
    made = library_int8.to_library(build8, options.firmware, subject.samples)
    verified = library_int8.verify(made, images, expected, "PyTorch")
    return made.file(build, verified), made.files


def _c_train(subject: Subject, options: Options) -> tuple[File, Mapping[str, bytes]]:
    options.check(subject.build.shortage)
    images, expected = _expected(subject)
    allowed = _allowed(expected, subject.answers(images))
    samples = subject.samples
    learnt, allowed_learning = _learnt(subject)
    made = library_train.to_library(
        subject.build, options.firmware, samples, distill=subject.distill
    )
    verified = library_train.verify(
        made,
        Images(images, samples.y[:CHECKED]),
        expected,
        learnt,
        subject.learning_rate,
        "PyTorch",
        distill=subject.distill,
        tolerance=allowed,
        learning_tolerance=allowed_learning,
    )
    return made.file(verified), made.files


def summary(file: File) -> dict[str, Any]:
    """What a command shows of a file."""
    return {
        "file": file.name,
        "bytes": len(file.data),
        "runtime": file.verified.runtime,
        "samples": file.verified.samples,
        "error": file.verified.error,
        "tolerance": file.verified.tolerance,
        "same_class": file.verified.same_class,
    }
