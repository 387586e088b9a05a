"""Cutting a network: the points where it can be cut, and the modules between them.

Any network that ``torch.fx`` can trace is cut at points where a single tensor is alive. The pieces
share the network's own submodules, so parameters and state-dict keys stay the original ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from splitee import bottleneck as own
from splitee.bottleneck import Mirror
from splitee.errors import CutError, ModelError
from splitee.exits import Exit


@dataclass(frozen=True)
class Cut:
    """A place where the network can end on the client."""

    name: str  # module path whose output crosses the cut
    number: int | None  # 1 is the stem; None for a point that list_cuts does not list
    shape: tuple[int, ...]  # of the activations of one sample

    @property
    def elements(self) -> int:
        """Activations per sample."""
        return int(torch.Size(self.shape).numel())


class Network:
    """A traced network: its cuts, and its pieces, which share the network's submodules."""

    def __init__(self, model: nn.Module, input_shape: Sequence[int]) -> None:
        """input_shape is that of one sample, (channels, height, width).

        Raises ModelError when the network cannot be traced, ties weights, calls a module twice or
        has a part whose name is ours.
        """
        self.input_shape = tuple(input_shape)
        for name in (own.NAME, "exits"):
            if hasattr(model, name):
                raise ModelError(
                    f'the network has a part "{name}", as what clients add to it is called: '
                    "rename it"
                )
        self._refuse_tied_weights(model)
        for module in model.modules():
            if getattr(module, "inplace", False) is True:
                module.inplace = False  # type: ignore[assignment]
        try:
            self.traced = fx.symbolic_trace(model)
        except Exception as error:  # torch.fx raises many kinds; all of them mean the same here
            raise ModelError(
                f"{type(model).__name__} cannot be traced by torch.fx ({error}): its forward must "
                "not branch or loop on values of tensors"
            ) from error
        self._refuse_repeated_modules()
        for node in self.traced.graph.nodes:
            if node.kwargs.get("inplace"):  # would change a tensor that the cut has sent
                node.update_kwarg("inplace", False)
        self.traced.recompile()
        device = next(model.parameters()).device
        modes = [(module, module.training) for module in self.traced.modules()]
        with torch.no_grad():
            ShapeProp(self.traced.eval()).propagate(
                torch.zeros(1, *self.input_shape, device=device)
            )
        for module, training in modes:  # one by one: a norm may be frozen in a network that trains
            module.training = training
        self._nodes = list(self.traced.graph.nodes)
        self._place = {node: i for i, node in enumerate(self._nodes)}
        self._ends = self._module_ends()
        self.cuts = self._list_cuts()

    @staticmethod
    def _refuse_tied_weights(model: nn.Module) -> None:
        names: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            first = names.setdefault(id(parameter), name)
            if first != name:
                raise ModelError(
                    f"{first} and {name} are one tied weight: a cut could part them; untie them"
                )

    def _refuse_repeated_modules(self) -> None:
        calls = Counter(n.target for n in self.traced.graph.nodes if n.op == "call_module")
        for path, count in calls.items():
            module = self.traced.get_submodule(str(path))
            if count > 1 and next(module.parameters(), None) is not None:
                raise ModelError(f"{path} is called {count} times: give each call its own module")

    def _module_ends(self) -> dict[str, fx.Node]:
        """The last node of every module, by module path."""
        ends: dict[str, fx.Node] = {}
        for node in self._nodes:
            for path in node.meta.get("nn_module_stack", {}):
                if path:
                    ends[path] = node
        return ends

    def _alive_after(self, node: fx.Node) -> list[fx.Node]:
        """Nodes computed up to node that are still needed behind it."""
        place = self._place[node]
        return [
            n
            for n in self._nodes[: place + 1]
            if any(self._place[user] > place for user in n.users)
        ]

    def _is_single(self, node: fx.Node) -> bool:
        return self._alive_after(node) == [node]

    @staticmethod
    def _shape(node: fx.Node) -> tuple[int, ...]:
        return tuple(node.meta["tensor_meta"].shape)[1:]

    def _list_cuts(self) -> tuple[Cut, ...]:
        """The stem, then the output of each residual block or stage, while it is an image."""
        cuts: dict[fx.Node, str] = {}
        for path in sorted(self._stage_paths() | self._block_paths(), key=lambda p: p.count(".")):
            node = self._ends[path]
            # the outermost name wins: the last block of layer1 is called layer1
            if self._is_single(node) and len(self._shape(node)) == 3:
                cuts.setdefault(node, path)
        ordered = sorted(cuts, key=self._place.__getitem__)
        return tuple(Cut(cuts[n], i + 1, self._shape(n)) for i, n in enumerate(ordered))

    def _block_paths(self) -> set[str]:
        """Residual blocks: the modules that join two tensors in their own forward."""
        blocks = set()
        for node in self._nodes:
            stack = list(node.meta.get("nn_module_stack", {}))
            if node.op in ("call_function", "call_method") and len(node.all_input_nodes) > 1:
                blocks.update(stack[-1:])
        return blocks - {""}

    def _stage_paths(self) -> set[str]:
        """Stages: top-level containers, and runs of layers that begin with a convolution."""
        parent, prefix = self._stem_parent()
        stages: set[str] = set()
        last = ""  # last layer of the run of single layers that is open now
        for name, child in parent.named_children():
            path = prefix + name
            if path not in self._ends:
                continue
            if next(child.children(), None) is not None:
                stages.update(p for p in (path, last) if p)
                last = ""
            elif isinstance(child, nn.Conv2d):
                stages.update({last} - {""})
                last = path
            elif isinstance(child, nn.AdaptiveAvgPool2d | nn.Flatten | nn.Linear):
                stages.update({last} - {""})  # the head begins
                last = ""
            elif last:
                last = path
        return stages | ({last} - {""})

    def _stem_parent(self) -> tuple[nn.Module, str]:
        """The module whose children are the stages: the first with more than one that convolves."""
        parent: nn.Module = self.traced
        prefix = ""
        while True:
            convolving = [
                (name, child)
                for name, child in parent.named_children()
                if any(isinstance(m, nn.Conv2d) for m in child.modules())
            ]
            if len(convolving) != 1 or isinstance(convolving[0][1], nn.Conv2d):
                return parent, prefix
            name, parent = convolving[0]
            prefix += name + "."

    def cut(self, spec: str | int) -> Cut:
        """The cut of that number or module path.

        Raises CutError: no such cut (the message lists them), or a skip connection crosses it.
        """
        listed = ", ".join(f"{c.number} {c.name}" for c in self.cuts)
        node = None if isinstance(spec, int) else self._ends.get(spec)
        if (
            node is None
        ):  # a path wins over a number: a Sequential's layers are called "0", "1", ...
            for cut in self.cuts:
                if str(spec) == str(cut.number):
                    return cut
            raise CutError(f'there is no cut "{spec}": take one of {listed}')
        alive = self._alive_after(node)
        if alive != [node]:
            needed = ", ".join(self._label(n) for n in alive) or "nothing"
            raise CutError(
                f'cut "{spec}" is crossed: behind it the network needs {needed}, '
                f"and a cut sends one tensor; take one of {listed}"
            )
        if node is self._nodes[-1].args[0]:
            raise CutError(f'cut "{spec}" leaves nothing for the server: take one of {listed}')
        # the same point may be listed under its outermost module's name
        for cut in self.cuts:
            if self._ends[cut.name] is node:
                return cut
        return Cut(str(spec), None, self._shape(node))

    def position(self, cut: Cut) -> int:
        """A number that grows along the network, for every cut, listed or not."""
        return self._place[self._ends[cut.name]]

    def norms_of_single_values(self, behind: Cut | None) -> list[str]:
        """The batch norms, behind a cut if given, that see a sample as one value a channel."""
        first = self.position(behind) + 1 if behind else 0
        return [
            str(node.target)
            for node in self._nodes[first:]
            if node.op == "call_module"
            and isinstance(self.traced.get_submodule(str(node.target)), nn.BatchNorm2d)
            and self._shape(node)[1:] == (1, 1)
        ]

    def _label(self, node: fx.Node) -> str:
        return str(node.target) if node.op == "call_module" else node.name

    def between(self, start: Cut | None, stops: Sequence[Cut | None]) -> fx.GraphModule:
        """The network behind start (None: its input) up to the last of stops (None: its output).

        The module returns a tuple with the tensor at every stop. It shares the network's
        submodules and keeps their names.
        """
        graph = fx.Graph()
        begin = self._ends[start.name] if start else self._nodes[0]
        ends = [self._ends[s.name] if s else self._nodes[-1].args[0] for s in stops]
        copies: dict[fx.Node, fx.Node] = {begin: graph.placeholder("x")}
        last = max(self._place[e] for e in ends if isinstance(e, fx.Node))
        for node in self._nodes[self._place[begin] + 1 : last + 1]:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[e] for e in ends if isinstance(e, fx.Node)))
        return fx.GraphModule(self.traced, graph)


