"""From a fleet file to networks and shards: what is chosen, refused, and drawn from the seed."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from splitee import assemble
from splitee.assemble import Assembly, Board
from splitee.client import LocalClient, Place
from splitee.errors import CutError, FitError, FleetError
from splitee.fleet import parse
from splitee.norms import frozen_norms
from splitee.ops import Array
from splitee.parked import ParkedClient
from splitee.place import Room, effects, kib
from splitee.steps import Levers
from splitee.strategies import Averaging, Sequential
from splitee.train import RoundDone, fit
from toolkit.networks import arrays, unequal
from toolkit.rounds import everything, last_states

ENDLESS = Room(ram=2**30, flash=2**30, code=0, static=0, stack=0)


def assembly(clients: str, top: str = "", model: str = "width = 4", **rooms: Room) -> Assembly:
    """A fleet of "name:board:further keys" clients; rooms by board, all with firmware."""
    tables = ""
    for client in clients.split(", "):
        name, board, *further = client.split(":")
        keys = "\n".join(further)
        tables += f'[[client]]\nname = "{name}"\nboard = "{board}"\n{keys}\n'
    fleet = parse(f'name = "x"\n{top}\n[model]\n{model}\n{tables}')
    return Assembly(fleet, lambda board: Board(board in rooms, rooms.get(board)))


@cache
def needed(cut: int) -> int:
    """RAM that a client's build takes up to a cut."""
    one = assembly("a:mcu", mcu=ENDLESS)
    return one.builds(one.fleet.client[0])[cut - 1].ram_bytes(ENDLESS)


def room(ram: int) -> Room:
    """A board with so much RAM."""
    return Room(ram=ram, flash=2**30, code=0, static=0, stack=0)


@pytest.mark.parametrize(
    ("cut", "name"), [(1, "stem"), (2, "layer1"), (3, "layer2"), (4, "layer3")]
)
def test_auto_takes_the_deepest_cut_that_fits(cut: int, name: str) -> None:
    exact = assembly("a:mcu", mcu=room(needed(cut)))
    assert exact.member("a").cut.name == name


def test_auto_takes_the_last_cut_where_there_is_room_enough() -> None:
    assert assembly("a:torch").member("a").cut.name == "layer3"


def test_a_cut_is_given_by_name_or_number() -> None:
    fleet = assembly("a:torch:cut = 2, b:torch:cut = 'layer1', c:torch:cut = '3'")
    assert [m.cut.name for m in fleet.members] == ["layer1", "layer1", "layer2"]
    assert [m.name for m in fleet.members] == ["a", "b", "c"]


def test_a_segment_that_is_too_large_says_by_how_much_and_which_cut_fits() -> None:
    ram = needed(2) + 100
    fleet = assembly("a:mcu:cut = 'layer3'", mcu=room(ram))
    with pytest.raises(FitError) as error:
        fleet.member("a")
    more = needed(4) - ram
    fitting = 1437 - math.ceil(more / 67)  # an image of 64 bytes, a label, a place in the order
    assert str(error.value) == (
        f'client "a": its segment up to layer3 needs {kib(needed(4))} of RAM, '
        f"{kib(more)} more than the {kib(ram)} there are (of its 1,437 samples {fitting} fit) on "
        'mcu: cut at "layer1", which fits'
    )


@pytest.mark.parametrize("cut", ["auto", "layer1"])
def test_a_board_on_which_nothing_fits_is_told_the_other_cures(cut: str) -> None:
    fleet = assembly(f"a:mcu:cut = '{cut}'", mcu=room(1024))
    where = "stem" if cut == "auto" else cut
    with pytest.raises(FitError, match=f"up to {where} needs .* on mcu: take a narrower network, "):
        fleet.member("a")


def test_an_unknown_cut_lists_the_cuts() -> None:
    with pytest.raises(CutError, match=r"take one of 1 stem, 2 layer1, 3 layer2, 4 layer3$"):
        assembly("a:torch:cut = 'layer4'").member("a")


