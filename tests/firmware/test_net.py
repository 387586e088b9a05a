"""The firmware's network: literal packets, malformed ones, and Python's verdict on any bytes."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "firmware" / "net" / "net.c", Path(__file__).with_name("net_harness.c")]
FLAGS = [
    *("-std=c11", "-O1", "-g", f"-I{ROOT / 'firmware'}"),
    *("-Wall", "-Wextra", "-Wconversion", "-Wdouble-promotion", "-Wshadow", "-Wvla", "-Werror"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
]

MAC = bytes.fromhex("02000a00020f")
ADDRESS = bytes([10, 0, 2, 15])
PORT = 5000
PEER_MAC = bytes.fromhex("52550a000202")
PEER = bytes([10, 0, 2, 2])
PEER_PORT = 49152

NOTHING, ANSWER, DATAGRAM = range(3)
KIND = {NOTHING: "nothing", ANSWER: "an answer", DATAGRAM: "a datagram"}


@dataclass(frozen=True)
class Status:
    """Whom the network answers, and how many packets it dropped."""

    mac: bytes = bytes(6)
    address: bytes = bytes(4)
    port: int = 0
    bad: int = 0
    fragments: int = 0


class Net:
    """net.c in a process under sanitizers, whose words and end the test would see."""

    def __init__(self, program: Path, mac: bytes, address: bytes, port: int) -> None:
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._send(mac + address + struct.pack("=H", port))

    def _send(self, command: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command)
        self._process.stdin.flush()

    def _take(self, size: int) -> bytes:
        assert self._process.stdout is not None
        taken = self._process.stdout.read(size)
        assert len(taken) == size, "it ended"
        return taken

    def _sized(self) -> bytes:
        return self._take(*struct.unpack("=H", self._take(2)))

    def receive(self, packet: bytes) -> tuple[int, bytes]:
        """What became of a packet, and the bytes of it."""
        self._send(b"R" + struct.pack("=H", len(packet)) + packet)
        return self._take(1)[0], self._sized()

    def datagram(self, content: bytes) -> bytes:
        """The packet that carries content to the peer."""
        self._send(b"D" + struct.pack("=H", len(content)) + content)
        return self._sized()

    def announcement(self) -> bytes:
        """The packet that tells our addresses."""
        self._send(b"A")
        return self._sized()

    def status(self) -> Status:
        """Where it stands."""
        self._send(b"S")
        return Status(*struct.unpack("=6s4sHII", self._take(20)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()
        if exception[0] is None:
            assert self._process.returncode == 0


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    path = tmp_path_factory.mktemp("net") / "net"
    subprocess.run(["gcc", *FLAGS, "-o", path, *SOURCES], check=True)
    return path


@pytest.fixture
def net(program: Path) -> Iterator[Net]:
    with Net(program, MAC, ADDRESS, PORT) as net:
        yield net


# ---- literal packets ----

ETHERNET = "02000a00020f 52550a000202 0800"
ETHERNET_BACK = "52550a000202 02000a00020f 0800"

ARP_REQUEST = bytes.fromhex(
    "ffffffffffff 52550a000202 0806 0001 0800 06 04 000152550a000202 0a000202 000000000000 0a00020f"
)
ARP_REPLY = bytes.fromhex(
    "52550a000202 02000a00020f 0806 0001 0800 06 04 000202000a00020f 0a00020f 52550a000202 0a000202"
)
ANNOUNCEMENT = bytes.fromhex(
    "ffffffffffff 02000a00020f 0806 0001 0800 06 04 000102000a00020f 0a00020f 000000000000 0a00020f"
)

# It carries the bytes whose sum RFC 1071 works out, DDF2: the checksum of the reply is 220D.
PING = bytes.fromhex(
    f"{ETHERNET} 4500 0024 0000 4000 40 01 22c9 0a000202 0a00020f"
    "08 00 1a0d 0000 0000 0001f203f4f5f6f7"
)
PONG = bytes.fromhex(
    f"{ETHERNET_BACK} 4500 0024 0000 4000 40 01 22c9 0a00020f 0a000202"
    "00 00 220d 0000 0000 0001f203f4f5f6f7"
)

HI = bytes.fromhex(
    f"{ETHERNET} 4500 001e 0000 4000 40 11 22bf 0a000202 0a00020f c000 1388 000a abd7 6869"
)
OK = bytes.fromhex(
    f"{ETHERNET_BACK} 4500 001e 0000 4000 40 11 22bf 0a00020f 0a000202 1388 c000 000a a4d5 6f6b"
)

PEERED = Status(PEER_MAC, PEER, PEER_PORT)


def test_it_tells_everybody_its_addresses(net: Net) -> None:
    assert net.announcement() == ANNOUNCEMENT


def test_it_answers_who_asks_for_its_ethernet_address(net: Net) -> None:
    assert net.receive(ARP_REQUEST) == (ANSWER, ARP_REPLY)
    assert net.status() == Status()


def test_it_answers_a_ping(net: Net) -> None:
    assert net.receive(PING) == (ANSWER, PONG)
    assert net.status() == Status()


def test_it_takes_a_datagram_and_answers_its_sender(net: Net) -> None:
    assert net.receive(HI) == (DATAGRAM, b"hi")
    assert net.status() == PEERED
    assert net.datagram(b"ok") == OK


def test_a_checksum_that_comes_to_zero_is_sent_as_its_other_form(net: Net) -> None:
    net.receive(HI)
    sent = net.datagram(b"\x14\x41")  # 182C of addresses, D392 of UDP and 1441 make FFFF
    assert sent[40:] == bytes.fromhex("ffff 1441")


def test_a_published_header_has_the_published_checksum(program: Path) -> None:
    # Wikipedia, "Internet checksum": from 192.168.0.1 to 192.168.0.199, UDP, 115 bytes
    header = bytes.fromhex("4500 0073 0000 4000 4011 b861 c0a80001 c0a800c7")
    content = bytes(range(87))
    packet = bytes.fromhex(ETHERNET) + header + struct.pack(">4H", 7, 53, 95, 0) + content
    with Net(program, MAC, bytes([192, 168, 0, 199]), 53) as net:
        assert net.receive(packet) == (DATAGRAM, content)


def test_it_sends_nothing_before_somebody_has_asked(net: Net) -> None:
    assert net.datagram(b"hello") == b""


def test_it_sends_nothing_to_a_sender_without_a_port(net: Net) -> None:
    net.receive(udp(HI, source=0))
    assert net.datagram(b"hello") == b""


def test_it_answers_whoever_sent_the_last_datagram(net: Net) -> None:
    net.receive(HI)
    other = put(put(HI, 6, "020000000001"), 26, "0a010203")
    assert net.receive(udp(other, source=7)) == (DATAGRAM, b"hi")
    net.receive(PING)  # nor does a ping change it
    net.receive(ARP_REQUEST)
    assert net.status() == Status(bytes.fromhex("020000000001"), bytes([10, 1, 2, 3]), 7)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1471, 1472])
def test_a_datagram_of_any_size_is_a_good_one(net: Net, program: Path, size: int) -> None:
    content = bytes(i * 37 % 256 for i in range(size))
    net.receive(HI)
    sent = net.datagram(content)
    assert len(sent) == 42 + size
    assert sent[:14] == OK[:14]
    assert folded(sent[14:34]) == 0
    assert folded(pseudo(sent) + sent[34:]) == 0
    with Net(program, PEER_MAC, PEER, PEER_PORT) as other:
        assert other.receive(sent) == (DATAGRAM, content)


# ---- packets that something is wrong with ----


def folded(data: bytes) -> int:
    """RFC 1071's checksum another way: as a number, 2^16 is 1 in arithmetic modulo 2^16 - 1."""
    value = int.from_bytes(data + bytes(len(data) % 2), "big")
    remainder = value % 0xFFFF
    return 0 if value and remainder == 0 else 0xFFFF - remainder


