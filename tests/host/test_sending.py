"""What sends less, over a link: a bottleneck, and only the samples that an exit is unsure of."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from host_harness import ENDS, Recorder, differences, end, host, splitee, waits
from splitee.bottleneck import Bottleneck
from splitee.client import Client, LocalClient, State
from splitee.codec import Coding, Kind
from splitee.model import Network, Tail
from splitee.ops import Array
from splitee.server import Server
from splitee.train import train_batch
from splitee_host import device as device_module
from splitee_host.device import Device
from splitee_host.verify import TOLERANCE
from splitee_host.wire import messages as m
from splitee_host.wire.frame import FrameReader
from step_harness import SETTINGS, Case, case, local
from toolkit.networks import arrays, far, resnet, unequal

NARROW = Bottleneck(3, 2)
CASE = case("resnet8", bottleneck=NARROW)  # capacity 8, 24 samples
MOVES = case("resnet8", moves=True)
BOTH = replace(SETTINGS, exit_weight=0.5, server_weight=0.5)
CODED = ("float32", "int8", "top-k")
KIND_OF = {"float32": m.Region.ACTIVATIONS}


@pytest.fixture(autouse=True)
def _nothing_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames are counted here: none is repeated only because this machine is busy."""
    waits(monkeypatch, 10.0)


def server_of(the_case: Case) -> Server:
    """A server behind the case's cut, with a mirror where the case has a bottleneck."""
    torch.manual_seed(11)
    network = Network(resnet(width=6), (1, 8, 8))
    cut = network.cut(the_case.segment.cut.name)
    narrow = the_case.build.graph.cut == "bottleneck"
    mirrors = {name: NARROW.mirror(cut.shape) for name in ("it", "local")} if narrow else {}
    if narrow:
        mirrors["local"] = copy.deepcopy(mirrors["it"])
    return Server(Tail(network, [cut], mirrors), BOTH)


def threshold(the_case: Case) -> float:
    """An entropy in the middle of those of the case's images, and apart from them."""
    client = local(the_case, BOTH)
    found: list[float] = []
    for start in range(0, 24, 8):
        _, logits = client.infer(the_case.images.x[start : start + 8])
        p = torch.softmax(logits.double(), 1)
        found += (-(p * p.log()).sum(1) / np.log(logits.shape[1])).tolist()
    found.sort()
    below, above = found[11:13]
    assert above - below > 1e-4
    return (below + above) / 2


@contextmanager
def client_of(
    kind: str, the_case: Case, folder: Path, coding: Coding, unsure: float | None
) -> Iterator[Client]:
    """A started client with the case's segment: in this process, or behind a link."""
    if kind == "torch":
        client: Client = local(the_case, BOTH)
        assert isinstance(client, LocalClient)
        client.coding, client.unsure = coding, unsure
        yield client
        return
    with end(kind, the_case, folder) as link:
        device = host(link, the_case, BOTH, coding=coding)
        device.unsure = unsure
        device.start(the_case.state, the_case.images)
        yield device


def trained(
    kind: str, the_case: Case, folder: Path, coding: Coding, unsure: float | None
) -> tuple[State, dict[str, Array], list[int], list[float | None]]:
    """Two batches of eight: the states of both halves, and what was sent of each."""
    server = server_of(the_case)
    with client_of(kind, the_case, folder, coding, unsure) as client:
        done = [train_batch(client, server, 8) for _ in range(2)]
        own = f"bottleneck.{client.name}."
        tensors = {n.replace(own, "mirror."): t for n, t in arrays(server.tensors()).items()}
        tensors = {n: t for n, t in tensors.items() if not n.startswith("bottleneck.")}
        return client.state(), tensors, [d.sent for d in done], [d.server_loss for d in done]


