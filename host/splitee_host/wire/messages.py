"""The wire's messages: the one place where they are defined.

The C header ``firmware/protocol/messages.h`` is generated from this file (``header.py``), and
``schema()`` is the number that both ends compare at hello. Every message is a request of the host
or the answer of a device to it. Requests are numbered from 1 on in each session. ``MOVES`` carry
pieces of a region: the pieces of one transfer share a number, may be under way together, come in
any order and be carried out again. All other requests have a number each, wait for what was before
them, and are acted on once; a number that comes again is answered again. ``Hello`` has number 0.
Integers and floats are little-endian and unaligned; a ``bytes`` field can only be the last one and
runs to the end of the frame.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Annotated, ClassVar, get_args, get_type_hints

from splitee_host.wire.frame import Bytes

U8 = Annotated[int, "B"]
U16 = Annotated[int, "H"]
U32 = Annotated[int, "I"]
U64 = Annotated[int, "Q"]
F32 = Annotated[float, "f"]


class Region(IntEnum):
    """The memories of a device that ``Read`` and ``Write`` reach; offsets count bytes.

    Of a segment of 8 bits there are three: INPUT, ACTIVATIONS and LOGITS, all int8, the channels of
    a pixel side by side (NHWC). The host makes such an input of an image.
    """

    WEIGHTS = 0  # float32: every parameter, then every norm statistic, in the graph's order
    MOMENTUM = 1  # float32: one value per parameter; empty when built without momentum
    SHARD = 2  # records of one label byte and the uint8 image, in the order sent
    INPUT = 3  # uint8 images for Infer: capacity x input elements
    ACTIVATIONS = 4  # float32 at the cut: capacity x elements, of the last Forward or Infer
    GRADIENT = 5  # float32, dLoss/dActivations: the host writes it before Backward
    LOGITS = 6  # float32 of the exit at the cut: capacity x classes
    GRADIENTS = 7  # float32 of every parameter, summed over the parts of this batch
    ARENA = 8  # the whole arena, for single-stepping with Run
    CODED_ACTIVATIONS = 9  # ACTIVATIONS by their codec, made as they are read: capacity x its size
    CODED_GRADIENT = 10  # GRADIENT by its codec, if not float32: Backward decodes it to there


class Codec(IntEnum):
    """How a tensor is coded; ``splitee.codec`` defines the bytes."""

    FLOAT32 = 0
    FLOAT16 = 1
    INT8 = 2
    INT4 = 3
    TOP_K = 4


class Error(IntEnum):
    """Why a device refused a request; the host owns the words (``errors.py``)."""

    UNKNOWN_MESSAGE = 1
    BAD_LENGTH = 2  # detail: the length received, in bytes
    NO_SUCH_REGION = 3  # detail: the region
    OUT_OF_RANGE = 4  # detail: the size of the region in bytes
    READ_ONLY = 5  # detail: the region
    TOO_MANY_SAMPLES = 6  # detail: the most that the device holds
    NO_DATA = 7  # detail: samples the device holds
    OUT_OF_ORDER = 8  # detail: its phase (0 idle, 1 after Forward, 2 after Backward)
    BAD_LABEL = 9  # detail: the label
    NO_MOMENTUM = 10  # the segment was built without momentum
    BAD_STEP = 11  # detail: number of steps in the segment
    NO_SUCH_CUT = 12  # detail: number of cuts in the segment
    NOT_FINITE = 13  # detail: the place of the first such gradient, or NOT_FINITE_LOSS
    NOT_WHOLE = 14  # detail: the capacity; layers that learn at once take a batch as one part
    NO_CLIP = 15  # detail: 0; layers that learn at once know no norm of all gradients
    LOCAL_ONLY = 16  # detail: 0; there is no room for the server's gradient
    BAD_CODEC = 17  # detail: the codec, which it has not, or which is none for samples of this size
    BAD_CODE = 18  # detail: the sample whose coded gradient nobody can have made
    INFERS_ONLY = 19  # detail: 0; the segment is of 8 bits, and so has nothing to train
    NO_DISTILL = 20  # detail: 0; the segment was built for exits that learn from labels alone


NOT_FINITE_LOSS = 0xFFFFFFFF
"""Every gradient is finite, but the loss is not."""


class Message:
    """Base of every message: packs its fields in their order of declaration."""

    CODE: ClassVar[int]
    _layout: ClassVar[struct.Struct]
    _tail: ClassVar[bool]
    _names: ClassVar[tuple[str, ...]]

    def pack(self) -> bytes:
        """The body of the frame. Raises ``struct.error`` when a field is out of its range."""
        return b"".join(self.parts())

    def parts(self) -> tuple[bytes, Bytes]:
        """The same without putting it together: all fields but a last one of bytes, and that."""
        values = [getattr(self, name) for name in self._names]
        tail = values.pop() if self._tail else b""
        return self._layout.pack(*values), tail


@dataclass(frozen=True)
class Hello(Message):
    """Asks who is there, in a new session, whose number stands in the frame's header.

    It changes nothing: the session begins with its first request, which is number 1.
    """

    CODE = 0x01
    schema: U32
    nonce: U64  # never used before by this host; the session's key is made of it


@dataclass(frozen=True)
class Settings(Message):
    """Hyper-parameters from now on, and what the trunk learns from.

    The gradient that reaches the trunk is exit_weight x dExitLosses + server_weight x the
    gradient written to Region.GRADIENT.
    """

    CODE = 0x02
    learning_rate: F32
    momentum: F32
    weight_decay: F32
    exit_weight: F32
    server_weight: F32
    clip: F32  # largest norm of the gradients that a step takes together; 0: any
    distill: F32  # share of the softmax of the exit at the cut in what those below learn from


@dataclass(frozen=True)
class Place(Message):
    """Where the client stands: samples held, place in its data order, steps taken.

    steps = 0 also clears the momentum. The order of epoch e is a permutation drawn from
    (seed, e); position counts the samples of this epoch already used.
    """

    CODE = 0x04
    samples: U16
    position: U16
    seed: U32
    epoch: U32
    steps: U32


@dataclass(frozen=True)
class Forward(Message):
    """Runs the next count samples of the data order forward, as a part of a batch of batch."""

    CODE = 0x05
    count: U16
    batch: U16


@dataclass(frozen=True)
class Infer(Message):
    """Runs the first count images of Region.INPUT forward; nothing is learnt from them."""

    CODE = 0x06
    count: U16


@dataclass(frozen=True)
class Backward(Message):
    """Runs the part of the last Forward backward; parameter gradients add up."""

    CODE = 0x07


@dataclass(frozen=True)
class Step(Message):
    """Updates the weights with the gradients of the whole batch and clears them.

    Where a gradient or the loss is not finite it is refused: nothing has changed, and the batch is
    forgotten.
    """

    CODE = 0x08


@dataclass(frozen=True)
class Read(Message):
    """Asks for length bytes of a region, from offset on: a piece of a transfer."""

    CODE = 0x09
    region: U8
    offset: U32
    length: U32


@dataclass(frozen=True)
class Write(Message):
    """Puts bytes into a region, from offset on: a piece of a transfer."""

    CODE = 0x0A
    region: U8
    offset: U32
    content: Bytes


@dataclass(frozen=True)
class Stats(Message):
    """Asks for the device's counters."""

    CODE = 0x0B


