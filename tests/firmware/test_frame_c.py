"""Frames and messages in C: the published bytes, and the same bytes as Python's."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitee_host.wire import messages
from splitee_host.wire.frame import Frame, encode
from splitee_host.wire.messages import MESSAGES, REQUESTS, Message
from vectors import wire
from vectors.wire import FRAMES, STREAMS, WHOLE, frame_of, title, unhex

ROOT = Path(__file__).parents[2]
SOURCES = [
    ROOT / "firmware" / "protocol" / "frame.c",
    ROOT / "firmware" / "protocol" / "seal.c",
    Path(__file__).with_name("frame_harness.c"),
]
FLAGS = [
    "-std=c11",
    *("-Wall", "-Wextra", "-Wconversion", "-Wdouble-promotion", "-Wshadow", "-Wvla", "-Werror"),
    f"-I{ROOT / 'firmware'}",
]

CAPACITY = 4096  # of the reader's memory where a case does not say

bytes_pointer = ctypes.POINTER(ctypes.c_uint8)


class Firmware:
    """frame.c and messages.h, called through ctypes."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.frame_harness_start.argtypes = [ctypes.c_size_t]
        self.library.frame_harness_read.restype = ctypes.c_size_t
        self.library.frame_harness_read.argtypes = [
            bytes_pointer,
            ctypes.c_size_t,
            *6 * [ctypes.c_void_p],
        ]
        self.library.frame_harness_write.restype = ctypes.c_size_t
        self.library.frame_harness_kept_within.argtypes = [ctypes.c_size_t]
        self.library.frame_harness_bad.restype = ctypes.c_uint32
        self.library.seal_crc32.restype = ctypes.c_uint32

    def write(self, frame: Frame, split: int) -> bytes:
        """What frame_write sends when the body's first split bytes are fields, the rest tail."""
        sent = bytes_pointer()
        size = self.library.frame_harness_write(
            ctypes.c_uint8(frame.code),
            ctypes.c_uint16(frame.session),
            ctypes.c_uint16(frame.sequence),
            frame.body[:split],
            ctypes.c_size_t(split),
            frame.body[split:],
            ctypes.c_size_t(len(frame.body) - split),
            ctypes.byref(sent),
        )
        return ctypes.string_at(sent, size)

    def read(self, stream: bytes, capacity: int) -> tuple[list[Frame], int]:
        """The good frames in stream and the count of bad ones."""
        self.library.frame_harness_start(capacity)
        memory = (ctypes.c_uint8 * max(1, len(stream))).from_buffer_copy(stream or b"\0")
        found, code, body = ctypes.c_int(), ctypes.c_uint8(), bytes_pointer()
        session, sequence, size = ctypes.c_uint16(), ctypes.c_uint16(), ctypes.c_size_t()
        outputs = [ctypes.byref(output) for output in (found, code, session, sequence, body, size)]
        frames = []
        place = 0
        while place < len(stream):
            rest = ctypes.cast(ctypes.byref(memory, place), bytes_pointer)
            place += self.library.frame_harness_read(rest, len(stream) - place, *outputs)
            if found.value:
                content = ctypes.string_at(body, size.value)
                frames.append(Frame(code.value, session.value, sequence.value, content))
        assert self.library.frame_harness_kept_within(capacity)
        return frames, self.library.frame_harness_bad()

    def crc32(self, crc: int, data: bytes) -> int:
        """seal_crc32 of data, going on from crc."""
        value: int = self.library.seal_crc32(ctypes.c_uint32(crc), data, ctypes.c_size_t(len(data)))
        return value