def test_a_point_without_an_exit_is_no_clients_cut() -> None:
    message = 'cut "stem.1" has no exit; clients take one of 1 stem, 2 layer1, 3 layer2, 4 layer3'
    with pytest.raises(CutError, match=f"^{re.escape(message)}$"):
        assembly("a:torch:cut = 'stem.1'").member("a")


def test_group_norm_where_firmware_is_in_the_fleet_and_batch_norm_elsewhere() -> None:
    assert assembly("a:torch, b:mcu", mcu=ENDLESS).norm == "group"
    assert assembly("a:torch, b:edge").norm == "batch"
    assert assembly("a:torch", model='width = 4\nnorm = "group"').norm == "group"
    assert assembly("a:torch, b:mcu", model='norm = "batch"', mcu=ENDLESS).norm == "batch"


BATCH = 'width = 4\nnorm = "batch"'


def test_batch_norm_by_the_samples_held_needs_the_whole_batch_at_once() -> None:
    assert assembly("a:torch").member("a").build.capacity == 16
    held = assembly("b:mcu:capacity = 16", model=BATCH, mcu=ENDLESS)
    assert held.member("b").build.capacity == 16
    for client in ("a:torch:capacity = 8", "a:mcu"):  # firmware usually holds 8
        with pytest.raises(FleetError) as error:
            assembly(client, model=BATCH, mcu=ENDLESS).member("a")
        assert str(error.value) == (
            'client "a": batch norm needs the whole batch at once: capacity = 16, '
            'batch_norm = "frozen" or norm = "group"'
        )


def test_frozen_batch_norm_takes_any_capacity_and_keeps_names_and_values() -> None:
    clients = "a:torch:capacity = 3:cut = 2, b:mcu:capacity = 1:cut = 2, c:mcu:cut = 2"
    fleet = assembly(clients, model=BATCH + '\nbatch_norm = "frozen"', mcu=ENDLESS)
    assert [m.build.capacity for m in fleet.members] == [3, 1, 8]
    held = assembly("a:torch:cut = 2", model=BATCH).member("a")
    for member in fleet.members:
        graph = member.build.graph
        assert {op.attrs["frozen"] for op in graph.ops if op.kind == "batch_norm"} == {True}
        assert list(member.state.weights) == list(held.state.weights)
        assert unequal(dict(member.state.weights), dict(held.state.weights)) == []
    assert {op.attrs["frozen"] for op in held.build.graph.ops if op.kind == "batch_norm"} == {False}
    client = fleet.local(fleet.member("a"))
    assert len(frozen_norms(client.segment)) == 3
    assert (
        frozen_norms(fleet.strategy([client]).server("a").tail) == []
    )  # servers learn as torch does


@pytest.mark.parametrize(
    ("client", "batch", "batch_norm", "refused"),
    [
        ("a:torch:cut = 3:capacity = 1", 16, "frozen", True),
        ("a:torch:cut = 3:capacity = 3", 16, "frozen", True),  # 16 is 5 x 3 + 1
        ("a:torch:cut = 3:capacity = 4", 16, "frozen", True),  # 1,437 is 89 x 16 + 13, 3 x 4 + 1
        ("a:torch:cut = 3:capacity = 5", 15, "frozen", False),
        ("a:torch:cut = 3:capacity = 2", 4, "frozen", True),
        ("a:torch:cut = 'layer4':capacity = 1", 16, "frozen", False),  # its own norms are frozen
        ("a:torch:cut = 3", 16, "held", False),
        ("a:torch:cut = 3", 4, "held", True),  # 1,437 is 359 x 4 + 1
    ],
)
def test_a_part_of_one_sample_is_too_little_for_batch_norms_of_1x1_images(
    client: str, batch: int, batch_norm: str, refused: bool
) -> None:
    model = f'name = "resnet18"\nwidth = 1\nnorm = "batch"\nbatch_norm = "{batch_norm}"'
    fleet = assembly(client, f"batch = {batch}", model)
    if refused:
        message = r'^client "a": of a part of one sample, layer4\.0\.norm1 sees one value a channel'
        with pytest.raises(FleetError, match=message):
            fleet.member("a")
    else:
        fleet.member("a")