@dataclass(frozen=True)
class Run(Message):
    """Single-stepping: runs the segment's steps start..stop-1 on the part of the last Forward."""

    CODE = 0x0C
    start: U16
    stop: U16


@dataclass(frozen=True)
class Select(Message):
    """Puts the cut at one of those that are built in; it waits for an idle device.

    At power-up it is the last, with all exits. Layers that take no part keep their weights and
    their momentum; Region.ACTIVATIONS, GRADIENT and LOGITS are those at the cut. Their codecs are
    float32 from here on.
    """

    CODE = 0x0D
    cut: U8  # 1 is the shallowest
    upto: U8  # 0: the exit at the cut learns; otherwise all up to it do


@dataclass(frozen=True)
class Coding(Message):
    """Codecs of the tensors that cross the cut, until the next Select; it waits for an idle device.

    A codec must not take more than float32 does for samples of this size.
    """

    CODE = 0x0E
    activations: U8  # a Codec
    gradient: U8  # a Codec
    kept: U16  # elements of a sample that top-k keeps


@dataclass(frozen=True)
class Done(Message):
    """The request was carried out."""

    CODE = 0x80


@dataclass(frozen=True)
class Welcome(Message):
    """Answer to Hello: what this device is. Sent even when the schema differs."""

    CODE = 0x81
    schema: U32
    segment: U32  # checksum of the segment built in
    receive_max: U32  # largest body of a frame the device can receive, bytes
    send_max: U32  # largest body of a frame the device may send, bytes
    window: U32  # bytes of further requests that find room while it is busy with one
    samples_max: U16  # samples the shard has room for
    samples: U16  # samples it holds
    steps: U32  # training steps taken so far
    shard: U32  # CRC-32 of the records it holds: the host sends them only if they differ
    session: U16  # that it is in, until a request comes in the new one; 0 since power-up
    fresh: U8  # whether the nonce is random; otherwise it may come again after a reset
    nonce: U64


