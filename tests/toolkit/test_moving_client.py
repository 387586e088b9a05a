"""A client in this process whose cut moves while it trains."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from splitee.client import LocalClient, Settings, State
from splitee.train import train_batch
from toolkit.networks import SCALE, SHIFT, local_client, random_images, resnet, server_for, unequal

SETTINGS = Settings(0.05, momentum=0.9, weight_decay=0.01, exit_weight=0.3, server_weight=0.7)
CUTS = ("stem", "layer1", "layer2")
WALK = (("layer2", True), ("stem", False), ("layer1", True), ("layer2", False), ("layer1", False))
IMAGES = random_images(12)


def client(norm: str = "group") -> LocalClient:
    """Up to layer2, with every exit."""
    return local_client(resnet(norm=norm), "layer2", SETTINGS, IMAGES, capacity=4, upto=True)


def alone(state: State, whole: LocalClient, cut: str, upto: bool) -> LocalClient:
    """A client that was made for one cut, in a state."""
    segment = copy.deepcopy(whole.segment)
    made = LocalClient("alone", segment, SETTINGS, capacity=4, scale=SCALE, shift=SHIFT)
    assert (segment.cut.name, segment.exit_names[0] == "stem") == (cut, upto or cut == "stem")
    made.start(state, IMAGES)
    return made


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_at_every_cut_it_trains_as_a_client_made_for_that_cut(norm: str) -> None:
    moving = client(norm)
    for cut, upto in WALK:
        moving.move(cut, upto=upto)
        fixed = alone(moving.state(), moving, cut, upto)
        servers = [server_for(resnet(norm=norm), [cut], SETTINGS) for _ in range(2)]
        for _ in range(4):
            mine, theirs = (
                train_batch(c, s, 4) for c, s in zip((moving, fixed), servers, strict=True)
            )
            assert replace(mine, client="") == replace(theirs, client="")
        assert unequal(moving.state().weights, fixed.state().weights) == []
        assert unequal(moving.state().momentum, fixed.state().momentum) == []
        assert moving.state().place == fixed.state().place


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_layers_that_take_no_part_stay_bit_for_bit(norm: str) -> None:
    moving = client(norm)
    train_batch(moving, server_for(resnet(norm=norm), ["layer2"], SETTINGS), 4)
    for cut, upto in WALK:
        moving.move(cut, upto=upto)
        before = moving.state(every=True)
        train_batch(moving, server_for(resnet(norm=norm), [cut], SETTINGS), 4)
        after = moving.state(every=True)
        active = moving.state()
        depth = CUTS.index(cut) + 1
        exits = CUTS[:depth] if upto else (cut,)
        owners = {*CUTS[:depth], *(f"exits.{name}" for name in exits)}
        assert {o for o in owners for n in active.weights if n.startswith(o + ".")} == owners
        assert set(unequal(after.weights, before.weights)) == set(active.weights)
        assert set(unequal(after.momentum, before.momentum)) == set(active.momentum)


def test_a_state_is_of_the_layers_up_to_the_cut() -> None:
    moving = client()
    moving.move("layer1", upto=False)
    state = moving.state()
    assert list(state.weights) == list(moving.segment.tensors())
    assert list(moving.gradients()) == list(state.momentum)
    assert not [n for n in state.weights if n.startswith(("layer2", "exits.stem"))]


def test_a_state_without_steps_leaves_no_layer_its_momentum() -> None:
    moving = client()
    start = moving.state()
    train_batch(moving, server_for(resnet(), ["layer2"], SETTINGS), 4)
    moving.move("stem", upto=True)
    moving.start(start, IMAGES)
    assert not any(v.any() for v in moving.state(every=True).momentum.values())


def test_an_answer_comes_from_the_exit_at_the_cut() -> None:
    moving = client()
    for cut in CUTS:
        moving.move(cut, upto=True)
        activations, logits = moving.infer(IMAGES.x[:4])
        expected = alone(moving.state(), moving, cut, True).infer(IMAGES.x[:4])
        assert moving.cut == cut
        assert torch.equal(activations, expected[0])
        assert torch.equal(logits, expected[1])


def test_a_cut_does_not_move_in_the_midst_of_a_batch() -> None:
    moving = client()
    moving.forward(4, 8)
    with pytest.raises(AssertionError, match="between batches"):
        moving.move("stem", upto=True)
    moving.backward(torch.zeros(4, 8, 4, 4))
    with pytest.raises(AssertionError, match="between batches"):
        moving.move("stem", upto=True)
    moving.discard()
    moving.move("stem", upto=True)
    assert not any(g.any() for g in moving.gradients(every=True).values())
