"""`torchrun … -m splitee_host.cli train`: a fleet whose clients are spread over processes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from splitee_host.cli.common import assembly_of

if TYPE_CHECKING:
    from rich.console import Console

    from splitee.assemble import Assembly
    from splitee.fleet import Fleet
    from splitee.ranks import Ranks
    from splitee.runs import Checkpoint, ClientSummary, Run


@dataclass(frozen=True)
class _Task:
    """What rank 0 has read for all: other machines need neither fleet file nor run."""

    fleet: str
    checkpoint: Checkpoint | None


def train_over_ranks(
    console: Console, fleet_file: Path | None, runs: Path, resume: Path | None
) -> None:
    """Trains this rank's clients; rank 0 writes and prints, as one process would."""
    from splitee.fleet import parse
    from splitee.ranks import ranks
    from splitee.runs import Run

    began = time.perf_counter()
    with ranks() as here:
        run, task = None, None
        if here.rank == 0:
            run = Run(resume) if resume is not None else None
            task = _read(fleet_file, run)
        task = here.told(task)
        fleet = parse(task.fleet)
        _check(fleet, here)
        assembly = assembly_of(fleet)
        if here.rank == 0:
            if run is not None:
                run.resume(task.checkpoint.round if task.checkpoint else 0)
            else:
                run = Run(runs / fleet.name)
                run.begin(task.fleet)
        earlier = run.seconds() if run is not None else 0.0
        summaries = _train(console, assembly, here, run, task.checkpoint)
        if run is not None:
            _finish(console, run, summaries, earlier + time.perf_counter() - began, here.size)


def _read(fleet_file: Path | None, run: Run | None) -> _Task:
    """A fleet file, or the run that goes on; errors name the file."""
    from splitee.fleet import read

    checkpoint = run.load() if run is not None and run.checkpoint_file.exists() else None
    path = run.fleet_file if run is not None else fleet_file
    assert path is not None
    read(path)
    return _Task(path.read_text(encoding="utf-8"), checkpoint)


def _check(fleet: Fleet, ranks: Ranks) -> None:
    """Raises FleetError for a fleet that cannot be spread."""
    from splitee.errors import FleetError

    if fleet.strategy != "averaging":
        raise FleetError(
            f'strategy = "{fleet.strategy}": over several processes only "averaging" trains: in '
            "sequential clients take turns at one server; start it without torchrun"
        )
    for client in fleet.client:
        if client.board != "torch":
            raise FleetError(
                f'client "{client.name}": board = "{client.board}": over several processes clients '
                'train in these alone: take board = "torch", or start it without torchrun'
            )
    if len(fleet.client) < ranks.size:
        raise FleetError(
            f"{ranks.size} processes and {len(fleet.client)} clients: start at most as many "
            "processes as clients"
        )


def _train(
    console: Console,
    assembly: Assembly,
    ranks: Ranks,
    run: Run | None,
    checkpoint: Checkpoint | None,
) -> list[ClientSummary]:
    """All rounds, then the test; the summaries of all clients, at rank 0."""
    from splitee.ranks import RankDone, RankedAveraging, rounds
    from splitee.runs import check
    from splitee.train import RoundDone, evaluate
    from splitee_host.screen import line_of

    fleet = assembly.fleet
    everyone = [c.name for c in fleet.client]
    members = {name: assembly.member(name) for name in ranks.mine(everyone)}
    states = {name: m.state for name, m in members.items()}
    if checkpoint is not None:
        held = {n: checkpoint.states[n].weights for n in members if n in checkpoint.states}
        check(held, {name: state.weights for name, state in states.items()})
        states = {name: checkpoint.states[name] for name in members}
    clients = [assembly.here(member, ranks.device) for member in members.values()]
    servers = {}
    for client in clients:
        member = members[client.name]
        client.start(states[client.name], member.images)
        servers[client.name] = assembly.completing(client, member, ranks.device)
    strategy = RankedAveraging(
        clients, servers, fleet.rules, states=states, everyone=everyone, ranks=ranks
    )
    if checkpoint is not None:
        strategy.load(checkpoint.servers, checkpoint.server_momentum)
    first = checkpoint.round + 1 if checkpoint is not None else 1
    for done in rounds(strategy, ranks, fleet.rounds, first):
        if run is None or not isinstance(done, RankDone):
            continue
        for event in done.events:
            record = run.log(event)
            line = line_of(record, everything=True) if record is not None else None
            if line is not None:
                console.print(line)
            if isinstance(event, RoundDone):
                run.save(event.round, event.states, done.servers)
    tested = []
    for client in clients:
        strategy.update(client)
        answers = evaluate(client, strategy.server(client.name), assembly.dataset.test)
        tested.append((client.name, answers.exit_accuracy, answers.server_accuracy))
    found = {name: rest for part in ranks.gathered(tested) for name, *rest in part}
    return [] if run is None else _summaries(assembly, run, found)


def _summaries(
    assembly: Assembly, run: Run, accuracies: dict[str, list[float]]
) -> list[ClientSummary]:
    """A summary of each client."""
    from splitee.runs import ClientSummary
    from splitee_host.boards import load_boards

    tier = load_boards()["torch"].tier
    passes = [r for r in run.metrics() if r["event"] == "ClientDone"]
    summaries = []
    for member in assembly.members:
        mine = [r for r in passes if r["client"] == member.name]
        trained = max(1, sum(r["samples"] for r in mine))
        at_exit, at_server = accuracies[member.name]
        summaries.append(
            ClientSummary(
                name=member.name,
                tier=tier,
                board="torch",
                link="memory",
                cut=member.cut.name,
                parameters=member.graph.parameter_size,
                arena_bytes=member.build.arena_bytes,
                flash_bytes=0,
                bytes_up_per_sample=round(sum(r["activations_up"] for r in mine) / trained, 1),
                ms_per_sample=round(1000 * sum(r["seconds"] for r in mine) / trained, 3),
                exit_accuracy=at_exit,
                server_accuracy=at_server,
            )
        )
    return summaries


def _finish(
    console: Console, run: Run, summaries: list[ClientSummary], seconds: float, processes: int
) -> None:
    from splitee_host.screen import final_table

    console.print(final_table(summaries))
    run.finish(seconds, summaries)
    console.print(
        f"{len(run.took_part())} rounds over {processes} processes in {seconds:.0f} s; curves, "
        f"metrics and checkpoint in {run.folder}/",
        highlight=False,
    )