@dataclass(frozen=True)
class Forwarded(Message):
    """Answer to Forward: the labels of the part, one byte each."""

    CODE = 0x85
    labels: Bytes


@dataclass(frozen=True)
class Stepped(Message):
    """Answer to Step, over the whole batch, measured before the step."""

    CODE = 0x88
    loss: F32  # mean cross-entropy of the exit at the cut, nats
    correct: U16  # samples that this exit classified correctly


@dataclass(frozen=True)
class Content(Message):
    """Answer to Read, with its offset."""

    CODE = 0x89
    offset: U32
    content: Bytes


@dataclass(frozen=True)
class Written(Message):
    """Answer to Write, with its offset."""

    CODE = 0x8A
    offset: U32


@dataclass(frozen=True)
class Counters(Message):
    """Answer to Stats: the place of ``Place`` now, and counters since power-up."""

    CODE = 0x8B
    samples: U16
    position: U16
    seed: U32
    epoch: U32
    steps: U32
    frames: U32  # good frames received
    bad_frames: U32  # frames with a wrong length, coding, or checksum; or tag, where it has a key
    foreign_frames: U32  # of another session, or not in turn
    repeated_frames: U32  # requests that came again, pieces of transfers not counted
    compute_micros: U32  # time spent in forward, backward and step (wraps)
    stack_used: U32  # bytes, the most at once since power-up; 0: not known
    dropped_packets: U32  # of a network: no room, fragments, wrong lengths and checksums


@dataclass(frozen=True)
class Refused(Message):
    """The request was not carried out, and nothing changed."""

    CODE = 0xFF
    error: U8
    detail: U32


REQUESTS: tuple[type[Message], ...] = (
    Hello,
    Settings,
    Place,
    Forward,
    Infer,
    Backward,
    Step,
    Read,
    Write,
    Stats,
    Run,
    Select,
    Coding,
)
ANSWERS: tuple[type[Message], ...] = (
    Done,
    Welcome,
    Forwarded,
    Stepped,
    Content,
    Written,
    Counters,
    Refused,
)
MOVES: tuple[type[Message], ...] = (Read, Write)
MESSAGES: dict[int, type[Message]] = {m.CODE: m for m in REQUESTS + ANSWERS}


def layout(message: type[Message]) -> list[tuple[str, str]]:
    """(field, struct code) in wire order; the code of a tail of bytes is ``s``."""
    hints = get_type_hints(message, include_extras=True)
    return [
        (f.name, "s" if hints[f.name] == Bytes else get_args(hints[f.name])[1])
        for f in fields(message)  # type: ignore[arg-type]
    ]


for _message in MESSAGES.values():
    _codes = [code for _, code in layout(_message)]
    assert "s" not in _codes[:-1], f"{_message.__name__}: only the last field can be bytes"
    _message._tail = _codes[-1:] == ["s"]
    _message._names = tuple(name for name, _ in layout(_message))
    _message._layout = struct.Struct("<" + "".join(c for c in _codes if c != "s"))


def unpack(code: int, body: Bytes) -> Message:
    """The message that a frame's body holds; its bytes are those of the body, not a copy.

    Raises ValueError, naming the message, when the code is unknown or the length is wrong.
    """
    message = MESSAGES.get(code)
    if message is None:
        raise ValueError(f"no message has the code 0x{code:02x}")
    size = message._layout.size
    if len(body) < size or (len(body) > size and not message._tail):
        raise ValueError(f"{message.__name__} takes {size} bytes, not {len(body)}")
    values: list[object] = list(message._layout.unpack_from(body))
    if message._tail:
        values.append(body[size:])
    return message(*values)


def description() -> str:
    """The whole schema as text, a line per message, region, codec and error, in a fixed order."""
    lines = [
        f"{code:02x} {m.__name__} " + " ".join(f"{name}:{kind}" for name, kind in layout(m))
        for code, m in sorted(MESSAGES.items())
    ]
    lines += [f"region {r.value} {r.name}" for r in Region]
    lines += [f"codec {c.value} {c.name}" for c in Codec]
    lines += [f"error {e.value} {e.name}" for e in Error]
    return "\n".join(lines)


def schema() -> int:
    """CRC-32 of ``description()``: two ends with the same number speak the same wire."""
    return zlib.crc32(description().encode())
