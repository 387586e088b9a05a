"""`splitee train`: a fleet from its file, or a run that goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitee_host.cli.common import (
    BUILD,
    app,
    assembly_of,
    ended,
    going_on,
    new_console,
    plain,
    unaugmented,
)

if TYPE_CHECKING:
    from rich.console import Console

    from splitee.assemble import Assembly
    from splitee.events import Evaluated, RoundDone
    from splitee.runs import Checkpoint, ClientSummary, Run
    from splitee.strategies import Strategy
    from splitee_host.launch import Launched
    from splitee_host.memory import Usage


@app.command()
def train(
    fleet_file: Annotated[
        Path | None, typer.Argument(help="The fleet file (TOML).", metavar="FLEET")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with the run in this folder, behind its last complete round, in place of "
            "training a fleet from the beginning.",
            metavar="RUN",
        ),
    ] = None,
) -> None:
    """Train a fleet; leaves metrics, checkpoint and summary in runs/<name>/."""
    import torch

    from splitee import ranks
    from splitee.errors import CheckpointError, FleetError, LinkError
    from splitee.fleet import read
    from splitee.runs import Run, check
    from splitee.strategies import of_name
    from splitee_exporters.c import to_c
    from splitee_host import keys
    from splitee_host.launch import Launcher
    from splitee_host.screen import final_table, memory_table

    torch.set_num_threads(1)  # sums in one order: a second run is bit-identical
    began = time.perf_counter()
    console = new_console()

    def say(text: str) -> None:
        console.print(plain(text), highlight=False)

    if (fleet_file is None) == (resume is None):
        raise FleetError(
            "train takes a fleet file, or --resume with the folder of a run, whose own copy of the "
            "fleet file it then uses: give one of the two"
        )
    if ranks.launched():
        from splitee_host.cli.ranked import train_over_ranks

        train_over_ranks(console, fleet_file, runs, resume)
        return
    if resume is not None:
        run = Run(resume)
        fleet_file = run.fleet_file
        if not fleet_file.exists():
            raise CheckpointError(f"{fleet_file}: no such file: is {resume} the folder of a run?")
        fleet = read(fleet_file)
    else:
        assert fleet_file is not None
        fleet = read(fleet_file)
        run = Run(runs / fleet.name)
    of_name(fleet.strategy)  # one that cannot be loaded is refused before anything is built
    assembly = assembly_of(fleet)
    for line in unaugmented(fleet):
        say(line)
    with run.ours():
        checkpoint: Checkpoint | None = None
        if resume is not None:
            if run.checkpoint_file.exists():
                checkpoint = run.load()
            say(_goes_on(run, checkpoint, fleet.rounds))
        elif unfinished := _unfinished(run):
            say(unfinished)
        if checkpoint is not None:
            held = {name: state.weights for name, state in checkpoint.states.items()}
            check(held, {m.name: m.state.weights for m in assembly.members})
        with Launcher(assembly, fleet_file, to_c, BUILD, say) as launcher:
            launched = [launcher.launch(member) for member in assembly.members]
            strategy = _strategy(assembly, launched, checkpoint)
            complete = checkpoint.round if checkpoint is not None else 0
            if resume is not None:
                run.resume(complete)
            else:
                run.begin(fleet_file.read_text(encoding="utf-8"))
                keys.lend(fleet_file, run.fleet_file)
            earlier = run.seconds()
            try:
                _train(console, assembly, run, launched, strategy, complete + 1)
                summaries, usages = _test(console, assembly, run, launched, strategy)
            except KeyboardInterrupt:
                say(_stopped(run, fleet.rounds))
                raise
        run.finish(earlier + time.perf_counter() - began, summaries)
    console.print(final_table(summaries))
    if usages:
        console.print(memory_table(usages))
    rounds = run.took_part()
    for summary in summaries:
        there = sum(summary.name in r["clients"] for r in rounds)
        if any(summary.name in r.get("missing", {}) for r in rounds):
            say(f"{summary.name} took part in {there} of {len(rounds)} rounds")
    say(ended(run, earlier + time.perf_counter() - began))
    if all(summary.lost for summary in summaries):
        raise LinkError(
            "every client was lost; the table shows what was kept of each: when they are back, go "
            f"on with {going_on(run)}"
        )


def _goes_on(run: Run, checkpoint: Checkpoint | None, rounds: int) -> str:
    """What resuming a run begins with, in words."""
    if checkpoint is None:
        return f"{run.folder}/: no round is complete yet: beginning with the first"
    if checkpoint.round >= rounds:
        return f"{run.folder}/: all {rounds} rounds are complete: only testing"
    return f"{run.folder}/: going on behind round {checkpoint.round} of {rounds}"


def _unfinished(run: Run) -> str | None:
    """What a new run of the same name is about to replace, where that could have gone on."""
    from splitee.errors import SpliteeError
    from splitee.fleet import read

    with suppress(SpliteeError):  # none, or none that we can go on with
        done, rounds = run.load().round, read(run.fleet_file).rounds
        if done < rounds:
            return (
                f"{run.folder}/ holds a run that ended behind round {done} of {rounds}; this one "
                f"takes its place ({going_on(run)} goes on with it instead)"
            )
    return None


def _stopped(run: Run, rounds: int) -> str:
    """What Ctrl-C ends with, in words."""
    complete = run.complete()
    behind = f"stopped behind round {complete} of {rounds}" if complete else "stopped"
    if complete == rounds:
        return f"all {rounds} rounds are complete and saved; {going_on(run)} tests them"
    return f"{behind}: go on with {going_on(run)}"


def _strategy(
    assembly: Assembly, launched: list[Launched], checkpoint: Checkpoint | None
) -> Strategy:
    """The fleet's strategy; where there is a checkpoint, all clients and servers are at it."""
    from splitee.runs import check
    from splitee_host.launch import torch_device

    clients, device = [entry.client for entry in launched], torch_device()
    if checkpoint is None:
        return assembly.strategy(clients, device)
    strategy = assembly.strategy(clients, device, states=checkpoint.states)
    check(checkpoint.servers, {n: s.tensors() for n, s in strategy.servers().items()})
    strategy.load(checkpoint.servers, checkpoint.server_momentum)
    for entry in launched:
        entry.client.start(checkpoint.states[entry.client.name], entry.member.images)
    return strategy


