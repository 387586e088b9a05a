"""`splitee client`: one of a fleet's clients, in this process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from splitee_host.cli.common import Json, app, assembly_of, client_key, listening_address
from splitee_host.cli.infer import Asked, infer

if TYPE_CHECKING:
    from splitee.place import Build
    from splitee_host.learner import Learner


@app.command()
def client(
    source: Annotated[
        Path,
        typer.Argument(
            help="The fleet file (TOML), with --infer the folder of a run; with --runtime onnx the "
            "folder that `splitee export` wrote for the client.",
            metavar="FLEET",
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="Which of the fleet's clients this is.", show_default=False)
    ] = None,
    runtime: Annotated[
        Literal["torch", "onnx"], typer.Option(help="What computes; onnx needs no torch.")
    ] = "torch",
    listen: Annotated[
        str, typer.Option(help="Address that the host connects to.")
    ] = "tcp://127.0.0.1:7070",
    key_file: Annotated[
        Path | None,
        typer.Option(
            "--keys",
            help="The file with its key; without it, the one beside the fleet file.",
            show_default=False,
        ),
    ] = None,
    auth: Annotated[
        Literal["auto", "none"] | None,
        typer.Option(
            help="none: without a key, also where others are on the network; without this option "
            "as the fleet file says.",
            show_default=False,
        ),
    ] = None,
    once: Annotated[bool, typer.Option(help="End when the host leaves.")] = False,
    answers: Annotated[
        bool,
        typer.Option(
            "--infer", help="Learn nothing: answer images, and ask the server where unsure."
        ),
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(
            help="With --infer: address of `splitee serve`; without it the exit answers alone.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="With --infer: a .npz file or a folder with images.",
            show_default="the run's test images",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="With --infer: only the first so many images.")
    ] = None,
    entropy: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="With --infer: the exit answers up to this normalised entropy.",
            show_default="the fleet's",
        ),
    ] = None,
    device: Annotated[
        bool,
        typer.Option("--device", help="With --infer: on the client's board, in 8 bits."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Be one of the fleet's clients: train with the host that connects, or answer (--infer)."""
    from splitee_host import keys
    from splitee_host.link import serve_tcp
    from splitee_host.serve import serve

    if answers:
        infer(
            Asked(
                source, name, runtime, server, images, samples, entropy, device, key_file, auth,
                as_json,
            )
        )  # fmt: skip
        return
    host, port = listening_address(listen)
    if runtime == "onnx":
        learner, segment = _of_folder(source)
        key = None if auth == "none" else client_key(name, key_file, key_file, listen)
    else:
        learner, segment, fleet_auth = _of_fleet(source, name)
        beside = key_file or keys.file_of(source)
        nobody = (auth or fleet_auth) == "none"
        key = None if nobody else client_key(name, key_file, beside, listen)
    with serve_tcp(host, port) as listener, suppress(BrokenPipeError):
        typer.echo(listener.url)
        while True:  # a host that left may come back, or another
            with listener.accept() as link:
                serve(link, learner, segment, key)
            if once:
                return


def _of_folder(folder: Path) -> tuple[Learner, Build]:
    """A client that was exported, in ONNX Runtime, and what it is built as."""
    from splitee_host.onnx_learner import OnnxLearner

    learner = OnnxLearner(folder)
    return learner, learner.build


def _of_fleet(fleet_file: Path, name: str | None) -> tuple[Learner, Build, str]:
    """A fleet's client in torch, what it is built as, and the fleet's auth."""
    import torch

    from splitee.errors import FleetError
    from splitee.fleet import read
    from splitee_host.torch_learner import TorchLearner

    torch.set_num_threads(1)
    if fleet_file.is_dir():
        raise FleetError(
            f"{fleet_file}: a folder: add --runtime onnx if it is one that was exported, or name "
            "the fleet file"
        )
    fleet = read(fleet_file)
    names = [c.name for c in fleet.client]
    if name not in names:
        which = f'no client "{name}"' if name else "--name says which of its clients this is"
        raise FleetError(f"{fleet_file}: {which}: there are {', '.join(names)}")
    assembly = assembly_of(fleet)
    member = assembly.member(name)
    return TorchLearner(assembly.local(member)), member.build, fleet.auth
