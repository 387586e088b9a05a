"""A test of client and server: accuracies, and who answers early."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from splitee.client import Settings
from splitee.train import Answers, evaluate
from toolkit.networks import local_client, network_input, random_images, resnet, server_for

SETTINGS = Settings(0.05)


def test_an_evaluation_in_parts_is_that_of_all_images_at_once() -> None:
    images = random_images(11)
    for norm in ("group", "batch"):
        model = resnet(norm=norm)
        server = server_for(model, ["layer1"], SETTINGS)
        one, all_ = (
            evaluate(local_client(model, "layer1", SETTINGS, images, capacity=c), server, images)
            for c in (2, 11)
        )
        np.testing.assert_allclose(one.server_logits, all_.server_logits, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(one.exit_logits, all_.exit_logits, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            expected = model.eval()(network_input(images.x)).numpy()
        np.testing.assert_allclose(all_.server_logits, expected, rtol=1e-4, atol=1e-6)
        assert server.tail.training


# Four samples of two classes: the exit is right at 0 and 1, the server at 0, 2 and 3. The exit is
# certain of 0, nearly of 1, not at all of 2; at 3 it is certain and wrong.
ANSWERS = Answers(
    labels=np.array([0, 1, 1, 0], np.uint8),
    exit_logits=np.array([[50, 0], [0, 5], [0.1, 0], [0, 50]], np.float32),
    server_logits=np.array([[2, 0], [2, 0], [0, 2], [2, 0]], np.float32),
)


def test_accuracies_are_shares_of_right_answers() -> None:
    assert ANSWERS.exit_accuracy == 0.5
    assert ANSWERS.server_accuracy == 0.75
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert ANSWERS.server_loss == pytest.approx((3 * right + wrong) / 4)


@pytest.mark.parametrize(
    ("threshold", "share", "accuracy"),
    [
        (0.0, 0.0, 0.75),  # nothing here is that certain
        (0.01, 0.5, 0.5),  # 0 and 3 answer early: 3 is wrong now, as 1 is
        (0.1, 0.75, 0.75),  # 1 too, and is right
        (1.0, 1.0, 0.5),
    ],
)
def test_a_sure_exit_answers_and_the_server_answers_the_rest(
    threshold: float, share: float, accuracy: float
) -> None:
    assert ANSWERS.early(threshold) == (share, accuracy)
