"""Folding batch norms into convolutions: the same function, and what may not be folded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from splitee.capture import capture
from splitee.client import Settings
from splitee.fold import fold
from step_harness import case, local
from toolkit.networks import far


@pytest.mark.parametrize("kind", ["resnet8-batch", "resnet18-batch", "vgg", "mobilenet"])
def test_a_folded_graph_computes_what_pytorch_does(kind: str) -> None:
    the_case = case(kind)
    build = the_case.build
    folded = fold(build.graph)
    activations, logits = local(the_case, Settings(0.1)).infer(the_case.images.x)
    scale, shift = (
        np.array(v)[:, None, None] for v in (the_case.build.scale, the_case.build.shift)
    )
    found = folded.run(the_case.images.x * scale + shift)
    assert not far(
        {"activations": found[folded.cut], "logits": found[folded.logits]},
        {"activations": activations.numpy(), "logits": logits.numpy()},
    )
    assert not folded.statistics
    assert not any(op.kind == "batch_norm" for op in folded.ops)


def test_a_graph_without_batch_norms_stays_as_it_is() -> None:
    graph = case("resnet8").build.graph
    folded = fold(graph)
    assert folded.ops == graph.ops
    assert all(folded.weights[name] is value for name, value in graph.weights.items())


def test_the_graph_that_was_folded_keeps_its_weights() -> None:
    the_case = case("vgg")
    before = {n: v.copy() for n, v in the_case.build.graph.weights.items()}
    fold(the_case.build.graph)
    again = capture(the_case.segment, the_case.build.graph.classes)
    assert all(np.array_equal(the_case.build.graph.weights[n], v) for n, v in before.items())
    assert all(torch.equal(torch.tensor(again.weights[n]), torch.tensor(before[n])) for n in before)


def test_a_convolution_that_is_sent_keeps_its_norm() -> None:
    graph = case("resnet8-batch").build.graph
    folded = fold(replace(graph, cut="stem.0"))
    kept = [op.name for op in folded.ops if op.kind == "batch_norm"]
    assert kept == ["stem.1"]
    assert list(folded.statistics) == ["stem.1.running_mean", "stem.1.running_var"]
