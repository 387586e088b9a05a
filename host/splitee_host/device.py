"""A client behind a link: a board, a process with the same firmware, or a Python client.

One request is outstanding at a time. It is sent again, with the same sequence number, until its
answer comes; a device acts once on a number, so nothing is ever trained twice.
"""

from __future__ import annotations

import secrets
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from splitee.client import Part, Place, Settings, State, Stepped, Traffic
from splitee.codec import PLAIN, Codec, Coding
from splitee.data import Images
from splitee.errors import DeviceRefused, LinkClosed, Mismatch, NotFinite, Timeout
from splitee.ops import Array
from splitee.place import Build
from splitee.steps import Variant
from splitee_host.errors import refusal
from splitee_host.link import Link
from splitee_host.wire import messages as m
from splitee_host.wire.frame import Frame, FrameReader, encode

Answer = TypeVar("Answer", bound=m.Message)

# Seconds until a request is sent again: at first, and at most (it doubles each time). Datagrams do
# get lost; a serial line mostly loses nothing, and a slow answer there costs a repeated request.
AGAIN = {"udp": (0.2, 2.0)}
AGAIN_OTHERWISE = (2.0, 4.0)


def records(images: Images) -> bytes:
    """The shard as a device keeps it: one label byte, then the image, for each sample."""
    flat = images.x.reshape(len(images), -1)
    return np.concatenate([images.y[:, None], flat], axis=1).tobytes()


