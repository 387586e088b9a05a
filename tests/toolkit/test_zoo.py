"""Networks by name: torchvision's and a user's own are cut and captured as the bundled ones are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from splitee import zoo
from splitee.capture import capture
from splitee.errors import ModelError
from splitee.exits import Exit
from splitee.model import Network, Segment
from toolkit.mobilenet import MobileNetV2

OWN = """\
from torch import nn

def build(classes, width=None):
    return nn.Sequential(
        nn.Conv2d(1, width or 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes)
    )

def nothing():
    return 3

def broken():
    raise ValueError("no such thing")
"""


@pytest.mark.parametrize("norm", zoo.NORMS)
def test_torchvisions_mobilenet_is_cut_where_ours_is(norm: str) -> None:
    model = zoo.build("torchvision:mobilenet_v2", norm=norm, classes=7)
    network = Network(model, (3, 32, 32))
    ours = Network(MobileNetV2(channels=3, classes=7), (3, 32, 32))
    assert [(c.name, c.shape) for c in network.cuts] == [(c.name, c.shape) for c in ours.cuts]
    kinds = {type(m) for m in model.modules()}
    assert (nn.GroupNorm in kinds) == (norm == "group")
    cut = network.cut(3)
    graph = capture(Segment(network, cut, {cut.name: Exit((24, 8, 8), 7)}), 7)
    assert graph.shapes[graph.cut] == (24, 8, 8)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_a_torchvision_that_was_built_for_another_torch_still_has_its_networks() -> None:
    assert isinstance(zoo.build("torchvision:resnet18"), nn.Module)
    assert isinstance(zoo.build("torchvision:vgg11_bn"), nn.Module)  # again, in one process


def test_a_users_own_module_is_found_in_the_folder_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_network.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_network", raising=False)
    before = list(sys.path)
    model = zoo.build("own_network:build", classes=3, width=5, channels=1)
    assert model(torch.zeros(1, 1, 4, 4)).shape == (1, 3)
    assert model.get_submodule("0").out_channels == 5
    with pytest.raises(ModelError, match=r"^model \"own_network:nothing\" is a int: return a tor"):
        zoo.build("own_network:nothing")
    with pytest.raises(ModelError, match=r"broken\" cannot be made: ValueError: no such thing$"):
        zoo.build("own_network:broken")
    assert sys.path == before
    monkeypatch.delitem(sys.modules, "own_network")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("torchvision:resnet7", {}, r'^torchvision has no model "resnet7": take one of .*resnet18'),
        ("torchvision:resnet18", {"width": 8}, r"has a width of its own and takes images of 3 cha"),
        ("torchvision:resnet18", {"channels": 1}, r"takes images of 3 channels$"),
        ("torchvision:vgg11", {"norm": "group"}, r'^model "torchvision:vgg11" has no norm = "grou'),
        ("no_such_module:build", {}, r"cannot be made: ModuleNotFoundError: No module named 'no_"),
        ("splitee.zoo:no_such", {}, r"cannot be made: AttributeError: .*no_such"),
    ],
)
def test_what_cannot_be_made_is_named(name: str, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        zoo.build(name, **settings)  # type: ignore[arg-type]
