"""A device takes no step from what is not finite: held to it value by value, on a board too."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

from host_harness import differences
from splitee.errors import MissingTool, NotFinite
from splitee_exporters.c import to_c
from splitee_host.device import Device
from splitee_host.wire import messages as m
from step_harness import SETTINGS, case, device, planted

BOARDS = ("posix", "qemu-m4")
CASE = case("resnet8", moves=True)
GRAPH = CASE.build.graph
BOTH = replace(SETTINGS, exit_weight=0.3, server_weight=0.7, clip=0.5)

# The segment of these tests has a fault planted: the gradient of a weight with such a value becomes
# what stands behind it. The values are too small to matter otherwise.
MARKS = {
    2.0**-100: "__builtin_inff()",
    2.0**-101: "-__builtin_inff()",
    2.0**-102: '__builtin_nanf("")',
}


def source() -> str:
    """The case's segment.c with that fault at the end of its backward pass."""
    planted = "".join(
        f"for (size_t i = 0; i < {GRAPH.parameter_size}; i++) {{ if (weights[i] == {mark.hex()}f) "
        f"{{ segment.gradients[i] = {value}; }} }}\n"
        for mark, value in MARKS.items()
    )
    text, count = re.subn(r"(// backward_weight stem\.0\n.*\n)", rf"\1{planted}", to_c(CASE.build))
    assert count == 1
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("firmware")


def batch(running: Device) -> None:
    """A batch in two parts."""
    for count in (5, 3):
        part = running.forward(count, 8)
        running.backward(0.01 * part.activations.cos())
    running.step()


def held(running: Device) -> tuple[bytes, bytes, int]:
    """All that a step changes."""
    return (
        running.read(m.Region.WEIGHTS, 0, 4 * GRAPH.weight_size),
        running.read(m.Region.MOMENTUM, 0, 4 * GRAPH.parameter_size),
        running.counters().steps,
    )


def wrong(running: Device, what: str, place: int) -> str:
    """What is wrong with the answer to a batch with something that is not finite; "": nothing."""
    before = held(running)
    try:
        batch(running)
    except NotFinite as error:
        said = (str(error), error.place)
    else:
        return "it took the step"
    expected = (
        f'client "{running.name}": {what} is not finite: nothing was changed; take a smaller '
        "learning_rate or clip"
    )
    if said != (expected, place):
        return f"it said {said}"
    return "" if held(running) == before else "something was changed"


def marked(running: Device, name: str, index: int, mark: float) -> str:
    """What is wrong with the answer where a value of a parameter's gradient is not finite."""
    offset = 4 * (GRAPH.places[name] + index)
    weight = running.read(m.Region.WEIGHTS, offset, 4)
    running.write(m.Region.WEIGHTS, np.float32(mark).tobytes(), offset)
    found = wrong(running, f"the gradient of {name}", index)
    running.write(m.Region.WEIGHTS, weight, offset)
    return found


def with_an_infinite_loss(running: Device) -> str:
    """What is wrong with the answer where the loss alone is not finite."""
    name = "exits.layer2.linear.bias"
    offset = 4 * GRAPH.places[name]
    biases = running.read(m.Region.WEIGHTS, offset, 40)
    apart = np.where(np.arange(10) == 3, 3e38, -3e38).astype("<f4")  # their difference is infinite
    running.write(m.Region.WEIGHTS, apart.tobytes(), offset)
    found = wrong(running, "the loss", 0)
    running.write(m.Region.WEIGHTS, biases, offset)
    return found


def afterwards(running: Device) -> str:
    """What is wrong with batches behind one that was refused."""
    state = running.state()
    for _ in range(2):
        batch(running)
    learnt = running.state()
    running.load_state(state)  # which begins anew in any case
    for _ in range(2):
        batch(running)
    return "; ".join(differences(running.state(), learnt))