def list_cuts(model: nn.Module, input: Tensor | Sequence[int]) -> list[Cut]:
    """The cuts of a network, from the stem on; input is a batch, or the shape of one sample."""
    shape = tuple(input.shape[1:]) if isinstance(input, Tensor) else tuple(input)
    return list(Network(model, shape).cuts)


class Segment(nn.Module):
    """A client's half: the trunk up to its cut, and its exits, the last of them at the cut.

    The network's submodules are shared, not copied; give each client its own network.
    """

    def __init__(
        self,
        network: Network,
        cut: Cut,
        exits: dict[str, Exit],
        bottleneck: nn.Conv2d | None = None,
    ) -> None:
        """exits by the name of their cut, in the network's order.

        bottleneck: comes behind the trunk; the last exit is on top of it, and what is sent is its
        output.
        """
        cuts = (*(network.cut(name) for name in list(exits)[:-1]), cut)
        trunk = network.between(None, cuts)
        prefixes = [f"exits.{c.name}" for c in cuts]
        if bottleneck is not None:
            _put_behind(trunk, bottleneck)
            prefixes[-1] = own.EXIT
        self._fill(network.input_shape, cuts, trunk, list(exits.values()), prefixes)

    def _fill(
        self,
        shape: tuple[int, ...],
        cuts: tuple[Cut, ...],
        trunk: fx.GraphModule,
        exits: Sequence[nn.Module],
        prefixes: Sequence[str],
    ) -> None:
        super().__init__()
        self.cut = cuts[-1]
        self.cuts = cuts  # those with an exit
        self.input_shape = shape
        self.exit_names = tuple(cut.name for cut in cuts)
        self.exit_prefixes = tuple(prefixes)  # of their tensors
        self.trunk = trunk
        self.exits = nn.ModuleList(exits)

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The activations (batch, *shape) and logits (batch, classes) at every exit."""
        points = self.trunk(x)
        return points, tuple(e(p) for e, p in zip(self.exits, points, strict=True))

    def at(self, cut: str, *, upto: bool) -> Segment:
        """The part of this segment that runs with a shallower cut; it shares the submodules.

        upto: with every exit up to that cut, not only with the one at it.
        """
        depth = self.exit_names.index(cut)
        chosen = slice(0 if upto else depth, depth + 1)
        *nodes, output = self.trunk.graph.nodes
        (points,) = output.args
        stops = points[chosen]
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in nodes[: nodes.index(stops[-1]) + 1]:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[stop] for stop in stops))
        part = Segment.__new__(Segment)
        trunk = fx.GraphModule(self.trunk, graph)
        part._fill(
            self.input_shape,
            self.cuts[chosen],
            trunk,
            list(self.exits)[chosen],
            self.exit_prefixes[chosen],
        )
        part.training = self.training
        return part

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and statistics by their names in the whole network; exits.<cut>.* for exits.

        A bottleneck, and the exit on top of it, have names that no network has: bottleneck.*.
        Parameters come first. The tensors are the live ones. Counters of batches are left out:
        nothing that we run reads them.
        """
        heads = zip(self.exit_prefixes, self.exits, strict=True)
        return tensors_of([("", self.trunk), *((f"{prefix}.", head) for prefix, head in heads)])