@pytest.mark.parametrize("unsure", [False, True], ids=["all", "unsure"])
@pytest.mark.parametrize("coded", CODED)
@pytest.mark.parametrize("kind", ENDS)
def test_with_a_bottleneck_clients_of_all_kinds_learn_alike(
    kind: str, coded: Kind, unsure: bool, folder: Path
) -> None:
    coding = Coding(coded, coded, 0.4)
    above = threshold(CASE) if unsure else None
    expected, its_server, sent, losses = trained("torch", CASE, folder, coding, above)
    assert all(0 < n < 8 for n in sent) if unsure else sent == [8, 8]
    found, server, mine, my_losses = trained(kind, CASE, folder, coding, above)
    assert mine == sent
    assert any(n.startswith("mirror.") for n in server)
    if kind == "python":
        assert found.place == expected.place
        assert unequal(dict(found.weights), dict(expected.weights)) == []
        assert unequal(dict(found.momentum), dict(expected.momentum)) == []
        np.testing.assert_equal(server, its_server)
        return
    # what rounds otherwise may be coded by a neighbouring number
    tolerance = TOLERANCE if coded == "float32" else 2e-2
    assert far(dict(found.weights), dict(expected.weights), tolerance) == {}
    assert far(server, its_server, tolerance) == {}
    assert my_losses == pytest.approx(losses, rel=tolerance)


@pytest.mark.parametrize("kind", ENDS)
def test_the_logits_of_a_part_are_there_behind_forward_at_every_cut(
    kind: str, folder: Path
) -> None:
    with end(kind, MOVES, folder) as link:
        device = host(link, MOVES, BOTH)
        device.start(MOVES.state, MOVES.images)
        for cut, upto in (("stem", True), ("layer1", True), ("layer1", False), ("layer2", True)):
            device.move(cut, upto=upto)
            reference = local(MOVES, BOTH)
            reference.move(cut, upto=upto)
            reference.load_weights(dict(device.state().weights))
            reference.place = device.state().place
            part = reference.forward(8, 8)
            device.forward(8, 8)
            found = device.floats(m.Region.LOGITS, 8 * 10).reshape(8, 10)
            assert part.count == 8
            np.testing.assert_allclose(found, reference.logits.numpy(), atol=1e-4)
            assert np.ptp(found) > 0.1
            device.backward(torch.zeros(8, *device.graph.shapes[device.graph.cut]))
            device.step()


CHOSEN = {
    "two runs": ([1, 1, 0, 1, 1, 1, 0, 0], [(0, 2), (3, 3)]),
    "the first": ([1, 0, 0, 0, 0, 0, 0, 0], [(0, 1)]),
    "the last": ([0, 0, 0, 0, 0, 0, 0, 1], [(7, 1)]),
    "every other": ([0, 1, 0, 1, 0, 1, 0, 1], [(1, 1), (3, 1), (5, 1), (7, 1)]),
    "all": ([1] * 8, [(0, 8)]),
    "none": ([0] * 8, []),
}


def choosing(monkeypatch: pytest.MonkeyPatch, chosen: list[int]) -> None:
    """The exit is unsure of these."""

    def unsure_of(logits: Tensor, above: float) -> Tensor:
        assert len(logits) == len(chosen)
        return torch.tensor(chosen, dtype=torch.bool)

    monkeypatch.setattr(device_module, "unsure_of", unsure_of)