def _train(
    console: Console,
    assembly: Assembly,
    run: Run,
    launched: list[Launched],
    strategy: Strategy,
    first: int,
) -> None:
    """Rounds from the first, or until Ctrl-C: raises KeyboardInterrupt then."""
    from splitee.curves import Curves
    from splitee.errors import MissingTool
    from splitee.events import Event, RoundDone
    from splitee.progress import Progress
    from splitee.train import batches, fit
    from splitee_host.interrupt import Interrupt
    from splitee_host.screen import Screen

    fleet = assembly.fleet
    passes = {
        m.name: batches(m.state.place, fleet.batch, fleet.local_steps) for m in assembly.members
    }
    progress = Progress(
        {name: sum(sizes) for name, sizes in passes.items()},
        fleet.rounds,
        first,
        seconds=run.seconds(),
        traffic={entry.client.name: entry.client.traffic for entry in launched},
    )
    run.note(progress, now=True)
    with ExitStack() as ends:
        try:
            curves: Curves | None = ends.enter_context(Curves(run.curves, first))
        except MissingTool as missing:
            curves = None
            console.print(plain(f"no curves for TensorBoard: {missing}"), highlight=False)
        screen = ends.enter_context(Screen(console, progress))

        def note(event: Event) -> None:
            progress.take(event)
            screen.tell(run.log(event))
            if curves is not None:
                curves.take(event)

        def asked() -> None:
            screen.notice(
                f"finishing round {progress.round}, which is then saved; Ctrl-C again stops at "
                "once, and loses it"
            )

        def aborted() -> None:
            screen.notice(f"stopping: round {progress.round} is lost")

        interrupt = ends.enter_context(Interrupt(asked, aborted))
        # closed whatever ends it, so that no pass goes on behind our back
        for event in ends.enter_context(closing(fit(strategy, fleet.rounds, first))):
            if isinstance(event, RoundDone):
                for tested in _tests(assembly, strategy, event):
                    note(tested)
            note(event)
            if isinstance(event, RoundDone):
                run.save(event.round, event.states, strategy.servers())
            run.note(progress, now=isinstance(event, RoundDone))
            if isinstance(event, RoundDone) and interrupt.asked:
                raise KeyboardInterrupt


def _tests(assembly: Assembly, strategy: Strategy, done: RoundDone) -> Iterator[Evaluated]:
    """Every client's test behind a round that asks for one; here, so no device waits for it."""
    from splitee.events import Evaluated
    from splitee.train import evaluate
    from splitee_host.launch import torch_device

    every = assembly.fleet.evaluate_every
    if every is None or done.round % every:
        return
    for member in assembly.members:
        client = assembly.local(member, torch_device())
        client.start(done.states[member.name], member.images)
        answers = evaluate(client, strategy.server(member.name), assembly.dataset.test)
        yield Evaluated(member.name, done.round, answers.exit_accuracy, answers.server_accuracy)


def _test(
    console: Console,
    assembly: Assembly,
    run: Run,
    launched: list[Launched],
    strategy: Strategy,
) -> tuple[list[ClientSummary], list[Usage]]:
    """The test at the end; a summary and the firmware's memory for each client."""
    from splitee.errors import LinkError
    from splitee.runs import ClientSummary
    from splitee.train import evaluate

    lost = dict(strategy.away)
    passes = [r for r in run.metrics() if r["event"] == "ClientDone"]
    console.print("testing: every client answers the test images itself", highlight=False)
    summaries = []
    usages = []
    for entry in launched:
        member, client, usage = entry.member, entry.client, entry.memory
        mine = [r for r in passes if r["client"] == member.name]
        trained = max(1, sum(r["samples"] for r in mine))
        up = sum(r["activations_up"] for r in mine) / trained
        if member.name not in lost:
            try:
                strategy.update(client)
                answers = evaluate(client, strategy.server(member.name), assembly.dataset.test)
                usage = entry.usage()
            except LinkError as error:
                lost[member.name] = str(error)
        if member.name in lost:
            # what it had learnt by its last complete round is kept, and tested here
            client = assembly.local(member)
            client.start(strategy.states[member.name], member.images)
            answers = evaluate(client, strategy.server(member.name), assembly.dataset.test)
        summaries.append(
            ClientSummary(
                name=member.name,
                tier=entry.tier,
                board=entry.board,
                link=entry.link,
                cut=member.cut.name,
                parameters=member.graph.parameter_size,
                arena_bytes=member.build.arena_bytes,
                flash_bytes=entry.flash_bytes,
                bytes_up_per_sample=round(up, 1),
                ms_per_sample=round(1000 * sum(r["seconds"] for r in mine) / trained, 3),
                exit_accuracy=answers.exit_accuracy,
                server_accuracy=answers.server_accuracy,
                lost=lost.get(member.name),
                memory=usage.figures() if usage else None,
            )
        )
        if usage:
            usages.append(usage)
    return summaries, usages
