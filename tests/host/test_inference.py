"""Answers by early exits: clients that ask `splitee serve`, held to both halves in one place."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_harness import splitee
from splitee import calibrate, data
from splitee.assemble import Assembly
from splitee.certainty import entropy
from splitee.codec import Codec, Coding
from splitee.edge import Deployed
from splitee.errors import DeviceRefused, LinkClosed, LinkError, Mismatch
from splitee.fleet import read
from splitee.ops import Array
from splitee.runs import Run
from splitee.train import Answers, evaluate
from splitee_host import boards, early, keys
from splitee_host.answering import CAPACITY, AnsweringServer, Half, _Answers
from splitee_host.asking import AskedServer, Asker, sent_bytes
from splitee_host.link import open_link, serve_tcp
from splitee_host.wire import messages as m
from splitee_host.wire import stream
from splitee_host.wire.frame import Frame

# The servers' weights are not averaged, so that each client has to be completed by its own. In
# another order than that of their names, by which the wire counts them.
FLEET = """
name = "answers"
rounds = 2
period = 9
exits = "upto"
[model]
width = 4
norm = "group"
[data]
samples = 256
held_out = 300
[[client]]
name = "plain"
cut = "stem"
[[client]]
name = "coded"
cut = "layer1"
codec = "int8"
board = "python"
[[client]]
name = "narrow"
cut = "layer2"
bottleneck = 3
codec = "top-k"
capacity = 1
"""
NAMES = ("plain", "coded", "narrow")
SAMPLES = 48


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run, which is the current one."""
    folder = tmp_path_factory.mktemp("inference")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # the client in another process learns the same here
        Path("fleet.toml").write_text(FLEET.replace('board = "python"', ""))
        assert splitee("train", "fleet.toml").code == 0
        Path("runs/answers/fleet.toml").write_text(FLEET)
        yield folder