def pseudo(packet: bytes) -> bytes:
    """What UDP's checksum covers in front of UDP, of a packet without options."""
    return packet[26:34] + struct.pack(">HH", 17, len(packet) - 34)


def put(packet: bytes, place: int, new: str) -> bytes:
    """A packet with other bytes in a place."""
    data = bytes.fromhex(new)
    return packet[:place] + data + packet[place + len(data) :]


def with_ip_checksum(packet: bytes) -> bytes:
    """With the checksum that belongs to the IPv4 header, where there is one."""
    end = 14 + 4 * (packet[14] & 15)
    cleared = put(packet, 24, "0000")
    return put(cleared, 24, f"{folded(cleared[14:end]):04x}")


def sealed(head: bytes, rest: bytes = b"") -> bytes:
    """Head and rest with all checksums right; without options."""
    packet = with_ip_checksum(head + rest)
    cleared = put(packet, 40, "0000")
    return put(cleared, 40, f"{folded(pseudo(cleared) + cleared[34:]):04x}")


def ip(packet: bytes, place: int, new: str) -> bytes:
    """A packet with other bytes in the IPv4 header, whose checksum follows."""
    return with_ip_checksum(put(packet, 14 + place, new))


def udp(packet: bytes, source: int) -> bytes:
    """A datagram from another port."""
    return sealed(put(packet, 34, f"{source:04x}"))


