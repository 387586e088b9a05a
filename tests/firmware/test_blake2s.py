"""BLAKE2s in C, held to the RFC's values and to Python's hashlib."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware.test_fast_on_boards import run
from splitee_host import boards

ROOT = Path(__file__).parents[2] / "firmware"
SOURCE = ROOT / "protocol" / "blake2s.c"
PROGRAM = Path(__file__).parent / "blake2s_check.c"
WARNINGS = (
    *("-Wall", "-Wextra", "-Wconversion", "-Wdouble-promotion", "-Wshadow", "-Wvla", "-Werror"),
)
GUARD = b"\xc7" * 16


class Blake2s:
    """blake2s.c, called through ctypes."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def digest(self, size: int, key: bytes, *pieces: bytes) -> bytes:
        """The digest of all pieces in a row."""
        hash_ = (ctypes.c_uint64 * 32)()  # more than a struct blake2s takes, and aligned
        self._library.blake2s_init(hash_, ctypes.c_size_t(size), key, ctypes.c_size_t(len(key)))
        for piece in pieces:
            self._library.blake2s_update(hash_, piece, ctypes.c_size_t(len(piece)))
        out = ctypes.create_string_buffer(bytes(size) + GUARD, size + len(GUARD))
        self._library.blake2s_final(hash_, out)
        assert out.raw[size:] == GUARD, "it wrote behind the end of the digest"
        return out.raw[:size]

    def same(self, a: bytes, b: bytes) -> bool:
        assert len(a) == len(b)
        return bool(self._library.blake2s_same(a, b, ctypes.c_size_t(len(a))))


