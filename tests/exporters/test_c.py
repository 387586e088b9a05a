"""segment.c: what is written into it, and what is refused by name."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from splitee import zoo
from splitee.capture import capture
from splitee.errors import ModelError
from splitee.exits import Exit
from splitee.model import Network, Segment
from splitee.place import Build
from splitee_exporters.c import to_c
from step_harness import case


def build_of(model: nn.Module, shape: tuple[int, int, int], cut: str | int) -> Build:
    network = Network(model, shape)
    place = network.cut(cut)
    channels, height, width = place.shape
    exits = {place.name: Exit((channels, height, width), 3)}
    graph = capture(Segment(network, place, exits), 3)
    return Build(graph, 4, True, 10, (1.0,) * shape[0], (0.0,) * shape[0])


def test_weights_stand_in_the_file_bit_for_bit() -> None:
    build = case("resnet8").build
    text = to_c(build)
    body = text.split("static float weights")[1].split("{", 1)[1].split("}", 1)[0]
    values = np.array([float.fromhex(v.strip().rstrip("f")) for v in body.split(",")], np.float32)
    assert values.tobytes() == build.graph.flatten(build.graph.weights).tobytes()


def test_the_same_segment_is_the_same_text() -> None:
    assert to_c(case("resnet8").build) == to_c(case("resnet8").build)


def test_every_step_of_the_schedule_is_a_case() -> None:
    build = case("resnet8").build
    cases = [int(n) for n in re.findall(r"^ +case (\d+):", to_c(build), flags=re.MULTILINE)]
    assert cases == list(range(len(build.schedule.steps)))


def test_no_momentum_takes_no_memory() -> None:
    build = replace(case("resnet8").build, momentum=False)
    assert ".momentum = NULL," in to_c(build)
    assert build.arena_bytes < case("resnet8").build.arena_bytes


def test_the_first_layer_computes_no_gradient_of_its_input() -> None:
    assert "conv2d_backward(NULL, " in to_c(case("resnet8").build)


def test_refuses_batch_norm_by_name() -> None:
    model = zoo.build("resnet8", width=4, norm="batch", channels=1)
    with pytest.raises(ModelError, match=r"stem\.1: .* no batch_norm.*norm = \"group\""):
        to_c(build_of(model, (1, 8, 8), "stem"))


def test_refuses_grouped_convolutions_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.LazyLinear(3)
    )
    model(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ModelError, match=r"^0: .*grouped convolution"):
        to_c(build_of(model, (2, 8, 8), 1))
