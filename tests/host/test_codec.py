"""Coded tensors over a link: both kinds of client, both ways, and what is refused."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from host_harness import ENDS, Recorder, Troubled, differences, end, host, splitee, waits
from splitee.client import State
from splitee.codec import KINDS, Codec, Coding, Kind
from splitee.errors import DeviceRefused, Mismatch, NotFinite
from splitee.ops import Array
from splitee_host.device import Device
from splitee_host.wire import messages as m
from step_harness import SETTINGS, case, local

CASE = case("resnet8")  # capacity 8, 24 samples
GRAPH = CASE.build.graph
ELEMENTS = GRAPH.elements(GRAPH.cut)
BOTH = replace(SETTINGS, exit_weight=0.5, server_weight=0.5)
LOSSY: tuple[Kind, ...] = ("float16", "int8", "int4", "top-k")


@pytest.fixture(autouse=True)
def _nothing_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames are counted here: none is repeated only because this machine is busy."""
    waits(monkeypatch, 10.0)


def gradient(count: int, seed: int) -> torch.Tensor:
    """What a server might return."""
    shape = GRAPH.shapes[GRAPH.cut]
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)) / 100


def through(codec: Codec, values: torch.Tensor) -> torch.Tensor:
    flat: Array = values.numpy().reshape(len(values), -1)
    return torch.from_numpy(codec.decode(codec.encode(flat))).reshape(values.shape)


@pytest.mark.parametrize("activations", KINDS)
@pytest.mark.parametrize("kind", ENDS)
def test_activations_come_through_their_codec(kind: str, activations: Kind, folder: Path) -> None:
    coding = Coding(activations)
    codec = coding.up(ELEMENTS)
    with end(kind, CASE, folder) as link:
        device = host(link, CASE, coding=coding)
        device.start(CASE.state, CASE.images)
        for count in (8, 1, 1, 3):  # one sample follows another in the same place
            part = device.forward(count, 13)
            plain = device.floats(m.Region.ACTIVATIONS, count * ELEMENTS)
            assert plain.any()
            plain = plain.reshape(part.activations.shape)
            torch.testing.assert_close(
                part.activations, through(codec, torch.from_numpy(plain)), rtol=0, atol=0
            )
            device.backward(None)
        device.step()
        answered, _ = device.infer(CASE.images.x[:5])
        plain = device.floats(m.Region.ACTIVATIONS, 5 * ELEMENTS).reshape(answered.shape)
        torch.testing.assert_close(
            answered, through(codec, torch.from_numpy(plain)), rtol=0, atol=0
        )


def learn(device: Device, codec: Codec | None = None) -> State:
    """Two batches of a part of 8 and one of 3, from gradients that went through a codec before."""
    device.start(CASE.state, CASE.images)
    for step in range(2):
        for count in (8, 3):
            device.forward(count, 11)
            sent = gradient(count, 10 * step + count)
            device.backward(sent if codec is None else through(codec, sent))
        device.step()
    return device.state()


@pytest.mark.parametrize("coded", LOSSY)
@pytest.mark.parametrize("kind", ENDS)
def test_a_gradient_comes_through_its_codec(kind: str, coded: Kind, folder: Path) -> None:
    coding = Coding(gradient=coded)
    with end(kind, CASE, folder) as link:
        mine = learn(host(link, CASE, BOTH, coding=coding))
    with end(kind, CASE, folder) as link:
        before = learn(host(link, CASE, BOTH), coding.down(ELEMENTS))
    with end(kind, CASE, folder) as link:
        without = learn(host(link, CASE, BOTH))
    assert differences(mine, before) == []
    assert differences(mine, without)  # the codec does something at all


@pytest.mark.parametrize("coded", LOSSY)
def test_a_client_in_this_process_is_what_one_behind_a_link_is(coded: Kind, folder: Path) -> None:
    coding = Coding(coded, coded, 0.2)
    reference = local(CASE, BOTH)
    reference.coding = coding
    with end("python", CASE, folder) as link:
        device = host(link, CASE, BOTH, coding=coding)
        device.start(CASE.state, CASE.images)
        for client in (device, reference):
            part = client.forward(6, 6)
            client.backward(gradient(6, 1))
            client.step()
            answers = client.infer(CASE.images.x[:4])
            if client is device:
                first = part, answers
        torch.testing.assert_close(part.activations, first[0].activations, rtol=0, atol=0)
        torch.testing.assert_close(answers[0], first[1][0], rtol=0, atol=0)
        learnt = reference.state().weights
        for name, weight in device.state().weights.items():
            np.testing.assert_array_equal(weight, learnt[name])
    codec = coding.up(ELEMENTS)
    assert reference.traffic.activations_up == 6 * (codec.size + 1)
    assert reference.traffic.down == 6 * codec.size