@pytest.mark.parametrize(
    ("client", "batch", "capacity"),
    [
        ("a:torch", 32, 32),
        ("a:mcu", 32, 8),
        ("a:mcu", 4, 4),
        ("a:mcu:capacity = 2", 32, 2),
        ("a:torch:capacity = 50", 32, 32),
    ],
)
def test_a_client_holds_a_batch_or_what_firmware_usually_holds(
    client: str, batch: int, capacity: int
) -> None:
    fleet = assembly(client, f"batch = {batch}", 'norm = "group"', mcu=ENDLESS)
    assert fleet.capacity(fleet.fleet.client[0]) == capacity


def test_shares_divide_the_training_images() -> None:
    fleet = assembly("a:torch:share = 1, b:torch:share = 2.5, c:torch:share = 0.5")
    sizes = [len(m.images) for m in fleet.members]
    assert sum(sizes) == 1437
    assert sizes == [359, 898, 180]  # of 1,437: a quarter, five eighths, an eighth
    assert [m.state.place for m in fleet.members] == [
        Place(samples, seed) for samples, seed in zip(sizes, (0, 1, 2), strict=True)
    ]
    with pytest.raises(FleetError, match=r'^client "b": its share is less than one sample: give'):
        assembly("a:torch, b:torch:share = 1e-4")


def test_a_seed_fits_into_the_32_bits_of_the_wire() -> None:
    fleet = assembly("a:torch, b:torch", f"seed = {2**31 - 1}")
    assert [m.seed for m in fleet.members] == [2**32 - 4096, 2**32 - 4095]


def test_exits_are_those_at_the_cut_or_all_up_to_it() -> None:
    for exits, names in (("own", ("layer2",)), ("upto", ("stem", "layer1", "layer2"))):
        fleet = assembly("a:torch:cut = 3", f'exits = "{exits}"')
        assert fleet.member("a").segment.exit_names == names


def cuts_of(fleet: Assembly, name: str = "a") -> tuple[str, list[str]]:
    """Where a client begins, and the cuts that are built in."""
    member = fleet.member(name)
    return member.cut.name, [stage.cut for stage in member.build.stages]


@pytest.mark.parametrize("exits", ["own", "upto"])
def test_every_cut_up_to_the_deepest_is_built_in(exits: str) -> None:
    fleet = assembly("a:torch:cut = 1:deepest = 'layer2'", f'exits = "{exits}"')
    assert cuts_of(fleet) == ("stem", ["stem", "layer1", "layer2"])
    assert fleet.member("a").segment.exit_names == ("stem", "layer1", "layer2")
    assert tuple(fleet.member("a").graph.exits) == ("stem",)
    assert {n.split(".")[0] for n in fleet.member("a").state.weights} == {"stem", "exits"}
    client = fleet.local(fleet.member("a"))
    assert client.cut == "stem"
    client.move("layer2", upto=False)
    assert client.cut == "layer2"


@pytest.mark.parametrize("exits", ["own", "upto"])
def test_only_the_clients_cut_is_built_in_by_default(exits: str) -> None:
    fleet = assembly("a:torch:cut = 'layer1'", f'exits = "{exits}"')
    assert cuts_of(fleet) == ("layer1", ["layer1"])
    assert not fleet.member("a").build.moves


def test_one_build_serves_every_cut_and_both_kinds_of_exits() -> None:
    fleets = [
        assembly(f"a:torch:cut = {cut}:deepest = 3", f'exits = "{exits}"')
        for cut in (1, 2, 3)
        for exits in ("own", "upto")
    ]
    assert len({fleet.member("a").build.checksum for fleet in fleets}) == 1
    assert [tuple(fleet.member("a").graph.exits) for fleet in fleets] == [
        ("stem",), ("stem",), ("layer1",), ("stem", "layer1"),
        ("layer2",), ("stem", "layer1", "layer2"),
    ]  # fmt: skip