@contextmanager
def serving(*words: str | Path) -> Iterator[subprocess.Popen[str]]:
    """`splitee serve` in a process of its own."""
    command = [sys.executable, "-m", "splitee_host.cli", "serve", *map(str, words)]
    with subprocess.Popen(
        [*command, "--listen", "tcp://127.0.0.1:0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[str]:
    with serving("runs/answers") as process:
        yield address(process)


def said_as_json(*words: str | Path) -> Any:
    said = splitee(*words, "--json")
    assert said.code == 0, said.err
    return json.loads(said.out)


def in_one_place(folder: Path) -> dict[str, Answers]:
    """What each client and its own server say, without any link."""
    run = Run(folder)
    known = boards.load_boards()
    assembly = Assembly(read(run.fleet_file), lambda name: boards.look_up(known, name).for_assembly)
    checkpoint = run.load()
    clients = [assembly.local(member) for member in assembly.members]
    strategy = assembly.strategy(clients)
    strategy.load(checkpoint.servers)
    for client, member in zip(clients, assembly.members, strict=True):
        client.start(checkpoint.states[member.name], member.images)
    images = assembly.dataset.test[:SAMPLES]
    return {c.name: evaluate(c, strategy.server(c.name), images) for c in clients}


def between(entropies: Array) -> float:
    """A threshold in the middle of entropies, and apart from them."""
    middle = np.sort(entropies)[len(entropies) // 4 : -len(entropies) // 4]
    widest = int(np.argmax(np.diff(middle)))
    return float(middle[widest : widest + 2].mean())


@pytest.mark.parametrize("name", NAMES)
def test_a_client_answers_as_both_halves_do_in_one_place(name: str, server: str) -> None:
    answers = in_one_place(Path("runs/answers"))[name]
    evaluated = said_as_json("eval", "runs/answers", "--samples", str(SAMPLES))["clients"]
    (told,) = [c for c in evaluated if c["client"] == name]
    assert told["temperature"] != 1
    entropies = entropy(answers.exit_logits, told["temperature"])
    threshold = between(entropies)
    words = ("--samples", str(SAMPLES), "--entropy", str(threshold))
    found = said_as_json(
        "client", "runs/answers", "--infer", "--name", name, "--server", server, *words
    )
    unsure = entropies > threshold
    assert 0.2 < unsure.mean() < 0.8
    expected = np.where(unsure, answers.server_logits.argmax(1), answers.exit_logits.argmax(1))
    assert [a["class"] for a in found["answers"]] == expected.tolist()
    assert [a["answered"] for a in found["answers"]] == ["server" if u else "exit" for u in unsure]
    assert [a["entropy"] for a in found["answers"]] == pytest.approx(entropies, abs=1e-5)
    evaluated = said_as_json("eval", "runs/answers", *words)["clients"]
    (same,) = [c for c in evaluated if c["client"] == name]
    assert found["accuracy"] == pytest.approx(same["accuracy"])
    assert found["share_at_exit"] == pytest.approx(same["share_at_exit"])
    assert found["at_server"] == unsure.sum()


def test_the_server_of_another_client_answers_otherwise(place: Path) -> None:
    """Otherwise the test above could not tell whose half answered."""
    found = in_one_place(Path("runs/answers"))
    assert not np.allclose(found["plain"].server_logits, found["coded"].server_logits, atol=0.1)


def test_bytes_are_those_that_eval_counts(server: str) -> None:
    # one sample at a time, and every one of them is sent
    found = said_as_json(
        "client", "runs/answers", "--infer", "--name", "narrow", "--server", server,
        "--samples", "20", "--entropy", "0",
    )  # fmt: skip
    assert found["at_server"] == 20
    rows = said_as_json("eval", "runs/answers", "--samples", "20")["clients"]
    (mine,) = [row for row in rows if row["client"] == "narrow"]
    counted = mine["sweep"][0]["bytes_sent"]
    opening = sum(
        stream.size(len(message.pack()), keyed=False)
        for message in (m.Hello(0, 0), m.Select(0, 0), m.Coding(0, 0, 0))
    )
    assert found["bytes_sent"] - opening == 20 * counted


def test_without_a_server_the_exit_answers_and_says_where_it_is_unsure(place: Path) -> None:
    said = splitee(
        "client", "runs/answers", "--infer", "--name", "plain", "--samples", "20", "--entropy", "0"
    )
    assert said.code == 0
    *lines, summary = said.out.splitlines()
    assert [line.split()[1] for line in lines] == [str(i) for i in range(20)]
    assert all(line.endswith("exit, unsure") for line in lines)
    assert "unsure of 20 more, which no server was there for" in summary


def test_images_come_from_a_file(server: str) -> None:
    images = data.load("digits").test[:5]
    np.savez("five.npz", x=images.x)
    words = ("client", "runs/answers", "--infer", "--name", "plain", "--server", server)
    found = said_as_json(*words, "--images", "five.npz")
    assert found["answers"] == said_as_json(*words, "--samples", "5")["answers"]
    assert "accuracy" not in found  # nobody said what they are


def test_ctrl_c_ends_a_server_that_clients_are_connected_to(place: Path) -> None:
    with serving("runs/answers") as process:
        url = address(process)
        words = ("--samples", "9", "--entropy", "0")
        said_as_json(
            "client", "runs/answers", "--infer", "--name", "coded", "--server", url, *words
        )
        host, port = url.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port))):
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in err
        assert {tuple(line.split()[:2]) for line in out.splitlines()[1:]} >= {
            ("coded", "9"), ("plain", "0")
        }  # fmt: skip


def test_a_client_with_a_key_asks_under_it_and_not_otherwise(place: Path) -> None:
    shutil.copytree("runs/answers", "keyed")
    assert splitee("keys", "keyed/fleet.toml").code == 0  # for the one in a process of its own
    with serving("keyed") as process:
        words = ("--infer", "--server", address(process), "--samples", "6", "--entropy", "0")
        for name in ("coded", "plain"):
            assert said_as_json("client", "keyed", "--name", name, *words)["at_server"] == 6
        said = splitee("client", "keyed", "--name", "coded", *words, "--auth", "none")
        assert said.code == 1
        assert "is answered under its own alone: bring its line" in " ".join(said.err.split())
        other = Path("other.keys.toml")
        keys.create(other, ["coded"])
        said = splitee("client", "keyed", "--name", "coded", *words, "--keys", other)
        assert said.code == 1
        assert "hung up at hello: is it `splitee serve`, with the same key" in " ".join(
            said.err.split()
        )