def icmp(packet: bytes, kind: int) -> bytes:
    """An ICMP packet of another kind."""
    cleared = put(put(packet, 34, f"{kind:02x}"), 36, "0000")
    return put(cleared, 36, f"{folded(cleared[34:]):04x}")


OPTIONS = "07 07 04 00000000 00"  # record the route, end
WITH_OPTIONS = with_ip_checksum(put(HI[:34], 14, "47 00 0026") + bytes.fromhex(OPTIONS) + HI[34:])
PING_WITH_OPTIONS = with_ip_checksum(
    put(PING[:34], 14, "47 00 002c") + bytes.fromhex(OPTIONS) + PING[34:]
)
ALL_CHECKSUMS = sealed(ip(HI[:-2] + b"hello", 2, "0021")[:38] + b"\0\x0d\0\0hello")


@dataclass(frozen=True)
class Case:
    packet: bytes
    kind: int = NOTHING
    part: bytes = b""
    bad: int = 0
    fragments: int = 0


CASES = {
    # taken
    "filled up to Ethernet's 60 bytes": Case(HI + bytes(16), DATAGRAM, b"hi"),
    "without UDP checksum": Case(put(HI, 40, "0000"), DATAGRAM, b"hi"),
    "with IPv4 options": Case(WITH_OPTIONS, DATAGRAM, b"hi"),
    "of other contents": Case(ALL_CHECKSUMS, DATAGRAM, b"hello"),
    "UDP shorter than IPv4 says": Case(ip(HI + b"xx", 2, "0020"), DATAGRAM, b"hi"),
    "carrying nothing": Case(sealed(put(ip(HI[:-2], 2, "001c"), 38, "0008")), DATAGRAM, b""),
    "a ping that is filled up": Case(PING + bytes(20), ANSWER, PONG),
    "ARP that is filled up": Case(ARP_REQUEST + bytes(18), ANSWER, ARP_REPLY),
    "ARP to us alone": Case(MAC + ARP_REQUEST[6:], ANSWER, ARP_REPLY),
    # Ethernet
    "no packet": Case(b""),
    "shorter than Ethernet's header": Case(HI[:13]),
    "nothing but Ethernet's header": Case(HI[:14], bad=1),
    "to another Ethernet address": Case(put(HI, 0, "02000a000210")),
    "to all Ethernet addresses": Case(put(HI, 0, "ffffffffffff")),
    "from a group of Ethernet addresses": Case(put(HI, 6, "53")),
    "ARP from a group": Case(put(ARP_REQUEST, 6, "ff")),
    "of another type": Case(put(HI, 12, "86dd")),
    # ARP
    "ARP cut off": Case(ARP_REQUEST[:-1]),
    "ARP for another address": Case(put(ARP_REQUEST, 41, "10")),
    "an ARP reply": Case(put(ARP_REQUEST, 20, "0002")),
    "ARP for another network": Case(put(ARP_REQUEST, 14, "0006")),
    "ARP for another protocol": Case(put(ARP_REQUEST, 16, "86dd")),
    "ARP for long addresses": Case(put(ARP_REQUEST, 18, "08")),
    # IPv4
    "IPv4 header cut off": Case(HI[:33], bad=1),
    "IPv6": Case(ip(HI, 0, "65"), bad=1),
    "IPv4 header shorter than it can be": Case(ip(ip(HI, 9, "06"), 0, "44"), bad=1),
    "IPv4 header longer than the packet": Case(put(HI, 14, "4f"), bad=1),
    "IPv4 longer than the packet": Case(ip(HI, 2, "001f"), bad=1),
    "IPv4 shorter than its header": Case(ip(HI, 2, "0013"), bad=1),
    "wrong IPv4 checksum": Case(put(HI, 24, "22be"), bad=1),
    "wrong IPv4 checksum behind options": Case(put(WITH_OPTIONS, 40, "01"), bad=1),
    "from no address": Case(sealed(put(HI, 26, "00000000")), bad=1),
    "from ourselves": Case(sealed(put(HI, 26, "7f000001")), bad=1),
    "from a group of addresses": Case(sealed(put(HI, 26, "e0000001")), bad=1),
    "from all addresses": Case(sealed(put(HI, 26, "ffffffff")), bad=1),
    "to another address": Case(ip(HI, 16, "0a000210")),
    "to all addresses": Case(ip(HI, 16, "ffffffff")),
    "first fragment": Case(ip(HI, 6, "2000"), fragments=1),
    "later fragment": Case(ip(HI, 6, "2001"), fragments=1),
    "last fragment": Case(ip(HI, 6, "00b9"), fragments=1),
    "fragment of a ping": Case(ip(PING, 6, "2000"), fragments=1),
    "TCP": Case(ip(HI, 9, "06")),
    # UDP
    "UDP header cut off": Case(ip(HI, 2, "001b")[:41], bad=1),
    "nothing but an IPv4 header": Case(ip(HI, 2, "0014")[:34], bad=1),
    "UDP shorter than its header": Case(put(HI, 38, "0007"), bad=1),
    "UDP longer than IPv4": Case(put(HI + bytes(9), 38, "000b"), bad=1),
    "UDP of 65,535 bytes": Case(put(HI, 38, "ffff"), bad=1),
    "wrong UDP checksum": Case(put(HI, 43, "68"), bad=1),
    "UDP checksum of another address": Case(ip(HI, 15, "03"), bad=1),
    "to another port": Case(sealed(put(HI, 36, "1389"))),
    # ICMP
    "a pong": Case(icmp(PING, 0)),
    "another ICMP": Case(icmp(PING, 13)),
    "an echo of another code": Case(put(put(PING, 35, "01"), 36, "1a0c")),
    "ICMP shorter than its header": Case(ip(put(PING, 36, "f7ff"), 2, "001b")[:41], bad=1),
    "nothing behind ICMP's IPv4 header": Case(ip(PING, 2, "0014")[:34], bad=1),
    "wrong ICMP checksum": Case(put(PING, 36, "1a0e"), bad=1),
    "a ping with options": Case(PING_WITH_OPTIONS),
}