@pytest.mark.parametrize("coded", CODED)
@pytest.mark.parametrize("title", CHOSEN)
def test_a_run_of_neighbours_is_read_at_once_and_nothing_else(
    title: str, coded: Kind, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, runs = CHOSEN[title]
    choosing(monkeypatch, chosen)
    with end("firmware", CASE, folder) as link, Recorder(link) as recorder:
        device = host(recorder, CASE, BOTH, coding=Coding(coded, coded, 0.4))
        device.unsure = 0.5
        device.start(CASE.state, CASE.images)
        recorder.sent.clear()
        part = device.forward(8, 8)
        asked = [m.unpack(f.code, f.body) for f in FrameReader().feed(b"".join(recorder.sent))]
        reads = [r for r in asked if isinstance(r, m.Read)]
        region = KIND_OF.get(coded, m.Region.CODED_ACTIVATIONS)
        size = device._up.size
        assert (reads[0].region, reads[0].offset, reads[0].length) == (m.Region.LOGITS, 0, 8 * 40)
        assert [(r.region, r.offset, r.length) for r in reads[1:]] == [
            (region, start * size, count * size) for start, count in runs
        ]
        mask = torch.tensor(chosen, dtype=torch.bool)
        plain = device.floats(m.Region.ACTIVATIONS, 8 * 12)
        expected = device._up.decode(device._up.encode(plain.reshape(8, 12)))[mask.numpy()]
        np.testing.assert_array_equal(part.activations.numpy().reshape(-1, 12), expected)
        reference = local(CASE, BOTH).forward(8, 8).labels
        assert part.labels.tolist() == reference[mask].tolist()
        assert part.count == 8


@pytest.mark.parametrize("coded", CODED)
@pytest.mark.parametrize("title", ["two runs", "none"])
@pytest.mark.parametrize("kind", ENDS)
def test_the_gradient_of_what_was_not_sent_is_zero_on_the_device(
    kind: str, title: str, coded: Kind, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, _ = CHOSEN[title]
    coding = Coding(gradient=coded, share=0.4)
    codec = coding.down(12)
    torch.manual_seed(2)
    sent = torch.randn(sum(chosen), 3, 2, 2)
    whole = torch.zeros(8, 3, 2, 2)
    whole[torch.tensor(chosen, dtype=torch.bool)] = sent
    states = []
    for by_hand in (False, True):
        with end(kind, CASE, folder) as link:
            device = host(link, CASE, BOTH, coding=coding)
            device.start(CASE.state, CASE.images)
            device.forward(8, 8)  # what its gradient leaves must not come again
            device.backward(torch.ones(8, 3, 2, 2))
            device.step()
            choosing(monkeypatch, chosen)
            device.unsure = None if by_hand else 0.5
            device.forward(8, 8)
            if by_hand:
                device.backward(whole)
            else:
                device.backward(sent if len(sent) else None)
            if kind == "python" and coded != "float32":
                code = device.read(m.Region.CODED_GRADIENT, 0, 8 * codec.size)
                assert code == codec.encode(whole.numpy().reshape(8, 12))
            device.step()
            states.append(device.state())
    assert differences(*states) == []


@pytest.mark.parametrize("coded", ["float16", "int8", "int4", "top-k"])
def test_the_code_of_a_gradient_of_zeros_has_a_scale_of_zero(coded: Kind) -> None:
    codec = Coding(gradient=coded, share=0.3).down(12)
    code = codec.encode(np.zeros((1, 12), np.float32))
    assert code[:4] == struct.pack("<f", 0.0)
    assert not codec.decode(code).any()


@pytest.mark.parametrize("coded", CODED)
def test_fewer_bytes_come_up_where_fewer_samples_are_sent(
    coded: Kind, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = {}
    for title in ("none", "the first", "two runs", "all"):
        choosing(monkeypatch, CHOSEN[title][0])
        with end("firmware", CASE, folder) as link:
            device = host(link, CASE, BOTH, coding=Coding(coded, coded, 0.4))
            device.unsure = 0.5
            device.start(CASE.state, CASE.images)
            device.forward(8, 8)
            taken[title] = device.traffic.activations_up
            content = 8 * 41 + sum(CHOSEN[title][0]) * device._up.size
        assert content < taken[title] < content + 60
    assert taken["none"] < taken["the first"] < taken["two runs"] < taken["all"]


def test_what_is_no_number_is_sent_so_that_the_server_sees_it(folder: Path) -> None:
    weights = {n: np.array(w) for n, w in CASE.state.weights.items()}
    weights["bottleneck.bias"][0] = np.nan
    with end("firmware", CASE, folder) as link:
        device: Device = host(link, CASE, BOTH)
        device.unsure = 0.5
        device.start(replace(CASE.state, weights=weights), CASE.images)
        part = device.forward(4, 4)
        assert len(part.labels) == 4
        assert part.activations.isnan().any()


# ---- whole runs ----

FLEET = """
name = "less"
rounds = 2
gradient = "{gradient}"
aggregate = "all"
exits = "upto"
strategy = "{strategy}"
entropy = 0.95

[model]
name = "resnet8"
width = 6

[data]
samples = 192

[[client]]
name = "process"
board = "posix"
cut = "layer1"
capacity = {capacity}
bottleneck = 2
bottleneck_stride = 2
send = "unsure"
codec = "int8"

[[client]]
name = "edge"
board = "python"
cut = "layer2"
bottleneck = 40

[[client]]
name = "here"
cut = "layer2"
send = "unsure"
"""


def test_the_plan_says_what_is_saved(workplace: Path) -> None:
    fleet = FLEET.format(gradient="both", strategy="averaging", capacity=16)
    Path("less.toml").write_text(fleet)
    planned = {c["client"]: c for c in json.loads(splitee("plan", "less.toml", "--json").out)}
    rows = {n: next(r for r in c["cuts"] if r["chosen"]) for n, c in planned.items()}
    figures = {
        n: (r["bytes_up_per_sample"], r["bytes_up_sure"], r["bytes_up_wide"])
        for n, r in rows.items()
    }
    # 2x4x4 int8 with their scale, a label, ten logits; 6x8x8 without a bottleneck
    assert figures["process"] == (4 + 32 + 1 + 40, 41, 4 + 384 + 1)
    assert figures["edge"] == (4 * 40 * 4 * 4 + 1, None, 4 * 12 * 4 * 4 + 1)
    assert figures["here"] == (4 * 12 * 4 * 4 + 1 + 40, 41, None)
    said = " ".join(splitee("plan", "less.toml").out.split())
    for line in (
        "its bottleneck of 2 channels, stride 2: 37 bytes up a sample, 389 without: 90% less",
        "its bottleneck of 40 channels, stride 1: 2,561 bytes up a sample, 769 without: it saves "
        "nothing",
        "a sample that its exit is sure of takes 41 bytes up",
    ):
        assert line in said


def test_the_plan_shows_where_a_stride_is_too_large(workplace: Path) -> None:
    text = 'name = "x"\n[model]\nwidth = 4\n[[client]]\nname = "a"\ncut = 1\nbottleneck = 1\n'
    Path("x.toml").write_text(text + "bottleneck_stride = 5\n")
    (planned,) = json.loads(splitee("plan", "x.toml", "--json").out)
    assert [row["fits"] for row in planned["cuts"]] == [True, True, False, False]
    assert planned["cuts"][2]["why"].startswith("bottleneck_stride = 5: the image at layer2 is 4x4")


@pytest.mark.parametrize(
    ("gradient", "strategy", "capacity"), [("both", "averaging", 16), ("local", "sequential", 5)]
)
def test_a_fleet_that_sends_less_trains_and_is_tested_again_from_its_checkpoint(
    gradient: str, strategy: str, capacity: int, workplace: Path
) -> None:
    fleet = FLEET.format(gradient=gradient, strategy=strategy, capacity=capacity)
    Path("less.toml").write_text(fleet)
    said = splitee("train", "less.toml")
    assert (said.code, said.err) == (0, "")
    summary = json.loads(Path("runs/less/summary.json").read_text())
    lines = [json.loads(t) for t in Path("runs/less/metrics.jsonl").read_text().splitlines()]
    passes = [e for e in lines if e["event"] == "ClientDone"]
    coded = {"process": 4 + 32, "edge": 4 * 40 * 16, "here": 4 * 12 * 16}
    for client in summary["clients"]:
        name = client["name"]
        mine = [e for e in passes if e["client"] == name]
        share = sum(e["sent"] for e in mine) / sum(e["samples"] for e in mine)
        assert share == 1 if name == "edge" else 0 < share < 1
        content = 1 + (0 if name == "edge" else 40) + share * coded[name]
        # frames, one for each run of neighbours
        assert content <= client["bytes_up_per_sample"] + 0.1 < 1.1 * content + 20
    answer = json.loads(splitee("eval", "runs/less", "--json").out)
    for tested, client in zip(answer["clients"], summary["clients"], strict=True):
        assert tested["exit_accuracy"] == pytest.approx(client["exit_accuracy"], abs=0.01)
        assert tested["server_accuracy"] == pytest.approx(client["server_accuracy"], abs=0.01)
