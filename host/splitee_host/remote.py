"""What is behind a link: greeted, asked, and its memories read and written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from splitee.errors import DeviceRefused, Mismatch, SpliteeError
from splitee_host.errors import refusal
from splitee_host.exchange import Exchange
from splitee_host.link import Link
from splitee_host.wire import messages as m
from splitee_host.wire.frame import Bytes, Frame, coded_body

Answer = TypeVar("Answer", bound=m.Message)
Piece = m.Read | m.Write

_PIECE = 64  # bytes of body that are worth a frame, however little a device keeps


def joined(pieces: Iterable[Bytes]) -> Bytes:
    """Pieces as one; a single one is not copied."""
    first, *others = [*pieces] or [b""]
    return b"".join([first, *others]) if others else first


class Remote:
    """A client behind a link, whatever its segment is; firmware that is not ours is refused."""

    # how errors call what runs there and what it holds, and the cure where these are not ours
    _program = "its firmware"
    _holds = "segment"
    _renew = "run `splitee build` and load the new firmware"

    def __init__(
        self,
        name: str,
        link: Link,
        checksum: int,
        *,
        key: bytes | None = None,
        session: int | None = None,
        patience: float = 30.0,
        silent: str | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        """checksum: of the segment that has to be built in. close: ends what was started for it.

        key, session, patience, silent: as for ``Exchange``.
        """
        self.name = name
        self.checksum = checksum
        self.exchange = Exchange(
            link, self._who, key=key, patience=patience, session=session, silent=silent
        )
        self.traffic = self.exchange.traffic
        self._close = close
        self._receive_max = self._send_max = 0

    @property
    def _who(self) -> str:
        """What errors call it."""
        return f'client "{self.name}"'

    @property
    def _what(self) -> str:
        """The same, and where it is."""
        return f"{self._who} on {self.link.name}"

    @property
    def link(self) -> Link:
        """The way to it."""
        return self.exchange.link

    def request(self, message: m.Message, expected: type[Answer]) -> Answer:
        """Sends a request and returns its answer.

        Raises DeviceRefused when the device refuses, Timeout when it does not answer, LinkClosed
        when it is gone, SessionLost when it was reset, Mismatch when its answer is none of ours.
        """
        (answer,) = self.exchange.ask([message])
        return self._checked(message, answer, expected)

    def _transfer(self, pieces: list[Piece], expected: type[Answer]) -> list[Answer]:
        """The answers to the pieces of a transfer."""
        frames = self.exchange.ask(pieces) if pieces else []
        if len(frames) < len(pieces):  # one was refused
            self._checked(pieces[0], frames[0], expected)
            raise AssertionError("an answer to one of several pieces tells which")
        return [self._checked(p, f, expected) for p, f in zip(pieces, frames, strict=True)]

    def _checked(self, asked: m.Message, frame: Frame, expected: type[Answer]) -> Answer:
        try:
            answer = m.unpack(frame.code, frame.body)
        except ValueError as error:  # of another schema: not even its Welcome need be ours
            strange = str(error)
        else:
            if isinstance(answer, expected):
                return answer
            if isinstance(answer, m.Refused):
                raise self._refused(asked, answer)
            strange = type(answer).__name__
        raise Mismatch(
            f"{self._what} answered {type(asked).__name__} with something else ({strange}): "
            f"{self._program} is not ours; {self._renew}"
        )

    def _refused(self, asked: m.Message, answer: m.Refused) -> SpliteeError:
        """The error that a refusal is."""
        return DeviceRefused(f"{self._what}: {refusal(asked, answer)}")

    def _expects(self) -> str:
        """Who asks for which segment."""
        return f"{self.checksum:08x} is expected"

    def hello(self, within: float | None = None) -> m.Welcome:
        """Begins a session; within so many seconds, or as long as patience lasts.

        Raises Mismatch when the device speaks another wire or holds another segment.
        """
        frame = self.exchange.hello(within)
        ours, theirs = m.schema(), int.from_bytes(frame.body[:4], "little")
        if theirs != ours:
            raise Mismatch(
                f"{self._what}: {self._program} speaks schema {theirs:08x}, this host {ours:08x}: "
                f"{self._renew}"
            )
        welcome = self._checked(m.Hello(ours, 0), frame, m.Welcome)
        if welcome.segment != self.checksum:
            raise Mismatch(
                f"{self._what}: {self._program} holds {self._holds} {welcome.segment:08x}, "
                f"{self._expects()}: {self._renew}"
            )
        self.exchange.room = welcome.window
        # pieces of which another finds room while the device is busy with one
        piece = min(self.exchange.piece, max(_PIECE, coded_body(welcome.window)))
        self._receive_max = min(piece, welcome.receive_max)
        self._send_max = min(piece, welcome.send_max)
        self.welcome = welcome
        return welcome

    def read(self, region: m.Region, offset: int, length: int) -> bytes:
        """length bytes of a region, in one transfer."""
        return b"".join(self.pieces(region, offset, length))

    def pieces(self, region: m.Region, offset: int, length: int) -> list[Bytes]:
        """The same as it comes, one piece behind the other."""
        most = self._send_max - len(m.Content(0, b"").pack())
        if region == m.Region.CODED_ACTIVATIONS:  # made in the memory that a request comes to
            most = min(most, self._receive_max)
        pieces: list[Piece] = [
            m.Read(region, start, min(most, offset + length - start))
            for start in range(offset, offset + length, most)
        ]
        contents = [answer.content for answer in self._transfer(pieces, m.Content)]
        for piece, content in zip(pieces, contents, strict=True):
            assert isinstance(piece, m.Read)
            if len(content) != piece.length:
                raise Mismatch(
                    f"{self._what} sent {len(content):,} bytes of {region.name}, not "
                    f"{piece.length:,}: {self._program} is not ours"
                )
        return contents

    def write(self, region: m.Region, content: Bytes, offset: int = 0) -> None:
        """Replaces bytes of a region from offset on, in one transfer."""
        most = self._receive_max - len(m.Write(region, 0, b"").pack())
        view = memoryview(content)
        pieces: list[Piece] = [
            m.Write(region, offset + start, view[start : start + most])
            for start in range(0, len(content), most)
        ]
        self._transfer(pieces, m.Written)

    def close(self) -> None:
        """Closes the link, and ends what was started for it."""
        self.link.close()
        if self._close is not None:
            self._close()
