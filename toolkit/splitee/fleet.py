"""The fleet file: every setting of a run, with its default, checked as it is read."""

from __future__ import annotations

import math
import re
import tomllib
from collections import Counter
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from splitee.augment import Augmentation
from splitee.bottleneck import Bottleneck
from splitee.client import Settings, trunk_weights
from splitee.codec import Coding, Kind
from splitee.errors import FleetError
from splitee.rules import Rules
from splitee.state import AdamW
from splitee.steps import Levers

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


def _fault(message: str, *path: str | int) -> PydanticCustomError:
    """What is wrong with a table as a whole, and the key that is to be named."""
    return PydanticCustomError("whole", message, {"path": path})


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelTable(_Table):
    """The network."""

    name: str = "resnet8"
    width: Annotated[int, Field(ge=1, le=1024)] | None = None  # None: the literature's
    norm: Literal["auto", "group", "batch"] = "auto"  # auto: group where firmware is in the fleet
    # a client's batch norm in training: by the samples held, or by the running statistics, which
    # then follow once after the step
    batch_norm: Literal["held", "frozen"] = "held"


class DataTable(_Table):
    """The data and its shards."""

    name: str = "digits"  # or cifar10, cifar100, stl10, folder, "<module>:<function>"
    path: str | None = None  # the folder that has it; of "folder": itself, or a tar archive of it
    download: bool = False  # where torchvision's is not there
    size: Annotated[int, Field(ge=1, le=1024)] | None = None  # pixels a side; None: as they are
    samples: Annotated[int, Field(ge=1)] | None = None  # training images used; None: all
    # further training images, that nobody is trained on: exits are calibrated with them; None: none
    held_out: Annotated[int, Field(ge=100)] | None = None
    test_samples: Annotated[int, Field(ge=1)] | None = None  # test images used; None: all
    # what changes training images anew in each epoch, in this order, on clients in torch
    augment: list[Augmentation] = []
    # dirichlet: shares of each class are drawn (alpha); classes: classes_per_client each; folder:
    # as the folders of its images say
    partition: Literal["iid", "dirichlet", "classes", "folder"] = "iid"
    alpha: Annotated[float, Field(gt=0)] = 0.5  # small: a client has few classes
    classes_per_client: Annotated[int, Field(ge=1, le=256)] = 2


Gradient = Literal["local", "server", "both"]
Optimizer = Literal["sgd", "adamw"]
BuiltIn = Literal["averaging", "sequential"]  # strategies

USUAL_RATES: dict[Optimizer, float] = {"sgd": 0.05, "adamw": 0.001}


