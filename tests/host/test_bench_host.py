"""What `splitee bench host` says, at sizes that take no time; how fast it is, no test can hold."""

from __future__ import annotations

import json

from host_harness import splitee
from splitee_host import bench_host
from splitee_host.bench_host import Row


def shape(row: Row, case: str) -> None:
    assert set(row) == {"case", "ratio", "detail"}
    assert row["case"] == case
    assert row["ratio"] > 0
    json.dumps(row)


def test_a_fleet_in_this_process_is_held_to_the_unsplit_network() -> None:
    shape(bench_host.fleet4(batch=2, repeats=1), "fleet4")


def test_a_client_behind_tcp_sends_what_its_cut_has_with_a_label() -> None:
    row = bench_host.loopback(4, repeats=1)
    shape(row, "loopback4")
    # float32 of 16 x 32 x 32 and a label, and what frames put around them, of 4 samples each
    assert 65_537 < row["detail"]["bytes_up_per_sample"] < 65_537 + 64 / 4


def test_sixteen_clients_are_held_to_one_and_their_servers_counted() -> None:
    row = bench_host.clients16(batch=1, repeats=1)
    shape(row, "clients16")
    assert row["detail"]["server_bytes"] == 16 * row["detail"]["server_bytes_per_client"]


def test_simulated_clients_are_live_only_while_they_train() -> None:
    row = bench_host.simulated1000(clients=30)
    shape(row, "simulated1000")
    assert row["detail"]["drawn"] == 3
    assert row["detail"]["live_networks"] <= 6  # a client and a server of each of three cuts


def test_a_case_that_there_is_not_is_refused_before_any_is_measured() -> None:
    said = splitee("bench", "host", "--case", "fleet4", "--case", "fleet5")
    assert said.code == 1
    assert 'no case "fleet5" is measured: there are fleet4, loopback1, loopback32' in said.err
