"""Keys: what a host and each of its devices share, so that nobody else can speak for either.

They stand in a file beside the fleet file, ``fleet.keys.toml`` for ``fleet.toml``: a line for each
client, 32 bytes in hexadecimal. A device's key is built into its firmware; a Python client reads it
from such a file of its own.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import stat
import tomllib
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from splitee.errors import KeyFileError
from splitee_host.wire.seal import KEY_SIZE

_HEAD = "# Secret: who has a client's key can speak for it, and for the host. `splitee keys`\n"


def file_of(fleet_file: Path) -> Path:
    """Where the keys of a fleet are."""
    return fleet_file.with_name(f"{fleet_file.stem}.keys.toml")


def read(path: Path) -> dict[str, bytes]:
    """The keys in a file, by client; none where there is no file.

    Raises KeyFileError when it is no file of keys, or others may read it.
    """
    if path.is_symlink() and not path.exists():
        raise KeyFileError(f"{path}: there are no keys at {path.readlink()} any more: restore them")
    if not path.exists():
        return {}
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise KeyFileError(f"{path}: others may read these keys: run `chmod 600 {path}`")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise KeyFileError(f"{path}: not a file of keys: {error}") from error
    keys = {}
    for name, text in table.items():
        if not isinstance(text, str) or not re.fullmatch(f"[0-9a-f]{{{2 * KEY_SIZE}}}", text):
            raise KeyFileError(
                f"{path}: {name}: a key is {2 * KEY_SIZE} hexadecimal digits: run `splitee keys`"
            )
        keys[name] = bytes.fromhex(text)
    return keys


def of_fleet(fleet_file: Path, auth: str) -> dict[str, bytes]:
    """The keys that a fleet's clients are spoken to under, by client. auth: as it says there."""
    return {} if auth == "none" else read(file_of(fleet_file))


def lend(fleet_file: Path, copy: Path) -> None:
    """Lets a copy of a fleet file have its keys, by a link: secrets are in one place."""
    link, path = file_of(copy), file_of(fleet_file)
    try:
        link.unlink(missing_ok=True)
        if path.exists():
            link.symlink_to(path.resolve())
    except OSError as error:
        raise KeyFileError(f"{link}: {error.strerror}: may you write there?") from error


def write(path: Path, keys: Mapping[str, bytes]) -> None:
    """Replaces a file of keys; only its owner may read it."""
    path = path.resolve()  # where it is lent, the one that there is
    lines = [f'{name} = "{key.hex()}"\n' for name, key in keys.items()]
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch(mode=0o600, exist_ok=False)
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines([_HEAD, *lines])
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}: may you write there?") from error


def create(path: Path, names: Iterable[str], *, renew: bool = False) -> list[str]:
    """Draws a key for each of the clients that has none, or for each; who got one."""
    keys = read(path)
    new = [name for name in names if renew or name not in keys]
    if new:
        write(path, {**keys, **{name: secrets.token_bytes(KEY_SIZE) for name in new}})
    return new


def for_answers(key: bytes) -> bytes:
    """The key under which a client asks the server: another than that under which it is asked."""
    return hashlib.blake2s(b"answers", key=key, digest_size=KEY_SIZE).digest()


def source(key: bytes) -> str:
    """key.c: what builds a key into a firmware."""
    rows = [key[i : i + 8] for i in range(0, KEY_SIZE, 8)]
    lines = ["    " + " ".join(f"0x{byte:02X}u," for byte in row) for row in rows]
    return "\n".join(
        [
            "// key.c: this device's key. Secret.",
            '#include "protocol/seal.h"',
            "",
            "const uint8_t device_key[KEY_SIZE] = {",
            *lines,
            "};",
            "",
        ]
    )


def is_open_to_others(link: str) -> bool:
    """Whether the address of a link leads over a network that others are on, too."""
    parts = urlsplit(link)
    if parts.scheme not in ("tcp", "udp", "socket", "rfc2217"):
        return False  # a cable
    try:
        found = socket.getaddrinfo(parts.hostname, None)
    except (OSError, UnicodeError):
        return True
    return not all(ip_address(str(address[0])).is_loopback for *_, address in found)
