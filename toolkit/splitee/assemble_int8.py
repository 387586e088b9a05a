"""From a fleet, or from a network alone, to segments of 8 bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from splitee import halves, zoo
from splitee.assemble import Assembly, Member
from splitee.data import Images
from splitee.errors import FitError
from splitee.model import Network
from splitee.ops import Array
from splitee.place import Room
from splitee.place_int8 import Int8Build
from splitee.quantize import quantize

UNTRAINED = 64  # images that calibrate what has learnt nothing: only its size is of interest


def of_member(assembly: Assembly, member: Member, weights: Mapping[str, Array]) -> Int8Build:
    """A client's segment with these weights, and the exit at its cut alone, in 8 bits.

    The fleet's training images calibrate it. Raises ModelError for a network that 8 bits have not,
    FitError where it is larger than the client's board.
    """
    dataset = assembly.dataset
    graph = member.build.graph.at(member.cut.name, upto=False).holding(weights)
    images = halves.calibration_of(assembly)
    quantized = quantize(graph, images.x, dataset.scale, dataset.shift)
    build = Int8Build(quantized, member.cut.name)
    room = assembly.boards[member.name].room
    assert room is not None, "it runs no firmware"
    if shortage := build.shortage(room):
        raise FitError(_no_fit(f'client "{member.name}"', build, shortage, member.table.board))
    return build


def of_model(
    model: str, cut: str | int, images: Images, board: str, room: Room, *, width: int | None = None
) -> Int8Build:
    """A network's segment in 8 bits, with weights that have learnt nothing, for a board.

    model: as ``zoo.build`` takes it. cut: its path or number; "auto" is the deepest that fits.
    images: of the shape that it will see. Raises ModelError, CutError, and FitError.
    """
    shape = images.x.shape[1:]
    cuts: list[str | int] = [cut]
    if cut == "auto":
        with torch.random.fork_rng(devices=[]):
            network = zoo.build(model, width=width, channels=shape[0])
        cuts = [c.name for c in reversed(Network(network, shape).cuts) if len(c.shape) == 3]
    why = ""
    for at in cuts:
        made = halves.of_model(model, at, shape, images, width=width)
        b = made.build
        quantized = quantize(b.graph, made.calibration.x[:UNTRAINED], b.scale, b.shift)
        build = Int8Build(quantized, made.cut.name)
        shortage = build.shortage(room)
        if shortage is None:
            return build
        why = _no_fit(model, build, shortage, board)
    raise FitError(why)


def _no_fit(what: str, build: Int8Build, shortage: str, board: str) -> str:
    return (
        f"{what}: its segment up to {build.cut} in 8 bits {shortage} on {board}: cut earlier, take "
        "a narrower network, or a larger board"
    )
