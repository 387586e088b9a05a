"""How clients with different cuts learn together: Sequential and Averaging.

After Oda et al., arXiv 2512.09313. In Sequential, clients take turns at one shared server; in
Averaging, each client has a server replica of its own, and layers are averaged across depths.

A client that is lost in its pass is waited for, put back to where the pass began, its server with
it, and the pass is replayed. One that does not come back, or is late, is away: the round goes on
without it, and in each later one it is tried again.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from splitee.bottleneck import is_private
from splitee.client import Client, State
from splitee.errors import DeviceRefused, Late, LinkError, Mismatch, NotFinite
from splitee.ops import Array
from splitee.server import Server
from splitee.train import ClientBack, ClientDone, ClientLost, Event, RoundDone, batches, train_pass

REPLAYS = 3  # of one pass: a device that resets in each of them must not keep the others waiting
ATTEMPT = 1.0  # seconds that a client that is away gets to answer, again and again

Rate = Callable[[int], float]  # the learning rate of a round
Copy = Mapping[str, tuple[Tensor, int]]  # an owner's layers: tensor and samples that trained it


def cross_layer_mean(copies: Sequence[Copy]) -> dict[str, Tensor]:
    """Every layer, averaged over all that own a copy of it, weighted by samples.

    Sums run in the order of copies, in float64, so that the result does not depend on who answered
    first. A layer with one owner is that owner's, bit for bit. Copies that no sample trained count
    only where no copy was trained. What is one client's alone, such as a bottleneck, has no mean.
    """
    owners: dict[str, list[tuple[Tensor, int]]] = {}
    for copy in copies:
        for name, owned in copy.items():
            if not is_private(name):
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
        batch: int,
        local_steps: int | None,
        aggregate: str,
        period: int,
        rate: Rate | None,
        states: Mapping[str, State] | None,
        rejoin_within: float,
        round_deadline: float | None,
    ) -> None:
        self.states = dict(states) if states is not None else {c.name: c.state() for c in clients}
        self._everyone = list(clients)
        self._away: dict[str, str] = {}
        self._batch = batch
        self._local_steps = local_steps
        self._aggregate = aggregate
        self._period = period
        self._rate = rate
        self._rejoin_within = rejoin_within
        self._round_deadline = round_deadline

    @property
    def clients(self) -> list[Client]:
        """Those that are not away, in the fleet file's order."""
        return [c for c in self._everyone if c.name not in self._away]

    @property
    def away(self) -> Mapping[str, str]:
        """Those that are away, each with the reason."""
        return dict(self._away)

    # one round

    def round(self, number: int) -> Iterator[Event]:
        """Every client's pass, then the means. Without a RoundDone where nobody completed it."""
        done = yield from self._passes(number)
        if not done:
            yield from self._wait(number)
            if self.clients:  # once more: a fleet that lost its power goes on where it was
                done = yield from self._passes(number)
        if not done:
            return
        finished = {d.client for d in done}
        missing = {n: why for n, why in self._away.items() if n not in finished}
        for d in done:
            self.states[d.client] = d.state
        if number % self._period == 0:
            means = self._aggregated(done)
            if self._aggregate == "all":
                yield from self._send_back(means, number)
        if not self.clients:
            yield from self._wait(number)
        yield RoundDone(number, dict(self.states), missing)

    def _passes(self, number: int) -> Generator[Event, None, list[ClientDone]]:
        """Every client's pass; those that were finished, in the fleet file's order."""
        raise NotImplementedError

    def _aggregated(self, done: Sequence[ClientDone]) -> Mapping[str, Tensor]:
        """The means of what those learnt, which the servers have by then."""
        raise NotImplementedError

    def server(self, client: str) -> Server:
        """The server network that completes this client's."""
        raise NotImplementedError

    def servers(self) -> dict[str, Server]:
        """Every server network, under its name in a checkpoint."""
        raise NotImplementedError

    # passes

    def _at_once(
        self, clients: Sequence[Client], number: int
    ) -> Generator[Event, None, list[ClientDone]]:
        """Passes of clients in parallel, events as they come; those that were finished."""
        events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        working = {c.name for c in clients if c.name not in self._away}
        over = threading.Event()  # nobody is left for whom those away could be waited for
        lock = threading.Lock()
        deadline = None
        if self._round_deadline is not None:
            deadline = time.monotonic() + self._round_deadline

        def work(client: Client) -> ClientDone | ClientLost | None:
            try:
                if client.name in self._away and not self._returns(client, number, over, events):
                    return None
                end = self._pass(client, number, events.put)
                events.put(end)
                return end
            finally:
                with lock:
                    working.discard(client.name)
                    if not working:
                        over.set()

        def give_everyone(until: float | None) -> None:
            for client in clients:
                client.deadline = until

        if not working:
            over.set()
        give_everyone(deadline)
        try:
            with ThreadPoolExecutor(max_workers=max(1, len(clients))) as pool:
                futures = [pool.submit(work, client) for client in clients]
                for future in futures:
                    future.add_done_callback(lambda _: events.put(None))
                left = len(futures)
                try:
                    while left:
                        event = events.get()
                        if event is None:
                            left -= 1
                        else:
                            yield event
                except BaseException:  # Ctrl-C, say: no pass is of use any more
                    over.set()
                    give_everyone(0.0)
                    raise
        finally:
            give_everyone(None)
        ends = [future.result() for future in futures]
        for client, end in zip(clients, ends, strict=True):
            if isinstance(end, ClientLost):
                self._away[client.name] = end.reason
            elif end is not None:
                self._away.pop(client.name, None)
        return [end for end in ends if isinstance(end, ClientDone)]

    def _returns(
        self,
        client: Client,
        number: int,
        over: threading.Event,
        events: queue.SimpleQueue[Event | None],
    ) -> bool:
        """Tries a client that is away, at least once, until it is back or the others are done."""
        while True:
            began = time.monotonic()
            try:
                client.rejoin(self.states[client.name], ATTEMPT)
            except LinkError:
                if over.wait(max(0.0, began + ATTEMPT - time.monotonic())):
                    return False
            else:
                events.put(ClientBack(client.name, number, self._away[client.name]))
                return True

    def _pass(
        self, client: Client, number: int, emit: Callable[[Event], None]
    ) -> ClientDone | ClientLost:
        """One client's pass, at the rate of the round; replayed when the client was lost in it.

        Of a client that stays lost the server keeps nothing. Raises NotFinite, with the round,
        where there was nothing to learn from.
        """
        name, server = client.name, self.server(client.name)
        kept = server.snapshot()
        before = replace(client.traffic)
        for replay in range(1 + REPLAYS):
            try:
                if self._rate is not None:
                    client.set_rate(self._rate(number))
                    server.set_rate(self._rate(number))
                sizes = batches(self.states[name].place, self._batch, self._local_steps)
                done = train_pass(client, server, number, sizes, emit)
            except NotFinite as error:
                server.discard()
                raise error.in_round(number) from error
            except LinkError as error:
                server.restore(kept)
                if isinstance(error, Late):
                    return ClientLost(name, number, str(error))
                if replay == REPLAYS:
                    reason = f"{error} (it was lost in each of {1 + REPLAYS} attempts at its pass)"
                    return ClientLost(name, number, reason)
                if lost := self._rejoin(client, error):
                    return ClientLost(name, number, lost)
                emit(ClientBack(name, number, str(error)))
            else:
                up, down = client.traffic.up - before.up, client.traffic.down - before.down
                return replace(done, bytes_up=up, bytes_down=down)
        raise AssertionError("unreachable")

    def _rejoin(self, client: Client, error: LinkError) -> str | None:
        """Waits for a client that was lost by that error; says why it is, when it stays lost."""
        within = self._rejoin_within
        if client.deadline is not None:
            within = max(0.0, min(within, client.deadline - time.monotonic()))
        try:
            client.rejoin(self.states[client.name], within)
        except (Mismatch, DeviceRefused) as refused:  # it is there, but cannot go on
            return str(refused)
        except LinkError:
            return str(error)
        return None

    def _wait(self, number: int) -> Iterator[ClientBack]:
        """Waits for all that are away, before the training ends for want of clients."""

        def back(client: Client) -> bool:
            try:
                client.rejoin(self.states[client.name], self._rejoin_within)
            except LinkError:
                return False
            return True

        with ThreadPoolExecutor(max_workers=len(self._everyone)) as pool:
            for client, is_back in zip(self._everyone, pool.map(back, self._everyone), strict=True):
                if is_back:
                    yield ClientBack(client.name, number, self._away.pop(client.name))

    # means

    def _send_back(
        self, means: Mapping[str, Tensor], number: int
    ) -> Iterator[ClientBack | ClientLost]:
        """Gives every client the mean of the layers that it has; to one away, when it is back."""
        clients = self.clients
        for name, state in self.states.items():
            weights = {
                n: means[n].cpu().numpy() if n in means else own for n, own in state.weights.items()
            }
            self.states[name] = replace(state, weights=weights)

        def send(client: Client) -> ClientBack | ClientLost | None:
            try:
                client.load_weights(self.states[client.name].weights)
            except LinkError as error:
                if lost := self._rejoin(client, error):
                    return ClientLost(client.name, number, lost)
                return ClientBack(client.name, number, str(error))
            return None

        with ThreadPoolExecutor(max_workers=max(1, len(clients))) as pool:
            for event in pool.map(send, clients):
                if isinstance(event, ClientLost):
                    self._away[event.client] = event.reason
                if event is not None:
                    yield event

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


