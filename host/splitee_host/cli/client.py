"""`splitee client`: one of a fleet's clients, in this process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from splitee_host.cli.common import app, assembly_of

if TYPE_CHECKING:
    from splitee.place import Build
    from splitee_host.learner import Learner


@app.command()
def client(
    source: Annotated[
        Path,
        typer.Argument(
            help="The fleet file (TOML); with --runtime onnx, the folder that `splitee export` "
            "wrote for the client.",
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
) -> None:
    """Be one of the fleet's clients, in this process: prints its address and waits for the host."""
    from splitee_host import keys
    from splitee_host.link import serve_tcp
    from splitee_host.serve import serve

    host, port = _address(listen)
    if runtime == "onnx":
        learner, segment = _of_folder(source)
        key = None if auth == "none" else _client_key(name, key_file, key_file, listen)
    else:
        learner, segment, fleet_auth = _of_fleet(source, name)
        beside = key_file or keys.file_of(source)
        nobody = (auth or fleet_auth) == "none"
        key = None if nobody else _client_key(name, key_file, beside, listen)
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


def _client_key(
    name: str | None, asked: Path | None, place: Path | None, listen: str
) -> bytes | None:
    """A client's key: that of its name, or the only one there is; None where it needs none.

    asked: the file that must have it. place: that file, or one that may.
    """
    from splitee.errors import KeyFileError
    from splitee_host import keys

    known = keys.read(place) if place else {}
    if name is None and len(known) > 1:
        raise KeyFileError(f"{place}: --name says whose key it is: there are {', '.join(known)}")
    key = known.get(name) if name is not None else next(iter(known.values()), None)
    if key is None and asked:
        whose = f'no key of client "{name}"' if name else "no key"
        raise KeyFileError(f"{asked}: there is {whose}: bring its line of the host's file of keys")
    if key is None and keys.is_open_to_others(listen):
        where = f"bring {place} here" if place else "name a file with its key by --keys"
        raise KeyFileError(
            f"{listen}: others are on that network, too: run `splitee keys` where the host is, "
            f'{where}, or say auth = "none" in the fleet file, and --auth none here'
        )
    return key


def _address(url: str) -> tuple[str, int]:
    """Host and port of a tcp:// URL to listen on."""
    from urllib.parse import urlsplit

    from splitee.errors import LinkError

    with suppress(ValueError):  # a port that is none
        parts = urlsplit(url)
        if parts.scheme == "tcp" and parts.hostname and parts.port is not None and not parts.path:
            return parts.hostname, parts.port
    raise LinkError(f"cannot listen on {url!r}: take the form tcp://host:port")
