"""A board whose segment is of 8 bits: it answers images, and learns nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from splitee.ops import Array
from splitee.place_int8 import Int8Build
from splitee_host.link import Link
from splitee_host.remote import Remote
from splitee_host.wire import messages as m


class Int8Device(Remote):
    """A segment of 8 bits over a link."""

    _renew = "run `splitee build RUN --int8` and load the new firmware"

    def __init__(
        self,
        name: str,
        link: Link,
        build: Int8Build,
        *,
        key: bytes | None = None,
        patience: float = 30.0,
        close: Callable[[], None] | None = None,
    ) -> None:
        """key, patience, close: as for ``Remote``."""
        super().__init__(name, link, build.checksum, key=key, patience=patience, close=close)
        self.build = build
        self.graph = build.graph
        self.capacity = build.capacity

    def _expects(self) -> str:
        return f"{self.checksum:08x} is what the checkpoint is in 8 bits (cut {self.build.cut})"

    def infer(self, images: Array) -> Array:
        """The logits (n, classes), float32, of at most capacity uint8 images, channels first.

        Their activations stay there until the next are asked.
        """
        logits = self.run(self.graph.image(images))
        return self.graph.dequantize(self.graph.logits, logits)

    def run(self, x: Array) -> Array:
        """The logits, int8, of an input that is int8 itself, (n, height, width, channels)."""
        self.write(m.Region.INPUT, x.tobytes())
        self.request(m.Infer(len(x)), m.Done)
        return self._values(m.Region.LOGITS, self.graph.logits, 0, len(x))

    def activations(self, chosen: Array) -> Array:
        """Of the images asked last the activations of some, float32, (n, channels, ...).

        chosen: for each image whether it is one of them.
        """
        return self.graph.dequantize(self.graph.cut, self.sent(chosen))

    def sent(self, chosen: Array) -> Array:
        """The same as they cross the link: int8, (n, height, width, channels)."""
        # where a run of neighbours begins, and where the next image is not chosen any more
        edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0))
        parts = [
            self._values(m.Region.ACTIVATIONS, self.graph.cut, int(start), int(stop))
            for start, stop in edges.reshape(-1, 2)
        ]
        nothing = np.zeros((0, *self.graph.shapes[self.graph.cut]), np.int8)
        return np.concatenate([nothing, *parts])

    def _values(self, region: m.Region, tensor: str, start: int, stop: int) -> Array:
        """Of samples start..stop-1 a tensor."""
        size = self.graph.elements(tensor)
        content = self.read(region, start * size, (stop - start) * size)
        shape = (stop - start, *self.graph.shapes[tensor])
        return np.frombuffer(content, np.int8).reshape(shape)
