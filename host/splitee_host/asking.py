"""The asking end of early exits: what an exit is unsure of goes to the server's half over a link.

Here the client is the one who asks, so it takes the host's part of the wire, and the server the
device's (``answering.py``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from splitee.codec import Codec
from splitee.edge import Deployed
from splitee.errors import DeviceRefused, LinkClosed, LinkError, Mismatch, SpliteeError
from splitee.ops import Array
from splitee_host.link import Link
from splitee_host.remote import Remote
from splitee_host.window import MANNERS
from splitee_host.wire import messages as m
from splitee_host.wire import stream

PATIENCE = 10.0
"""Seconds without an answer after which a server is not there."""

NUMBERS = 255
"""Clients that a ``Select`` tells apart."""


class AskedServer(Remote):
    """The server's half of a client, behind a link."""

    _program = "it"
    _holds = "checkpoint"
    _renew = "serve the run that this client is of (`splitee serve RUN`), or bring the client anew"

    def __init__(
        self,
        link: Link,
        deployed: Deployed,
        *,
        key: bytes | None = None,
        patience: float = PATIENCE,
    ) -> None:
        """key: of ``keys.for_answers``; None: without."""
        self.keyed = key is not None
        super().__init__(
            deployed.client,
            link,
            deployed.checkpoint,
            key=key,
            patience=patience,
            silent="is it `splitee serve` that runs there?",
        )
        self._deployed = deployed
        self._codec = deployed.codec

    @property
    def _who(self) -> str:
        return "the server"

    def _expects(self) -> str:
        return f"this client is of {self.checksum:08x}"

    def _refused(self, asked: m.Message, answer: m.Refused) -> SpliteeError:
        if answer.error == m.Error.NO_SUCH_CUT:
            return DeviceRefused(
                f'{self._what} does not answer client "{self.name}" so: a client that has a key is '
                "answered under its own alone: bring its line of the host's file of keys"
            )
        return super()._refused(asked, answer)

    def logits(self, activations: Array) -> Array:
        """What the server makes of activations, (n, *shape) float32: (n, classes)."""
        flat = activations.reshape(len(activations), -1)
        most = self.welcome.samples_max
        parts = [flat[start : start + most] for start in range(0, len(flat), most)]
        return np.concatenate([self._part(part) for part in parts])

    def begin(self) -> None:
        """Says hello, who asks, and how activations will be coded.

        Raises Timeout where nobody answers, Mismatch where what is there is of another checkpoint,
        DeviceRefused where it does not answer this client.
        """
        if self._deployed.number > NUMBERS:
            raise LinkError(
                f'client "{self.name}": it is number {self._deployed.number} of its run, and a '
                f"server tells {NUMBERS} apart"
            )
        try:
            self.hello()
        except LinkClosed as error:
            key = "with the same key for" if self.keyed else "without a key for"
            raise LinkClosed(
                f"{self._what} hung up at hello: is it `splitee serve`, {key} this client?"
            ) from error
        self.request(m.Select(self._deployed.number, 0), m.Done)
        kind = m.Codec[self._codec.kind.replace("-", "_").upper()]
        self.request(m.Coding(kind, m.Codec.FLOAT32, self._codec.kept), m.Done)

    def _part(self, part: Array) -> Array:
        self.write(m.Region.CODED_ACTIVATIONS, self._codec.encode(part))
        self.request(m.Infer(len(part)), m.Done)
        classes = self._deployed.classes
        content = self.read(m.Region.LOGITS, 0, 4 * len(part) * classes)
        return np.frombuffer(content, "<f4").reshape(len(part), classes)


def sent_bytes(codec: Codec, classes: int, *, keyed: bool) -> int:
    """What a client sends, frames included, for one sample that it asks the server about."""
    manner = MANNERS["tcp"]
    most = manner.piece - len(m.Write(0, 0, b"").pack())
    sizes = [min(most, codec.size - start) for start in range(0, codec.size, most)]
    bodies = [len(m.Write(0, 0, b"").pack()) + size for size in sizes]
    bodies += [len(m.Infer(1).pack()), len(m.Read(0, 0, 4 * classes).pack())]
    return sum(stream.size(body, keyed=keyed) for body in bodies)


class Asker:
    """Asks a server as long as it is there, and looks for it again whenever it is needed."""

    def __init__(self, open: Callable[[], AskedServer], say: Callable[[str], None]) -> None:
        """open: connects to it and begins. say: is told when it is lost, and when it is back.

        Raises LinkError where it is not there now.
        """
        self._open = open
        self._say = say
        self._server: AskedServer | None = open()
        self._sent = 0  # bytes to servers that are gone

    @property
    def bytes_sent(self) -> int:
        """So far, frames included."""
        return self._sent + (self._server.traffic.down if self._server else 0)

    def __call__(self, activations: Array) -> Array | None:
        """The server's logits; None where it is gone.

        Raises Mismatch, or DeviceRefused, where another is there.
        """
        try:
            if self._server is None:
                self._server = self._open()
                self._say("the server is back")
            return self._server.logits(activations)
        except (Mismatch, DeviceRefused):
            raise
        except LinkError as error:
            if self._server is not None:
                self._say(f"{error}; until it is back, the exit answers alone")
            self.close()
            return None

    def close(self) -> None:
        """Leaves."""
        if self._server is not None:
            self._sent += self._server.traffic.down
            self._server.close()
            self._server = None
