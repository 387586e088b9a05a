"""Seals: what stands behind a frame's body, by which one that is spoilt or forged is told.

Without a key it is a CRC-32. With one it is 16 bytes of BLAKE2s (RFC 7693) of the direction u8,
the upper half of the sequence number u16, and the frame's bytes, keyed by the key of the session;
that of a Hello, by the device's own key. The key of a session is made of the device's and of the
nonces of Hello and Welcome, so that no frame of one session is good in another, and none twice in
one.
``firmware/protocol/seal.c`` is the other end.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

KEY_SIZE = 32  # bytes
TAG_SIZE = 16
CRC_SIZE = 4

_FIRST = struct.Struct("<BH")
_NONCES = struct.Struct("<QQH")
_CRC = struct.Struct("<I")


class Direction(IntEnum):
    """Which way a frame goes: nobody is answered with his own words."""

    TO_DEVICE = 0
    TO_HOST = 1


@dataclass(frozen=True, slots=True)
class Sealing:
    """What a tag depends on beside the frame's bytes."""

    key: bytes
    direction: Direction
    turns: int  # upper half of the sequence number: a number never comes twice


def seal(content: bytes, sealing: Sealing | None) -> bytes:
    """What ends a frame with this content (header and body); None: a CRC-32."""
    if sealing is None:
        return _CRC.pack(zlib.crc32(content))
    first = _FIRST.pack(sealing.direction, sealing.turns)
    return hashlib.blake2s(first + content, key=sealing.key, digest_size=TAG_SIZE).digest()


def session_key(key: bytes, host_nonce: int, device_nonce: int, session: int) -> bytes:
    """The key of a session."""
    nonces = _NONCES.pack(host_nonce, device_nonce, session)
    return hashlib.blake2s(nonces, key=key, digest_size=KEY_SIZE).digest()


def nearest(sequence: int, low: int) -> int:
    """The number nearest to sequence whose lower 16 bits are low."""
    ahead = (low - sequence) & 0xFFFF
    return (sequence + ahead - (ahead & 0x8000) * 2) & 0xFFFFFFFF
