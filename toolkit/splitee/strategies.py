"""How clients with different cuts learn together: Sequential, Averaging, or a class of your own.

After Oda et al., arXiv 2512.09313. In Sequential, clients take turns at one shared server; in
Averaging, each client has a server replica of its own, and layers are averaged across depths.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from splitee import own
from splitee.attendance import Attendance
from splitee.client import Client, State
from splitee.data import draw_order
from splitee.errors import StrategyError, TooFewClients
from splitee.means import Copy, client_copy, cross_layer_mean, owners
from splitee.ops import Array
from splitee.rules import Rules
from splitee.server import Server
from splitee.train import ClientDone, Event, RoundDone, RoundFailed

_DRAWS = 0x5EED  # clients are drawn by other numbers than samples are


class Strategy:
    """A round: who takes part, their passes, and what is averaged then.

    A strategy of your own is a subclass, of this or of one below, that overrides what is else in
    it: ``draw``, ``passes``, ``copies``, ``mean``; its name in a fleet file is "module:Class".
    """

    shared: ClassVar[bool] = False  # one server for all clients; False: a replica for each

    def __init__(
        self,
        clients: Sequence[Client],
        servers: Mapping[str, Server],
        rules: Rules,
        *,
        states: Mapping[str, State] | None = None,
    ) -> None:
        """servers by client, each entered at that client's cut: one and the same where shared.

        states: where the clients are; None asks them.
        """
        self.rules = rules
        self._servers = dict(servers)
        self._attendance = Attendance(clients, self._servers, rules, states)

    # what a strategy is

    def draw(self, number: int, names: Sequence[str]) -> Sequence[str]:
        """Who of these clients is in a round: a share of the fleet, by the fleet's seed."""
        count = self.rules.drawn(self._count())
        order = draw_order(len(names), self.rules.seed ^ _DRAWS, number)
        return [names[place] for place in order[:count]]

    def passes(
        self, clients: Sequence[Client], number: int
    ) -> Generator[Event, None, list[ClientDone]]:
        """Every client's pass of a round, by ``at_once``; those that were finished, in order."""
        raise NotImplementedError

    def copies(self, done: Sequence[ClientDone]) -> list[Copy]:
        """Whose layers are averaged after these passes, each with the samples that trained it."""
        raise NotImplementedError

    def mean(self, copies: Sequence[Copy]) -> Mapping[str, Tensor]:
        """The layers that all servers, and with aggregate = "all" all clients, then have."""
        return cross_layer_mean(copies)

    # what it is made of

    @property
    def everyone(self) -> Sequence[Client]:
        """All clients, in the fleet file's order."""
        return self._attendance.everyone

    @property
    def clients(self) -> list[Client]:
        """Those that are not away, in the fleet file's order."""
        return self._attendance.there

    @property
    def away(self) -> Mapping[str, str]:
        """Those that are away, each with the reason."""
        return dict(self._attendance.away)

    @property
    def states(self) -> Mapping[str, State]:
        """What every client holds, or will when it is back or in a round again."""
        return self._attendance.states

    def server(self, client: str) -> Server:
        """The server network that completes this client's."""
        return self._servers[client]

    def servers(self) -> dict[str, Server]:
        """Every server network, under its name in a checkpoint."""
        if self.shared:
            return {"server": next(iter(self._servers.values()))}
        return {f"server.{name}": server for name, server in self._servers.items()}

    def at_once(
        self, clients: Sequence[Client], number: int
    ) -> Generator[Event, None, list[ClientDone]]:
        """Passes of these clients in parallel; those that were finished, in the order given."""
        return (yield from self._attendance.at_once(clients, number))

    def update(self, client: Client) -> None:
        """Gives a client the means that it has missed. Raises LinkError when it is lost."""
        self._attendance.update(client)

    # one round

    def round(self, number: int) -> Iterator[Event]:
        """The passes of those that are drawn, then the means.

        A round that fewer clients complete than min_clients is undone, and begins once more behind
        a wait for those that are away. Then it ends without a RoundDone where everybody is away;
        otherwise, raises TooFewClients.
        """
        attendance = self._attendance
        drawn = self._drawn(number, self.everyone)
        done = yield from self._complete(drawn, number)
        if done is None:  # once more: a fleet that lost its power goes on where it was
            yield from attendance.wait(number)
            again = self._drawn(number, attendance.there)
            drawn += [c for c in again if c not in drawn]
            if len(again) >= self.rules.min_clients:
                done = yield from self._complete(again, number)
        if done is None:
            if attendance.there:
                raise TooFewClients(number, self.rules.min_clients, attendance.away)
            return
        finished = {d.client for d in done}
        asked = {c.name for c in drawn} - finished
        missing = {n: why for n, why in attendance.away.items() if n in asked}
        idle = attendance.states.keys() - finished - missing.keys()
        for d in done:
            attendance.states[d.client] = d.state
        if number % self.rules.period == 0:
            copies = self.copies(done)
            means = self._means(copies)
            for server in self.servers().values():
                server.load(means)
            if self.rules.aggregate == "all":
                yield from attendance.give(means, drawn, number)
        if not attendance.there:
            yield from attendance.wait(number)
        yield RoundDone(number, dict(attendance.states), missing, idle)

    def _drawn(self, number: int, clients: Sequence[Client]) -> list[Client]:
        names = [c.name for c in clients]
        drawn = set(self.draw(number, names))
        if unknown := drawn.difference(names):
            raise StrategyError(
                f"{type(self).__name__}.draw: {', '.join(sorted(unknown))} cannot take part in "
                f"round {number}: draw from the names that it is given"
            )
        return [c for c in clients if c.name in drawn]

    def _complete(
        self, clients: Sequence[Client], number: int
    ) -> Generator[Event, None, list[ClientDone] | None]:
        """The passes of a round; None, and undone, where too few clients finished theirs."""
        kept = []
        if self.rules.min_clients > 1:  # of a single client that is lost nothing is left anyway
            servers = {id(s): s for s in (self.server(c.name) for c in clients)}
            kept = [(server, server.snapshot()) for server in servers.values()]
        done = yield from self.passes(clients, number)
        if len(done) >= self.rules.min_clients:
            return done
        yield RoundFailed(number, [d.client for d in done], self.rules.min_clients)
        for server, snapshot in kept:
            server.restore(snapshot)
        yield from self._attendance.undo(done, number)
        return None

    def _count(self) -> int:
        """The clients of the fleet, whether or not they are away."""
        return len(self._attendance.everyone)

    def _means(self, copies: Sequence[Copy]) -> Mapping[str, Tensor]:
        """The means, of layers that there are."""
        return _checked(self.mean(copies), copies)

    # checkpoints

    def load(
        self,
        servers: Mapping[str, Mapping[str, Array]],
        momentum: Mapping[str, Mapping[str, Array]] | None = None,
    ) -> None:
        """Replaces what the servers have learnt by that of a checkpoint; the names have to fit.

        momentum: None leaves it as it is; a server that is not named has none yet.
        """
        for name, server in self.servers().items():
            server.load({k: torch.as_tensor(v) for k, v in servers[name].items()})
            if momentum is not None:
                velocity = momentum.get(name, {})
                server.load_momentum({k: torch.as_tensor(v) for k, v in velocity.items()})


