"""A client behind a link: a board, a process with the same firmware, or a Python client."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from splitee.client import Part, Place, Settings, State, Stepped, spread, unsure_of
from splitee.codec import PLAIN, Codec, Coding
from splitee.data import Images
from splitee.errors import (
    DeviceRefused,
    Late,
    LinkClosed,
    LinkError,
    Mismatch,
    NotFinite,
    SpliteeError,
)
from splitee.ops import Array
from splitee.place import Build
from splitee.steps import Variant
from splitee_host.link import Link
from splitee_host.remote import Remote, joined
from splitee_host.wire import messages as m
from splitee_host.wire.frame import Bytes

_ATTEMPT = 1.0  # seconds that a device gets to say hello again, however long it was silent
_REOPEN = 0.2  # seconds between two tries to open a link again


def records(images: Images) -> bytes:
    """The shard as a device keeps it: one label byte, then the image, for each sample."""
    flat = images.x.reshape(len(images), -1)
    return np.concatenate([images.y[:, None], flat], axis=1).tobytes()


class Device(Remote):
    """A ``splitee.client.Client`` over a link."""

    def __init__(
        self,
        name: str,
        link: Link,
        build: Build,
        settings: Settings,
        *,
        coding: Coding = PLAIN,
        unsure: float | None = None,
        cut: str | None = None,
        upto: bool = True,
        key: bytes | None = None,
        session: int | None = None,
        patience: float = 30.0,
        reopen: Callable[[], Link] | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        """coding: its codecs. key, session, patience, close: as for ``Remote``.

        unsure: normalised entropy of the exit at the cut, above which activations are fetched;
        None: all are.
        cut and upto: where it begins; the deepest cut and every exit built in, by default.
        reopen: opens its link again when it broke; None: it stays broken.
        """
        super().__init__(
            name, link, build.checksum, key=key, session=session, patience=patience, close=close
        )
        self.capacity = build.capacity
        self.build = build
        self.coding = coding
        self.unsure = unsure
        self._sent: Tensor | None = None  # which samples of the last part were, where not all are
        self._put(cut or build.stages[-1].cut, upto)
        self._settings = settings
        self._reopen = reopen
        self._broken = False
        self._images = Images(np.zeros((0,)), np.zeros((0,)))
        self._last = State({}, {}, Place(0, 0))  # what to go back to: the last state on both sides

    @property
    def deadline(self) -> float | None:
        """When its pass has to be over; see ``splitee.client.Client.deadline``."""
        return self.exchange.deadline

    @deadline.setter
    def deadline(self, deadline: float | None) -> None:
        self.exchange.deadline = deadline

    def _expects(self) -> str:
        return f"the fleet file asks for {self.checksum:08x} (cut {self.cut})"

    def _refused(self, asked: m.Message, answer: m.Refused) -> SpliteeError:
        if answer.error == m.Error.NOT_FINITE:
            return self._not_finite(answer.detail)
        return super()._refused(asked, answer)

    def _not_finite(self, detail: int) -> NotFinite:
        owner, graph = f'client "{self.name}"', self.build.graph
        fused = self.build.levers.fused_update
        if detail == m.NOT_FINITE_LOSS:
            return NotFinite(owner, taken_back=fused)
        name = graph.parameter_at(detail)
        return NotFinite(owner, name, detail - graph.places[name], taken_back=fused)

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
        trunk = s.exit_weight, s.server_weight
        message = m.Settings(s.learning_rate, s.momentum, s.weight_decay, *trunk, s.clip, s.distill)
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
        self._images = images
        self._start(state)

    def _start(self, state: State, within: float | None = None) -> None:
        welcome = self.hello(within)
        content = records(self._images)
        if (welcome.samples, welcome.shard) != (len(self._images), zlib.crc32(content)):
            self.write(m.Region.SHARD, content)
        self.move(self.cut, upto=self.upto)
        self._send_settings()
        self.load_state(state)

    def rejoin(self, state: State, within: float) -> None:
        """Comes back in that state; see ``splitee.client.Client.rejoin``."""
        # it may have been silent for a while already
        end = max(time.monotonic() + _ATTEMPT, self.exchange.heard + within)
        while True:
            try:
                if self._broken and self._reopen is not None:
                    self.link.close()
                    self.exchange.attach(self._reopen())
                    self._broken = False
                return self._start(state, max(0.0, end - time.monotonic()))
            except (Mismatch, DeviceRefused, Late):
                raise  # it is back, as another, or nobody waits for it any more
            except LinkError as error:
                self._broken = self._broken or isinstance(error, LinkClosed)
                if time.monotonic() + _REOPEN >= end or (self._broken and self._reopen is None):
                    raise
                time.sleep(_REOPEN)

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
        """Runs its next count samples forward and fetches their activations and labels.

        Where only those are wanted that the exit is unsure of, its logits tell which these are.
        """
        before = self.traffic.up
        labels = self.request(m.Forward(count, batch), m.Forwarded).labels
        if len(labels) != count or max(labels) >= self.graph.classes:
            raise Mismatch(f'client "{self.name}" sent labels {list(labels)} for {count} samples')
        self._sent, chosen = None, torch.ones(count, dtype=torch.bool)
        if self.unsure is not None:
            self._sent = chosen = unsure_of(self._logits(count), self.unsure)
        activations = self._activations(chosen)
        self.traffic.activations_up += self.traffic.up - before
        theirs = torch.tensor(list(labels), dtype=torch.int64)[chosen]
        return Part(activations, theirs, count)

    def _activations(self, chosen: Tensor) -> Tensor:
        """Those of the chosen of the samples held, as they come through their codec."""
        region, size = m.Region.CODED_ACTIVATIONS, self._up.size
        if self._up.kind == "float32":
            region = m.Region.ACTIVATIONS
        # where a run of neighbours begins, and where the next sample is not chosen any more
        edges = np.flatnonzero(np.diff(chosen.numpy().astype(np.int8), prepend=0, append=0))
        code = joined(
            piece
            for start, stop in edges.reshape(-1, 2)
            for piece in self.pieces(region, int(start) * size, int(stop - start) * size)
        )
        shape = (int(chosen.sum()), *self.graph.shapes[self.graph.cut])
        values = self._decoded(self._up, code) if code else np.zeros(0, np.float32)
        return torch.from_numpy(values.reshape(shape))

    def _logits(self, count: int) -> Tensor:
        """Those of the first count samples held, of the exit at the cut."""
        values = self.floats(m.Region.LOGITS, count * self.graph.classes)
        return torch.from_numpy(values.reshape(count, self.graph.classes))

    def _decoded(self, codec: Codec, code: Bytes) -> Array:
        try:
            return codec.decode(code)
        except ValueError as error:
            raise Mismatch(
                f'client "{self.name}" on {self.link.name} sent activations that are no '
                f"{codec.kind}: {error}"
            ) from error

    def backward(self, gradient: Tensor | None) -> None:
        """Sends the server's gradient, where there is one, and runs the part backward."""
        if self._sent is not None and self._settings.wants_gradient:
            gradient = spread(gradient, self._sent, self.graph.shapes[self.graph.cut])
        if gradient is not None:
            plain = self._down.kind == "float32"
            region = m.Region.GRADIENT if plain else m.Region.CODED_GRADIENT
            values = np.ascontiguousarray(gradient.cpu().numpy(), "<f4").reshape(len(gradient), -1)
            # as float32, its own memory is the code
            self.write(region, values.data.cast("B") if plain else self._down.encode(values))
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
        activations = self._activations(torch.ones(len(images), dtype=torch.bool))
        return activations, self._logits(len(images))

    def gradients(self) -> dict[str, Array]:
        """Gradients of this batch so far, by parameter."""
        vector = self._vector(m.Region.GRADIENTS, self.graph.parameters)
        return self.graph.unflatten_parameters(vector)
