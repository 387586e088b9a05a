"""Clients behind a link whose exits learn from the deepest: in C, torch and ONNX Runtime alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from host_harness import EVERY_END, end, host
from splitee.client import Client, State
from splitee.errors import DeviceRefused
from step_harness import SETTINGS, case, local
from toolkit.networks import far

WITHOUT, CASE = case("resnet8"), case("resnet8", distills=True)
BOTH = replace(SETTINGS, exit_weight=0.3, server_weight=0.7, distill=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ends")


def sent(activations: Tensor) -> Tensor:
    """A server's gradient that follows from the activations."""
    return 0.01 * activations.cos()


def train(client: Client, steps: int) -> State:
    """Whole batches in two parts."""
    for _ in range(steps):
        for count in (5, 3):
            client.backward(sent(client.forward(count, 8).activations))
        client.step()
    return client.state()


@pytest.mark.parametrize("kind", EVERY_END)
def test_it_learns_what_a_client_of_this_process_learns(kind: str, folder: Path) -> None:
    expected = train(local(CASE, BOTH), 4)
    with end(kind, CASE, folder) as link:
        device = host(link, CASE, BOTH)
        device.start(CASE.state, CASE.images)
        found = train(device, 4)
    assert far(found.weights, expected.weights) == {}
    assert far(found.momentum, expected.momentum, 1e-4) == {}
    assert far(expected.weights, train(local(CASE, replace(BOTH, distill=0.0)), 4).weights)


@pytest.mark.parametrize("kind", EVERY_END)
def test_a_share_may_change_between_batches(kind: str, folder: Path) -> None:
    reference = local(CASE, BOTH)
    with end(kind, CASE, folder) as link:
        device = host(link, CASE, BOTH)
        device.start(CASE.state, CASE.images)
        for share in (0.5, 0.0, 1.0):
            for client in (device, reference):
                client.settings = replace(BOTH, distill=share)
            assert far(train(device, 1).weights, train(reference, 1).weights) == {}


@pytest.mark.parametrize("kind", EVERY_END)
def test_who_was_built_without_refuses_it(kind: str, folder: Path) -> None:
    with end(kind, WITHOUT, folder) as link:
        device = host(link, WITHOUT)
        device.start(WITHOUT.state, WITHOUT.images)
        with pytest.raises(DeviceRefused, match="it was built without distill"):
            device.settings = BOTH