# ---- what is refused ----


def test_a_client_of_another_checkpoint_is_refused(server: str) -> None:
    Path("again.toml").write_text(FLEET.replace("rounds = 2", "rounds = 1\nseed = 5"))
    text = Path("again.toml").read_text().replace('board = "python"', "")
    Path("again.toml").write_text(text)
    assert splitee("train", "again.toml", "--runs", "other").code == 0
    said = splitee("client", "other/answers", "--infer", "--name", "plain", "--server", server)
    assert said.code == 1
    words = " ".join(said.err.split())
    assert "the server on " in words
    assert "it holds checkpoint " in words
    assert "serve the run that this client is of" in words


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no name": (("runs/answers",), "--name says which client this is: there are plain, coded"),
    "no such client": (("runs/answers", "--name", "far"), 'no client "far": there are plain'),
    "a fleet file": (("fleet.toml", "--name", "plain"), "a client has to be trained: name the"),
    "no run": (("nowhere", "--name", "plain"), "a client has to be trained"),
    "no server": (
        ("runs/answers", "--name", "plain", "--server", "tcp://127.0.0.1:9"),
        "no server at tcp://127.0.0.1:9: cannot connect",
    ),
    "a board without firmware": (
        ("runs/answers", "--name", "plain", "--device"),
        "torch runs no firmware: leave --device out",
    ),
}


@pytest.mark.parametrize("title", REFUSED)
def test_infer_refuses(title: str, place: Path) -> None:
    arguments, words = REFUSED[title]
    said = splitee("client", *arguments, "--infer")
    assert said.code == 1
    assert words in " ".join(said.err.split())


def test_serve_refuses_what_is_no_run_and_a_network_without_keys(place: Path) -> None:
    said = splitee("serve", "nowhere")
    assert said.code == 1
    assert "is nowhere the folder of a run?" in " ".join(said.err.split())
    said = splitee("serve", "runs/answers", "--listen", "tcp://0.0.0.0:0")
    assert said.code == 1
    assert "others are on that network, too: run `splitee keys" in " ".join(said.err.split())


# ---- the wire: the server's half as a device ----

SHAPE = (2, 3)
WEIGHTS = np.arange(24, dtype=np.float32).reshape(6, 4)


def half(client: str, number: int, key: bytes | None = None) -> Half:
    return Half(client, number, key, 6, lambda x: np.asarray(x @ (number * WEIGHTS)))


def deployed(client: str = "a", number: int = 1, codec: Coding | None = None) -> Deployed:
    return Deployed(client, number, 77, "stem", 0.5, 1.0, codec or Coding(), 6, 4)


@contextmanager
def answering(*halves: Half, port: int = 0) -> Iterator[str]:
    """A server of these halves in a thread: its address."""
    server = AnsweringServer(halves, 77, say=lambda text: None)
    with serve_tcp(port=port) as listener:
        thread = threading.Thread(target=server.serve, args=(listener,))
        thread.start()
        try:
            yield listener.url
        finally:
            listener.close()
            thread.join()


def connected(url: str, way: Deployed, key: bytes | None = None) -> AskedServer:
    server = AskedServer(open_link(url), way, key=key)
    try:
        server.begin()
    except BaseException:
        server.close()
        raise
    return server


@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "int4", "top-k"])
def test_what_crosses_is_what_the_codec_makes_of_it(kind: Any) -> None:
    coding = Coding(kind, share=0.4)
    x = np.random.default_rng(0).normal(0, 1, (2 * CAPACITY + 3, 2, 3)).astype(np.float32)
    with answering(half("b", 2), half("a", 1)) as url:
        for way in (deployed("a", 1, coding), deployed("b", 2, coding)):
            asked = connected(url, way)
            found = asked.logits(x)
            asked.close()
            codec = way.codec
            arrived = codec.decode(codec.encode(x.reshape(len(x), 6)))
            np.testing.assert_allclose(found, arrived @ (way.number * WEIGHTS), rtol=1e-5)


