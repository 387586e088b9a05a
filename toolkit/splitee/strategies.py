"""How clients with different cuts learn together: Sequential and Averaging.

After Oda et al., arXiv 2512.09313. In Sequential, clients take turns at one shared server; in
Averaging, each client has a server replica of its own, and layers are averaged across depths.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from splitee.client import Client, State
from splitee.errors import LinkError, NotFinite
from splitee.ops import Array
from splitee.server import Server
from splitee.train import ClientDone, ClientLost, Event, RoundDone, train_pass

Rate = Callable[[int], float]  # the learning rate of a round
Copy = Mapping[str, tuple[Tensor, int]]  # an owner's layers: tensor and samples that trained it


def cross_layer_mean(copies: Sequence[Copy]) -> dict[str, Tensor]:
    """Every layer, averaged over all that own a copy of it, weighted by samples.

    Sums run in the order of copies, in float64, so that the result does not depend on who answered
    first. A layer with one owner is that owner's, bit for bit. Copies that no sample trained count
    only where no copy was trained.
    """
    owners: dict[str, list[tuple[Tensor, int]]] = {}
    for copy in copies:
        for name, owned in copy.items():
            owners.setdefault(name, []).append(owned)
    means = {}
    for name, copies_of in owners.items():
        trained = [(t, n) for t, n in copies_of if n > 0] or copies_of[:1]
        if len(trained) == 1:
            means[name] = trained[0][0].detach().clone()
            continue
        total = torch.zeros_like(trained[0][0], dtype=torch.float64)
        for tensor, samples in trained:
            total += tensor.detach().to(total.device, torch.float64) * samples
        means[name] = (total / sum(n for _, n in trained)).to(trained[0][0].dtype)
    return means


def _client_copy(state: State, samples: int) -> Copy:
    return {name: (torch.as_tensor(w), samples) for name, w in state.weights.items()}


class _Rounds:
    """What the strategies share: who takes part, what they learnt, and sending means back."""

    def __init__(
        self,
        clients: Sequence[Client],
        samples: Mapping[str, int],
        batch: int,
        aggregate: str,
        period: int,
        rate: Rate | None,
    ) -> None:
        self.clients = list(clients)
        self.states: dict[str, State] = {}
        self._order = [c.name for c in clients]
        self._samples = samples
        self._batch = batch
        self._aggregate = aggregate
        self._period = period
        self._rate = rate

    def _pass(
        self, client: Client, server: Server, number: int, emit: Callable[[Event], None]
    ) -> ClientDone | ClientLost:
        """One client's pass, at the rate of the round.

        A lost client leaves no half-finished batch behind. Raises NotFinite, with the round, where
        there was nothing to learn from.
        """
        try:
            if self._rate is not None:
                client.set_rate(self._rate(number))
                server.set_rate(self._rate(number))
            samples = self._samples[client.name]
            return train_pass(client, server, number, samples, self._batch, emit)
        except LinkError as error:
            server.discard()
            return ClientLost(client.name, number, str(error))
        except NotFinite as error:
            server.discard()
            raise error.in_round(number) from error

    def _drop(self, name: str) -> None:
        self.clients = [c for c in self.clients if c.name != name]

    def _send_back(self, means: Mapping[str, Tensor], number: int) -> Iterator[ClientLost]:
        """Gives every client the mean of the layers that it has."""
        for client in list(self.clients):
            state = self.states[client.name]
            weights = {n: means[n].cpu().numpy() for n in state.weights}
            try:
                client.load_weights(weights)
            except LinkError as error:
                self._drop(client.name)
                yield ClientLost(client.name, number, str(error))
            else:
                self.states[client.name] = State(weights, state.momentum, state.place)

    def load(self, servers: Mapping[str, Mapping[str, Array]]) -> None:
        """Replaces the servers' weights by those of a checkpoint."""
        for name, server in self.servers().items():
            server.load({k: torch.as_tensor(v) for k, v in servers[name].items()})

    def servers(self) -> dict[str, Server]:
        """Every server network, under its name in a checkpoint."""
        raise NotImplementedError

    def _ended(self, number: int) -> RoundDone:
        return RoundDone(number, dict(self.states))