class Sequential(_Rounds):
    """One shared server; a turn is one client's whole pass, in the fleet file's order."""

    def __init__(
        self,
        clients: Sequence[Client],
        server: Server,
        *,
        batch: int,
        local_steps: int | None = None,
        aggregate: str = "server",
        period: int = 1,
        rate: Rate | None = None,
        states: Mapping[str, State] | None = None,
        rejoin_within: float = 30.0,
        round_deadline: float | None = None,
    ) -> None:
        """server enters at every client's cut.

        local_steps: batches of a pass; None: the client's whole shard. rate: None leaves clients
        and server at that of their settings. states: where the clients are; None asks them.
        rejoin_within: seconds that a lost client has to come back.
        round_deadline: seconds that a turn may take.
        """
        super().__init__(
            clients,
            batch,
            local_steps,
            aggregate,
            period,
            rate,
            states,
            rejoin_within,
            round_deadline,
        )
        self._server = server

    def server(self, client: str) -> Server:
        """The shared server."""
        return self._server

    def servers(self) -> dict[str, Server]:
        """The one server, under the name of its place in a checkpoint."""
        return {"server": self._server}

    def _passes(self, number: int) -> Generator[Event, None, list[ClientDone]]:
        """Every client's turn, one after the other."""
        done = []
        for client in self._everyone:
            done += yield from self._at_once([client], number)
        return done

    def _aggregated(self, done: Sequence[ClientDone]) -> Mapping[str, Tensor]:
        """Means over clients' copies and the shared server's, where aggregate is all."""
        if self._aggregate != "all":
            return {}
        cuts = {c.name: c.cut for c in self._everyone}
        behind = [(set(self._server.tensors(cuts[d.client])), d.samples) for d in done]
        shared: Copy = {
            name: (tensor, sum(n for names, n in behind if name in names))
            for name, tensor in self._server.tensors().items()
        }
        means = cross_layer_mean([*(_client_copy(d.state, d.samples) for d in done), shared])
        self._server.load(means)
        return means