def test_several_clients_are_answered_at_once() -> None:
    halves = [half(str(number), number) for number in range(1, 7)]
    everyone = threading.Barrier(len(halves))

    def ask(way: Deployed) -> bool:
        rng, right = np.random.default_rng(way.number), True
        asked = connected(url, way)
        everyone.wait(60)  # all of them are connected by now
        for _ in range(20):
            x = rng.normal(0, 1, (5, *SHAPE)).astype(np.float32)
            expected = x.reshape(5, 6) @ (way.number * WEIGHTS)
            right &= np.allclose(asked.logits(x), expected, rtol=1e-4, atol=1e-4)
        asked.close()
        return right

    with answering(*halves) as url, ThreadPoolExecutor(len(halves)) as pool:
        assert all(pool.map(ask, [deployed(h.client, h.number) for h in halves]))


def test_a_key_is_one_clients_alone() -> None:
    own, other = bytes(range(32)), bytes(range(1, 33))
    with answering(half("a", 1, own), half("b", 2, other), half("c", 3)) as url:
        for way, key in (("a", own), ("b", other), ("c", None)):
            number = ord(way) - ord("a") + 1
            asked = connected(url, deployed(way, number), key)
            assert asked.logits(np.ones((1, *SHAPE), np.float32)).shape == (1, 4)
            asked.close()
        for number, key in ((2, own), (1, None), (3, other)):
            with pytest.raises(DeviceRefused, match="is answered under its own alone"):
                connected(url, deployed("x", number), key)
        with pytest.raises(LinkClosed, match="hung up at hello: is it `splitee serve`, with the"):
            connected(url, deployed(), bytes(32))


def test_a_training_host_s_key_does_not_ask(tmp_path: Path) -> None:
    key = bytes(range(32))
    with answering(half("a", 1, keys.for_answers(key))) as url:
        with pytest.raises(LinkClosed):
            connected(url, deployed(), key)
        connected(url, deployed(), keys.for_answers(key)).close()


def test_who_does_not_speak_the_wire_is_left() -> None:
    with answering(half("a", 1)) as url:
        host, port = url.removeprefix("tcp://").split(":")
        for words in (b"GET / HTTP/1.1\r\n\r\n\0", b"x" * 5000):
            with socket.create_connection((host, int(port)), timeout=30) as rogue:
                rogue.sendall(words)
                assert rogue.recv(1) == b""
        connected(url, deployed()).close()


WRONG: dict[str, tuple[list[m.Message], m.Refused]] = {
    "nobody's": ([m.Infer(1)], m.Refused(m.Error.OUT_OF_ORDER, 0)),
    "nobody's codec": ([m.Coding(0, 0, 0)], m.Refused(m.Error.OUT_OF_ORDER, 0)),
    "no such client": ([m.Select(9, 0)], m.Refused(m.Error.NO_SUCH_CUT, 1)),
    "no such codec": ([m.Select(1, 0), m.Coding(9, 0, 0)], m.Refused(m.Error.BAD_CODEC, 9)),
    "none at once": ([m.Select(1, 0), m.Infer(0)], m.Refused(m.Error.TOO_MANY_SAMPLES, CAPACITY)),
    "too many": (
        [m.Select(1, 0), m.Infer(CAPACITY + 1)],
        m.Refused(m.Error.TOO_MANY_SAMPLES, CAPACITY),
    ),
    "a code that is none": (
        [m.Select(1, 0), m.Coding(m.Codec.TOP_K, 0, 2), m.Infer(1)],  # indices 0, 0 do not rise
        m.Refused(m.Error.BAD_CODE, 0),
    ),
    "more than there is": (
        [m.Select(1, 0), m.Write(m.Region.CODED_ACTIVATIONS, CAPACITY * 24 - 1, b"..")],
        m.Refused(m.Error.OUT_OF_RANGE, CAPACITY * 24),
    ),
    "answers that there are not": (
        [m.Select(1, 0), m.Read(m.Region.LOGITS, 0, 4)],
        m.Refused(m.Error.OUT_OF_RANGE, 0),
    ),
    "weights": (
        [m.Read(m.Region.WEIGHTS, 0, 4)],
        m.Refused(m.Error.NO_SUCH_REGION, m.Region.WEIGHTS),
    ),
    "training": ([m.Step()], m.Refused(m.Error.UNKNOWN_MESSAGE, m.Step.CODE)),
    "an answer": ([m.Done()], m.Refused(m.Error.UNKNOWN_MESSAGE, m.Done.CODE)),
}