def test_auto_begins_at_the_deepest_and_the_deepest_may_be_auto() -> None:
    assert cuts_of(assembly("a:torch:deepest = 2")) == ("layer1", ["stem", "layer1"])
    one = assembly("a:mcu", mcu=ENDLESS)
    ram = one.builds(one.fleet.client[0], moves=True)[2].ram_bytes(ENDLESS)
    assert ram > needed(3)  # the exits below take memory of their own
    exact = assembly("a:mcu:cut = 1:deepest = 'auto'", mcu=room(ram))
    assert cuts_of(exact) == ("stem", ["stem", "layer1", "layer2"])
    tight = assembly("a:mcu:deepest = 'auto'", mcu=room(ram - 1))
    assert cuts_of(tight) == ("layer1", ["stem", "layer1"])


def test_a_cut_behind_the_deepest_is_refused() -> None:
    fleet = assembly("a:torch:cut = 'layer2':deepest = 'layer1'")
    message = (
        'client "a": cut "layer2" lies behind "layer1", the deepest that it is built with: '
        'take deepest = "layer2" or a shallower cut'
    )
    with pytest.raises(CutError, match=f"^{re.escape(message)}$"):
        fleet.member("a")


def test_a_build_that_is_too_large_says_up_to_where_it_fits() -> None:
    fleet = assembly("a:mcu:cut = 1:deepest = 4", mcu=room(needed(4)))
    with pytest.raises(FitError, match=r'its segment up to layer3 needs .* build up to "layer2"'):
        fleet.member("a")


def test_all_copies_of_a_layer_begin_alike() -> None:
    fleet = assembly("a:torch:cut = 1, b:torch:cut = 3", 'exits = "upto"')
    a, b = (m.state.weights for m in fleet.members)
    assert "exits.stem.linear.weight" in a
    assert unequal({n: b[n] for n in a}, dict(a)) == []
    strategy = fleet.strategy([fleet.local(m) for m in fleet.members])
    replica = arrays(strategy.server("a").tensors())
    shared = [n for n in replica if n in b]
    assert unequal({n: replica[n] for n in shared}, {n: b[n] for n in shared}) == []


def drawn(fleet: Assembly) -> dict[str, Any]:
    """All that is random of a fleet, by owner and name."""
    found: dict[str, Any] = {}
    for member in fleet.members:
        found |= {f"{member.name}/{n}": w for n, w in member.state.weights.items()}
        found |= {f"{member.name}/x": member.images.x, f"{member.name}/y": member.images.y}
        found[f"{member.name}/seed"] = np.array(member.seed)
    return found


@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
def test_the_same_seed_gives_the_same_run_bit_for_bit(strategy: str) -> None:
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        top = f'seed = 5\nbatch = 128\nstrategy = "{strategy}"\naggregate = "all"\nexits = "upto"'
        top += '\n[data]\nsamples = 500\npartition = "dirichlet"\naugment = ["crop", "trivial"]'
        fleet = assembly("a:torch:cut = 1, b:torch:cut = 2:share = 2", top)
        before = drawn(fleet)
        clients = []
        for member in fleet.members:
            clients.append(fleet.local(member))
            clients[-1].start(member.state, member.images)
        rounds = fleet.strategy(clients)
        assert isinstance(rounds, Averaging if strategy == "averaging" else Sequential)
        events = list(fit(rounds, 2))
        assert isinstance(events[-1], RoundDone)
        assert unequal(drawn(fleet), before) == []  # members are where clients start
        results.append(before | everything(rounds, last_states(events)))
    assert unequal(*results) == []


def test_a_member_stays_where_it_starts_while_its_client_learns() -> None:
    fleet = assembly("a:torch:cut = 1")
    member, expected = fleet.member("a"), fleet.member("a").state
    client = fleet.local(member)
    client.start(expected, member.images)
    client.forward(16, 16)
    client.backward(None)
    client.step()
    assert unequal(dict(member.state.weights), dict(expected.weights)) == []
    assert unequal(dict(client.state().weights), dict(expected.weights)) != []


def test_another_seed_gives_other_weights_and_shards() -> None:
    one, other = (
        drawn(assembly("a:torch:cut = 1, b:torch:cut = 2", f"seed = {s}")) for s in (1, 2)
    )
    norms = [n for n in one if re.search(r"\.1\.|norm", n)]  # these begin as ones and zeros
    assert sorted([*unequal(one, other), *norms]) == sorted(one)


