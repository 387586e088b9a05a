"""Where networks can be cut, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splitee import zoo
from splitee.errors import CutError, ModelError
from splitee.model import Cut, Network, list_cuts
from toolkit.networks import SHAPE, MobileNet, resnet, vgg

# 32x32 images; every stage behind the first halves the image and doubles the width
RESNET8 = [("stem", 1, (4, 32, 32)), ("layer1", 2, (4, 32, 32)), ("layer2", 3, (8, 16, 16)),
           ("layer3", 4, (16, 8, 8))]  # fmt: skip
RESNET18 = [("stem", 1, (4, 32, 32)), ("layer1.0", 2, (4, 32, 32)), ("layer1", 3, (4, 32, 32)),
            ("layer2.0", 4, (8, 16, 16)), ("layer2", 5, (8, 16, 16)),
            ("layer3.0", 6, (16, 8, 8)), ("layer3", 7, (16, 8, 8)),
            ("layer4.0", 8, (32, 4, 4)), ("layer4", 9, (32, 4, 4))]  # fmt: skip
RESNET20 = [("stem", 1, (4, 32, 32)), ("layer1.0", 2, (4, 32, 32)), ("layer1.1", 3, (4, 32, 32)),
            ("layer1", 4, (4, 32, 32)), ("layer2.0", 5, (8, 16, 16)), ("layer2.1", 6, (8, 16, 16)),
            ("layer2", 7, (8, 16, 16)), ("layer3.0", 8, (16, 8, 8)), ("layer3.1", 9, (16, 8, 8)),
            ("layer3", 10, (16, 8, 8))]  # fmt: skip


@pytest.mark.parametrize("norm", zoo.NORMS)
@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet8", RESNET8), ("resnet18", RESNET18), ("resnet20", RESNET20)],
    ids=["resnet8", "resnet18", "resnet20"],
)
def test_the_cuts_are_the_stem_and_the_residual_blocks(
    name: str, norm: str, expected: list[Any]
) -> None:
    model = zoo.build(name, width=4, norm=norm)
    assert [(c.name, c.number, c.shape) for c in list_cuts(model, (3, 32, 32))] == expected


def test_cuts_are_listed_for_a_batch_of_images_as_for_a_shape() -> None:
    model = resnet()
    assert list_cuts(model, torch.zeros(5, *SHAPE)) == list_cuts(model, SHAPE)


def test_a_chain_is_cut_at_the_end_of_each_stage_that_begins_with_a_convolution() -> None:
    # convolutions are layers 0, 3 and 6; pools belong to the stage above them
    assert [(c.name, c.number) for c in list_cuts(vgg(), SHAPE)] == [("2", 1), ("5", 2), ("9", 3)]


def test_inverted_residuals_are_cut_behind_each_block() -> None:
    names = [(c.name, c.shape) for c in list_cuts(MobileNet(), SHAPE)]
    assert names == [("features.0", (4, 8, 8)), ("features.1", (6, 4, 4)),
                     ("features.2", (6, 4, 4)), ("features.3", (6, 4, 4)),
                     ("features.4", (12, 4, 4))]  # fmt: skip


def test_a_cut_is_found_by_path_and_by_number() -> None:
    network = Network(resnet(), SHAPE)
    layer2 = Cut("layer2", 3, (8, 4, 4))
    for spec in ("layer2", 3, "3", "layer2.0", "layer2.0.relu2"):
        assert network.cut(spec) == layer2, spec
    assert layer2.elements == 128


def test_a_layers_own_number_in_a_chain_is_a_path_and_a_bare_number_counts_cuts() -> None:
    network = Network(vgg(), SHAPE)
    assert network.cut(2) == Cut("5", 2, (6, 4, 4))
    assert network.cut("2") == Cut("2", 1, (4, 8, 8))
    assert network.cut("4") == Cut("4", None, (6, 8, 8))
    assert network.cut("1") == Cut("1", None, (4, 8, 8))


def test_points_that_are_not_listed_have_no_number() -> None:
    network = Network(resnet(), SHAPE)
    assert network.cut("stem.0") == Cut("stem.0", None, (4, 8, 8))
    assert network.cut("pool") == Cut("pool", None, (16, 1, 1))


def test_positions_grow_along_the_network() -> None:
    network = Network(resnet(), SHAPE)
    specs = ("stem.0", "stem", "layer1", "layer2", "layer3", "pool")
    places = [network.position(network.cut(s)) for s in specs]
    assert places == sorted(set(places))


LISTED = "take one of 1 stem, 2 layer1, 3 layer2, 4 layer3"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("layer9", f'there is no cut "layer9": {LISTED}'),
        (5, f'there is no cut "5": {LISTED}'),
        (0, f'there is no cut "0": {LISTED}'),
        ("", f'there is no cut "": {LISTED}'),
        (
            "layer2.0.conv1",
            'cut "layer2.0.conv1" is crossed: behind it the network needs layer1.0.relu2, '
            f"layer2.0.conv1, and a cut sends one tensor; {LISTED}",
        ),
        (
            "layer2.0.shortcut",
            'cut "layer2.0.shortcut" is crossed: behind it the network needs layer2.0.norm2, '
            f"layer2.0.shortcut.1, and a cut sends one tensor; {LISTED}",
        ),
        ("fc", f'cut "fc" leaves nothing for the server: {LISTED}'),
    ],
)
def test_refuses_a_cut_by_its_name(spec: str | int, message: str) -> None:
    with pytest.raises(CutError) as error:
        Network(resnet(), SHAPE).cut(spec)
    assert str(error.value) == message


class Net(nn.Module):
    """A convolutional network whose features are computed by the function that it is given."""

    def __init__(self, features: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.features = features
        self.conv1 = nn.Conv2d(1, 4, 3, 1, 1)
        self.conv2 = nn.Conv2d(4, 4, 3, 1, 1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(self, x).mean((2, 3)))  # type: ignore[no-any-return]


def test_refuses_tied_weights_by_both_names() -> None:
    net = Net(lambda net, x: net.conv2(net.conv1(x)))
    net.conv3 = nn.Conv2d(4, 4, 3)
    net.conv3.weight = net.conv2.weight
    with pytest.raises(ModelError, match=r"^conv2\.weight and conv3\.weight are one tied weight"):
        Network(net, SHAPE)


def test_refuses_a_module_that_is_shared_under_two_names() -> None:
    net = Net(lambda net, x: net.conv2(net.conv1(x)))
    net.again = net.conv2
    with pytest.raises(ModelError, match=r"^conv2\.weight and again\.weight are one tied weight"):
        Network(net, SHAPE)


def test_refuses_control_flow_on_values() -> None:
    net = Net(lambda net, x: net.conv1(x) if x.sum() > 0 else net.conv1(-x))
    with pytest.raises(ModelError, match=r"^Net cannot be traced by torch\.fx .* branch or loop"):
        Network(net, SHAPE)


def test_refuses_a_module_with_weights_that_is_called_twice() -> None:
    net = Net(lambda net, x: net.conv2(net.conv2(net.conv1(x))))
    with pytest.raises(ModelError, match=r"^conv2 is called 2 times: give each call its own"):
        Network(net, SHAPE)


def test_a_layer_without_weights_may_be_called_twice() -> None:
    net = Net(lambda net, x: net.relu(net.conv2(net.relu(net.conv1(x)))))
    # its name stands for the first call
    assert [c.name for c in list_cuts(net, SHAPE)] == ["relu", "conv2"]


def test_a_skip_from_the_input_crosses_every_cut_up_to_its_end() -> None:
    net = Net(lambda net, x: net.conv2(net.conv1(x)) + F.pad(x, (0, 0, 0, 0)))
    with pytest.raises(CutError, match=r'cut "conv1" is crossed: .* needs x, conv1,'):
        Network(net, SHAPE).cut("conv1")


def test_cutting_leaves_the_network_in_the_mode_it_was_in() -> None:
    for training in (True, False):
        model = resnet(norm="batch").train(training)
        before = model.stem[1].running_mean.clone()
        network = Network(model, SHAPE)
        assert {m.training for m in model.modules()} == {training}
        assert network.traced.training == training
        assert torch.equal(model.stem[1].running_mean, before)


def test_layers_that_work_in_place_are_made_to_keep_their_input() -> None:
    model = MobileNet()
    Network(model, SHAPE)
    assert not any(m.inplace for m in model.modules() if isinstance(m, nn.ReLU))


def test_an_unknown_network_or_norm_lists_those_there_are() -> None:
    with pytest.raises(ModelError, match=r'"resnet9" is unknown: .* resnet20, "torchvision:<model'):
        zoo.build("resnet9")
    with pytest.raises(ModelError, match=r'norm = "layer" is unknown: take one of batch, group$'):
        zoo.build("resnet8", norm="layer")


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2))
        self.body = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1))
        self.fc = nn.Linear(2 * 8 * 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(torch.nn.functional.relu(self.stem(x), inplace=True))
        return self.fc(torch.flatten(y, 1))  # type: ignore[no-any-return]


def test_what_crosses_a_cut_is_not_changed_in_place_behind_it() -> None:
    network = Network(_InPlace(), (1, 8, 8))
    cut = network.cut("stem")
    (sent,) = network.between(None, [cut])(torch.randn(2, 1, 8, 8))
    before = sent.clone()
    network.between(cut, [None])(sent)
    assert (before < 0).any()
    assert torch.equal(sent, before)


def test_a_frozen_norm_stays_frozen() -> None:
    model = _InPlace().train()
    model.stem[1].eval()
    network = Network(model, (1, 8, 8))
    assert network.traced.training
    assert not network.traced.get_submodule("stem.1").training
    assert network.traced.get_submodule("stem.0").training