@pytest.mark.parametrize("title", CASES)
def test_of_packets_it_takes_the_good_and_counts_the_bad(net: Net, title: str) -> None:
    case = CASES[title]
    kind, part = net.receive(case.packet)
    assert (KIND[kind], part) == (KIND[case.kind], case.part)
    peered = PEERED if case.kind == DATAGRAM else Status()
    assert net.status() == replace(peered, bad=case.bad, fragments=case.fragments)


# ---- any bytes ----


def verdict(packet: bytes) -> tuple[int, bytes, int, int]:
    """Kind, part, bad and fragments, as the RFCs have them, of any bytes."""
    nothing, dropped = (NOTHING, b"", 0, 0), (NOTHING, b"", 1, 0)
    to, source, kind, rest = packet[:6], packet[6:12], packet[12:14], packet[14:]
    if len(packet) < 14 or source[0] & 1:
        return nothing
    if kind == b"\x08\x06":
        asks = rest[:8] == ARP_REQUEST[14:22] and len(rest) >= 28 and rest[24:28] == ADDRESS
        reply = rest[8:14] + MAC + kind + ARP_REPLY[14:22] + MAC + ADDRESS + rest[8:18]
        return (ANSWER, reply, 0, 0) if asks else nothing
    if kind != b"\x08\x00" or to != MAC:
        return nothing
    if len(rest) < 20:
        return dropped
    size, length = 4 * (rest[0] % 16), int.from_bytes(rest[2:4], "big")
    if rest[0] // 16 != 4 or not 20 <= size <= length <= len(rest) or folded(rest[:size]):
        return dropped
    if rest[12] in (0, 127, *range(224, 256)):
        return dropped
    if rest[16:20] != ADDRESS:
        return nothing
    if int.from_bytes(rest[6:8], "big") & 0x3FFF:
        return (NOTHING, b"", 0, 1)
    body = rest[size:length]
    if rest[9] == 17:
        count = int.from_bytes(body[4:6], "big")
        if len(body) < 8 or not 8 <= count <= len(body):
            return dropped
        covered = rest[12:20] + struct.pack(">HH", 17, count) + body[:count]
        if any(body[6:8]) and folded(covered):
            return dropped
        ours = int.from_bytes(body[2:4], "big") == PORT
        return (DATAGRAM, body[8:count], 0, 0) if ours else nothing
    if rest[9] == 1 and size == 20:
        if len(body) < 8 or folded(body):
            return dropped
        if body[:2] != b"\x08\0":
            return nothing
        head = source + MAC + kind + PONG[14:16] + rest[2:4] + PONG[18:24] + b"\0\0" + ADDRESS
        packet = with_ip_checksum(head + rest[12:16] + b"\0\0\0\0" + body[4:])
        return (ANSWER, put(packet, 36, f"{folded(packet[34:]):04x}"), 0, 0)
    return nothing


