"""What a firmware takes of its board's memory, measured: by part in its ELF file, by its stack.

The parts of a segment are arrays of ``segment.c``, found by their symbols; whatever else is in RAM
is the firmware's own. Next to that stands what the device itself tells, the stack it has used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from splitee.place import Memory

SEGMENT = "segment.c"  # the file whose arrays are the parts
SHARD_SECTION = ".shard"  # where a linker script puts a shard that has a memory of its own

# System V ABI, chapter 4: types and flags of sections, types of symbols
_SYMBOLS, _NOBITS, _WRITE, _ALLOC = 2, 8, 0x1, 0x2
_OBJECT, _FILE = 1, 4


@dataclass(frozen=True)
class Section:
    """A part of an ELF file."""

    name: str
    kind: int
    flags: int
    offset: int  # in the file
    size: int
    link: int  # the section that this one's names are in

    @property
    def flashed(self) -> bool:
        """Whether it is loaded: code, constants and the initial values of variables."""
        return bool(self.flags & _ALLOC) and self.kind != _NOBITS

    @property
    def variable(self) -> bool:
        """Whether it can be written to while the firmware runs."""
        return bool(self.flags & _ALLOC and self.flags & _WRITE)


class Elf:
    """The sections and symbols of an ELF file of 32 or 64 bits, little-endian."""

    def __init__(self, path: Path) -> None:
        self._content = content = path.read_bytes()
        self._wide = content[4] == 2
        # sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size, sh_link; e_shoff, then
        # e_shentsize, e_shnum, e_shstrndx
        header = struct.Struct("<2I4QI" if self._wide else "<7I")
        table_at, numbers_at = ("<Q", 0x28), 0x3A
        if not self._wide:
            table_at, numbers_at = ("<I", 0x20), 0x2E
        (table,) = struct.unpack_from(table_at[0], content, table_at[1])
        entry, count, names = struct.unpack_from("<3H", content, numbers_at)
        headers = [header.unpack_from(content, table + i * entry) for i in range(count)]
        self.sections = [
            Section(self._text(headers[names][4] + name), kind, flags, offset, size, link)
            for name, kind, flags, _, offset, size, link in headers
        ]

    def _text(self, start: int) -> str:
        return self._content[start : self._content.index(b"\0", start)].decode()

    def kept(self) -> Mapping[str, int]:
        """Bytes of every section that is loaded or kept in RAM."""
        return MappingProxyType({s.name: s.size for s in self.sections if s.flags & _ALLOC})

    def arrays(self, file: str) -> dict[str, int]:
        """Bytes of the variables that a C file keeps to itself, by name."""
        found: dict[str, int] = {}
        current = ""
        for name, info, size in self._symbols():
            if info & 0xF == _FILE:  # the symbols of a file follow its name
                current = name
            elif info == _OBJECT and current == file:  # a local one: its binding is 0
                found[name] = size
        return found

    def _symbols(self) -> Iterator[tuple[str, int, int]]:
        """Name, binding and type, size."""
        for table in (s for s in self.sections if s.kind == _SYMBOLS):
            names = self.sections[table.link].offset
            rows = self._content[table.offset : table.offset + table.size]
            if self._wide:
                for name, info, _, _, _, size in struct.iter_unpack("<I2BH2Q", rows):
                    yield self._text(names + name), info, size
            else:
                for name, _, size, info, _, _ in struct.iter_unpack("<3I2BH", rows):
                    yield self._text(names + name), info, size


def measure(elf: Elf) -> Memory:
    """What a firmware takes of its board's memory; parts that it has not got take nothing."""
    arrays = elf.arrays(SEGMENT)
    parts = {part: arrays.get(part, 0) for part in ("arena", "weights", "labels")}
    shard = arrays.get("shard", 0) + arrays.get("order", 0)
    variables = {s.name: s.size for s in elf.sections if s.variable}
    apart = variables.pop(SHARD_SECTION, 0) > 0
    stack = variables.get(".stack", 0)
    static = sum(variables.values()) - stack - sum(parts.values()) - (0 if apart else shard)
    return Memory(**parts, shard=shard, static=static, stack=stack, apart=apart)


@dataclass(frozen=True)
class Usage:
    """The memory of a client's device against what its board has."""

    client: str
    board: str
    memory: Memory
    ram_bytes: int  # of the board; 0: no limit that we know of
    shard_bytes: int = 0  # of the board's memory for the shard alone, where it has one
    stack_used: int | None = None  # the most at once; None: nobody has asked, or it cannot tell

    def figures(self) -> dict[str, int | bool | None]:
        """All of it by name, for JSON."""
        parts = asdict(self.memory)
        return {
            **{f"{part}_bytes": size for part, size in parts.items() if part != "apart"},
            "stack_used_bytes": self.stack_used,
            "shard_apart": self.memory.apart,
            "ram_bytes": self.memory.ram,
            "board_ram_bytes": self.ram_bytes,
            "board_shard_bytes": self.shard_bytes,
        }
