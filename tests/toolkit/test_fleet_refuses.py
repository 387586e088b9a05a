"""What is said of a bad fleet file: file, line, key, and what may stand there."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitee.errors import FleetError
from splitee.fleet import read

CLIENT = '[[client]]\nname = "one"\n'
KEYS = {
    "": "name, seed, rounds, batch, local_steps, strategy, gradient, exit_weight, aggregate, "
    "exits, distill, period, evaluate_every, entropy, participation, min_clients, auth, "
    "rejoin_within, round_deadline, model, data, optimizer, client",
    "model": "name, width, norm, batch_norm",
    "data": (
        "name, path, download, size, samples, held_out, test_samples, augment, partition, alpha, "
        "classes_per_client"
    ),
    "optimizer": "kind, learning_rate, server_rate, warmup, server_warmup, schedule, step_every, "
    "step_factor, momentum, beta1, beta2, eps, weight_decay, clip",
    "client": "name, count, board, link, cut, deepest, capacity, relu_bits, float16, recompute, "
    "fused_update, local_only, share, gradient, exit_weight, optimizer, learning_rate, bottleneck, "
    "bottleneck_stride, send, codec, gradient_codec, top_k",
}

BAD = {
    # not TOML
    "no-value": ('name = "x"\nrounds =\n', ["2: not TOML: Invalid value"]),
    "open-string": ('name = "x\n', ["1: not TOML: Illegal character '\\n'"]),
    "end-of-file": ('name = "x"\nseed = 1\nrounds = [1,\n', ["4: not TOML: Invalid value"]),
    "key-twice": ('name = "x"\n\nname = "y"\n', ["3: not TOML: Cannot overwrite a value"]),
    # a key that there is not, in each table
    "unknown-key": (
        f'name = "x"\nround = 3\n{CLIENT}',
        [f"2: round: there is no such key; there are {KEYS['']}"],
    ),
    "unknown-table": (
        f'name = "x"\n\n[network]\nwidth = 3\n{CLIENT}',
        [f"3: network: there is no such key; there are {KEYS['']}"],
    ),
    "unknown-in-model": (
        f'name = "x"\n[model]\nname = "resnet8"\nwidht = 4\n{CLIENT}',
        [f"4: model.widht: there is no such key; there are {KEYS['model']}"],
    ),
    "unknown-in-data": (
        f'name = "x"\n[data]\n\nfolder = "here"\n{CLIENT}',
        [f"4: data.folder: there is no such key; there are {KEYS['data']}"],
    ),
    "unknown-in-optimizer": (
        f'name = "x"\n[optimizer]\nlr = 0.1\n{CLIENT}',
        [f"3: optimizer.lr: there is no such key; there are {KEYS['optimizer']}"],
    ),
    "unknown-in-client": (
        f'name = "x"\n{CLIENT}[[client]]\nname = "two"\nport = "/dev/tty"\n',
        [f"6: client[1].port: there is no such key; there are {KEYS['client']}"],
    ),
    "count-behind-a-link": (
        f'name = "x"\n{CLIENT}link = "udp://there:1"\ncount = 2\n',
        ["5: client[0].count: a link leads to one client: leave one of them out"],
    ),
    "top-level-key-too-late": (
        f'name = "x"\n[model]\nrounds = 3\n{CLIENT}',
        [f"3: model.rounds: there is no such key; there are {KEYS['model']}"],
    ),
    # the wrong type
    "text-for-number": (
        f'name = "x"\nrounds = "3"\n{CLIENT}',
        ["2: rounds: Input should be a valid integer, not '3'"],
    ),
    "truth-for-number": (
        f'name = "x"\nrounds = true\n{CLIENT}',
        ["2: rounds: Input should be a valid integer, not True"],
    ),
    "number-for-text": (f"name = 8\n{CLIENT}", ["1: name: Input should be a valid string, not 8"]),
    "list-for-cut": (
        f'name = "x"\n{CLIENT}cut = ["stem"]\n',
        [
            "4: client[0].cut: Input should be a valid string, not ['stem']",
            "4: client[0].cut: Input should be a valid integer, not ['stem']",
        ],
    ),
    "one-client-table": (
        'name = "x"\nseed = 1\n[client]\nname = "one"\n',
        ["3: client: Input should be a valid list, not {'name': 'one'}"],
    ),
    "word-for-table": (
        f'name = "x"\nmodel = "resnet8"\n{CLIENT}',
        ["2: model: Input should be a valid dictionary or instance of ModelTable, not 'resnet8'"],
    ),
    # out of range
    "none-of-the-choices": (
        f'name = "x"\nstrategy = "average"\n{CLIENT}',
        [
            "2: strategy: Input should be 'averaging', 'sequential' or a class as 'module:Class', "
            "not 'average'"
        ],
    ),
    "more-than-are-drawn": (
        f'name = "x"\nmin_clients = 2\nparticipation = 0.5\n{CLIENT}[[client]]\nname = "two"\n',
        [
            "2: min_clients: 2, but 1 of 2 clients are drawn for a round: take a larger "
            "participation, or fewer here"
        ],
    ),
    "no-optimizer-of-that-name": (
        f'name = "x"\n{CLIENT}optimizer = "adam"\n[optimizer]\nkind = "lion"\n',
        [
            "6: optimizer.kind: Input should be 'sgd' or 'adamw', not 'lion'",
            "4: client[0].optimizer: Input should be 'sgd' or 'adamw', not 'adam'",
        ],
    ),
    "more-than-all-of-it": (
        f'name = "x"\nexits = "upto"\ndistill = 1.5\n{CLIENT}',
        ["3: distill: Input should be less than or equal to 1, not 1.5"],
    ),
    "nobody-to-learn-from-the-deepest": (
        f'name = "x"\ndistill = 0.5\n{CLIENT}',
        [
            '2: distill: with exits = "own" a client has no shallower exit that could learn from '
            'its deepest: take exits = "upto", or 0.0'
        ],
    ),
    "no-such-codec": (
        f'name = "x"\n{CLIENT}codec = "int9"\n',
        [
            "4: client[0].codec: Input should be 'float32', 'float16', 'int8', 'int4' or 'top-k', "
            "not 'int9'"
        ],
    ),
    "all-of-the-elements": (
        f'name = "x"\n{CLIENT}gradient_codec = "top-k"\ntop_k = 1\n',
        ["5: client[0].top_k: Input should be less than 1, not 1"],
    ),
    "no-channels": (
        f'name = "x"\n{CLIENT}bottleneck = 0\nbottleneck_stride = 0\n',
        [
            "4: client[0].bottleneck: Input should be greater than or equal to 1, not 0",
            "5: client[0].bottleneck_stride: Input should be greater than or equal to 1, not 0",
        ],
    ),
    "nothing-sent": (
        f'name = "x"\n{CLIENT}send = "none"\n',
        ["4: client[0].send: Input should be 'all' or 'unsure', not 'none'"],
    ),
    "too-small": (
        f'name = "x"\n[model]\nwidth = 0\n{CLIENT}',
        ["3: model.width: Input should be greater than or equal to 1, not 0"],
    ),
    "too-large": (
        f'name = "x"\nbatch = 4097\n{CLIENT}',
        ["2: batch: Input should be less than or equal to 4096, not 4097"],
    ),
    "negative": (
        f'name = "x"\n[optimizer]\n\n# of SGD\nlearning_rate = -0.1\n{CLIENT}',
        ["5: optimizer.learning_rate: Input should be greater than 0, not -0.1"],
    ),
    "infinite": (
        f'name = "x"\n{CLIENT}share = inf\n',
        ["4: client[0].share: Input should be a finite number, not inf"],
    ),
    "name-with-a-slash": (
        f'name = "../x"\n{CLIENT}',
        ["1: name: String should match pattern '^[A-Za-z0-9][A-Za-z0-9_-]*$', not '../x'"],
    ),
    # where else a key may stand
    "in-an-inline-table": (
        f'name = "x"\nmodel = {{ width = 0 }}\n{CLIENT}',
        ["2: model.width: Input should be greater than or equal to 1, not 0"],
    ),
    "under-a-dotted-name": (
        f'name = "x"\n\nmodel.width = 0\n{CLIENT}',
        ["3: model.width: Input should be greater than or equal to 1, not 0"],
    ),
    # clients
    "no-name": (f"rounds = 3\n{CLIENT}", ["1: name: Field required"]),
    "no-client": ('name = "x"\nrounds = 3\n', ["1: client: Field required"]),
    "empty-client": (
        'name = "x"\nclient = []\n',
        ["2: client: List should have at least 1 item after validation, not 0, not []"],
    ),
    "client-without-name": (
        f'name = "x"\n{CLIENT}\n[[client]]\nboard = "posix"\n',
        ["5: client[1].name: Field required"],
    ),
    "clients-of-one-name": (
        f'name = "x"\n{CLIENT}[[client]]\nname = "two"\n[[client]]\nshare = 2\nname = "one"\n',
        ["8: client[2].name: there is such a client already"],
    ),
    "all-at-once": (
        'name = "x"\nseed = -1\n[[client]]\nname = "one"\ncapacity = 0\n',
        [
            "2: seed: Input should be greater than or equal to 0, not -1",
            "5: client[0].capacity: Input should be greater than or equal to 1, not 0",
        ],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_a_bad_file_by_file_line_and_key(case: str, tmp_path: Path) -> None:
    text, lines = BAD[case]
    path = tmp_path / "fleet.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FleetError) as error:
        read(path)
    assert str(error.value).splitlines() == [f"{path}:{line}" for line in lines]


def test_says_of_a_file_that_cannot_be_read_why(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "missing.toml", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(FleetError) as error:
            read(path)
        assert str(error.value) == f"{path}: {reason}: is the path right?"


def test_says_of_a_file_that_is_not_utf8_where(tmp_path: Path) -> None:
    path = tmp_path / "latin1.toml"
    path.write_bytes('name = "Gerät"\n'.encode("latin-1"))
    with pytest.raises(FleetError) as error:
        read(path)
    assert str(error.value) == f"{path}: not UTF-8 at byte 11: save it as UTF-8"