class OptimizerTable(_Table):
    """What clients and servers learn by."""

    kind: Optimizer = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] | None = None  # None: the usual one of the kind
    server_rate: Annotated[float, Field(gt=0)] | None = None  # of servers; None: learning_rate
    # rounds in which the rate rises to that, in equal steps; of servers, None: as many
    warmup: Annotated[int, Field(ge=0)] = 0
    server_warmup: Annotated[int, Field(ge=0)] | None = None
    # cosine: down to 0 over all rounds; step: times step_factor every step_every rounds
    schedule: Literal["constant", "cosine", "step"] = "constant"
    step_every: Annotated[int, Field(ge=1)] = 5
    step_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of SGD
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of AdamW, as the next two
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    # largest norm of all gradients of a client together, or of a server; None: any
    clip: Annotated[float, Field(gt=0)] | None = None

    @property
    def rate(self) -> float:
        """That of clients, before any schedule."""
        return self.learning_rate or USUAL_RATES[self.kind]

    def factor(self, number: int, warmup: int, rounds: int) -> float:
        """What schedule and warm-up make of a rate in a round, the first of which is 1."""
        before = number - 1  # rounds
        rising = min(1.0, number / (warmup + 1))
        match self.schedule:
            case "constant":
                return rising
            case "cosine":
                return rising * (1 + math.cos(math.pi * before / rounds)) / 2
            case "step":
                return rising * self.step_factor ** (before // self.step_every)


class ClientTable(_Table):
    """One client."""

    name: Name
    # so many clients like this one, called name-1, name-2 and so on, each with that share; where
    # they are many and in this process, they are simulated: live only while they train
    count: Annotated[int, Field(ge=1, le=100_000)] = 1
    board: str = "torch"  # a name that `splitee boards` lists
    link: str | None = None  # None: the board's own; or an address of a device that runs already
    cut: str | int = "auto"  # module path, number, or auto: the deepest that fits
    # a cut as above: every cut up to it is built in, so that the client's can move without a new
    # build, and "auto" begins there; None: only the client's, with the exits that the fleet has
    deepest: str | int | None = None
    capacity: Annotated[int, Field(ge=1, le=4096)] | None = None  # samples held at once
    # what saves memory in firmware, each at its price (Levers)
    relu_bits: bool = False
    float16: bool = False
    recompute: Annotated[float, Field(ge=0, le=10)] = 0.0
    fused_update: bool = False
    local_only: bool = False
    share: Annotated[float, Field(gt=0)] = 1.0  # of the training data, relative to the others
    # as the fleet's; None: what the fleet has
    gradient: Gradient | None = None
    exit_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    optimizer: Optimizer | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    # channels that are sent, and pixels left out, by a learned bottleneck at its cut; None: no
    # bottleneck
    bottleneck: Annotated[int, Field(ge=1, le=4096)] | None = None
    bottleneck_stride: Annotated[int, Field(ge=1)] = 1
    # unsure: sends only samples for which its exit's entropy is above the fleet's; the others train
    # the exit alone
    send: Literal["all", "unsure"] = "all"
    # how what crosses its cut is coded: activations, and the gradient that the server returns
    codec: Kind = "float32"
    gradient_codec: Kind = "float32"
    top_k: Annotated[float, Field(gt=0, lt=1)] = 0.1  # share of the elements that top-k keeps

    def each(self) -> list[ClientTable]:
        """A table for each of the clients that this one stands for."""
        if self.count == 1:
            return [self]
        digits = len(str(self.count))  # so that names sort as numbers do
        names = (f"{self.name}-{i:0{digits}}" for i in range(1, self.count + 1))
        return [self.model_copy(update={"name": name, "count": 1}) for name in names]

    @property
    def coding(self) -> Coding:
        """Its codecs."""
        return Coding(self.codec, self.gradient_codec, self.top_k)

    @property
    def narrowing(self) -> Bottleneck | None:
        """Its bottleneck."""
        return Bottleneck(self.bottleneck, self.bottleneck_stride) if self.bottleneck else None

    @property
    def levers(self) -> Levers:
        """What saves memory in its segment."""
        return Levers(**{f.name: getattr(self, f.name) for f in fields(Levers)})


class Fleet(_Table):
    """A run: its clients and how they learn together."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    rounds: Annotated[int, Field(ge=1)] = 10
    batch: Annotated[int, Field(ge=1, le=4096)] = 16
    # batches that a client trains in a round; None: its whole shard once
    local_steps: Annotated[int, Field(ge=1)] | None = None
    strategy: str = "averaging"  # or "sequential", or a class of a user's own
    gradient: Gradient = "local"
    exit_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    aggregate: Literal["server", "all"] = "server"
    exits: Literal["own", "upto"] = "own"
    # share of the softmax of a client's deepest exit in what its shallower exits learn from
    distill: Annotated[float, Field(ge=0, le=1)] = 0.0
    period: Annotated[int, Field(ge=1)] = 1  # rounds between two aggregations
    # rounds between two tests of all clients while they train, on the host; None: only at the end
    evaluate_every: Annotated[int, Field(ge=1)] | None = None
    entropy: Annotated[float, Field(ge=0, le=1)] = 0.5  # an exit answers up to this
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of clients drawn for a round
    min_clients: Annotated[int, Field(ge=1)] = 1  # that have to complete a round for it to count
    # auto: clients with a key are spoken to under it, and one behind a network must have one; none:
    # without keys, wherever they are
    auth: Literal["auto", "none"] = "auto"
    rejoin_within: Annotated[float, Field(gt=0)] = 30.0  # seconds that a lost client is waited for
    # seconds that a client has for its pass of a round, in sequential from the beginning of its
    # turn on; then the round goes on without it; None: any
    round_deadline: Annotated[float, Field(gt=0)] | None = None
    model: ModelTable = ModelTable()
    data: DataTable = DataTable()
    optimizer: OptimizerTable = OptimizerTable()
    client: Annotated[list[ClientTable], Field(min_length=1)]

    @field_validator("client")
    @classmethod
    def _each_counts(cls, tables: list[ClientTable]) -> list[ClientTable]:
        """A table for each client."""
        for i, table in enumerate(tables):
            if table.count > 1 and table.link is not None:
                raise _fault(
                    "a link leads to one client: leave one of them out", "client", i, "count"
                )
        return [one for table in tables for one in table.each()]

    @model_validator(mode="after")
    def _names_differ(self) -> Fleet:
        names = [c.name for c in self.client]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise _fault("there is such a client already", "client", i, "name")
        return self

    @model_validator(mode="after")
    def _enough_are_drawn(self) -> Fleet:
        drawn = self.rules.drawn(len(self.client))
        if self.min_clients > drawn:
            raise _fault(
                f"{self.min_clients}, but {drawn} of {len(self.client)} clients are drawn for a "
                "round: take a larger participation, or fewer here",
                "min_clients",
            )
        return self

    @model_validator(mode="after")
    def _has_exits_to_teach(self) -> Fleet:
        if self.distill and self.exits == "own":
            raise _fault(
                'with exits = "own" a client has no shallower exit that could learn from its '
                'deepest: take exits = "upto", or 0.0',
                "distill",
            )
        return self

    @field_validator("strategy")
    @classmethod
    def _is_a_strategy(cls, strategy: str) -> str:
        known = get_args(BuiltIn)
        if strategy in known or re.fullmatch(r"[\w.]+:\w+", strategy):
            return strategy
        listed = ", ".join(f"'{name}'" for name in known)
        raise PydanticCustomError(
            "strategy", f"Input should be {listed} or a class as 'module:Class'"
        )

    def settings(self, client: ClientTable) -> Settings:
        """What a client learns with."""
        gradient = client.gradient or self.gradient
        exit_weight = self.exit_weight if client.exit_weight is None else client.exit_weight
        exits, server = trunk_weights(gradient, exit_weight)
        rate = client.learning_rate or self.optimizer.rate
        settings = self._settings(client.optimizer or self.optimizer.kind, rate)
        return replace(settings, exit_weight=exits, server_weight=server, distill=self.distill)

    @property
    def server_settings(self) -> Settings:
        """What servers learn with."""
        o = self.optimizer
        return self._settings(o.kind, o.server_rate or o.rate)

    def _settings(self, kind: Optimizer, rate: float) -> Settings:
        o = self.optimizer
        adamw = AdamW(o.beta1, o.beta2, o.eps) if kind == "adamw" else None
        return Settings(rate, o.momentum, o.weight_decay, clip=o.clip or 0.0, adamw=adamw)

    def unsure(self, client: ClientTable) -> float | None:
        """The entropy above which a client sends samples; None: it sends all."""
        return self.entropy if client.send == "unsure" else None

    @property
    def rules(self) -> Rules:
        """How its rounds go."""
        return Rules(
            batch=self.batch,
            local_steps=self.local_steps,
            aggregate=self.aggregate,
            period=self.period,
            rate=self.rate,
            rejoin_within=self.rejoin_within,
            round_deadline=self.round_deadline,
            participation=self.participation,
            min_clients=self.min_clients,
            seed=self.seed,
        )

    def rate(self, number: int, client: str | None = None) -> float:
        """The learning rate of a round, the first of which is 1: of a client, or of servers."""
        o = self.optimizer
        if client is not None:
            return self._rates[client] * o.factor(number, o.warmup, self.rounds)
        warmup = o.warmup if o.server_warmup is None else o.server_warmup
        return (o.server_rate or o.rate) * o.factor(number, warmup, self.rounds)

    @cached_property
    def _rates(self) -> dict[str, float]:
        """Those of clients before any schedule, by name."""
        return {c.name: c.learning_rate or self.optimizer.rate for c in self.client}


def read(path: Path) -> Fleet:
    """The fleet in a file.

    Raises FleetError with file, line and key when it cannot be read or says something unknown.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FleetError(f"{path}: {error.strerror}: is the path right?") from error
    except UnicodeDecodeError as error:
        raise FleetError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from error
    return parse(text, str(path))


def parse(text: str, where: str = "fleet file") -> Fleet:
    """The fleet in a text; where is named in errors."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at (?:line (\d+)|end of document)", str(error))
        line = found.group(1) if found and found.group(1) else str(text.count("\n") + 1)
        reason = str(error).split(" (at ")[0]
        raise FleetError(f"{where}:{line}: not TOML: {reason}") from error
    try:
        return Fleet.model_validate(table)
    except ValidationError as error:
        raise FleetError("\n".join(_explain(e, text, where) for e in error.errors())) from error


def _explain(error: Any, text: str, where: str) -> str:
    """One line for one of pydantic's errors: file, line, key, what is wrong and what may stand."""
    path = tuple(error["loc"])
    path = path[: 3 if path[:1] == ("client",) else 2]  # behind a key pydantic names union branches
    if error["type"] == "whole":
        path = error["ctx"]["path"]
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        table = path[0] if len(path) > 1 else ""
        tables: dict[Any, type[BaseModel]] = {
            "model": ModelTable, "data": DataTable, "optimizer": OptimizerTable,
            "client": ClientTable,
        }  # fmt: skip
        keys = tables.get(table, Fleet).model_fields
        message = f"there is no such key; there are {', '.join(keys)}"
    elif error["type"] not in ("missing", "whole"):
        message += f", not {error['input']!r}"
    return f"{where}:{line_of(text, path)}: {key + ': ' if key else ''}{message}"


def line_of(text: str, path: tuple[str | int, ...]) -> int:
    """The line of a key or table in a TOML text; where it does not stand, that of its table."""
    wanted = ".".join(p for p in path if isinstance(p, str))
    parent = wanted.rpartition(".")[0]
    index = next((p for p in path if isinstance(p, int)), 0)
    table, best = "", 1
    seen: Counter[str] = Counter()  # [[tables]] of that name so far
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*(\[\[?)\s*([\w.-]+)\s*\]", line)
        key = re.match(r"\s*([\w.-]+)\s*=", line)
        if header:
            table = here = header.group(2)
            seen[table] += header.group(1) == "[["
        elif key:
            here = f"{table}.{key.group(1)}".lstrip(".")
        else:
            continue
        if seen[table] not in (0, index + 1):
            continue
        if here == wanted:
            return number
        if here == parent:
            best = number
    return best