def test_assembling_leaves_torchs_random_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assembly("a:torch").member("a")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_board_is_refused_by_whoever_knows_the_boards() -> None:
    def boards(name: str) -> Board:
        raise FleetError(f'no board "{name}"')

    with pytest.raises(FleetError, match='no board "torch"'):
        Assembly(parse('name = "x"\n[[client]]\nname = "a"\n'), boards)


# ---- what saves memory ----


@pytest.mark.parametrize(
    ("client", "message"),
    [
        ("a:far", 'client "a": optimizer = "adamw": clients behind a link learn by SGD alone: give '
         'this one optimizer = "sgd" and a learning_rate'),
        ('a:far:optimizer = "sgd"', 'client "a": optimizer = "sgd": the fleet\'s learning_rate is '
         'for "adamw": give this client one of its own'),
        ('a:far:optimizer = "sgd":learning_rate = 0.1', None),
        ("a:near", None),
        ('a:near:optimizer = "sgd":learning_rate = 0.1', None),
    ],
)  # fmt: skip
def test_adamw_is_for_clients_that_compute_here(client: str, message: str | None) -> None:
    name, board, *keys = client.split(":")
    table = "\n".join([f'[[client]]\nname = "{name}"\nboard = "{board}"', *keys])
    fleet = parse(f'name = "x"\n[optimizer]\nkind = "adamw"\n[model]\nwidth = 4\n{table}\n')
    found = Assembly(fleet, lambda board: Board(False, None, here=board == "near"))
    if message:
        with pytest.raises(FleetError, match=f"^{re.escape(message)}$"):
            found.member("a")
    else:
        found.member("a")


PLAIN = "[optimizer]\nmomentum = 0.0"


def test_a_client_is_built_with_its_levers() -> None:
    client = "a:mcu:relu_bits = true:float16 = true:recompute = 0.5:local_only = true, b:mcu"
    fleet = assembly(client, mcu=ENDLESS)
    a, b = fleet.members
    assert a.build.levers == Levers(relu_bits=True, float16=True, recompute=0.5, local_only=True)
    assert b.build.levers == Levers()
    assert a.build.arena_bytes < b.build.arena_bytes
    assert a.build.checksum != b.build.checksum


def test_a_fused_update_is_built_where_a_batch_is_one_part_without_momentum() -> None:
    fleet = assembly("a:mcu:capacity = 16:fused_update = true", PLAIN, mcu=ENDLESS)
    assert fleet.member("a").build.levers.fused_update


@pytest.mark.parametrize(
    ("client", "top", "message"),
    [
        ("a:torch:relu_bits = true", "", 'a": relu_bits: torch runs no firmware: leave it out'),
        ("a:mcu:capacity = 16:fused_update = true", "", "fused_update: .* take momentum = 0$"),
        ("a:mcu:fused_update = true", PLAIN, "fused_update: .* one part: take capacity = 16$"),
        (
            "a:mcu:capacity = 16:fused_update = true",
            PLAIN + "\nclip = 1.0",
            "fused_update: clipping .*: take no clip$",
        ),
        ("a:mcu:local_only = true", 'gradient = "both"', 'local_only: .*, and gradient = "both"$'),
        ('a:mcu:local_only = true:gradient = "server"', "", 'and gradient = "server"$'),
        ("a:mcu:local_only = true:deepest = 2", "", "local_only: .*: leave out deepest$"),
    ],
)
def test_a_lever_that_the_fleet_rules_out_is_refused(client: str, top: str, message: str) -> None:
    with pytest.raises(FleetError, match=message):
        assembly(client, top, mcu=ENDLESS).member("a")


def test_a_lever_asks_for_the_gradient_of_its_client() -> None:
    client = 'a:mcu:local_only = true:gradient = "local"'
    assert assembly(client, 'gradient = "both"', mcu=ENDLESS).member("a").build.levers.local_only


