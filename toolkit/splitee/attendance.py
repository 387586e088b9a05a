"""Who of a fleet is there: passes at once, and clients that are lost in theirs.

A client that is lost in its pass is waited for, put back to where the pass began, its server with
it, and the pass is replayed. One that does not come back, or is late, is away: the round goes on
without it, and in each later one that it is drawn for it is tried again.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from splitee.client import Client, LocalClient, State
from splitee.errors import DeviceRefused, Late, LinkError, Mismatch, NotFinite
from splitee.parked import ParkedClient
from splitee.rules import Rules
from splitee.server import Server
from splitee.train import ClientBack, ClientDone, ClientLost, Event, batches, train_pass

REPLAYS = 3  # of one pass: a device that resets in each of them must not keep the others waiting
ATTEMPT = 1.0  # seconds that a client that is away gets to answer, again and again


def threads() -> int:
    """How many clients this process trains at the same time itself.

    OMP_NUM_THREADS, which torchrun sets to 1 in each of its processes; without it, one for each
    core. More would only stand in each other's way.
    """
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdecimal() and int(said) > 0:
        return int(said)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Attendance:
    """Clients with their servers and states, and who of them is away."""

    def __init__(
        self,
        clients: Sequence[Client],
        servers: Mapping[str, Server],
        rules: Rules,
        states: Mapping[str, State] | None,
    ) -> None:
        """servers: by client. states: where the clients are; None asks them."""
        self.everyone = list(clients)
        self.states = dict(states) if states is not None else {c.name: c.state() for c in clients}
        self.away: dict[str, str] = {}  # with the reason
        self._outdated: set[str] = set()  # are there, but do not have the weights of their state
        self._servers = servers
        self._rules = rules
        self._computing = threading.BoundedSemaphore(threads())

    @property
    def there(self) -> list[Client]:
        """Those that are not away, in the fleet file's order."""
        return [c for c in self.everyone if c.name not in self.away]

    def at_once(
        self, clients: Sequence[Client], number: int
    ) -> Generator[Event, None, list[ClientDone]]:
        """Passes of clients in parallel, events as they come; those that were finished."""
        events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        working = {c.name for c in clients if c.name not in self.away}
        over = threading.Event()  # nobody is left for whom those away could be waited for
        lock = threading.Lock()
        deadline = None
        if self._rules.round_deadline is not None:
            deadline = time.monotonic() + self._rules.round_deadline

        def work(client: Client) -> ClientDone | ClientLost | None:
            try:
                if client.name in self.away and not self._returns(client, number, over, events):
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
                self.away[client.name] = end.reason
            elif end is not None:
                self.away.pop(client.name, None)
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
                self._put_back(client, ATTEMPT)
            except LinkError:
                if over.wait(max(0.0, began + ATTEMPT - time.monotonic())):
                    return False
            else:
                events.put(ClientBack(client.name, number, self.away[client.name]))
                return True

    def _pass(
        self, client: Client, number: int, emit: Callable[[Event], None]
    ) -> ClientDone | ClientLost:
        """One client's pass, at the rate of the round; replayed when the client was lost in it.

        Of a client that stays lost the server keeps nothing. Raises NotFinite, with the round,
        where there was nothing to learn from.
        """
        name, server, rules = client.name, self._servers[client.name], self._rules
        kept = server.snapshot()
        before = replace(client.traffic)
        for replay in range(1 + REPLAYS):
            try:
                self.update(client)
                if rules.rate is not None:
                    client.set_rate(rules.rate(number, name))
                    server.set_rate(rules.rate(number, None))
                sizes = batches(self.states[name].place, rules.batch, rules.local_steps)
                with self._turn(client), server.awake():
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

    @contextmanager
    def _turn(self, client: Client) -> Iterator[None]:
        """Held by a client that computes here; others have processors of their own."""
        if not isinstance(client, LocalClient | ParkedClient):
            yield
            return
        with self._computing, client.awake():
            yield

    def _rejoin(self, client: Client, error: LinkError) -> str | None:
        """Waits for a client that was lost by that error; says why it is, when it stays lost."""
        within = self._rules.rejoin_within
        if client.deadline is not None:
            within = max(0.0, min(within, client.deadline - time.monotonic()))
        try:
            self._put_back(client, within)
        except (Mismatch, DeviceRefused) as refused:  # it is there, but cannot go on
            return str(refused)
        except LinkError:
            return str(error)
        return None

    def _put_back(self, client: Client, within: float) -> None:
        """Has it in its state within so many seconds. Raises LinkError where it is not."""
        client.rejoin(self.states[client.name], within)
        self._outdated.discard(client.name)

    def update(self, client: Client) -> None:
        """Gives a client the weights of its state, where means have passed it by."""
        if client.name in self._outdated:
            client.load_weights(self.states[client.name].weights)
            self._outdated.discard(client.name)

    def wait(self, number: int) -> Iterator[ClientBack]:
        """Waits for all that are away, before the training ends for want of clients."""
        away = [c for c in self.everyone if c.name in self.away]

        def back(client: Client) -> bool:
            try:
                self._put_back(client, self._rules.rejoin_within)
            except LinkError:
                return False
            return True

        with ThreadPoolExecutor(max_workers=max(1, len(away))) as pool:
            for client, is_back in zip(away, pool.map(back, away), strict=True):
                if is_back:
                    yield ClientBack(client.name, number, self.away.pop(client.name))

    def undo(self, done: Sequence[ClientDone], number: int) -> Iterator[ClientLost]:
        """Puts those that finished their passes back to where these began."""
        names = {d.client for d in done}

        def undone(client: Client) -> str | None:
            try:
                self._put_back(client, self._rules.rejoin_within)
            except LinkError as error:
                return str(error)
            return None

        yield from self._lost([c for c in self.everyone if c.name in names], undone, number)

    def give(
        self, means: Mapping[str, Tensor], clients: Sequence[Client], number: int
    ) -> Iterator[ClientBack | ClientLost]:
        """Means of the layers that each has go to clients now; to others when they train."""
        arrays = {name: mean.cpu().numpy() for name, mean in means.items()}
        for name, state in self.states.items():
            weights = {n: arrays.get(n, own) for n, own in state.weights.items()}
            self.states[name] = replace(state, weights=weights)
        self._outdated = {c.name for c in self.there}
        back: list[ClientBack] = []

        def send(client: Client) -> str | None:
            try:
                self.update(client)
            except LinkError as error:
                if lost := self._rejoin(client, error):
                    return lost
                back.append(ClientBack(client.name, number, str(error)))
            return None

        yield from self._lost([c for c in clients if c.name not in self.away], send, number)
        yield from back

    def _lost(
        self, clients: Sequence[Client], ask: Callable[[Client], str | None], number: int
    ) -> Iterator[ClientLost]:
        """Asks clients in parallel; those that answer with a reason are away."""
        with ThreadPoolExecutor(max_workers=max(1, len(clients))) as pool:
            for client, reason in zip(clients, pool.map(ask, clients), strict=True):
                if reason is not None:
                    self.away[client.name] = reason
                    yield ClientLost(client.name, number, reason)