class Sequential(_Rounds):
    """One shared server; a turn is one client's whole pass, in the fleet file's order."""

    def __init__(
        self,
        clients: Sequence[Client],
        server: Server,
        samples: Mapping[str, int],
        *,
        batch: int,
        aggregate: str = "server",
        period: int = 1,
        rate: Rate | None = None,
    ) -> None:
        """samples per client and round; server enters at every client's cut.

        rate: None leaves clients and server at that of their settings.
        """
        super().__init__(clients, samples, batch, aggregate, period, rate)
        self._server = server

    def server(self, client: str) -> Server:
        """The shared server."""
        return self._server

    def servers(self) -> dict[str, Server]:
        """The one server, under the name of its place in a checkpoint."""
        return {"server": self._server}

    def round(self, number: int) -> Iterator[Event]:
        """Every client's turn, then the means where aggregate is all."""
        done: list[ClientDone] = []
        for client in list(self.clients):
            events: list[Event] = []
            turn = self._pass(client, self._server, number, events.append)
            yield from events
            yield turn
            if isinstance(turn, ClientLost):
                self._drop(client.name)
            else:
                self.states[client.name] = turn.state
                done.append(turn)
        if self._aggregate == "all" and number % self._period == 0 and done:
            cuts = {c.name: c.cut for c in self.clients}
            behind = [(set(self._server.tensors(cuts[d.client])), d.samples) for d in done]
            shared: Copy = {
                name: (tensor, sum(n for names, n in behind if name in names))
                for name, tensor in self._server.tensors().items()
            }
            means = cross_layer_mean([*(_client_copy(d.state, d.samples) for d in done), shared])
            self._server.load(means)
            yield from self._send_back(means, number)
        yield self._ended(number)


class Averaging(_Rounds):
    """A server replica for each client, in parallel, with periodic cross-layer aggregation."""

    def __init__(
        self,
        clients: Sequence[Client],
        servers: Mapping[str, Server],
        samples: Mapping[str, int],
        *,
        batch: int,
        aggregate: str = "server",
        period: int = 1,
        rate: Rate | None = None,
    ) -> None:
        """samples per client and round; servers by client, each entered at that client's cut.

        rate: None leaves clients and servers at that of their settings.
        """
        super().__init__(clients, samples, batch, aggregate, period, rate)
        self._servers = dict(servers)

    def server(self, client: str) -> Server:
        """This client's replica."""
        return self._servers[client]

    def servers(self) -> dict[str, Server]:
        """The replicas, under the names of their places in a checkpoint."""
        return {f"server.{name}": server for name, server in self._servers.items()}

    def round(self, number: int) -> Iterator[Event]:
        """All clients at the same time; means are summed in the fleet file's order."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        ended: dict[str, ClientDone | ClientLost] = {}

        def work(client: Client) -> None:
            events.put(self._pass(client, self._servers[client.name], number, events.put))

        running = len(self.clients)
        with ThreadPoolExecutor(max_workers=max(1, running)) as pool:
            futures = [pool.submit(work, client) for client in self.clients]
            while len(ended) < running:
                for future in futures:  # an error of ours must not leave us waiting
                    if future.done() and (error := future.exception()):
                        raise error
                try:
                    event = events.get(timeout=1.0)
                except queue.Empty:
                    continue
                if isinstance(event, ClientDone | ClientLost):
                    ended[event.client] = event
                yield event

        done: list[ClientDone] = []
        for name in self._order:
            match ended.get(name):
                case ClientLost():
                    self._drop(name)
                case ClientDone() as finished:
                    self.states[name] = finished.state
                    done.append(finished)
        if number % self._period == 0 and done:
            yield from self._average(done, number)
        yield self._ended(number)

    def _average(self, done: list[ClientDone], number: int) -> Iterator[ClientLost]:
        copies: list[Copy] = []
        for d in done:
            replica = self._servers[d.client].tensors()
            copies.append({name: (tensor, d.samples) for name, tensor in replica.items()})
            if self._aggregate == "all":
                copies.append(_client_copy(d.state, d.samples))
        means = cross_layer_mean(copies)
        for d in done:
            self._servers[d.client].load(means)
        if self._aggregate == "all":
            yield from self._send_back(means, number)