@pytest.mark.parametrize("title", WRONG)
def test_the_server_refuses(title: str) -> None:
    requests, refused = WRONG[title]
    with answering(half("a", 1)) as url:
        asked = AskedServer(open_link(url), deployed())
        asked.hello()
        frames = [asked.exchange.ask([request])[0] for request in requests]
        asked.close()
    assert m.unpack(frames[-1].code, frames[-1].body) == refused
    assert all(frame.code != m.Refused.CODE for frame in frames[:-1])


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*(r.CODE for r in m.REQUESTS[1:]), 0x80, 0xEE]),
            st.binary(max_size=40),
        ),
        max_size=8,
    )
)
def test_whatever_it_is_asked_it_answers(requests: list[tuple[int, bytes]]) -> None:
    silent = Half("a", 1, None, 6, lambda x: np.zeros((len(x), 4)))
    answers = _Answers([silent], 77, None, threading.Lock())
    for code, body in [(m.Select.CODE, m.Select(1, 0).pack()), *requests]:
        answer = answers.act(Frame(code, 1, 1, body))
        assert type(answer) in m.ANSWERS


def test_another_session_is_nobodys_again() -> None:
    with answering(half("a", 1)) as url:
        asked = connected(url, deployed())
        asked.hello()
        with pytest.raises(DeviceRefused, match="Infer refused"):
            asked.request(m.Infer(1), m.Done)
        asked.close()


class Sure:
    """An exit whose logits are those of the images' first pixel, and activations of ones."""

    capacity = 2

    def infer(self, images: Array) -> Array:
        self._count = len(images)
        logits = np.zeros((len(images), 4), np.float32)
        logits[:, 1] = images[:, 0, 0, 0]
        return logits

    def activations(self, chosen: Array) -> Array:
        return np.ones((int(chosen.sum()), *SHAPE), np.float32)


def test_while_a_server_is_gone_the_exit_answers_and_then_it_is_asked_again() -> None:
    images = np.zeros((8, 1, 1, 1), np.uint8)
    images[::2] = 50  # of those the exit is sure
    told: list[str] = []
    with answering(half("a", 1)) as url:
        port = int(url.rsplit(":", 1)[1])
        asker = Asker(lambda: connected(url, deployed()), told.append)
        parts = early.answer(Sure(), asker, images, 0.5)
        found = [next(parts)]
    found.append(next(parts))
    found.append(next(parts))
    sent = asker.bytes_sent
    with answering(half("a", 1), port=port):
        found.append(next(parts))
        asker.close()
    assert [part.served.tolist() for part in found] == [
        [False, True], [False, False], [False, False], [False, True]
    ]  # fmt: skip
    assert [part.classes.tolist() for part in found] == [[1, 3], [1, 0], [1, 0], [1, 3]]
    assert all(part.unsure.tolist() == [False, True] for part in found)
    assert ["until it is back, the exit answers alone" in t for t in told] == [True, False]
    assert told[1] == "the server is back"
    assert asker.bytes_sent > sent > 0


def test_a_server_that_comes_back_as_another_ends_it() -> None:
    way = deployed()
    images = np.zeros((4, 1, 1, 1), np.uint8)
    with answering(half("a", 1)) as url:
        port = int(url.rsplit(":", 1)[1])
        asker = Asker(lambda: connected(url, way), lambda text: None)
        parts = early.answer(Sure(), asker, images, 0.5)
        next(parts)
    way = Deployed("a", 1, 78, "stem", 0.5, 1.0, Coding(), 6, 4)
    one = np.ones((1, *SHAPE), np.float32)
    with answering(half("a", 1), port=port):
        assert asker(one) is None  # it finds out that the first is gone
        with pytest.raises(Mismatch, match="holds checkpoint"):
            asker(one)
    asker.close()