def _checked(means: Mapping[str, Tensor], copies: Sequence[Copy]) -> Mapping[str, Tensor]:
    """The means. Raises StrategyError where one is none of these layers, or of another shape."""
    shapes = {name: owned[0][0].shape for name, owned in owners(copies).items()}
    for name, mean in means.items():
        if shapes.get(name) != mean.shape:
            known = f"{tuple(shapes[name])}" if name in shapes else "no layer of that name"
            raise StrategyError(
                f"the mean of {name} is {tuple(mean.shape)}, its copies are {known}: let "
                "Strategy.mean return layers of the copies that it is given, in their shapes"
            )
    return means


class Averaging(Strategy):
    """A server replica for each client, in parallel, with periodic cross-layer aggregation."""

    def passes(
        self, clients: Sequence[Client], number: int
    ) -> Generator[Event, None, list[ClientDone]]:
        """All at the same time."""
        return (yield from self.at_once(clients, number))

    def copies(self, done: Sequence[ClientDone]) -> list[Copy]:
        """The replicas', and the clients' where aggregate is all, in the fleet file's order.

        All replicas get the means, also of clients that are away.
        """
        found: list[Copy] = []
        for d in done:
            replica = self.server(d.client).tensors()
            found.append({name: (tensor, d.samples) for name, tensor in replica.items()})
            if self.rules.aggregate == "all":
                found.append(client_copy(d.state, d.samples))
        return found


class Sequential(Strategy):
    """One shared server; a turn is one client's whole pass, in the fleet file's order."""

    shared = True

    def passes(
        self, clients: Sequence[Client], number: int
    ) -> Generator[Event, None, list[ClientDone]]:
        """Every client's turn, one after the other."""
        done = []
        for client in clients:
            done += yield from self.at_once([client], number)
        return done

    def copies(self, done: Sequence[ClientDone]) -> list[Copy]:
        """The clients' and the shared server's, where aggregate is all; otherwise none."""
        if self.rules.aggregate != "all":
            return []
        cuts = {c.name: c.cut for c in self.everyone}
        server = self.server(done[0].client)
        behind = [(set(server.tensors(cuts[d.client])), d.samples) for d in done]
        shared: Copy = {
            name: (tensor, sum(n for names, n in behind if name in names))
            for name, tensor in server.tensors().items()
        }
        return [*(client_copy(d.state, d.samples) for d in done), shared]


BUILT_IN: dict[str, type[Strategy]] = {"averaging": Averaging, "sequential": Sequential}


def of_name(name: str) -> type[Strategy]:
    """The strategy of a fleet file. Raises StrategyError for a user's own that cannot be used."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    try:
        found = own.load(name)
    except Exception as error:  # whatever a user's module raises
        raise StrategyError(
            f'strategy "{name}" cannot be loaded: {type(error).__name__}: {error}: is its module '
            "in this folder, or installed?"
        ) from error
    if isinstance(found, type) and issubclass(found, Strategy):
        return found
    raise StrategyError(
        f'strategy "{name}" is no strategy: take a subclass of splitee.strategies.Strategy'
    )
