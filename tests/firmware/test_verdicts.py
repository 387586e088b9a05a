"""C and Python give the same verdict on any bytes: which frames they hold, and which requests.

200 cases each, and 20,000 with ``--hypothesis-profile=fuzz``, as in `make fuzz`; and the whole
corpus of the fuzzing.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firmware.test_frame_c import (
    CAPACITY,
    FLAGS,
    Firmware,
    bodies,
    build,
    firmware,
    frames,
    structure_of,
)
from fuzz_harness import (
    RECEIVE_MAX,
    ROOT,
    SESSION,
    TARGETS,
    Request,
    corpus,
    requests,
    row,
    segment,
)
from splitee_exporters.c import to_c
from splitee_host.wire import messages as m
from splitee_host.wire.frame import Frame, FrameReader, cobs_encode, encode

__all__ = ["firmware"]  # a fixture

EXAMPLES = max(200, settings.default.max_examples if settings.default else 0)


# ---- frames ----


def wrong(coded: bytes, place: int, change: str) -> bytes:
    """A frame's bytes as a bad link delivers them."""
    place %= len(coded)
    changes: dict[str, Callable[[], bytes]] = {
        "nothing": lambda: coded,
        "flipped": lambda: (
            coded[:place] + bytes([coded[place] ^ 1 << place % 8]) + coded[place + 1 :]
        ),
        "lost": lambda: coded[:place] + coded[place + 1 :],
        "doubled": lambda: coded[:place] + coded[place : place + 1] + coded[place:],
        "zeroed": lambda: coded[:place] + b"\0" + coded[place + 1 :],
        "cut": lambda: coded[:place],
        "last block doubled": lambda: coded[:-1] + b"\x01\0",
    }
    return changes[change]()


changes = ["nothing", "flipped", "lost", "doubled", "zeroed", "cut", "last block doubled"]
streams = st.lists(
    st.one_of(
        st.builds(
            wrong, frames.map(encode), place=st.integers(0, 5000), change=st.sampled_from(changes)
        ),
        st.binary(max_size=30),
        st.lists(st.sampled_from([0, 1, 2, 3, 255]), max_size=30).map(bytes),
        bodies.map(lambda body: cobs_encode(body) + b"\0"),  # well coded, but no frame
    ),
    max_size=6,
).map(b"".join)


def same_frames(firmware: Firmware, stream: bytes, capacity: int) -> bool:
    reader = FrameReader(capacity)
    expected = reader.feed(stream)
    return firmware.read(stream, capacity) == (expected, reader.bad)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    stream=st.one_of(streams, st.binary(max_size=700)),
    capacity=st.one_of(st.integers(0, 40), st.integers(250, 700), st.just(CAPACITY)),
)
def test_both_find_the_same_frames(firmware: Firmware, stream: bytes, capacity: int) -> None:
    assert same_frames(firmware, stream, capacity)


def different_streams(firmware: Firmware) -> list[str]:
    """The inputs of the corpus in which the two do not find the same frames."""
    inputs = [(int.from_bytes(content[:2], "little"), content[2:]) for content in corpus("frame")]
    return [
        stream.hex() for capacity, stream in inputs if not same_frames(firmware, stream, capacity)
    ]


def test_both_find_the_same_frames_in_the_corpus(firmware: Firmware) -> None:
    assert different_streams(firmware) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("reader->filled = byte != FULL", "reader->filled = 1"),
        ("!reader->broken && reader->block == 0", "!reader->broken"),
        ("reader->length == reader->capacity", "reader->length + 1 >= reader->capacity"),
        ("} else if (!empty) {", "} else if (!empty || !whole) {"),
    ],
)
def test_a_planted_fault_is_noticed_in_frames(old: str, new: str, tmp_path: Path) -> None:
    text = (ROOT / "firmware" / "protocol" / "frame.c").read_text()
    assert text.count(old) == 1, "the text to change is not there, or not alone"
    (tmp_path / "frame.c").write_text(text.replace(old, new))
    assert different_streams(build(tmp_path, tmp_path / "frame.c"))


# ---- messages ----