def _put_behind(trunk: fx.GraphModule, bottleneck: nn.Conv2d) -> None:
    """Lets the last of a trunk's tensors go through a bottleneck."""
    trunk.add_module(own.NAME, bottleneck)
    output = next(node for node in trunk.graph.nodes if node.op == "output")
    (points,) = output.args
    with trunk.graph.inserting_before(output):
        sent = trunk.graph.call_module(own.NAME, (points[-1],))
    output.args = ((*points[:-1], sent),)
    trunk.recompile()


def tensors_of(named: Sequence[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """The float tensors of prefixed modules, parameters before statistics."""
    parameters = {p + n: t for p, m in named for n, t in m.named_parameters()}
    buffers = {p + n: t for p, m in named for n, t in m.named_buffers() if t.is_floating_point()}
    return parameters | buffers


class Tail(nn.Module):
    """The server's half of the network: enters at any of the cuts that its clients have."""

    def __init__(
        self, network: Network, cuts: Sequence[Cut], mirrors: Mapping[str, Mirror] | None = None
    ) -> None:
        """mirrors: of the clients that have a bottleneck, by name."""
        super().__init__()
        order = sorted({c.name: c for c in cuts}.values(), key=network.position)
        names: list[Cut | None] = [*order, None]
        self.entries = {c.name: i for i, c in enumerate(order)}
        self.stages = nn.ModuleList(network.between(a, [b]) for a, b in pairwise(names))
        # a list: the names in a ModuleDict must not be those of its methods
        self._mirrored = {client: i for i, client in enumerate(mirrors or {})}
        self.mirrors = nn.ModuleList((mirrors or {}).values())

    def forward(self, activations: Tensor, cut: str, client: str = "") -> Tensor:
        """Logits (batch, classes) from what a client sends at that cut."""
        if mirror := self.mirror(client):
            activations = mirror(activations)
        for stage in self.behind(cut):
            (activations,) = stage(activations)
        return activations

    def behind(self, cut: str) -> list[nn.Module]:
        """The stages behind a cut; each returns a tuple with one tensor."""
        return list(self.stages[self.entries[cut] :])

    def mirror(self, client: str) -> Mirror | None:
        """What widens that which a client sends, if anything does."""
        if client not in self._mirrored:
            return None
        mirror = self.mirrors[self._mirrored[client]]
        assert isinstance(mirror, Mirror)
        return mirror

    def tensors(self, cut: str | None = None) -> dict[str, Tensor]:
        """Parameters and statistics by their names in the whole network.

        With a cut, those behind it; otherwise also the mirrors', as bottleneck.<client>.*.
        """
        if cut:
            return tensors_of([("", stage) for stage in self.behind(cut)])
        mirrors = [(f"{own.PREFIX}{n}.", self.mirrors[i]) for n, i in self._mirrored.items()]
        return tensors_of([*(("", stage) for stage in self.stages), *mirrors])