def build(folder: Path, source: Path = SOURCE) -> Blake2s:
    """A library of the source, with every warning an error and traps on undefined behaviour."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    path = folder / "blake2s.so"
    checked = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    command = ["gcc", "-std=c11", *WARNINGS, *checked, "-O2", "-fPIC", "-shared", f"-I{ROOT}"]
    subprocess.run([*command, "-o", path, source], check=True)
    return Blake2s(path)


@pytest.fixture(scope="module")
def blake2s(tmp_path_factory: pytest.TempPathFactory) -> Blake2s:
    return build(tmp_path_factory.mktemp("blake2s"))


def sequence(size: int, seed: int) -> bytes:
    """The deterministic bytes of RFC 7693, appendix E."""
    a, b = 0xDEAD4BAD * seed & 0xFFFFFFFF, 1
    out = bytearray()
    for _ in range(size):
        a, b = b, a + b & 0xFFFFFFFF
        out.append(b >> 24)
    return bytes(out)


COUNTING = bytes(range(256))

# By the RFC, appendices B and E, and by the designers' list of known answers (blake2s-kat.txt).
SELF_TEST = "6a411f08ce25adcdfb02aba641451cec53c598b24f4fc787fbdc88797f4c1dfe"
KNOWN = {
    "abc, RFC 7693": (
        b"abc",
        b"",
        "508c5e8c327c14e2e1a72ba34eeb452f37458b209ed63a294d999b4c86675982",
    ),
    "nothing": (
        b"",
        b"",
        "69217a3079908094e11121d042354a7c1f55b6482ca1a51e1b250dfd1ed0eef9",
    ),
    "nothing with a key": (
        b"",
        COUNTING[:32],
        "48a8997da407876b3d79c0d92325ad3b89cbb754d86ab71aee047ad345fd2c49",
    ),
    "255 bytes with a key": (
        COUNTING[:255],
        COUNTING[:32],
        "3fb735061abc519dfe979e54c1ee5bfad0a9d858b3315bad34bde999efd724dd",
    ),
}


@pytest.mark.parametrize(("message", "key", "digest"), KNOWN.values(), ids=KNOWN)
def test_a_digest_is_the_published_one(
    blake2s: Blake2s, message: bytes, key: bytes, digest: str
) -> None:
    assert blake2s.digest(32, key, message).hex() == digest


def self_test(blake2s: Blake2s) -> str:
    """RFC 7693, appendix E: one digest of many."""
    digests = [
        blake2s.digest(size, sequence(key_size, key_size), sequence(length, length))
        for size in (16, 20, 28, 32)
        for length in (0, 3, 64, 65, 255, 1024)
        for key_size in (0, size)
    ]
    return blake2s.digest(32, b"", *digests).hex()


def test_the_rfc_s_self_test_passes(blake2s: Blake2s) -> None:
    assert self_test(blake2s) == SELF_TEST


def oracle(size: int, key: bytes, message: bytes) -> bytes:
    return hashlib.blake2s(message, digest_size=size, key=key).digest()


def wrong_digests(blake2s: Blake2s) -> list[tuple[int, int, int]]:
    """(length, key, digest) wherever hashlib says something else."""
    message, key = sequence(300, 1), sequence(32, 2)
    cases = [(n, k, 32) for n in range(301) for k in (0, 1, 16, 32)]
    cases += [(n, k, 16) for n in (0, 63, 64, 65, 300) for k in range(33)]
    cases += [(n, k, d) for n in (0, 64, 100) for k in (0, 32) for d in range(1, 33)]
    return [
        (n, k, d)
        for n, k, d in cases
        if blake2s.digest(d, key[:k], message[:n]) != oracle(d, key[:k], message[:n])
    ]


def test_every_length_key_and_digest_is_as_in_hashlib(blake2s: Blake2s) -> None:
    assert wrong_digests(blake2s) == []


@given(
    message=st.binary(max_size=400),
    cuts=st.lists(st.integers(0, 400), max_size=6),
    key=st.binary(max_size=32),
    size=st.integers(1, 32),
)
def test_a_digest_does_not_depend_on_the_pieces(
    blake2s: Blake2s, message: bytes, cuts: list[int], key: bytes, size: int
) -> None:
    places = [0, *sorted(min(cut, len(message)) for cut in cuts), len(message)]
    pieces = [message[a:b] for a, b in pairwise(places)]
    assert blake2s.digest(size, key, *pieces) == oracle(size, key, message)


def test_the_count_of_bytes_goes_on_above_32_bits(blake2s: Blake2s) -> None:
    # 4 GB are too many to hash in a test: the count is put there by hand, in both ends' state. Of
    # hashlib none can be; what the RFC says about the high word is written out here instead.
    state = (ctypes.c_uint64 * 32)()
    library = blake2s._library
    library.blake2s_init(state, ctypes.c_size_t(32), None, ctypes.c_size_t(0))
    state[4] = 2**32 - 64  # the count stands behind eight words of 32 bits
    library.blake2s_update(state, COUNTING, ctypes.c_size_t(64))
    out = ctypes.create_string_buffer(32)
    library.blake2s_final(state, out)
    assert out.raw == compressed_by_the_rfc(COUNTING[:64], 2**32)


def compressed_by_the_rfc(block: bytes, count: int) -> bytes:
    """The digest of 32 bytes whose last block this is: RFC 7693, section 3.2, step by step.

    The blocks before it are left out, as if they had not changed the chain.
    """
    mask = 0xFFFFFFFF
    iv = [
        *(0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A),
        *(0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19),
    ]
    order = [
        "0123456789abcdef",
        "ea489fd61c02b753",
        "b8c052fdae367194",
        "7931dcbe265a40f8",
        "905724afe1bc683d",
        "2c6a0b834d75fe19",
        "c51fed4a0763928b",
        "db7ec13950f4862a",
        "6fe9b308c2d714a5",
        "a2847615fb9e3cd0",
    ]
    chain = [iv[0] ^ 0x01010020, *iv[1:]]
    v = chain + iv
    v[12] ^= count & mask
    v[13] ^= count >> 32
    v[14] ^= mask
    m = [int.from_bytes(block[i : i + 4], "little") for i in range(0, 64, 4)]

    def turn(value: int, right: int) -> int:
        return (value >> right | value << 32 - right) & mask

    quarters = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
    quarters += [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]
    for row in order:
        for i, (a, b, c, d) in enumerate(quarters):
            for place, one, other in ((2 * i, 16, 12), (2 * i + 1, 8, 7)):
                v[a] = v[a] + v[b] + m[int(row[place], 16)] & mask
                v[d] = turn(v[d] ^ v[a], one)
                v[c] = v[c] + v[d] & mask
                v[b] = turn(v[b] ^ v[c], other)
    words = [h ^ v[i] ^ v[i + 8] for i, h in enumerate(chain)]
    return b"".join(word.to_bytes(4, "little") for word in words)


def test_the_oracle_of_the_count_hashes_a_block_as_hashlib_does() -> None:
    assert compressed_by_the_rfc(COUNTING[:64], 64) == oracle(32, b"", COUNTING[:64])


def test_tags_are_the_same_only_when_every_bit_is(blake2s: Blake2s) -> None:
    tag = sequence(16, 3)
    assert blake2s.same(tag, tag)
    assert blake2s.same(b"", b"")
    for bit in range(8 * len(tag)):
        other = bytearray(tag)
        other[bit // 8] ^= 1 << bit % 8
        assert not blake2s.same(tag, bytes(other))
        assert not blake2s.same(bytes(other), tag)


FAULTS = {
    "a rotation": ("v[b] = rotate(v[b] ^ v[c], 7);", "v[b] = rotate(v[b] ^ v[c], 8);"),
    "an order": ("{10, 2, 8, 4, 7, 6,", "{10, 2, 8, 4, 6, 7,"),
    "a constant": ("0x5BE0CD19u", "0x5BE0CD18u"),
    "the last block": ("last ? ~v[14] : v[14]", "last > 1 ? ~v[14] : v[14]"),
    "the key's size": ("(uint32_t)key_size << 8 ^ ", ""),
    "the digest's size": (" ^ (uint32_t)digest_size;", ";"),
    "the key's block": (
        "if (key_size > 0) {",
        "if (key_size > 1) {",
    ),
    "a block too early": (
        "hash->filled == BLAKE2S_BLOCK_SIZE) {\n            compress(hash, BLAKE2S_BLOCK_SIZE, 0)",
        "hash->filled == BLAKE2S_BLOCK_SIZE) {\n            compress(hash, BLAKE2S_BLOCK_SIZE, 1)",
    ),
    "the rest of a block": (
        "memset(hash->block + hash->filled, 0, BLAKE2S_BLOCK_SIZE - hash->filled);",
        "",
    ),
}


@pytest.mark.parametrize(("old", "new"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_noticed(tmp_path: Path, old: str, new: str) -> None:
    text = SOURCE.read_text()
    assert text.count(old) == 1, "the text to change is not there, or not alone"
    (tmp_path / "blake2s.c").write_text(text.replace(old, new))
    assert wrong_digests(build(tmp_path, tmp_path / "blake2s.c"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("differs | (ours ^ theirs)", "ours ^ theirs"),
        ("i < size; i++) {\n        //", "i < size / 2; i++) {\n        //"),
    ],
    ids=["the last byte alone", "the first bytes alone"],
)
def test_a_planted_fault_is_noticed_in_comparing_tags(tmp_path: Path, old: str, new: str) -> None:
    text = SOURCE.read_text()
    assert text.count(old) == 1, "the text to change is not there, or not alone"
    (tmp_path / "blake2s.c").write_text(text.replace(old, new))
    with pytest.raises(AssertionError):
        test_tags_are_the_same_only_when_every_bit_is(build(tmp_path, tmp_path / "blake2s.c"))


def lines(board: boards.Board, firmware: boards.Firmware) -> list[str]:
    """What the program writes on a board, but its last line."""
    if board.qemu:
        return run(board, firmware)
    # a process ends at the end of its standard input
    said = subprocess.run([firmware.elf], stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return said.stdout.decode().splitlines()[:-1]


@pytest.mark.parametrize("name", ["posix", "qemu-m4", "qemu-m55", "qemu-rv32"])
def test_a_board_hashes_the_same(name: str, tmp_path: Path) -> None:
    board = boards.load_boards()[name]
    for tool in (f"{board.prefix}gcc", *([board.qemu.program] if board.qemu else [])):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    shutil.copy(PROGRAM, tmp_path / "segment.c")
    firmware = boards.build(
        board,
        tmp_path,
        tmp_path,
        sanitize=name == "posix",
        overrides={"PROGRAM": "protocol/blake2s.c"},
    )
    message, key = sequence(1024, 1), sequence(32, 2)
    every = hashlib.blake2s()
    for size in range(301):
        key_size = size % 33
        tail = key[32 - key_size :]
        every.update(oracle(1 + size % 32, tail, message[1024 - size :]))
    assert lines(board, firmware) == [SELF_TEST, every.hexdigest()]


@pytest.mark.parametrize("optimize", ["-O3", "-Os"])
def test_the_microcontroller_s_hash_is_small(optimize: str, tmp_path: Path) -> None:
    prefix = "arm-none-eabi-"
    if shutil.which(f"{prefix}gcc") is None:
        pytest.skip(f"needs {prefix}gcc")
    built = tmp_path / "blake2s.o"
    target = ["--specs=picolibc.specs", "-mcpu=cortex-m4", "-mthumb", optimize]
    command = [f"{prefix}gcc", "-std=c11", *WARNINGS, *target, f"-I{ROOT}", "-Wstack-usage=256"]
    subprocess.run([*command, "-c", SOURCE, "-o", built], check=True)
    size = subprocess.run([f"{prefix}size", built], check=True, capture_output=True, text=True)
    text, data, bss = map(int, size.stdout.splitlines()[1].split()[:3])
    assert text <= 2048
    assert (data, bss) == (0, 0)
