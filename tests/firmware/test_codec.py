"""The codecs in C, held to Python's bit for bit: here under sanitizers, and on emulated cores."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from splitee.codec import KINDS, Codec
from splitee.errors import LinkClosed, MissingTool
from splitee.ops import Array
from splitee_host import boards
from splitee_host.boards import Board
from splitee_host.link import Link
from splitee_host.wire import messages as m
from step_harness import planted

PROGRAM = Path(__file__).parent / "codec_check.c"
# the emulators have more memory than the parts that the boards stand for
BOARDS = {
    name: replace(boards.load_boards()[name], ram_bytes=1 << 19, flash_bytes=1 << 19)
    for name in ("posix", "qemu-m3", "qemu-m4", "qemu-m55")
}
POSIX = BOARDS["posix"]
PATIENCE = 60.0  # seconds without a word
ENCODE, DECODE = 1, 2


class Coder:
    """The program at the other end of a link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._received = b""

    def _ask(self, what: int, codec: Codec, samples: int, size: int, content: bytes) -> None:
        kind = m.Codec[codec.kind.replace("-", "_").upper()]
        head = struct.pack("<6I", what, kind, codec.kept, codec.elements, samples, size)
        for start in range(0, len(head + content), 1024):  # as datagrams are, where it has those
            self._link.write((head + content)[start : start + 1024])

    def _answer(self, size: int) -> bytes:
        while len(self._received) < size:
            chunk = self._link.read(PATIENCE)
            assert chunk, "it says nothing any more"
            self._received += chunk
        answer, self._received = self._received[:size], self._received[size:]
        return answer

    def _number(self) -> int:
        (number,) = struct.unpack("<I", self._answer(4))
        return int(number)

    def encode(self, codec: Codec, values: Array, piece: int) -> bytes:
        """The code of (samples, elements) values, made in pieces of so many bytes."""
        self._ask(ENCODE, codec, len(values), piece, np.ascontiguousarray(values, "<f4").tobytes())
        return self._answer(self._number())

    def decode(self, codec: Codec, code: bytes, held: int) -> tuple[int, Array]:
        """How many samples are good, and the values, in the memory of held samples."""
        self._ask(DECODE, codec, len(code) // codec.size, held, code)
        good = self._number()
        floats = np.frombuffer(self._answer(self._number()), "<f4")
        return good, floats.reshape(-1, codec.elements)


@contextmanager
def coder(board: Board, folder: Path) -> Iterator[Coder]:
    """The program on a board; on this machine under sanitizers, which end it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(PROGRAM, folder / "segment.c")
    overrides = {"PROGRAM": "protocol/codec.c kernels/half.c"}
    try:
        built = boards.build(
            board, folder, folder, sanitize=board.port == "posix", overrides=overrides
        )
        with boards.start(board, built) as running:
            yield Coder(running.link)
    except MissingTool as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module", params=BOARDS)
def any_coder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Coder]:
    with coder(BOARDS[request.param], tmp_path_factory.mktemp(request.param)) as found:
        yield found


@pytest.fixture(scope="module")
def posix_coder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coder]:
    with coder(POSIX, tmp_path_factory.mktemp("posix")) as found:
        yield found


def codecs(elements: int) -> list[Codec]:
    """Every codec for samples of that size, top-k with few, half and all but one kept."""
    shares = sorted({1, elements // 2, elements - 1} - {0})
    found = [Codec(kind, elements) for kind in KINDS if kind != "top-k"]
    found += [Codec("top-k", elements, kept) for kept in shares]
    return [c for c in found if c.fault is None]


# ---- inputs ----


def _rng() -> np.random.Generator:
    return np.random.default_rng(20251209)


def _normal(samples: int, elements: int) -> Array:
    return _rng().standard_normal((samples, elements)).astype(np.float32)


def _bits(*bits: int) -> Array:
    return np.array([bits], np.uint32).view(np.float32)


def _rows(*rows: float) -> Array:
    return np.repeat(np.array(rows, np.float32)[:, None], 6, 1) * _normal(1, 6)


INPUTS: dict[str, Array] = {
    "random": _normal(3, 129),
    "a few hundred": _normal(2, 700),
    "two elements": _normal(5, 2),
    "one element": _normal(3, 1),
    "three elements": _normal(4, 3),
    "constant": np.full((2, 33), -0.3, np.float32),
    "zero": np.zeros((2, 9), np.float32),
    "negative zero": np.full((1, 5), -0.0, np.float32),
    "a single one that is not zero": np.eye(7, dtype=np.float32)[2:5] * np.float32(-3),
    "as a ReLU leaves it": np.maximum(_normal(3, 65), 0),
    "tiny": _rows(1e-23, 1e-24, 8e-25, 1e-30, 1e-37),
    "subnormal": _rows(1e-38, 1e-40, 1e-44),
    "subnormal beside others": _bits(0x3F80_0000, 0x0000_0001, 0x807F_FFFF, 0x0080_0000, 0),
    "huge": _rows(1e30, 1e37, 6e37),
    "where scales begin": _bits(0x177F_FFFF, 0x9700_0000, 0x1234_5678),
    "the smallest scale": _bits(0x1780_0000, 0x9700_0000, 0x0C00_0000),
    "the largest scale": _bits(0x7EFF_FFFF, 0xFEFF_FFFE, 0x7E7F_FFFF),
    "where scales end": _bits(0x7F00_0000, 0x3F80_0000, 0xFF7F_FFFF),
    "no numbers": _bits(0x7FC0_0000, 0x3F80_0000, 0xFFFF_FFFF, 0x7F80_0001),
    "infinite": _bits(0x7F80_0000, 0xFF80_0000, 0x3F80_0000, 0),
    "one sample of them infinite": np.concatenate(
        [_normal(1, 4), _bits(0x7F80_0000, 0, 1, 2), _normal(1, 4)]
    ),
    "equal magnitudes": _rng().integers(-3, 4, (4, 70)).astype(np.float32),
    "ties of int8": np.concatenate([np.arange(-126.5, 127), [127]])[None].astype(np.float32),
    "ties of int4": np.concatenate([np.arange(-6.5, 7), [7]])[None].astype(np.float32),
    "beside the ties": np.nextafter(
        np.concatenate([np.arange(-126.5, 127), [127.5]])[None].astype(np.float32), np.float32(0)
    ),
    "ties of float16": (1 + np.arange(512)[None] * 2.0**-12).astype(np.float32),
    "float16s that are subnormal": np.logspace(0, -13, 300, dtype=np.float32)[None],
    "any bits": _rng().integers(0, 1 << 32, (40, 11), np.uint32).view(np.float32),
    # all that come near a tie once x * (1 / scale) was rounded, a core that fuses would round
    "products": (_rng().integers(-254, 255, (6, 600)) / np.float32(2) * np.float32(0.0371)).astype(
        np.float32
    ),
}


def differences(coder: Coder, values: Array, piece: int) -> list[str]:
    """Of which codecs bytes or values are not the same in C."""
    found = []
    for codec in codecs(values.shape[1]):
        name = f"{codec.kind} {codec.kept}".removesuffix(" 0")
        code = codec.encode(values)
        if coder.encode(codec, values, piece) != code:
            found.append(f"{name} encodes")
        for held in (len(values), len(values) + 2):
            good, back = coder.decode(codec, code, held)
            assert good == len(values)
            if codec.kind == "float32":  # stays at the end of its memory, which it fills
                continue
            expected = codec.decode(code)
            same = back.view(np.uint32) == expected.view(np.uint32)
            if not (same | (np.isnan(back) & np.isnan(expected))).all():
                found.append(f"{name} decodes")
    return found


@pytest.mark.parametrize("title", INPUTS)
def test_c_makes_the_bits_that_python_makes(any_coder: Coder, title: str) -> None:
    assert differences(any_coder, INPUTS[title], 1000) == []


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 7, 64, 997])
def test_pieces_of_any_size_make_up_the_same_code(posix_coder: Coder, piece: int) -> None:
    assert differences(posix_coder, _normal(3, 41), piece) == []
    assert differences(posix_coder, INPUTS["equal magnitudes"], piece) == []


@given(
    values=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 40)),
        elements=st.one_of(
            st.floats(width=32),
            st.integers(-4, 4).map(float),
            st.integers(0, 2**32 - 1).map(lambda b: np.uint32(b).view(np.float32)),
        ),
    ),
    piece=st.integers(1, 50),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_c_makes_the_same_of_any_values(posix_coder: Coder, values: Array, piece: int) -> None:
    assert differences(posix_coder, values, piece) == []


@given(data=st.data(), elements=st.integers(2, 20), samples=st.integers(1, 3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_c_makes_the_same_of_any_code(
    posix_coder: Coder, data: st.DataObject, elements: int, samples: int
) -> None:
    codec = data.draw(st.sampled_from(codecs(elements)[1:]))
    size = codec.size * samples
    code = data.draw(st.binary(min_size=size, max_size=size))
    good, back = posix_coder.decode(codec, code, samples)
    try:
        expected = codec.decode(code)
    except ValueError:
        assert good < samples
        with pytest.raises(ValueError, match="rise"):
            codec.decode(code[: codec.size * (good + 1)])
        return
    assert good == samples
    np.testing.assert_array_equal(back, expected)


@pytest.mark.parametrize(
    "indices", [(0, 0, 1), (2, 1, 3), (1, 2, 5), (65535, 65535, 65535)], ids=str
)
def test_refuses_indices_that_do_not_rise_or_are_too_large(
    any_coder: Coder, indices: tuple[int, ...]
) -> None:
    pairs = b"".join(struct.pack("<HH", index, 0x3C00) for index in indices)
    codec = Codec("top-k", 5, 3)
    first = codec.encode(_normal(1, 5))
    good, _ = any_coder.decode(codec, first + struct.pack("<f", 1.0) + pairs, 2)
    assert good == 1


# A fault in codec.c, an input that must notice it, and what it says.
FAULTS: dict[str, tuple[str, str, str, str]] = {
    "ties away from zero": (" - 1 + odd)", " + 0 * odd)", "ties of int8", "int8 encodes"),
    "a tie at a half": ("exponent < 126", "exponent < 127", "random", "int4 encodes"),
    "the wrong scale": ("/ 127.0f", "/ 128.0f", "random", "int8 encodes"),
    "a scale that is not inverted": (
        "s->x[i] * s->inverse",
        "s->x[i] / s->scale * 0.9999f",
        "ties of int8",
        "int8 encodes",
    ),
    "a sign lost": ("bits >> 31 ? -found", "bits >> 31 ? found", "random", "int8 encodes"),
    "halves the wrong way round": ("low | high << 4", "high | low << 4", "random", "int4 encodes"),
    "an element behind the last": (
        "second < c->elements ?",
        "second <= c->elements ?",
        "three elements",
        "AddressSanitizer",
    ),
    "the smallest scale": ("bits >= SMALLEST", "bits > SMALLEST", "the smallest scale", "int8"),
    "the largest scale": ("} else if (bits >= LARGEST)", "} else if (0)", "infinite", "int8"),
    "of equals the last": (
        "(m == s->least && s->left > 0)",
        "(m == s->least && s->left > 1)",
        "equal magnitudes",
        "top-k 35 encodes",
    ),
    "too many counted": (
        "wanted -= counts[digit--]",
        "digit--",
        "equal magnitudes",
        "top-k 35 encodes",
    ),
    "digits of other numbers": (
        "(m & known) == least",
        "(m & known) >= least",
        "random",
        "top-k 64 encodes",
    ),
    "the sample before": ("known->x != sample", "known->x == NULL", "random", "int8 encodes"),
    "nibbles without sign": ("(high >> 4)", "(high >> 4 & 15)", "random", "int4 decodes"),
    "a pair read twice": ("pairs++;", "", "random", "top-k 64 decodes"),
    "a place too far ahead": (
        "(size_t)held * codec_size(c);",
        "(size_t)held * codec_size(c) - 1;",
        "random",
        "top-k 128 decodes",
    ),
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they are planted: what stays the same is not compiled again."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault: str, faults: Path) -> None:
    old, new, title, notices = FAULTS[fault]
    with planted(faults, "protocol/codec.c", old, new), coder(POSIX, faults / "built") as faulty:
        try:
            found = differences(faulty, INPUTS[title], 1000)
        except LinkClosed as ended:  # by a sanitizer
            found = [str(ended)]
    assert any(notices in words for words in found), found


def test_a_sum_that_a_core_fuses_is_noticed(tmp_path: Path) -> None:
    # rounded by adding 1.5 * 2^23: right where a product is rounded first, as it is in Python
    old, new = "int32_t nearest(float x) {", "int32_t nearest(float x) { return FUSED(x);"
    head, with_it = (
        "#define SCALE_SIZE 4u",
        ("#define FUSED(x) ((int32_t)(((x) + 12582912.0f) - 12582912.0f))\n#define SCALE_SIZE 4u"),
    )
    with planted(tmp_path, "protocol/codec.c", head, with_it):
        path = tmp_path / "sources" / "protocol" / "codec.c"
        path.write_text(path.read_text().replace(old, new))
        with coder(BOARDS["qemu-m4"], tmp_path / "built") as faulty:
            assert "int8 encodes" in differences(faulty, INPUTS["products"], 1000)