@pytest.mark.parametrize("trouble", ["lost", "doubled", "delayed"])
@pytest.mark.parametrize("kind", ENDS)
def test_a_bad_link_changes_nothing_of_what_is_coded(
    kind: str, trouble: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coding = Coding("top-k", "int4", 0.3)
    with end(kind, CASE, folder) as link:
        expected = learn(host(link, CASE, BOTH, coding=coding))
    waits(monkeypatch, 0.05)
    with end(kind, CASE, folder) as link, Troubled(link, trouble) as troubled:
        device = host(troubled, CASE, BOTH, coding=coding)
        assert differences(learn(device), expected) == []


@pytest.mark.parametrize("kind", ENDS)
def test_a_read_that_is_repeated_is_answered_alike(kind: str, folder: Path) -> None:
    with end(kind, CASE, folder) as link, Recorder(link) as recorder:
        device = host(recorder, CASE, coding=Coding("int8"))
        device.start(CASE.state, CASE.images)
        device.forward(8, 8)
        length = min(300, 8 * device.coding.up(ELEMENTS).size)
        device.request(m.Read(m.Region.CODED_ACTIVATIONS, 5, length), m.Content)
        asked, answer = recorder.sent[-1], recorder.answers[-1]
        link.write(b"\x03\x09\x01\x00")  # a spoilt frame, in the memory of what was sent
        recorder.write(asked)
        while recorder.answers[-1:] != [answer] or recorder.answers.count(answer) < 2:
            assert recorder.read(10.0)


def test_coded_activations_take_fewer_bytes(folder: Path) -> None:
    taken = {}
    for kind in KINDS:
        coding = Coding(kind)
        with end("firmware", CASE, folder) as link:
            device = host(link, CASE, coding=coding)
            device.start(CASE.state, CASE.images)
            device.forward(8, 8)
            taken[kind] = device.traffic.activations_up
        content = 8 * (coding.up(ELEMENTS).size + 1)
        assert content < taken[kind] < 1.06 * content + 40
    assert taken["top-k"] < taken["int4"] < taken["int8"] < taken["float16"] < taken["float32"]


@pytest.mark.parametrize("coded", LOSSY)
@pytest.mark.parametrize("kind", ENDS)
def test_what_is_not_finite_is_found_behind_a_codec(kind: str, coded: Kind, folder: Path) -> None:
    weights = {n: np.array(w) for n, w in CASE.state.weights.items()}
    weights["stem.1.bias"][0] = np.nan
    with end(kind, CASE, folder) as link:
        device = host(link, CASE, coding=Coding(coded))
        device.start(replace(CASE.state, weights=weights), CASE.images)
        part = device.forward(4, 4)
        if kind == "python":  # in C, what a ReLU makes of a NaN is 0
            assert part.activations.reshape(4, -1).isnan().any(1).all()
        device.backward(None)
        with pytest.raises(NotFinite, match='client "it"'):
            device.step()


# ---- what is refused ----


CODED = m.Region.CODED_ACTIVATIONS
TOP = m.Codec.TOP_K


@pytest.mark.parametrize(
    ("request_", "error", "detail"),
    [
        (m.Coding(5, 0, 0), m.Error.BAD_CODEC, 5),
        (m.Coding(0, 255, 0), m.Error.BAD_CODEC, 255),
        (m.Coding(TOP, 0, 0), m.Error.BAD_CODEC, TOP),
        (m.Coding(0, TOP, ELEMENTS), m.Error.BAD_CODEC, TOP),
        (m.Write(CODED, 0, b"x"), m.Error.READ_ONLY, CODED),
        (m.Read(CODED, 8 * (4 + ELEMENTS) - 7, 8), m.Error.OUT_OF_RANGE, 8 * (4 + ELEMENTS)),
        (m.Read(CODED, 8 * (4 + ELEMENTS), 1), m.Error.OUT_OF_RANGE, 8 * (4 + ELEMENTS)),
        (m.Write(m.Region.CODED_GRADIENT, 8 * (4 + 4 * 5), b"x"), m.Error.OUT_OF_RANGE, 192),
    ],
    ids=[
        "an unknown codec", "an unknown codec of gradients", "none kept", "all kept",
        "writing activations", "over the end", "behind the end", "behind the gradient",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ENDS)
def test_refuses(kind: str, request_: m.Message, error: m.Error, detail: int, folder: Path) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE)
        device.start(CASE.state, CASE.images)
        device.request(m.Coding(m.Codec.INT8, TOP, 5), m.Done)
        refused = device.request(request_, m.Refused)
        assert (refused.error, refused.detail) == (error, detail)
        size = 8 * (4 + ELEMENTS)  # its codecs are what they were
        assert device.request(m.Read(CODED, size - 7, 7), m.Content).content


@pytest.mark.parametrize("kind", ENDS)
def test_a_codec_waits_for_the_end_of_a_batch_and_a_cut_puts_it_back(
    kind: str, folder: Path
) -> None:
    with end(kind, CASE, folder) as link:
        device = host(link, CASE, coding=Coding("int8"))
        device.start(CASE.state, CASE.images)
        device.forward(8, 8)
        refused = device.request(m.Coding(0, 0, 0), m.Refused)
        assert (refused.error, refused.detail) == (m.Error.OUT_OF_ORDER, 1)
        device.backward(None)
        device.step()
        device.request(m.Select(1, 1), m.Done)
        last = m.Read(CODED, 8 * 4 * ELEMENTS - 1, 1)
        assert len(device.request(last, m.Content).content) == 1


@pytest.mark.parametrize("kind", ENDS)
def test_refuses_a_gradient_that_is_no_code_and_takes_the_next(kind: str, folder: Path) -> None:
    coding = Coding(gradient="top-k", share=0.02)
    kept = coding.down(ELEMENTS).kept
    assert kept >= 2
    states = []
    for bad in (True, False):
        with end(kind, CASE, folder) as link:
            device = host(link, CASE, BOTH, coding=coding)
            device.start(CASE.state, CASE.images)
            device.forward(3, 3)
            if bad:
                code = coding.down(ELEMENTS).encode(np.ones((3, ELEMENTS), np.float32))
                second = coding.down(ELEMENTS).size + 4
                code = code[:second] + struct.pack("<HH", ELEMENTS, 1) + code[second + 4 :]
                device.write(m.Region.CODED_GRADIENT, code)
                with pytest.raises(DeviceRefused, match="gradient of sample 1 is no code"):
                    device.request(m.Backward(), m.Done)
            device.backward(gradient(3, 1))
            device.step()
            states.append(device.state())
    assert differences(*states) == []


def test_activations_that_are_no_code_are_a_mismatch(folder: Path) -> None:
    with end("python", CASE, folder) as link:
        device = host(link, CASE, coding=Coding("top-k"))
        device.start(CASE.state, CASE.images)
        with pytest.raises(Mismatch, match=r'client "it" on .* sent activations that are no top-k'):
            device._decoded(device.coding.up(ELEMENTS), bytes(device.coding.up(ELEMENTS).size))


# ---- whole runs ----

FLEET = """
name = "coded"
rounds = 1
gradient = "both"

[model]
name = "resnet8"
width = 4

[data]
samples = 96

[[client]]
name = "process"
board = "posix"
cut = "layer1"
capacity = 4
codec = "int8"
gradient_codec = "int8"

[[client]]
name = "edge"
board = "python"
cut = "layer2"
codec = "top-k"
top_k = 0.25

[[client]]
name = "here"
board = "torch"
cut = "layer2"
codec = "top-k"
top_k = 0.25
"""


def test_plan_and_train_say_what_a_sample_takes(workplace: Path) -> None:
    Path("coded.toml").write_text(FLEET)
    planned = json.loads(splitee("plan", "coded.toml", "--json").out)
    rows = {c["client"]: next(r for r in c["cuts"] if r["chosen"]) for c in planned}
    bytes_up = {name: row["bytes_up_per_sample"] for name, row in rows.items()}
    # 4 x 8 x 8 elements; 8 x 4 x 4, of which 32 are kept
    assert bytes_up == {"process": 4 + 256 + 1, "edge": 4 + 4 * 32 + 1, "here": 4 + 4 * 32 + 1}
    said = splitee("train", "coded.toml")
    assert (said.code, said.err) == (0, "")
    summary = json.loads(Path("runs/coded/summary.json").read_text())
    for client in summary["clients"]:
        sent = client["bytes_up_per_sample"]
        assert bytes_up[client["name"]] <= sent < 1.25 * bytes_up[client["name"]]


def test_refuses_a_codec_that_is_of_no_use_at_a_cut(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitee.codec.INDICES", 100)
    Path("coded.toml").write_text(FLEET)
    said = splitee("plan", "coded.toml")
    assert said.code == 1
    assert " ".join(said.err.split()) == (
        'error: client "edge": codec = "top-k" at layer2: top-k tells 100 elements apart, and a '
        "sample has 128: take another"
    )