@st.composite
def packets(draw: st.DrawFn) -> bytes:
    """A good packet with some bytes changed, cut or added, its checksum perhaps made right."""
    packet = draw(st.sampled_from([c.packet for c in CASES.values()] + [HI, PING, ARP_REQUEST]))
    changed = bytearray(packet)
    for _ in range(draw(st.integers(0, 3)) if packet else 0):
        changed[draw(st.integers(0, len(packet) - 1))] = draw(st.integers(0, 255))
    packet = bytes(changed) + draw(st.binary(max_size=24))
    packet = packet[: draw(st.one_of(st.just(len(packet)), st.integers(0, len(packet))))]
    if len(packet) >= 34 and draw(st.booleans()):
        packet = with_ip_checksum(packet)
    return packet


@pytest.fixture(scope="module")
def lasting_net(program: Path) -> Iterator[Net]:
    """One for many examples: its counters go on."""
    with Net(program, MAC, ADDRESS, PORT) as net:
        yield net


@given(packet=st.one_of(packets(), st.binary(max_size=80)))
def test_any_bytes_get_the_verdict_that_python_gives(lasting_net: Net, packet: bytes) -> None:
    before = lasting_net.status()
    kind, part = lasting_net.receive(packet)
    after = lasting_net.status()
    counted = (after.bad - before.bad, after.fragments - before.fragments)
    assert (kind, part, *counted) == verdict(packet)
    assert after == before or kind != ANSWER
