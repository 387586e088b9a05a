"""Three clients with different cuts and shards, for tests of the strategies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from splitee.client import Client, LocalClient, Part, Place, Settings, State, Stepped
from splitee.data import Images
from splitee.errors import LinkClosed, Timeout
from splitee.ops import Array
from splitee.rules import Rules
from splitee.strategies import Averaging, Sequential, Strategy
from splitee.train import ClientBack, ClientDone, ClientLost, Event, RoundDone, batches
from toolkit.networks import arrays, local_client, random_images, resnet, server_for

SETTINGS = Settings(0.05, 0.9, 0.0, 0.5, 0.5)
CUTS = {"a": "stem", "b": "layer2", "c": "layer1"}
SAMPLES = {"a": 8, "b": 20, "c": 12}
BATCH = 4
REASON = "no answer within 2 s: is it powered?"


def clients(
    names: str = "abc", *, upto: bool = True, settings: Settings = SETTINGS, norm: str = "group"
) -> list[LocalClient]:
    """Clients with different cuts and shards, from the same weights."""
    return [
        local_client(
            resnet(norm=norm), CUTS[n], settings, random_images(SAMPLES[n], seed=ord(n)),
            capacity=BATCH, upto=upto, name=n, seed=ord(n),
        )
        for n in names
    ]  # fmt: skip


def pass_of(client: LocalClient) -> list[int]:
    """The batches of its whole shard."""
    return batches(client.place, BATCH)


def averaging(
    members: Sequence[Client],
    *,
    norm: str = "group",
    settings: Settings = SETTINGS,
    kind: type[Strategy] = Averaging,
    **rules: Any,
) -> Strategy:
    """Averaging over clients; each has a replica from the same weights."""
    servers = {c.name: server_for(resnet(norm=norm), [c.cut], settings) for c in members}
    return kind(members, servers, rules_of(**rules), states=states_of(members))


def sequential(
    members: Sequence[Client],
    *,
    norm: str = "group",
    settings: Settings = SETTINGS,
    kind: type[Strategy] = Sequential,
    **rules: Any,
) -> Strategy:
    """Sequential over clients at one server."""
    server = server_for(resnet(norm=norm), [CUTS[c.name] for c in members], settings)
    servers = dict.fromkeys([c.name for c in members], server)
    return kind(members, servers, rules_of(**rules), states=states_of(members))


def rules_of(
    *, aggregate: str = "all", rate: Callable[[int], float] | None = None, **rules: Any
) -> Rules:
    """Rules of those tests; rate: of clients and servers alike, by the round."""
    of_round = None if rate is None else lambda number, _: rate(number)
    return Rules(BATCH, aggregate=aggregate, rate=of_round, **rules)


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "averaging": averaging,
    "sequential": sequential,
}


def states_of(members: Sequence[Client]) -> dict[str, State]:
    """Where clients are; nothing happens before they say so."""
    return {c.name: (c.inner if isinstance(c, Wrapped) else c).state() for c in members}


def ends(events: Sequence[Event]) -> dict[str, ClientDone]:
    """How each client's pass ended, before any aggregation."""
    return {e.client: e for e in events if isinstance(e, ClientDone)}


def everything(strategy: Strategy, states: Mapping[str, State]) -> dict[str, Array]:
    """All weights and momenta of clients and servers, by owner and name."""
    found: dict[str, Array] = {}
    for name, state in states.items():
        found |= {f"{name}/{k}": a for k, a in state.weights.items()}
        found |= {f"{name}/momentum/{k}": a for k, a in state.momentum.items()}
    for name, server in strategy.servers().items():
        found |= {f"{name}/{k}": a for k, a in arrays(server.tensors()).items()}
        found |= {f"{name}/momentum/{k}": a for k, a in arrays(server.momentum()).items()}
    return found


def last_states(events: Sequence[Event]) -> dict[str, State]:
    """What each client holds at the end."""
    return [e for e in events if isinstance(e, RoundDone)][-1].states


