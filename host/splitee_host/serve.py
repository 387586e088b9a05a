"""The Python client's end of the link: answers the same requests as the firmware does.

``splitee client`` runs this on an edge computer. It differs from ``firmware/core/device.c`` only
in what lies below: a ``Learner`` instead of the C kernels, in torch or in ONNX Runtime.
"""

from __future__ import annotations

import time
import zlib

import numpy as np

from splitee.codec import KINDS, Codec, Kind
from splitee.data import Images
from splitee.errors import LinkClosed, NotFinite
from splitee.ops import Array
from splitee.place import Build
from splitee.state import Place, Settings
from splitee_host.learner import Learner
from splitee_host.link import Link
from splitee_host.session import WINDOW, Refusal, Sessions
from splitee_host.wire import messages as m
from splitee_host.wire.frame import Bytes, Frame

_KINDS: dict[int, Kind] = {m.Codec[k.replace("-", "_").upper()]: k for k in KINDS}


def serve(link: Link, learner: Learner, build: Build, key: bytes | None = None) -> None:
    """Answers requests until the host closes the link. key: 32 bytes that the host has, too."""
    server = _Server(learner, build, key, link.kind)
    try:
        while True:
            for answer in server.sessions.receive(link.read(3600.0)):
                link.write(answer)
    except LinkClosed:
        return