def build(folder: Path, source: Path = SOURCES[0], *, keyed: bool = False) -> Firmware:
    """The C end, built with every warning an error and traps on undefined behaviour."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    path = folder / "frame.so"
    checked = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    command = ["gcc", *FLAGS, *checked, "-O1", "-g", "-fPIC", "-shared", "-o", str(path)]
    if keyed:
        command += ["-DKEYED", str(ROOT / "firmware" / "protocol" / "blake2s.c")]
    subprocess.run([*command, str(source), *map(str, SOURCES[1:])], check=True)
    return Firmware(path)


@pytest.fixture(scope="module")
def firmware(tmp_path_factory: pytest.TempPathFactory) -> Firmware:
    return build(tmp_path_factory.mktemp("frame"))


def structure_of(message: type[Message]) -> type[ctypes.Structure]:
    """The C struct of a message's fixed fields, laid out by ctypes."""
    types: dict[str, Any] = {
        "B": ctypes.c_uint8,
        "H": ctypes.c_uint16,
        "I": ctypes.c_uint32,
        "Q": ctypes.c_uint64,
        "f": ctypes.c_float,
    }
    fixed = [(name, types[code]) for name, code in messages.layout(message) if code != "s"]
    return type(message.__name__, (ctypes.Structure,), {"_fields_": fixed})


@pytest.mark.parametrize("case", WHOLE, ids=title)
def test_c_writes_the_published_bytes(firmware: Firmware, case: dict[str, Any]) -> None:
    frame = frame_of(case)
    assert firmware.write(frame, split=0) == unhex(case["bytes"])
    assert firmware.write(frame, split=len(frame.body)) == unhex(case["bytes"])


@pytest.mark.parametrize("case", WHOLE, ids=title)
def test_c_reads_the_published_bytes(firmware: Firmware, case: dict[str, Any]) -> None:
    assert firmware.read(unhex(case["bytes"]), CAPACITY) == ([frame_of(case)], 0)


@pytest.mark.parametrize("case", STREAMS, ids=title)
def test_c_finds_the_good_frames_and_counts_the_bad(
    firmware: Firmware, case: dict[str, Any]
) -> None:
    found, bad = firmware.read(unhex(case["bytes"]), case.get("capacity", CAPACITY))
    assert found == [FRAMES[title] for title in case["frames"]]
    assert bad == case["bad"]


@pytest.mark.parametrize(
    ("data", "crc"),
    # The check value that catalogues give for CRC-32/ISO-HDLC; the others are zlib's.
    [(b"", 0), (b"123456789", 0xCBF43926), (b"a", 0xE8B7BE43), (bytes(32), 0x190A55AD)],
    ids=["nothing", "check value", "one letter", "32 zeros"],
)
def test_c_computes_the_published_checksums(firmware: Firmware, data: bytes, crc: int) -> None:
    assert firmware.crc32(0, data) == crc
    assert firmware.crc32(firmware.crc32(0, data[:3]), data[3:]) == crc


# Bodies where long runs, zeros and both limits of a block are common.
bodies = st.lists(
    st.one_of(
        st.binary(max_size=8),
        st.integers(1, 300).map(bytes),
        st.integers(1, 600).map(lambda size: b"\x01" * size),
    ),
    max_size=4,
).map(b"".join)
frames = st.builds(
    Frame,
    code=st.integers(0, 2**8 - 1),
    session=st.integers(0, 2**16 - 1),
    sequence=st.integers(0, 2**16 - 1),
    body=bodies,
)


@given(frame=frames, data=st.data())
def test_c_and_python_write_the_same_bytes(
    firmware: Firmware, frame: Frame, data: st.DataObject
) -> None:
    split = data.draw(st.integers(0, len(frame.body)))
    assert firmware.write(frame, split) == encode(frame)


FIXED = [case for case in wire.MESSAGES if structure_of(MESSAGES[case["code"]])._fields_]


@pytest.mark.parametrize("case", FIXED, ids=title)
def test_c_packs_or_unpacks_every_fixed_field(firmware: Firmware, case: dict[str, Any]) -> None:
    message = MESSAGES[case["code"]]
    structure = structure_of(message)
    names = [name for name, *_ in structure._fields_]
    tail = b"".join(unhex(value) for name, value in case["fields"].items() if name not in names)
    body = unhex(case["body"])
    fixed = body[: len(body) - len(tail)]
    name = message.__name__.lower()
    # A byte behind is there to see that nothing is written past the end.
    buffer = ctypes.create_string_buffer(fixed + b"\xc7", len(fixed) + 1)
    if message in REQUESTS:
        values = structure()
        firmware.library[f"unpack_{name}"](ctypes.byref(values), buffer)
        assert {field: getattr(values, field) for field in names} == {
            field: case["fields"][field] for field in names
        }
    else:
        ctypes.memset(buffer, 0, len(fixed))
        values = structure(**{field: case["fields"][field] for field in names})
        firmware.library[f"pack_{name}"](ctypes.byref(values), buffer)
    assert buffer.raw == fixed + b"\xc7"