def at_another_cut(running: Device) -> str:
    """What is wrong where the values are in layers that take no part, or in the last that does."""
    running.move("layer1", upto=False)
    still = ("exits.stem.linear.weight", "exits.stem.linear.bias", "layer2.0.conv1.weight")
    offsets = [4 * GRAPH.places[name] for name in still]
    weights = [running.read(m.Region.WEIGHTS, offset, 4) for offset in offsets]
    for offset in offsets:
        running.write(m.Region.WEIGHTS, np.float32(2.0**-100).tobytes(), offset)
    steps = running.counters().steps
    batch(running)
    taken = running.counters().steps - steps
    for offset, weight in zip(offsets, weights, strict=True):
        running.write(m.Region.WEIGHTS, weight, offset)
    last = GRAPH.parameters[name := "exits.layer1.linear.bias"].size - 1
    found = marked(running, name, last, 2.0**-102)
    running.move("layer2", upto=True)
    return found if taken == 1 else "what takes no part kept it from a step"


Scene = Callable[[Device], str]
SCENES: dict[str, Scene] = {}
for _i, _name in enumerate(GRAPH.parameters):
    for _index in (0, GRAPH.parameters[_name].size - 1):
        _mark = list(MARKS)[(_i + (_index > 0)) % 3]
        SCENES[f"{_name}[{_index}]"] = partial(marked, name=_name, index=_index, mark=_mark)
SCENES |= {
    "the loss": with_an_infinite_loss,
    "another cut": at_another_cut,
    "afterwards": afterwards,
}


def play(title: str, running: Device) -> str:
    """What is wrong with the scene."""
    try:
        return SCENES[title](running)
    except NotFinite as error:
        return str(error)


@cache
def played(board: str, folder: Path) -> dict[str, str]:
    """All scenes, on one running firmware, which has momentum: what is wrong with each."""
    try:
        with device(CASE, board, folder / board, BOTH, source=source()) as running:
            batch(running)
            return {title: play(title, running) for title in SCENES}
    except MissingTool as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("title", SCENES)
@pytest.mark.parametrize("board", BOARDS)
def test_refuses_the_step_and_changes_nothing(board: str, title: str, folder: Path) -> None:
    assert played(board, folder)[title] == ""


# A fault in the firmware, and a scene that must notice it: (file, text, its change, scene).
FAULTS = {
    "the update comes first": (
        "step.c",
        "    float squares = 0;\n",
        "    float squares = 0;\n"
        "    step_update(segment.weights, NULL, segment.gradients, 1, s, 1);\n",
        "layer2.0.conv1.weight[0]",
    ),
    "infinities pass": (
        "step.c",
        "(bits & exponent) == exponent",
        "(bits & 0x7FFFFFFFu) > exponent",
        "stem.0.weight[0]",
    ),
    "the last stage is not looked at": (
        "step.c",
        "        if (*bad < r.end) {\n",
        "        if (*bad < r.end && i < cut) {\n",
        "layer2.0.conv1.weight[0]",
    ),
    "the last value of a stage is not looked at": (
        "step.c",
        "if (*bad < r.end) {",
        "if (*bad + 1 < r.end) {",
        "exits.stem.linear.bias[9]",
    ),
    "exits that do not learn are looked at": (
        "step.c",
        "step_exit_learns(stage, cut, upto) ?",
        "upto || stage <= cut ?",
        "another cut",
    ),
    "the loss is not looked at": (
        "step.c",
        "step_finite(&loss, 1) == 0",
        "step_finite(&loss, 1) > 1",
        "the loss",
    ),
    "places are counted from the stage": (
        "step.c",
        "if (*bad < r.end) {\n",
        "if (*bad < r.end) {\n            *bad -= r.first;\n",
        "layer1.0.conv1.weight[0]",
    ),
    "a step is counted": (
        "device.c",
        "    if (!taken) {\n",
        "    if (!taken) {\n        place.steps++;\n",
        "stem.0.weight[0]",
    ),
    "the batch goes on": (
        "device.c",
        "        refuse(ERROR_NOT_FINITE, pass.bad);\n",
        "        refuse(ERROR_NOT_FINITE, pass.bad);\n        phase = ACCUMULATED;\n",
        "afterwards",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault: str, folder: Path) -> None:
    file, old, new, title = FAULTS[fault]
    with (
        planted(folder, f"core/{file}", old, new),
        device(CASE, "posix", folder / "planted", BOTH, source=source()) as running,
    ):
        batch(running)
        marked(running, "stem.0.weight", 1, 2.0**-102)
        assert play(title, running) != ""