def test_the_effect_of_each_lever_is_that_of_a_build_with_it() -> None:
    build = assembly("a:mcu:cut = 2", mcu=ENDLESS).member("a").build
    found = {e.setting: e for e in effects(build)}
    assert list(found) == ["capacity", *(f.name for f in fields(Levers))]
    fewer = replace(build, capacity=4)
    assert (found["capacity"].now, found["capacity"].other) == ("8", "4")
    assert found["capacity"].arena_bytes == fewer.arena_bytes < build.arena_bytes
    pulled_alone = (Levers(relu_bits=True), Levers(float16=True), Levers(recompute=1.0))
    for name, levers in zip(("relu_bits", "float16", "recompute"), pulled_alone, strict=True):
        other = replace(build, levers=levers)
        assert found[name].arena_bytes == other.arena_bytes
        assert (found[name].now, found[name].other) in (("false", "true"), ("0.0", "1.0"))
    pulled = replace(build, levers=Levers(recompute=1.0))
    back = {e.setting: e for e in effects(pulled)}["recompute"]
    assert (back.now, back.other, back.arena_bytes) == ("1.0", "0.0", build.arena_bytes)
    again = pulled.schedule.macs_again / build.graph.macs()[0]
    assert back.price == found["recompute"].price == f"{again:.0%} of the forward pass again; exact"


@pytest.mark.parametrize("samples", [200, None])
def test_images_that_are_held_out_are_nobody_s(samples: int | None) -> None:
    data = "held_out = 150" + (f"\nsamples = {samples}" if samples else "")
    without = f"samples = {samples}" if samples else ""
    fleet = 'name = "x"\n[model]\nwidth = 4\n[[client]]\nname = "a"\n[[client]]\nname = "b"\n'
    held, plain = (
        Assembly(parse(f"{fleet}[data]\n{words}"), lambda board: Board(False, None))
        for words in (data, without)
    )
    used = samples or 1437 - 150
    assert sum(len(member.images) for member in held.members) == used
    every = np.concatenate([held.dataset.train.x[:used], held.held_out.x])
    assert len(held.held_out) == 150
    assert len(plain.held_out) == 0
    # the first of one order: those behind what is used
    whole = parse(f"{fleet}[data]\nsamples = {used + 150}")
    assert np.array_equal(every, Assembly(whole, lambda board: Board(False, None)).dataset.train.x)


def test_more_than_there_are_cannot_be_held_out() -> None:
    with pytest.raises(FleetError, match="held_out = 2,000: there are 1,437 training images"):
        assembly("a:torch", "[data]\nheld_out = 2000")


MANY = """
name = "many"
aggregate = "all"
exits = "upto"
participation = 0.3
[data]
samples = 100
[model]
width = 4
[[client]]
name = "one"
cut = "layer2"
[[client]]
name = "many"
count = 19
cut = "layer1"
"""


@pytest.mark.parametrize("kind", ["averaging", "sequential"])
def test_many_clients_alike_are_parked_and_learn_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome() -> tuple[list[type], dict[str, Array]]:
        many = Assembly(parse(f'strategy = "{kind}"\n{MANY}'), lambda _: Board(False, None))
        clients = [many.here(member) for member in many.members]
        strategy = many.strategy(clients)
        for client, member in zip(clients, many.members, strict=True):
            client.start(member.state, member.images)
        states = last_states(list(fit(strategy, 3)))
        return [type(c) for c in clients], everything(strategy, states)

    kinds, found = outcome()
    assert kinds == [LocalClient, *[ParkedClient] * 19]
    monkeypatch.setattr(assemble, "PARKED_FROM", 100)
    kinds, expected = outcome()
    assert set(kinds) == {LocalClient}
    assert unequal(found, expected) == []


def test_clients_alike_share_what_they_begin_with_but_for_their_images_and_order() -> None:
    many = Assembly(parse(MANY), lambda _: Board(False, None))
    first, second = many.members[1:3]
    assert first.segment is second.segment
    assert first.state.weights is second.state.weights
    assert first.seed != second.seed
    assert not np.array_equal(first.images.x, second.images.x)
    assert second.state.place == Place(len(second.images), second.seed)


def test_many_clients_whose_cut_may_move_stay_live() -> None:
    text = MANY.replace('cut = "layer1"', 'cut = "auto"')
    many = Assembly(parse(text), lambda _: Board(False, None))
    assert isinstance(many.here(many.members[1]), LocalClient)