def test_the_header_agrees_with_the_published_bytes_on_codes_sizes_and_tails(
    tmp_path: Path,
) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    lines = ['#include "protocol/messages.h"', "#include <assert.h>"]
    for case in wire.MESSAGES:
        name = f"MESSAGE_{case['message'].upper()}"
        tail = [f.name for f in fields(MESSAGES[case["code"]]) if f.type == "Bytes"]  # type: ignore[arg-type]
        size = len(unhex(case["body"])) - sum(len(unhex(case["fields"][field])) for field in tail)
        lines += [
            f"static_assert({name} == {case['code']}, {json.dumps(name)});",
            f"static_assert({name}_SIZE == {size}, {json.dumps(name)});",
            f"static_assert({name}_TAIL == {len(tail)}, {json.dumps(name)});",
        ]
    lines += [
        f"static_assert(MESSAGES_SCHEMA == {messages.schema()}u, {json.dumps('schema')});",
        f"static_assert(REGION_COUNT == {len(messages.Region)}, {json.dumps('regions')});",
        'static_assert(REGION_LOGITS == 6 && ERROR_OUT_OF_RANGE == 4, "numbers");',
        'static_assert(CODEC_INT8 == 2 && CODEC_TOP_K == 4, "codecs");',
    ]
    source = tmp_path / "agrees.c"
    source.write_text("\n".join([*lines, ""]))
    subprocess.run(["gcc", *FLAGS, "-fsyntax-only", source], check=True)


def test_the_microcontroller_s_frame_needs_only_the_port_and_little_stack(tmp_path: Path) -> None:
    prefix = "arm-none-eabi-"
    if shutil.which(f"{prefix}gcc") is None:
        pytest.skip(f"needs {prefix}gcc")
    target = ["--specs=picolibc.specs", "-mcpu=cortex-m3", "-mthumb", "-O2"]
    built = tmp_path / "frame.o"
    subprocess.run(
        [f"{prefix}gcc", *FLAGS, *target, "-Wstack-usage=384", "-c", SOURCES[0], "-o", built],
        check=True,
    )
    symbols = subprocess.run(
        [f"{prefix}nm", "-u", built], check=True, capture_output=True, text=True
    )
    assert set(symbols.stdout.split()) - {"U"} == {
        *("port_write", "port_flush"),
        *("seal_start", "seal_add", "seal_end", "seal_holds"),
    }


# ---- seals ----


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Firmware:
    return build(tmp_path_factory.mktemp("keyed"), keyed=True)


def seal(keyed: Firmware, case: dict[str, Any], **other: Any) -> None:
    """Seals from now on as a case says, but for what is other."""
    how = {"key": bytes.fromhex(case["key"]), "direction": case["direction"], **other}
    turns = other.get("turns", case["number"] >> 16)
    keyed.library.frame_harness_seal(
        how["key"], ctypes.c_uint8(how["direction"]), ctypes.c_uint16(turns)
    )


@pytest.mark.parametrize("case", wire.SEALED, ids=title)
def test_c_writes_and_reads_the_published_seals_and_no_others(
    keyed: Firmware, case: dict[str, Any]
) -> None:
    frame = Frame(case["code"], case["session"], case["number"] & 0xFFFF, unhex(case["body"]))
    coded = unhex(case["bytes"])
    seal(keyed, case)
    assert keyed.write(frame, split=0) == coded
    assert keyed.read(coded, CAPACITY) == ([frame], 0)
    for bit in range(8 * (len(coded) - 1)):
        forged = bytearray(coded)
        forged[bit // 8] ^= 1 << bit % 8
        assert keyed.read(bytes(forged), CAPACITY)[0] == []
    assert keyed.read(encode(frame), CAPACITY)[0] == []  # with a CRC
    for other in ({"key": bytes(32)}, {"direction": 1 - case["direction"]}, {"turns": 0x7777}):
        seal(keyed, case, **other)
        assert keyed.read(coded, CAPACITY) == ([], 1)