class Device:
    """A ``splitee.client.Client`` over a link."""

    def __init__(
        self,
        name: str,
        link: Link,
        build: Build,
        settings: Settings,
        *,
        coding: Coding = PLAIN,
        cut: str | None = None,
        upto: bool = True,
        session: int | None = None,
        patience: float = 30.0,
        close: Callable[[], None] | None = None,
    ) -> None:
        """coding: its codecs.

        cut and upto: where it begins; the deepest cut and every exit built in, by default.
        patience: seconds without any answer after which the device is lost. session: 1..65535,
        drawn at random by default, so that a device that went on running takes this host for a
        new one.
        """
        self.name = name
        self.capacity = build.capacity
        self.link = link
        self.build = build
        self.coding = coding
        self._put(cut or build.stages[-1].cut, upto)
        self.traffic = Traffic()
        self._settings = settings
        self._session = session or 1 + secrets.randbelow(0xFFFF)
        self._sequence = 0
        self._patience = patience
        self._reader = FrameReader()
        self._close = close
        self._receive_max = self._send_max = 0
        self._last = State({}, {}, Place(0, 0))  # what to go back to: the last state on both sides

    # requests

    def request(self, message: m.Message, expected: type[Answer]) -> Answer:
        """Sends a request and returns its answer.

        Raises DeviceRefused when the device refuses, Timeout when it does not answer, LinkClosed
        when it is gone, Mismatch when its answer is none of ours; NotFinite when it took no step.
        """
        self._sequence = (self._sequence + 1) & 0xFFFF
        frame = encode(Frame(message.CODE, self._session, self._sequence, message.pack()))
        try:
            answer = self._exchange(frame)
        except LinkClosed as error:
            raise LinkClosed(f'client "{self.name}": {error}') from error
        if answer is None:
            raise Timeout(
                f'client "{self.name}": no answer to {type(message).__name__} within '
                f"{self._patience:g} s on {self.link.name}: is the device powered, its firmware "
                "running, and nothing else using the link?"
            )
        return self._checked(message, answer, expected)

    def _exchange(self, frame: bytes) -> Frame | None:
        """Sends a request until its answer comes; None when patience is at its end."""
        wait, longest = AGAIN.get(self.link.kind, AGAIN_OTHERWISE)
        deadline = time.monotonic() + self._patience
        while (now := time.monotonic()) < deadline:
            self.link.write(frame)
            self.traffic.down += len(frame)
            answer = self._answer(min(now + wait, deadline))
            if answer is not None:
                return answer
            wait = min(2 * wait, longest)
        return None

    def _answer(self, deadline: float) -> Frame | None:
        """The answer to the last request, or None when it does not come by the deadline."""
        while (left := deadline - time.monotonic()) > 0:
            chunk = self.link.read(left)
            self.traffic.up += len(chunk)
            for frame in self._reader.feed(chunk):
                # anything else is the answer to an earlier request, sent twice
                if (frame.session, frame.sequence) == (self._session, self._sequence):
                    return frame
        return None

    def _checked(self, asked: m.Message, frame: Frame, expected: type[Answer]) -> Answer:
        what = f'client "{self.name}" on {self.link.name}'
        try:
            answer = m.unpack(frame.code, frame.body)
        except ValueError as error:  # of another schema: not even its Welcome need be ours
            strange = str(error)
        else:
            if isinstance(answer, expected):
                return answer
            if isinstance(answer, m.Refused):
                if answer.error == m.Error.NOT_FINITE:
                    raise self._not_finite(answer.detail)
                raise DeviceRefused(f"{what}: {refusal(asked, answer)}")
            strange = type(answer).__name__
        raise Mismatch(
            f"{what} answered {type(asked).__name__} with something else ({strange}): "
            "its firmware is not ours; run `splitee build`"
        )

    def _not_finite(self, detail: int) -> NotFinite:
        owner, graph = f'client "{self.name}"', self.build.graph
        fused = self.build.levers.fused_update
        if detail == m.NOT_FINITE_LOSS:
            return NotFinite(owner, taken_back=fused)
        name = graph.parameter_at(detail)
        return NotFinite(owner, name, detail - graph.places[name], taken_back=fused)

    def hello(self) -> m.Welcome:
        """Opens the session.

        Raises Mismatch when the device speaks another wire or holds another segment.
        """
        welcome = self.request(m.Hello(m.schema()), m.Welcome)
        ours = m.schema()
        what = f'client "{self.name}" on {self.link.name}'
        if welcome.schema != ours:
            raise Mismatch(
                f"{what}: its firmware speaks schema {welcome.schema:08x}, this host {ours:08x}: "
                "run `splitee build` and load the new firmware"
            )
        if welcome.segment != self.build.checksum:
            raise Mismatch(
                f"{what}: its firmware holds segment {welcome.segment:08x}, the fleet file asks "
                f"for {self.build.checksum:08x} (cut {self.cut}): run `splitee build` and load the "
                "new firmware"
            )
        self._receive_max, self._send_max = welcome.receive_max, welcome.send_max
        return welcome

    def read(self, region: m.Region, offset: int, length: int) -> bytes:
        """length bytes of a region, in as many requests as it takes."""
        most = self._send_max
        if region == m.Region.CODED_ACTIVATIONS:  # made in the memory that requests come to
            most = min(most, self._receive_max)
        pieces = []
        for start in range(offset, offset + length, most):
            size = min(most, offset + length - start)
            content = self.request(m.Read(region, start, size), m.Content).content
            if len(content) != size:
                raise Mismatch(f'client "{self.name}" sent {len(content)} of {size} bytes')
            pieces.append(content)
        return b"".join(pieces)

    def write(self, region: m.Region, content: bytes, offset: int = 0) -> None:
        """Replaces bytes of a region from offset on, in as many requests as it takes."""
        size = self._receive_max - len(m.Write(region, 0, b"").pack())
        for start in range(0, len(content), size):
            piece = content[start : start + size]
            self.request(m.Write(region, offset + start, piece), m.Done)

    def floats(self, region: m.Region, size: int, first: int = 0) -> Array:
        """size float32 values of a region, from the first'th on."""
        return np.frombuffer(self.read(region, 4 * first, 4 * size), "<f4").astype(np.float32)

    def _vector(self, region: m.Region, names: Iterable[str]) -> Array:
        """The values that a region has for those weights of the cut, one behind the other."""
        parts = [np.zeros(0, np.float32)]
        for part in self.build.graph.ranges(names):
            parts.append(self.floats(region, part.stop - part.start, part.start))
        return np.concatenate(parts)

    def _write_vector(self, region: m.Region, names: Iterable[str], vector: Array) -> None:
        """Replaces those values."""
        for part in self.build.graph.ranges(names):
            values, vector = np.split(vector, [part.stop - part.start])
            self.write(region, values.tobytes(), 4 * part.start)

    # splitee.client.Client

    @property
    def settings(self) -> Settings:
        """What it learns with; may be replaced between batches."""
        return self._settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self._settings = settings
        self._send_settings()

    def _send_settings(self) -> None:
        s = self._settings
        message = m.Settings(
            s.learning_rate, s.momentum, s.weight_decay, s.exit_weight, s.server_weight, s.clip
        )
        self.request(message, m.Done)

    def set_rate(self, rate: float) -> None:
        """Learns at this rate from the next step on; what it knows already is not sent."""
        if rate != self._settings.learning_rate:
            self.settings = replace(self._settings, learning_rate=rate)

    def move(self, cut: str, *, upto: bool) -> None:
        """Ends at another cut, without new firmware; see ``splitee.client.Client.move``.

        Raises CutError for one that is not built in, and DeviceRefused in the midst of a batch.
        """
        self.request(m.Select(self.build.number(cut, upto=upto), int(upto)), m.Done)
        self._put(cut, upto)
        up, down = (m.Codec[c.kind.replace("-", "_").upper()] for c in (self._up, self._down))
        if up or down:  # otherwise Select has said it
            kept = max(self._up.kept, self._down.kept)
            self.request(m.Coding(up, down, kept), m.Done)

    def _put(self, cut: str, upto: bool) -> None:
        self._number = self.build.number(cut, upto=upto)
        self.cut = cut
        self.upto = upto
        self.graph = self.build.graph.at(cut, upto=upto)
        elements = self.graph.elements(self.graph.cut)
        self._up, self._down = self.coding.up(elements), self.coding.down(elements)

    def steps_at_cut(self) -> list[int]:
        """Those of the segment's steps that a pass runs at its cut."""
        variant = Variant(self._number - 1, self.upto)
        schedule = self.build.schedule
        steps = schedule.steps[: schedule.backward_end]
        return [i for i, s in enumerate(steps) if s.runs(variant)]

    def start(self, state: State, images: Images) -> None:
        """Says hello, sends the shard unless the device holds it, then cut, settings and state."""
        welcome = self.hello()
        content = records(images)
        held = (welcome.samples, welcome.shard)
        if held != (len(images), zlib.crc32(content)):
            size = self._receive_max - len(m.Data(0, b"").pack())
            for start in range(0, len(content), size):
                self.request(m.Data(start, content[start : start + size]), m.Done)
        self.move(self.cut, upto=self.upto)
        self._send_settings()
        self.load_state(state)

    def load_state(self, state: State) -> None:
        """Replaces weights, momentum and place."""
        self._last = state
        p = state.place
        self.request(m.Place(p.samples, p.position, p.seed, p.epoch, p.steps), m.Done)
        self.load_weights(state.weights)
        if state.momentum:
            vector = self.graph.flatten_parameters(state.momentum)
            self._write_vector(m.Region.MOMENTUM, self.graph.parameters, vector)

    def load_weights(self, weights: Mapping[str, Array]) -> None:
        """Replaces parameters and statistics."""
        self._last = replace(self._last, weights=weights)
        self._write_vector(m.Region.WEIGHTS, self.graph.weights, self.graph.flatten(weights))

    def state(self) -> State:
        """Reads everything that it has learnt, and its place."""
        graph = self.graph
        weights = graph.unflatten(self._vector(m.Region.WEIGHTS, graph.weights))
        momentum: dict[str, Array] = {}
        if self.build.momentum:
            vector = self._vector(m.Region.MOMENTUM, graph.parameters)
            momentum = graph.unflatten_parameters(vector)
        c = self.counters()
        place = Place(c.samples, c.seed, c.epoch, c.position, c.steps)
        self._last = State(weights, momentum, place)
        return self._last

    def counters(self) -> m.Counters:
        """The device's counters."""
        return self.request(m.Stats(), m.Counters)

    def forward(self, count: int, batch: int) -> Part:
        """Runs its next count samples forward and fetches their activations and labels."""
        before = self.traffic.up
        labels = self.request(m.Forward(count, batch), m.Forwarded).labels
        if len(labels) != count or max(labels) >= self.graph.classes:
            raise Mismatch(f'client "{self.name}" sent labels {list(labels)} for {count} samples')
        activations = self._activations(count)
        self.traffic.activations_up += self.traffic.up - before
        return Part(activations, torch.tensor(list(labels), dtype=torch.int64))

    def _activations(self, count: int) -> Tensor:
        """Those of the first count samples held, as they come through their codec."""
        region = m.Region.CODED_ACTIVATIONS
        if self._up.kind == "float32":
            region = m.Region.ACTIVATIONS
        values = self._decoded(self._up, self.read(region, 0, count * self._up.size))
        return torch.from_numpy(values.reshape(count, *self.graph.shapes[self.graph.cut]))

    def _decoded(self, codec: Codec, code: bytes) -> Array:
        try:
            return codec.decode(code)
        except ValueError as error:
            raise Mismatch(
                f'client "{self.name}" on {self.link.name} sent activations that are no '
                f"{codec.kind}: {error}"
            ) from error

    def backward(self, gradient: Tensor | None) -> None:
        """Sends the server's gradient, where there is one, and runs the part backward."""
        if gradient is not None:
            plain = self._down.kind == "float32"
            region = m.Region.GRADIENT if plain else m.Region.CODED_GRADIENT
            values = gradient.cpu().numpy().reshape(len(gradient), -1)
            self.write(region, self._down.encode(values))
        self.request(m.Backward(), m.Done)

    def step(self) -> Stepped:
        """Updates its weights; see ``splitee.client.Client.step``."""
        try:
            stepped = self.request(m.Step(), m.Stepped)
        except NotFinite:
            if self.build.levers.fused_update:  # some layers have learnt from this batch already
                self.load_state(self._last)
            raise
        return Stepped(stepped.loss, stepped.correct)

    def infer(self, images: Array) -> tuple[Tensor, Tensor]:
        """Activations and logits of at most capacity uint8 images."""
        self.write(m.Region.INPUT, np.ascontiguousarray(images).tobytes())
        self.request(m.Infer(len(images)), m.Done)
        activations = self._activations(len(images))
        logits = self.floats(m.Region.LOGITS, len(images) * self.graph.classes)
        return activations, torch.from_numpy(logits.reshape(len(images), self.graph.classes))

    def gradients(self) -> dict[str, Array]:
        """Gradients of this batch so far, by parameter."""
        vector = self._vector(m.Region.GRADIENTS, self.graph.parameters)
        return self.graph.unflatten_parameters(vector)

    def close(self) -> None:
        """Closes the link, and ends what was started for it."""
        self.link.close()
        if self._close is not None:
            self._close()