def test_a_client_that_no_number_reaches_is_refused() -> None:
    with (
        answering(half("a", 1)) as url,
        pytest.raises(LinkError, match="is number 256 of its run, and a server tells 255 apart"),
    ):
        connected(url, deployed("z", 256))


def test_a_sample_s_bytes_are_those_of_its_frames() -> None:
    # float32: 100 + 5 of Write, Infer 2, Read 9; 4 of length and 5 of header, with a key 16 of tag
    sizes = [100 + 5, 2, 9]
    assert sent_bytes(Codec("float32", 25), 10, keyed=False) == sum(s + 9 for s in sizes)
    assert sent_bytes(Codec("float32", 25), 10, keyed=True) == sum(s + 25 for s in sizes)
    two = Codec("float32", 1_500_000)  # more than a frame
    assert sent_bytes(two, 10, keyed=False) == 6_000_000 + 2 * (5 + 9) + (2 + 9) + (9 + 9)


# ---- temperatures ----


def test_temperatures_are_of_images_that_nobody_was_trained_on(place: Path) -> None:
    run = Run(Path("runs/answers"))
    said_as_json("eval", run.folder, "--samples", "8")
    stored = json.loads((run.folder / "calibration.json").read_text())
    known = boards.load_boards()
    assembly = Assembly(read(run.fleet_file), lambda name: boards.look_up(known, name).for_assembly)
    trained_on = {x.tobytes() for member in assembly.members for x in member.images.x}
    held_out = assembly.held_out
    assert len(held_out) == 300
    seen = [x.tobytes() in trained_on for x in held_out.x]
    assert sum(seen) < 5  # images that are there twice
    client = assembly.local(assembly.member("plain"))
    client.load_weights(run.load().states["plain"].weights)
    _, logits = client.infer(held_out.x)
    expected = calibrate.fit(logits.numpy(), held_out.y)
    told = stored["exits"]["plain"]
    assert told["temperature"] == pytest.approx(expected, rel=1e-4)
    assert told["images"] == 300
    assert told["loss"] < told["loss_before"]


def test_temperatures_are_of_one_checkpoint(place: Path) -> None:
    path = Path("runs/answers/calibration.json")
    words = ("eval", "runs/answers", "--samples", "8")
    first = said_as_json(*words)["clients"][0]["temperature"]
    stored = json.loads(path.read_text())
    stored["exits"]["plain"]["temperature"] = 3.5
    path.write_text(json.dumps(stored))
    assert said_as_json(*words)["clients"][0]["temperature"] == 3.5
    for spoilt in (json.dumps({**stored, "checkpoint": "00000000"}), "{", "[]"):
        path.write_text(spoilt)
        assert said_as_json(*words)["clients"][0]["temperature"] == first


def test_without_images_that_are_held_out_nothing_is_calibrated(place: Path) -> None:
    text = FLEET.replace("held_out = 300", "").replace("rounds = 2", "rounds = 1")
    Path("all.toml").write_text(text.replace('board = "python"', ""))
    assert splitee("train", "all.toml", "--runs", "all").code == 0
    said = splitee("eval", "all/answers", "--samples", "8")
    assert "exits are not calibrated: no training images are held out" in said.out
    found = said_as_json("eval", "all/answers", "--samples", "8")["clients"]
    assert {c["temperature"] for c in found} == {1.0}


def test_eval_leaves_a_table_and_a_picture(place: Path) -> None:
    run = Path("runs/answers")
    said = splitee("eval", run, "--rate", "115200")
    assert said.code == 0
    lines = (run / "eval.csv").read_text().splitlines()
    assert lines[0].startswith("client,threshold,share_at_exit,accuracy_at_exit,")
    assert {line.split(",")[0] for line in lines[1:]} == set(NAMES)
    assert (run / "eval.png").read_bytes().startswith(b"\x89PNG")
    rows = [line for line in said.out.splitlines() if line.startswith("│")]
    assert max(map(len, said.out.splitlines())) <= 160
    assert sum(row.startswith("│ narrow") for row in rows) == 2
