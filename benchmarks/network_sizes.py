"""What the link takes of each Arm board, by part, over Ethernet and serial lines, as JSON.

.venv/bin/python benchmarks/network_sizes.py > benchmarks/results/network_sizes.json

Bytes of code with constants, and of variables, that the linker kept of each file, as its map says.
The firmware is the whole one, around the first stage of a small network.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from splitee.assemble import Assembly
from splitee.fleet import parse
from splitee_exporters.c import to_c
from splitee_host import boards
from splitee_host.bench import compiler
from splitee_host.launch import build_firmware
from splitee_host.wire.seal import KEY_SIZE

FLEET = """
name = "sizes"
[model]
width = 2
[[client]]
name = "board"
board = "{}"
cut = "stem"
"""
PARTS = {
    "frames and seals": r"protocol/(frame|seal)\.o",
    "sessions": r"core/session\.o",
    "requests": r"core/device\.o",
    "codecs": r"protocol/codec\.o",
    "BLAKE2s": r"protocol/blake2s\.o",
    "ARP, IPv4, ICMP and UDP": r"net/net\.o",
    "Ethernet driver": r"ports/mps2/lan9118\.o",
    "link": r"ports/mps2/(udp|serial)\.o",  # with its buffers: two packets, or the ring
}


def sizes(map_file: Path) -> dict[str, dict[str, int]]:
    """Bytes by part."""
    kept = map_file.read_text().split("Linker script and memory map")[1]
    row = r"^ \.(text|rodata|data|bss)\S*\s+0x[0-9a-f]+\s+(0x[0-9a-f]+) (\S+)$"
    code, ram = Counter[str](), Counter[str]()
    for kind, size, file in re.findall(row, kept, re.MULTILINE):
        for part, pattern in PARTS.items():
            if re.search(pattern + "$", file):
                code[part] += int(size, 16) if kind != "bss" else 0  # initial values of variables
                ram[part] += int(size, 16) if kind in ("data", "bss") else 0
    return {part: {"code_bytes": code[part], "ram_bytes": ram[part]} for part in PARTS}


def row(board: boards.Board, *, auth: bool = False) -> dict[str, Any]:
    """The sizes of one board's firmware; auth: with a key built in."""
    key = bytes(KEY_SIZE) if auth else None
    (member,) = Assembly(parse(FLEET.format(board.name)), lambda _: board.for_assembly).members
    with tempfile.TemporaryDirectory() as name:
        firmware = build_firmware(member.build, board, to_c, Path(name), key)
        parts = sizes(firmware.elf.with_name("device.map"))
    static = firmware.memory.static
    about = {"board": board.name, "auth": auth, "compiler": compiler(board)}
    return {**about, "static_bytes": static, **parts}


def main() -> None:
    known = boards.load_boards()
    arm = [b for b in known.values() if b.port == "mps2"]
    rows = [row(b, auth=auth) for b in arm for auth in (False, True)]
    json.dump({"rows": rows}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
