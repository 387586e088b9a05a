"""8-bit ONNX files: how near they come to PyTorch with weights that have learnt the digits."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from splitee import data, zoo
from splitee.capture import capture
from splitee.client import LocalClient, Settings
from splitee.errors import ExportError
from splitee.exits import Exit
from splitee.model import Network, Segment
from splitee.ops import Array
from splitee.place import Build

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from splitee_exporters.manifest import INT8_TOLERANCE, MEAN_SQUARE
from splitee_exporters.onnx import read, segment_to_onnx, verify
from splitee_exporters.onnx_int8 import segment_to_int8

DIGITS = data.load("digits")


@cache
def trained(norm: str) -> tuple[Build, dict[str, Array]]:
    """A segment that has learnt the digits, and what PyTorch makes of the test images."""
    torch.manual_seed(3)
    network = Network(zoo.build("resnet8", width=8, norm=norm, channels=1), DIGITS.shape)
    cut = network.cut("layer1")
    segment = Segment(network, cut, {cut.name: Exit((8, 8, 8), 10)})
    client = LocalClient(
        "one", segment, Settings(0.1), capacity=32, scale=DIGITS.scale, shift=DIGITS.shift
    )
    optimizer = torch.optim.SGD(segment.parameters(), lr=0.05, momentum=0.9)
    x = torch.tensor(DIGITS.train.x) * DIGITS.scale[0] + DIGITS.shift[0]
    y = torch.tensor(DIGITS.train.y).long()
    for _ in range(4):
        for batch in torch.split(torch.randperm(len(y)), 32):
            optimizer.zero_grad()
            _, (logits,) = segment(x[batch])
            torch.autograd.backward(F.cross_entropy(logits, y[batch]))
            optimizer.step()
    build = Build(capture(segment, 10), 8, False, 1, DIGITS.scale, DIGITS.shift)
    activations, logits = client.infer(DIGITS.test.x)
    return build, {"activations": activations.numpy(), "logits": logits.numpy()}


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_eight_bits_answer_as_pytorch_does(norm: str, caplog: pytest.LogCaptureFixture) -> None:
    build, expected = trained(norm)
    assert (expected["logits"].argmax(1) == DIGITS.test.y).mean() > 0.9
    exported = segment_to_int8(build, DIGITS.train.x)
    found = verify(
        exported,
        DIGITS.test.x,
        expected,
        "PyTorch",
        batches=(1, 50),
        tolerance=INT8_TOLERANCE,
        measure=MEAN_SQUARE,
    )
    assert found.same_class is not None
    assert found.same_class >= 0.98
    assert found.error > 1e-4  # it is no float32 in disguise
    assert not caplog.records  # ONNX Runtime has nothing to complain of


def test_it_holds_integers_and_no_batch_norm() -> None:
    build, _ = trained("batch")
    exported = segment_to_int8(build, DIGITS.train.x[:64])
    nodes = exported.nodes
    assert "BatchNormalization" not in nodes
    assert nodes["QuantizeLinear"] > 0
    assert "BatchNormalization" in segment_to_onnx(build).nodes
    model = read(exported)
    assert model.producer_name == "hetero-splitee"
    assert {p.key: p.value for p in model.metadata_props} == {
        "graph_checksum": f"{build.graph.checksum():08x}"
    }


def test_calibration_with_other_images_is_seen() -> None:
    build, expected = trained("batch")
    dark = np.zeros_like(DIGITS.train.x[:64])
    with pytest.raises(ExportError, match=r"^segment-int8\.onnx: \w+: off by"):
        verify(
            segment_to_int8(build, dark),
            DIGITS.test.x,
            expected,
            "PyTorch",
            tolerance=INT8_TOLERANCE,
            measure=MEAN_SQUARE,
        )


def test_refuses_to_calibrate_with_nothing() -> None:
    build, _ = trained("batch")
    with pytest.raises(ExportError, match="there is nothing to calibrate with: give it images"):
        segment_to_int8(build, DIGITS.train.x[:0])


def test_the_same_calibration_makes_the_same_file() -> None:
    build, _ = trained("group")
    first, second = (segment_to_int8(build, DIGITS.train.x[:64]) for _ in range(2))
    assert first.data == second.data