class Averaging(_Rounds):
    """A server replica for each client, in parallel, with periodic cross-layer aggregation."""

    def __init__(
        self,
        clients: Sequence[Client],
        servers: Mapping[str, Server],
        *,
        batch: int,
        local_steps: int | None = None,
        aggregate: str = "server",
        period: int = 1,
        rate: Rate | None = None,
        states: Mapping[str, State] | None = None,
        rejoin_within: float = 30.0,
        round_deadline: float | None = None,
    ) -> None:
        """servers by client, each entered at that client's cut.

        local_steps: batches of a pass; None: the client's whole shard. rate: None leaves clients
        and servers at that of their settings. states: where the clients are; None asks them.
        rejoin_within: seconds that a lost client has to come back.
        round_deadline: seconds that a round's passes may take.
        """
        super().__init__(
            clients,
            batch,
            local_steps,
            aggregate,
            period,
            rate,
            states,
            rejoin_within,
            round_deadline,
        )
        self._servers = dict(servers)

    def server(self, client: str) -> Server:
        """This client's replica."""
        return self._servers[client]

    def servers(self) -> dict[str, Server]:
        """The replicas, under the names of their places in a checkpoint."""
        return {f"server.{name}": server for name, server in self._servers.items()}

    def _passes(self, number: int) -> Generator[Event, None, list[ClientDone]]:
        """All clients at the same time."""
        return (yield from self._at_once(self._everyone, number))

    def _aggregated(self, done: Sequence[ClientDone]) -> Mapping[str, Tensor]:
        """Means over the replicas, and over clients' copies where aggregate is all.

        They are summed in the fleet file's order. All replicas get them, also of clients that are
        away.
        """
        copies: list[Copy] = []
        for d in done:
            replica = self._servers[d.client].tensors()
            copies.append({name: (tensor, d.samples) for name, tensor in replica.items()})
            if self._aggregate == "all":
                copies.append(_client_copy(d.state, d.samples))
        means = cross_layer_mean(copies)
        for server in self._servers.values():
            server.load(means)
        return means
