"""`splitee client --infer`: a trained client answers images, or has the server answer them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from splitee_host.cli.common import assembly_of, client_key, on_board

if TYPE_CHECKING:
    from splitee.data import Images
    from splitee.edge import Deployed
    from splitee_host.asking import AskedServer
    from splitee_host.early import Answered, Holder


@dataclass(frozen=True)
class Asked:
    """What `splitee client --infer` was asked for."""

    source: Path
    name: str | None
    runtime: Literal["torch", "onnx"]
    server: str | None
    images: str | None
    samples: int | None
    entropy: float | None
    device: bool
    key_file: Path | None
    auth: Literal["auto", "none"] | None
    as_json: bool


@dataclass(frozen=True)
class _Client:
    """What answers, and what there is to answer."""

    holder: Holder
    way: Deployed
    images: Images
    key_place: Path | None  # where its key may be
    auth: str


def infer(asked: Asked) -> None:
    """Answers images; says of each which class it is, who answered, and how sure the exit was."""
    from splitee_host import early
    from splitee_host.asking import Asker

    def say(text: str) -> None:
        typer.echo(text, err=True)

    with _opened(asked) as client, ExitStack() as ends:
        asker = None
        if asked.server is not None:
            asker = Asker(partial(_connected, asked.server, client.way, _key(asked, client)), say)
            ends.callback(asker.close)
        threshold = client.way.entropy if asked.entropy is None else asked.entropy
        parts, first = [], 0
        x = client.images.x
        for part in early.answer(client.holder, asker, x, threshold, client.way.temperature):
            if not asked.as_json:
                _print(part, first)
            parts.append(part)
            first += len(part.classes)
        answered = early.joined(parts)
        sent = asker.bytes_sent if asker else 0
    figures = _figures(client, answered, sent)
    if asked.as_json:
        rows = [_row(answered, i) for i in range(len(answered.classes))]
        typer.echo(json.dumps({**figures, "answers": rows}, indent=2))
        return
    typer.echo(_summary(figures))


@contextmanager
def _opened(asked: Asked) -> Iterator[_Client]:
    """The client that was asked for."""
    if asked.runtime == "onnx":
        yield _of_folder(asked)
        return
    with _of_run(asked) as client:
        yield client


def _of_folder(asked: Asked) -> _Client:
    """An exported client, in ONNX Runtime."""
    from splitee import edge
    from splitee.errors import SpliteeError
    from splitee_host.early import LearnerHolder
    from splitee_host.onnx_learner import OnnxLearner

    if asked.device:
        raise SpliteeError("--device: boards are those of a run: name its folder, without onnx")
    if asked.images is None:
        raise SpliteeError(
            f"{asked.source}: an exported client has no images: name some (--images)"
        )
    learner = OnnxLearner(asked.source)
    way = edge.read_deployed(asked.source)
    learner.move(way.cut, upto=True)
    images = _images(asked.images, _shape(learner.build.graph.input_shape))
    holder = LearnerHolder(learner, learner.build.capacity)
    place = asked.key_file
    return _Client(holder, way, images[: asked.samples], place, asked.auth or "auto")


@contextmanager
def _of_run(asked: Asked) -> Iterator[_Client]:
    """A client of a run: in torch, or on its board."""
    import torch

    from splitee import trained
    from splitee.errors import FleetError
    from splitee.fleet import read
    from splitee.runs import Run
    from splitee_host import keys
    from splitee_host.early import LearnerHolder
    from splitee_host.torch_learner import TorchLearner

    torch.set_num_threads(1)
    if not asked.source.is_dir():
        raise FleetError(
            f"{asked.source}: to answer, a client has to be trained: name the folder of a run, or, "
            "with --runtime onnx, a client that was exported of one"
        )
    run = Run(asked.source)
    checkpoint = run.load()
    assembly = assembly_of(read(run.fleet_file))
    found = {one.member.name: one for one in trained.of_run(assembly, checkpoint)}
    if asked.name not in found:
        which = f'no client "{asked.name}"' if asked.name else "--name says which client this is"
        raise FleetError(f"{asked.source}: {which}: there are {', '.join(found)}")
    one = found[asked.name]
    way = trained.deployed(run, assembly, checkpoint, list(found.values()))[asked.name]
    images = assembly.dataset.test
    if asked.images is not None:
        images = _images(asked.images, assembly.dataset.shape)
    place = asked.key_file or keys.file_of(run.fleet_file)
    client = partial(
        _Client,
        way=way,
        images=images[: asked.samples],
        key_place=place,
        auth=asked.auth or assembly.fleet.auth,
    )
    if not asked.device:
        yield client(LearnerHolder(TorchLearner(one.client), one.client.capacity))
        return
    if not assembly.boards[asked.name].firmware:
        raise FleetError(
            f'client "{asked.name}": {one.member.table.board} runs no firmware: leave --device out'
        )
    with on_board(run, assembly, one.member, checkpoint) as (board, _):
        yield client(board)


def _key(asked: Asked, client: _Client) -> bytes | None:
    """The key under which the server is asked."""
    from splitee_host import keys

    assert asked.server is not None
    if client.auth == "none":
        return None
    key = client_key(client.way.client, asked.key_file, client.key_place, asked.server)
    return keys.for_answers(key) if key else None


def _connected(url: str, way: Deployed, key: bytes | None) -> AskedServer:
    """The server at an address, ready to be asked. Raises LinkError where it is not there."""
    from splitee.errors import LinkError
    from splitee_host.asking import AskedServer
    from splitee_host.link import open_link

    try:
        link = open_link(url)
    except LinkError as error:
        raise LinkError(
            f"no server at {url}: {error}; start it with `splitee serve RUN`, or leave --server "
            "out for the exit to answer alone"
        ) from error
    server = AskedServer(link, way, key=key)
    try:
        server.begin()
    except BaseException:
        server.close()
        raise
    return server


def _images(source: str, shape: tuple[int, int, int]) -> Images:
    """What --images names: of a bundled dataset those that nobody was trained on."""
    from splitee import data, samples

    return data.load(source).test if source in data.DATASETS else samples.load(source, shape)


def _shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, height, width


def _where(part: Answered, i: int) -> str:
    """Who answered."""
    if part.served[i]:
        return "server"
    return "exit, unsure" if part.unsure[i] else "exit"


def _row(part: Answered, i: int) -> dict[str, Any]:
    return {
        "class": int(part.classes[i]),
        "answered": _where(part, i),
        "entropy": round(float(part.entropies[i]), 6),
    }


def _print(part: Answered, first: int) -> None:
    for i, (label, entropy) in enumerate(zip(part.classes, part.entropies, strict=True)):
        where = _where(part, i)
        typer.echo(f"image {first + i:<6}  class {label:<4}  entropy {entropy:.3f}  {where}")


def _figures(client: _Client, answered: Answered, sent: int) -> dict[str, Any]:
    labels, samples = client.images.y, len(answered.classes)
    alone = answered.unsure & ~answered.served
    figures: dict[str, Any] = {
        "client": client.way.client,
        "cut": client.way.cut,
        "samples": samples,
        "share_at_exit": answered.share_at_exit,
        "at_server": int(answered.served.sum()),
        "unsure_at_exit": int(alone.sum()),
        "bytes_sent": sent,
    }
    if len(set(labels.tolist())) > 1:  # images of no class are all of class 0
        figures["accuracy"] = float((answered.classes == labels).mean())
    return figures


def _summary(figures: dict[str, Any]) -> str:
    samples, sent = figures["samples"], figures["bytes_sent"]
    here = samples - figures["at_server"] - figures["unsure_at_exit"]
    words = f"{samples:,} images: the exit answered {here:,}, the server {figures['at_server']:,}"
    if alone := figures["unsure_at_exit"]:
        words += f"; unsure of {alone:,} more, which no server was there for"
    if "accuracy" in figures:
        words += f"; {100 * figures['accuracy']:.1f} % right"
    return words + f"; {sent:,} bytes sent, {sent / samples:,.1f} an image"