class _Server:
    """The state machine of device.c: idle, or after a forward or a backward."""

    def __init__(self, learner: Learner, build: Build, key: bytes | None, kind: str) -> None:
        """kind: of the link."""
        self._learner = learner
        self._learner.discard()  # what an earlier host has left
        self._build = build
        graph = build.graph
        self._shard = bytearray(build.samples_max * build.record_size)
        self._images = bytearray(build.capacity * graph.elements(graph.input))
        self._logits = bytearray(4 * build.capacity * graph.classes)
        self._floats: dict[int, bytearray] = {}  # weights, momentum, gradients as last asked for
        self._written: set[int] = set()  # those that the host changed since
        self._coded: bytes | None = None  # of the activations held, once asked for
        self._select(len(build.stages), upto=True)
        self._phase = 0  # 0 idle, 1 after Forward, 2 after Backward
        self._count = 0  # samples of the part that is held
        self.sessions = Sessions(self, key, kind)
        self._compute_seconds = 0.0

    def act(self, frame: Frame) -> m.Message:
        """Carries a request out; the answer to it."""
        if frame.code not in (r.CODE for r in m.REQUESTS):
            return m.Refused(m.Error.UNKNOWN_MESSAGE, frame.code)
        try:
            request = m.unpack(frame.code, frame.body)
        except ValueError:
            return m.Refused(m.Error.BAD_LENGTH, len(frame.body))
        try:
            if not isinstance(request, m.Read | m.Write):
                self._settle()
                self._coded = None
            began = time.perf_counter()
            answer = self._on(request)
            if isinstance(request, m.Forward | m.Infer | m.Backward | m.Step):
                self._compute_seconds += time.perf_counter() - began
            return answer
        except Refusal as refusal:
            return m.Refused(refusal.error, refusal.detail)

    def _on(self, request: m.Message) -> m.Message:
        match request:
            case m.Settings():
                self._settings(request)
            case m.Select(cut, upto):
                self._on_select(cut, upto=bool(upto))
            case m.Coding(activations, gradient, kept):
                self._on_coding(activations, gradient, kept)
            case m.Place(samples, position, seed, epoch, steps):
                self._on_place(Place(samples, seed, epoch, position, steps))
            case m.Forward(count, batch):
                return self._forward(count, batch)
            case m.Infer(count):
                self._infer(count)
            case m.Backward():
                self._backward()
            case m.Step():
                return self._step()
            case m.Read(region, offset, length):
                return m.Content(offset, self._read(region, offset, length))
            case m.Write(region, offset, content):
                self._write(region, offset, content)
                return m.Written(offset)
            case m.Stats():
                return self._counters()
            case _:  # a Run: this client has no steps to single out
                raise Refusal(m.Error.UNKNOWN_MESSAGE, request.CODE)
        return m.Done()

    def welcome(self, session: int, nonce: int) -> m.Welcome:
        """What it is."""
        place = self._learner.place
        return m.Welcome(
            schema=m.schema(),
            segment=self._build.checksum,
            receive_max=self.sessions.most,
            send_max=self.sessions.most,
            window=WINDOW,
            samples_max=self._build.samples_max,
            samples=place.samples,
            steps=place.steps,
            shard=zlib.crc32(self._shard[: place.samples * self._build.record_size]),
            session=session,
            fresh=1,
            nonce=nonce,
        )

    def begin(self) -> None:
        """Another host is here, or the same one again: a batch that was begun is forgotten."""
        self._phase = 0
        self._learner.discard()

    def _on_select(self, cut: int, *, upto: bool) -> None:
        if self._phase != 0:
            raise Refusal(m.Error.OUT_OF_ORDER, self._phase)
        if not 1 <= cut <= len(self._build.stages):
            raise Refusal(m.Error.NO_SUCH_CUT, len(self._build.stages))
        self._select(cut, upto=upto)

    def _select(self, cut: int, *, upto: bool) -> None:
        stage = self._build.stages[cut - 1]
        # of a cut that stays, all exits there are belong to the segment
        self._learner.move(stage.cut, upto=upto or not self._build.moves)
        self._shape = self._build.graph.shapes[stage.point]  # of a sample's activations
        elements = self._build.graph.elements(stage.point)
        size = 4 * self._build.capacity * elements
        self._gradient, self._activations = bytearray(size), bytearray(size)
        self._code(Codec("float32", elements), Codec("float32", elements))

    def _code(self, up: Codec, down: Codec) -> None:
        self._up, self._down = up, down
        self._coded_gradient = bytearray(self._build.capacity * down.size)

    def _on_coding(self, activations: int, gradient: int, kept: int) -> None:
        if self._phase != 0:
            raise Refusal(m.Error.OUT_OF_ORDER, self._phase)
        codecs = []
        for number in (activations, gradient):
            kind = _KINDS.get(number)
            codec = kind and Codec(kind, self._up.elements, kept if kind == "top-k" else 0)
            if not codec or codec.fault or (kind == "top-k" and kept == 0):
                raise Refusal(m.Error.BAD_CODEC, number)
            codecs.append(codec)
        self._code(*codecs)

    def _settings(self, s: m.Settings) -> None:
        if s.momentum and not self._build.momentum:
            raise Refusal(m.Error.NO_MOMENTUM)
        if s.distill and not self._build.distills:
            raise Refusal(m.Error.NO_DISTILL)
        trunk = s.exit_weight, s.server_weight
        self._learner.settings = Settings(
            s.learning_rate, s.momentum, s.weight_decay, *trunk, s.clip, distill=s.distill
        )

    def _on_place(self, place: Place) -> None:
        if place.samples > self._build.samples_max or place.position > place.samples:
            raise Refusal(m.Error.TOO_MANY_SAMPLES, self._build.samples_max)
        self._phase = 0
        self._learner.discard()
        size = self._build.record_size
        held = np.frombuffer(self._shard, np.uint8)[: place.samples * size].reshape(-1, size)
        shape = self._build.graph.input_shape
        images = Images(held[:, 1:].reshape(-1, *shape).copy(), held[:, 0].copy())
        self._learner.begin(place, images)

    def _forward(self, count: int, batch: int) -> m.Forwarded:
        if self._phase == 1:
            raise Refusal(m.Error.OUT_OF_ORDER, self._phase)
        place = self._learner.place
        if place.samples == 0:
            raise Refusal(m.Error.NO_DATA)
        if not 0 < count <= min(self._build.capacity, batch):
            raise Refusal(m.Error.TOO_MANY_SAMPLES, self._build.capacity)
        left = place.samples - place.position or place.samples
        if count > left:
            raise Refusal(m.Error.TOO_MANY_SAMPLES, left)
        labels = self._learner.upcoming(count).y
        bad = labels[labels >= self._build.graph.classes]
        if bad.size:
            raise Refusal(m.Error.BAD_LABEL, int(bad[0]))
        activations, logits = self._learner.forward(count, batch)
        _put(self._activations, activations)
        _put(self._logits, logits)
        self._count = count
        self._phase = 1
        return m.Forwarded(bytes(labels.tolist()))

    def _infer(self, count: int) -> None:
        if self._phase == 1:
            raise Refusal(m.Error.OUT_OF_ORDER, self._phase)
        if not 0 < count <= self._build.capacity:
            raise Refusal(m.Error.TOO_MANY_SAMPLES, self._build.capacity)
        shape = (self._build.capacity, *self._build.graph.input_shape)
        images = np.frombuffer(bytes(self._images), np.uint8).reshape(shape)[:count]
        activations, logits = self._learner.infer(images)
        _put(self._activations, activations)
        _put(self._logits, logits)

    def _backward(self) -> None:
        if self._phase != 1:
            raise Refusal(m.Error.OUT_OF_ORDER, self._phase)
        gradient = None
        if self._learner.settings.wants_gradient:
            gradient = self._sent_gradient(self._count).reshape(self._count, *self._shape)
        self._learner.backward(gradient)
        self._phase = 2

    def _sent_gradient(self, count: int) -> Array:
        """What the host wrote for the first count samples."""
        codec, size = self._down, self._down.size
        if codec.kind == "float32":
            return codec.decode(memoryview(self._gradient)[: count * size])
        samples = [bytes(self._coded_gradient[i * size : (i + 1) * size]) for i in range(count)]
        values = []
        for i, sample in enumerate(samples):
            try:
                values.append(codec.decode(sample))
            except ValueError as error:
                raise Refusal(m.Error.BAD_CODE, i) from error
        return np.concatenate(values)

    def _step(self) -> m.Stepped:
        if self._phase != 2:
            raise Refusal(m.Error.OUT_OF_ORDER, self._phase)
        self._phase = 0
        try:
            stepped = self._learner.step()
        except NotFinite as error:
            detail = m.NOT_FINITE_LOSS
            if error.tensor:
                detail = self._build.graph.places[error.tensor] + error.place
            raise Refusal(m.Error.NOT_FINITE, detail) from error
        return m.Stepped(stepped.loss, stepped.correct)

    def _settle(self) -> None:
        """Hands what the host wrote to the client, and forgets the copies that it read."""
        graph = self._build.graph
        for region in sorted(self._written):
            values = np.frombuffer(bytes(self._floats[region]), "<f4")
            if region == m.Region.WEIGHTS:
                self._learner.load_weights(graph.unflatten(values))
            else:
                self._learner.load_momentum(graph.unflatten_parameters(values))
        self._written.clear()
        self._floats.clear()

    def _region(self, region: int) -> bytearray | memoryview:
        """The memory of a region."""
        if region in (m.Region.WEIGHTS, m.Region.MOMENTUM, m.Region.GRADIENTS):
            if region not in self._floats:
                self._floats[region] = self._read_floats(region)
            return self._floats[region]
        if region == m.Region.CODED_ACTIVATIONS:
            if self._coded is None:
                values = np.frombuffer(self._activations, "<f4")
                self._coded = self._up.encode(values.reshape(-1, self._up.elements))
            return memoryview(self._coded)
        found = (
            {
                m.Region.SHARD: self._shard,
                m.Region.INPUT: self._images,
                m.Region.ACTIVATIONS: self._activations,
                m.Region.GRADIENT: self._gradient,
                m.Region.CODED_GRADIENT: self._coded_gradient,
                m.Region.LOGITS: self._logits,
            }.get(m.Region(region))
            if region in list(m.Region)
            else None
        )
        if found is None:  # an arena is only what the C firmware has
            raise Refusal(m.Error.NO_SUCH_REGION, region)
        return found

    def _read_floats(self, region: int) -> bytearray:
        graph, learner = self._build.graph, self._learner
        if region == m.Region.WEIGHTS:
            return bytearray(graph.flatten(learner.weights()).tobytes())
        if region == m.Region.GRADIENTS:
            return bytearray(graph.flatten_parameters(learner.gradients()).tobytes())
        if not self._build.momentum:
            return bytearray()
        momentum = learner.momentum()
        if not momentum:  # a setting of 0 makes no use of it
            return bytearray(4 * graph.parameter_size)
        return bytearray(graph.flatten_parameters(momentum).tobytes())

    def _read(self, region: int, offset: int, length: int) -> memoryview:
        if length > self.sessions.most - 4:
            raise Refusal(m.Error.OUT_OF_RANGE, self.sessions.most - 4)
        content = self._region(region)
        return memoryview(content)[_within(content, offset, length)]

    def _write(self, region: int, offset: int, content: Bytes) -> None:
        buffer = self._region(region)
        place = _within(buffer, offset, len(content))
        read_only = {
            m.Region.ACTIVATIONS,
            m.Region.CODED_ACTIVATIONS,
            m.Region.LOGITS,
            m.Region.GRADIENTS,
        }
        if self._phase == 1:  # the firmware holds the part there
            read_only.add(m.Region.INPUT)
        if region in read_only:
            raise Refusal(m.Error.READ_ONLY, region)
        buffer[place] = content
        if region in (m.Region.WEIGHTS, m.Region.MOMENTUM):
            self._written.add(region)

    def _counters(self) -> m.Counters:
        p, s = self._learner.place, self.sessions
        micros = int(self._compute_seconds * 1e6) & 0xFFFFFFFF
        return m.Counters(
            p.samples, p.position, p.seed, p.epoch, p.steps, s.frames, s.bad, s.foreign,
            s.repeated, micros, 0, 0,
        )  # fmt: skip


def _put(buffer: bytearray, tensor: Array) -> None:
    np.frombuffer(buffer, "<f4")[: tensor.size] = tensor.reshape(-1)


def _within(buffer: bytearray | memoryview, offset: int, length: int) -> slice:
    if offset + length > len(buffer):
        raise Refusal(m.Error.OUT_OF_RANGE, len(buffer))
    return slice(offset, offset + length)