class Wrapped:
    """A client that does something before it answers; all else is the client's."""

    def __init__(self, client: LocalClient, before: Callable[[str], None]) -> None:
        self.inner = client
        self.deadline: float | None = None
        self._before = before
        self.name, self.cut, self.capacity = client.name, client.cut, client.capacity
        self.settings, self.traffic = client.settings, client.traffic
        self.unsure = client.unsure

    def _call(self, method: str, *arguments: Any) -> Any:
        self._before(method)
        return getattr(self.inner, method)(*arguments)

    def start(self, state: State, images: Images) -> None:
        """Makes it this client."""
        self._call("start", state, images)

    def rejoin(self, state: State, within: float) -> None:
        """Comes back."""
        self._call("rejoin", state, within)

    def move(self, cut: str, *, upto: bool) -> None:
        """Its new cut."""
        self._before("move")
        self.inner.move(cut, upto=upto)
        self.cut = cut

    def set_rate(self, rate: float) -> None:
        """Its new rate."""
        self._call("set_rate", rate)

    def forward(self, count: int, batch: int) -> Part:
        """Its next samples."""
        return self._call("forward", count, batch)  # type: ignore[no-any-return]

    def backward(self, gradient: Tensor | None) -> None:
        """Its backward pass."""
        self._call("backward", gradient)

    def step(self) -> Stepped:
        """Its step."""
        return self._call("step")  # type: ignore[no-any-return]

    def infer(self, images: Array) -> tuple[Tensor, Tensor]:
        """Its answers."""
        return self._call("infer", images)  # type: ignore[no-any-return]

    def state(self) -> State:
        """Its state."""
        return self._call("state")  # type: ignore[no-any-return]

    def load_weights(self, weights: Mapping[str, Array]) -> None:
        """Its new weights."""
        self._call("load_weights", weights)

    def close(self) -> None:
        """Its end."""
        self._call("close")


class Failing:
    """Raises Timeout at one call of a method, and from then on at every call of any."""

    def __init__(self, method: str, call: int) -> None:
        self._method = method
        self._left = call
        self._lost = False

    def __call__(self, method: str) -> None:
        if method == self._method:
            self._left -= 1
            self._lost |= self._left == 0
        if self._lost:
            raise Timeout(REASON)


def mean_by_hand(owners: Mapping[str, Sequence[tuple[Array, int]]]) -> dict[str, Array]:
    """Every layer's weighted mean, in float64."""
    return {
        name: np.average(
            [array.astype(np.float64) for array, _ in copies], 0, [n for _, n in copies]
        )
        for name, copies in owners.items()
    }


class Resetting:
    """Is reset at some calls of a method: forgets all but its shard, and is back when it may be.

    It is put back by ``rejoin`` alone; what else is asked of it before ends the test.
    """

    def __init__(self, method: str, *calls: int) -> None:
        """calls: which calls of the method, the first has the number 1."""
        self._method = method
        self._calls = calls
        self._count = 0
        self._down = False
        self.rejoined = 0

    def wrap(self, client: LocalClient) -> Wrapped:
        """The client, with this trouble."""
        self._client = client
        return Wrapped(client, self)

    def __call__(self, method: str) -> None:
        if method == "rejoin":
            assert self._down
            self._down, self.rejoined = False, self.rejoined + 1
            return
        assert not self._down, f"{method} of a device that was reset"
        if method != self._method:
            return
        self._count += 1
        if self._count in self._calls:
            self._down = True
            forget(self._client)
            raise LinkClosed(REASON)


def forget(client: LocalClient) -> None:
    """What a reset leaves: noise for weights and momentum, no place, another rate."""
    state = client.state()
    noise = np.random.default_rng(1)
    weights, momentum = (
        {n: noise.normal(size=a.shape).astype(np.float32) for n, a in part.items()}
        for part in (state.weights, state.momentum)
    )
    client.load_state(State(weights, momentum, Place(0, 0, steps=1)))
    client.set_rate(7.0)


def troubles(events: Sequence[Event]) -> list[tuple[str, str, int]]:
    """Who was lost or came back, and in which round."""
    return [
        ("lost" if isinstance(e, ClientLost) else "back", e.client, e.round)
        for e in events
        if isinstance(e, ClientLost | ClientBack)
    ]
