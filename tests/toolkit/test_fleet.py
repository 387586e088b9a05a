"""What a fleet file means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from splitee.bottleneck import Bottleneck
from splitee.client import Settings
from splitee.codec import PLAIN, Coding
from splitee.fleet import Fleet, parse, read
from splitee.rules import Rules
from splitee.state import AdamW

DEMO = Path(__file__).parents[2] / "examples" / "demo.toml"

GOOD = """\
name = "two-tiers"      # line 1
seed = 3
rounds = 4
batch = 8
strategy = "sequential"
gradient = "both"
exit_weight = 0.25
aggregate = "all"
exits = "upto"
distill = 0.5
period = 2
entropy = 0.4
rejoin_within = 1.5
round_deadline = 60
participation = 0.75
min_clients = 2

[model]
name = "resnet20"
width = 8
norm = "group"
batch_norm = "frozen"

[data]
name = "digits"

[optimizer]
kind = "adamw"
learning_rate = 0.1
server_rate = 0.3
warmup = 2
server_warmup = 0
beta1 = 0.8
beta2 = 0.99
eps = 1e-6
schedule = "step"
step_every = 3
step_factor = 0.5
momentum = 0
weight_decay = 1e-4
clip = 2

[[client]]
name = "board"
board = "qemu-m4"
link = "serial:/dev/ttyACM0"
cut = "layer1"
deepest = "layer3"
capacity = 2
relu_bits = true
float16 = true
recompute = 0.75
fused_update = true
local_only = true
share = 0.5
exit_weight = 0.125
optimizer = "sgd"
learning_rate = 0.02
bottleneck = 3
bottleneck_stride = 2
send = "unsure"
codec = "top-k"
gradient_codec = "int8"
top_k = 0.25

[[client]]
name = "edge"
cut = 3
gradient = "server"
"""


def test_a_good_file_says_what_it_says() -> None:
    fleet = parse(GOOD)
    assert fleet.model_dump() == {
        "name": "two-tiers", "seed": 3, "rounds": 4, "batch": 8, "local_steps": None,
        "strategy": "sequential", "gradient": "both", "exit_weight": 0.25, "aggregate": "all",
        "exits": "upto", "distill": 0.5, "period": 2, "evaluate_every": None,
        "entropy": 0.4, "auth": "auto", "rejoin_within": 1.5,
        "round_deadline": 60.0, "participation": 0.75, "min_clients": 2,
        "model": {"name": "resnet20", "width": 8, "norm": "group", "batch_norm": "frozen"},
        "data": {
            "name": "digits", "path": None, "download": False, "size": None, "samples": None,
            "held_out": None, "test_samples": None, "augment": [], "partition": "iid", "alpha": 0.5,
            "classes_per_client": 2,
        },
        "optimizer": {
            "kind": "adamw", "learning_rate": 0.1, "server_rate": 0.3, "warmup": 2,
            "server_warmup": 0, "beta1": 0.8, "beta2": 0.99, "eps": 1e-6,
            "schedule": "step", "step_every": 3, "step_factor": 0.5,
            "momentum": 0.0, "weight_decay": 1e-4, "clip": 2.0,
        },
        "client": [
            {"name": "board", "count": 1, "board": "qemu-m4", "link": "serial:/dev/ttyACM0",
             "cut": "layer1", "deepest": "layer3", "capacity": 2, "relu_bits": True,
             "float16": True, "recompute": 0.75, "fused_update": True, "local_only": True,
             "share": 0.5,
             "gradient": None, "exit_weight": 0.125, "optimizer": "sgd", "learning_rate": 0.02,
             "bottleneck": 3, "bottleneck_stride": 2, "send": "unsure",
             "codec": "top-k", "gradient_codec": "int8", "top_k": 0.25},
            {"name": "edge", "count": 1, "board": "torch", "link": None, "cut": 3, "deepest": None,
             "capacity": None, "relu_bits": False, "float16": False, "recompute": 0.0,
             "fused_update": False, "local_only": False, "share": 1.0,
             "gradient": "server", "exit_weight": None, "optimizer": None, "learning_rate": None,
             "bottleneck": None, "bottleneck_stride": 1, "send": "all",
             "codec": "float32", "gradient_codec": "float32", "top_k": 0.1},
        ],
    }  # fmt: skip
    assert [c.coding for c in fleet.client] == [Coding("top-k", "int8", 0.25), PLAIN]
    assert [c.narrowing for c in fleet.client] == [Bottleneck(3, 2), None]
    assert [fleet.unsure(c) for c in fleet.client] == [0.4, None]
    board = Settings(0.02, 0.0, 1e-4, exit_weight=0.125, server_weight=0.875, clip=2.0, distill=0.5)
    edge = Settings(0.1, 0.0, 1e-4, 0.0, 1.0, 2.0, AdamW(0.8, 0.99, 1e-6), distill=0.5)
    assert [fleet.settings(c) for c in fleet.client] == [board, edge]
    assert fleet.server_settings == replace(
        edge, learning_rate=0.3, exit_weight=1.0, server_weight=0.0, distill=0.0
    )
    assert fleet.rules == Rules(
        8, None, "all", 2, fleet.rate, rejoin_within=1.5, round_deadline=60.0, participation=0.75,
        min_clients=2, seed=3,
    )  # fmt: skip


def test_a_name_and_a_client_are_enough() -> None:
    fleet = parse('name = "least"\n[[client]]\nname = "one"\n')
    assert fleet == Fleet.model_validate({"name": "least", "client": [{"name": "one"}]})
    assert (fleet.strategy, fleet.gradient, fleet.aggregate, fleet.exits) == (
        "averaging", "local", "server", "own",
    )  # fmt: skip
    assert fleet.client[0].cut == "auto"
    least = Settings(0.05, 0.9, 0.0, exit_weight=1.0, server_weight=0.0)
    assert fleet.settings(fleet.client[0]) == fleet.server_settings == least


def test_the_demo_can_be_read() -> None:
    assert [c.cut for c in read(DEMO).client] == ["stem", "layer1", "layer2", "layer3"]


def test_a_table_stands_for_as_many_clients_as_it_counts() -> None:
    tables = '[[client]]\nname = "a"\n[[client]]\nname = "b"\ncount = 10\nshare = 2\n'
    fleet = parse(f'name = "x"\n{tables}[[client]]\nname = "c"\n')
    assert [c.name for c in fleet.client] == ["a", *(f"b-{i:02}" for i in range(1, 11)), "c"]
    assert [c.share for c in fleet.client] == [1.0, *[2.0] * 10, 1.0]
    assert {c.count for c in fleet.client} == {1}