class DeviceInMemory:
    """firmware/fuzz/any_requests.c, called through ctypes: a device whose link is memory."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.fuzz_sent.restype = ctypes.c_size_t

    def answers(self, script: bytes) -> list[Frame]:
        """What it answers to a row of requests after power-up."""
        self._library.LLVMFuzzerTestOneInput(script, ctypes.c_size_t(len(script)))
        sent = ctypes.POINTER(ctypes.c_uint8)()
        size = self._library.fuzz_sent(ctypes.byref(sent))
        reader = FrameReader()
        frames = reader.feed(ctypes.string_at(sent, size))
        assert reader.bad == 0
        return frames


def build_device(folder: Path, root: Path = ROOT / "firmware") -> DeviceInMemory:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    (folder / "segment.c").write_text(to_c(segment("device")))
    sources = [root / path for path in ("fuzz/any_requests.c", *TARGETS["device"].sources)]
    flags = [*FLAGS[:-1], f"-I{root}", f"-DRECEIVE_MAX={RECEIVE_MAX}u", "-O1", "-fPIC", "-shared"]
    built = folder / "device.so"
    command = ["gcc", *flags, "-o", str(built), *map(str, sources), f"{folder}/segment.c", "-lm"]
    subprocess.run(command, check=True)
    return DeviceInMemory(built)


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> DeviceInMemory:
    return build_device(tmp_path_factory.mktemp("device"))


HELLO = Request(m.Hello.CODE, m.Hello(m.schema(), 1).pack(), SESSION)
CODES = {request.CODE for request in m.REQUESTS}


def verdict_of_python(code: int, body: bytes) -> m.Error | None:
    if code not in CODES:
        return m.Error.UNKNOWN_MESSAGE
    if code == m.Hello.CODE:  # it may be of another schema: hosts compare them
        return None
    try:
        m.unpack(code, body)
    except ValueError:
        return m.Error.BAD_LENGTH
    return None


def verdict_of_c(answer: Frame) -> m.Error | None:
    message = m.unpack(answer.code, answer.body)
    assert type(message) in m.ANSWERS
    if isinstance(message, m.Refused):
        error = m.Error(message.error)
        return error if error in (m.Error.UNKNOWN_MESSAGE, m.Error.BAD_LENGTH) else None
    return None


def same_requests(device: DeviceInMemory, asked: Sequence[Request]) -> bool:
    """Whether both take the same of these for requests, each of them in order."""
    welcome, *answers = device.answers(row(HELLO, *asked))
    assert isinstance(m.unpack(welcome.code, welcome.body), m.Welcome)
    theirs = [verdict_of_python(request.code, request.body) for request in asked]
    return [verdict_of_c(answer) for answer in answers] == theirs


def fixed_size(message: type[m.Message]) -> int:
    """Bytes of a message without its tail."""
    return sum(
        {"B": 1, "H": 2, "I": 4, "Q": 8, "f": 4, "s": 0}[code] for _, code in m.layout(message)
    )


def sized(message: type[m.Message]) -> st.SearchStrategy[Request]:
    """Requests with a body of about the size that the message has."""
    size = fixed_size(message)
    close = st.binary(min_size=max(0, size - 1), max_size=size + 1)
    small = st.lists(st.sampled_from([0, 1, 2, 3]), min_size=size, max_size=size).map(bytes)
    return st.builds(Request, st.just(message.CODE), st.one_of(small, small, close))


any_request = st.one_of(
    st.sampled_from(m.REQUESTS).flatmap(sized),
    st.builds(Request, st.sampled_from(sorted(m.MESSAGES)), st.binary(max_size=40)),
    st.builds(Request, st.integers(0, 255), st.binary(max_size=RECEIVE_MAX)),
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(asked=st.lists(any_request, max_size=8))
def test_both_take_the_same_requests(device: DeviceInMemory, asked: list[Request]) -> None:
    assert same_requests(device, asked)


def different_requests(device: DeviceInMemory) -> list[str]:
    """The inputs of the corpus of which the two do not take the same requests, all in order."""
    return [
        content.hex()
        for content in (*corpus("device"), *corpus("lean"))
        if not same_requests(
            device, [Request(r.code, r.body[:RECEIVE_MAX]) for r in requests(content)]
        )
    ]


def test_both_take_the_same_requests_of_the_corpus(device: DeviceInMemory) -> None:
    assert different_requests(device) == []


def test_a_planted_fault_is_noticed_in_requests(tmp_path: Path) -> None:
    root = Path(shutil.copytree(ROOT / "firmware", tmp_path / "firmware"))
    text = (root / "core" / "device.c").read_text()
    old, new = " || (f->size > size && !requests[i].tail)", ""
    assert text.count(old) == 1, "the text to change is not there, or not alone"
    (root / "core" / "device.c").write_text(text.replace(old, new))
    assert different_requests(build_device(tmp_path, root))


def test_an_input_finds_the_device_as_at_power_up(device: DeviceInMemory) -> None:
    scripts = corpus("device")
    first = [device.answers(script) for script in scripts]
    again = [device.answers(script) for script in reversed(scripts)]
    assert again == first[::-1]


FIXED = [message for message in m.REQUESTS if structure_of(message)._fields_]


@settings(max_examples=EXAMPLES, deadline=None)
@given(message=st.sampled_from(FIXED), data=st.data())
def test_both_read_the_same_fields(
    firmware: Firmware, message: type[m.Message], data: st.DataObject
) -> None:
    size = fixed_size(message)
    body = data.draw(st.binary(min_size=size, max_size=size))
    ours, theirs = structure_of(message)(), m.unpack(message.CODE, body)
    firmware.library[f"unpack_{message.__name__.lower()}"](ctypes.byref(ours), body)
    for name, *_ in ours._fields_:
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert mine == other or (math.isnan(mine) and math.isnan(other)), name
