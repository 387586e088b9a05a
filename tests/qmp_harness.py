"""QEMU's control line, for tests that stop a board or look into its memory."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Self

WAIT = 20.0  # seconds for QEMU to connect and to answer


class Control:
    """Listens for one QEMU; its ``options`` are those that QEMU has to be started with."""

    def __init__(self, folder: Path) -> None:
        path = folder / "qmp"
        self.options = ("-qmp", f"unix:{path}")
        self._server = socket.socket(socket.AF_UNIX)
        self._server.settimeout(WAIT)
        self._server.bind(str(path))
        self._server.listen()

    def execute(self, *commands: tuple[str, dict[str, object]]) -> None:
        """Connects and executes commands of QEMU's machine protocol, one after another."""
        connection, _ = self._server.accept()
        with connection, connection.makefile("rw") as lines:
            connection.settimeout(WAIT)
            for command, arguments in (("qmp_capabilities", {}), *commands):
                request = {"execute": command, "arguments": arguments}
                print(json.dumps(request), file=lines, flush=True)
                while "return" not in (answer := json.loads(lines.readline())):
                    assert "error" not in answer, answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.close()
