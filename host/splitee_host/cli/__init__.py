"""The command line: `splitee boards | data | plan | build | train | watch | eval | export | …`."""

from __future__ import annotations

import sys

# isort: off
# importing them adds their commands, in the order in which `splitee --help` lists them
from splitee_host.cli import boards, data, plan, build, train, watch, evaluate  # noqa: F401
from splitee_host.cli import export, verify, bench, client, serve, keys  # noqa: F401

# isort: on
from splitee_host.cli.common import app, new_console, plain

__all__ = ["app", "main"]

_HOST_NEEDS = ("torch", "torchvision", "PIL", "safetensors", "matplotlib", "sklearn", "pydantic")


def main() -> None:
    """Runs the command line; errors that a user can cure are printed without a traceback."""
    from splitee.errors import SpliteeError

    try:
        try:
            app()
        except ModuleNotFoundError as missing:
            raise _missing(missing) from missing
    except SpliteeError as error:
        new_console(stderr=True).print(f"[bold red]error:[/] {plain(error)}", highlight=False)
        sys.exit(1)


def _missing(error: ModuleNotFoundError) -> Exception:
    """What a user can do about a module that is not there, where that is an extra's."""
    from splitee.errors import MissingTool

    package = (error.name or "").partition(".")[0]
    if package in _HOST_NEEDS:
        return MissingTool(f"{package} is not installed: pip install 'hetero-splitee[host]'")
    return error
