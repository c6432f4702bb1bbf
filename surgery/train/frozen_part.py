"""Caches the part of a model that is not being trained: it runs once per input and is reused.

If adapters are only on the last layers, most of a forward pass never changes. Reinforcement learning reads each batch
of responses in several epochs, next to a reference policy, and in every Fisher-vector product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from surgery.engine.module import get, memory_of, over
from surgery.graph.analysis.dataflow import op_name
from surgery.graph.graphs import ancestors, writes
from surgery.graph.outputs import named_outputs

if TYPE_CHECKING:
    from surgery.engine.program import Program

POSITIONS = "positions"


class FrozenPart(nn.Module):
    """A program split into a frozen trunk and one or more trainable tails.

    Attributes:
        trunk: computes the cached values, a tuple, from the program's inputs.
        tails: the rest of the program, and of each other program. A tail is called with the program's inputs by name,
            the values of `run`, and `positions`.
        narrowed: output that a tail computes only at `positions` (N × T token positions), as N × T × features, or "".
    """

    def __init__(self, trunk: nn.Module, tails: Sequence[Tail], narrowed: str) -> None:
        """Make the module from parts. Use `of` to split a program.

        Args:
            trunk: the frozen part.
            tails: the trainable parts.
            narrowed: output computed only at `positions`, or "".
        """
        super().__init__()
        self.trunk, self.narrowed = trunk, narrowed
        self.tails = nn.ModuleList(tails)

    @classmethod
    def of(cls, program: Program, others: Sequence[Program] = (), narrow: str = "") -> FrozenPart | None:
        """Split a program, if possible.

        Args:
            program: program being trained.
            others: programs on the same base with the same frozen part, such as a reference policy.
            narrow: output of a final linear layer that need not be computed for every token.

        Returns:
            The parts, or None if nothing below the trained layers is frozen, a gradual pass changes tensors during
            training, an op writes in place, or another program has a different frozen part.
        """
        module = program.module()
        if module.__dict__["_paced"]:
            return None
        graph, names = module.graph_module(False).graph, module.__dict__["_trains"]
        trained = {id(p) for name, p in module.named_parameters(remove_duplicate=False) if name in names}
        inputs = _input_names(graph)
        if inputs is None or any(map(writes, graph.nodes)):
            return None
        frozen = _frozen(graph, module, trained)
        if narrow and _narrows(graph, narrow):
            # Logits of every token would need more memory than all other cached values.
            frozen.discard(named_outputs(graph)[narrow])
        kept = _kept(graph, frozen)
        if not any(node.op == "get_attr" for node in ancestors(kept)):
            return None  # only masks and similar values without weights, which are cheap to compute again
        sources = [other.module() for other in others]
        graphs = [source.graph_module(False).graph for source in sources]
        matches = [_matched(kept, module, source, its) for source, its in zip(sources, graphs, strict=True)]
        if any(match is None or _input_names(g) != inputs for match, g in zip(matches, graphs, strict=True)):
            return None
        narrowed = narrow if all(_narrows(g, narrow) for g in (graph, *graphs)) else ""
        stops = [kept, *(match for match in matches if match is not None)]
        tails = [
            Tail(over(m, _tail(g, stop, inputs, narrowed), "Tail"), g, narrowed)
            for m, g, stop in zip((module, *sources), (graph, *graphs), stops, strict=True)
        ]
        trunk = over(module, _trunk(graph, kept, inputs), "Trunk")
        return cls(trunk, tails, narrowed)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
        """Compute the cached values, by name, for inputs of N rows.

        Args:
            inputs: inputs of the program.
            rows: rows per forward pass.
        """
        count = len(next(iter(inputs.values())))
        parts = [
            self.trunk(**{name: tensor[start : start + rows] for name, tensor in inputs.items()})
            for start in range(0, count, rows)
        ]
        return {_name(number): torch.cat(each) for number, each in enumerate(zip(*parts, strict=True))}


class Tail(nn.Module):
    """The part of a program after its frozen trunk. It returns the outputs of the program."""

    def __init__(self, graph_module: fx.GraphModule, whole: fx.Graph, narrowed: str) -> None:
        super().__init__()
        self.graph_module, self.narrowed = graph_module, narrowed
        codegen: Any = whole._codegen
        self.spec = codegen.pytree_info.out_spec

    def forward(self, **given: Tensor) -> Any:
        return pytree.tree_unflatten(self.graph_module(**given), self.spec)


def _input_names(graph: fx.Graph) -> tuple[str, ...] | None:
    """Return the name of each placeholder, or None if the inputs are nested."""
    info = getattr(graph._codegen, "pytree_info", None)
    names = tuple(name for name in info.orig_args if name != "self") if info is not None else ()
    count = sum(node.op == "placeholder" for node in graph.nodes)
    return names if count and len(names) == count else None


def _frozen(graph: fx.Graph, module: nn.Module, trained: set[int]) -> set[fx.Node]:
    """Find the ops that depend on the inputs but on no trained parameter, and whose first axis is the batch."""
    first = next(node for node in graph.nodes if node.op == "placeholder")
    rows = first.meta["val"].shape[0]
    if not all(_by_rows(node, rows) for node in graph.nodes if node.op == "placeholder"):
        return set()
    moving: set[fx.Node] = set()
    reading: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            reading.add(node)
        elif node.op == "get_attr":
            if id(get(module, node.target)) in trained:
                moving.add(node)
        elif node.op == "call_function":
            if not moving.isdisjoint(node.all_input_nodes):
                moving.add(node)
            # A size is not cached: the tail computes it again from the inputs.
            if op_name(node.target) != "sym_size" and not reading.isdisjoint(node.all_input_nodes):
                reading.add(node)
    return {node for node in reading - moving if node.op == "call_function" and _by_rows(node, rows)}


def _by_rows(node: fx.Node, rows: Any) -> bool:
    """Return True if the first axis of a node's value is the batch axis.

    A value with a fixed first axis may be broadcast over rows, so it cannot be cached per row.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.dim() or not isinstance(rows, torch.SymInt):
        return False
    size = value.shape[0]
    return isinstance(size, torch.SymInt) and size.node.expr == rows.node.expr


def _kept(graph: fx.Graph, frozen: set[fx.Node]) -> list[fx.Node]:
    """Return the frozen ops that the rest of the graph reads, in graph order."""
    read = ancestors(graph.output_node().all_input_nodes, frozen)
    return [
        node
        for node in graph.nodes
        if node in frozen and any(u in read or u.op == "output" for u in node.users)
    ]


def _is_same(own: Tensor, other: Tensor) -> bool:
    """True if two tensors are one. Programs on one base share the storage of weights, and have copies of buffers."""
    if memory_of(own) == memory_of(other):
        return True
    if isinstance(own, nn.Parameter) or isinstance(other, nn.Parameter):
        return False
    return own.dtype == other.dtype and torch.equal(own, other)


def _matched(
    kept: Sequence[fx.Node], module: nn.Module, other: nn.Module, graph: fx.Graph
) -> list[fx.Node] | None:
    """Find the nodes of another graph that compute the same values from the same tensors.

    Returns:
        The nodes, in the order of `kept`, or None if one has no counterpart.
    """
    named = {node.name: node for node in graph.nodes}
    pairs = [(node, named.get(node.name)) for node in kept]
    seen: set[fx.Node] = set()
    todo = list(pairs)
    while todo:
        node, twin = todo.pop()
        if twin is None or (node.op, len(node.all_input_nodes)) != (twin.op, len(twin.all_input_nodes)):
            return None
        if node in seen:
            continue
        seen.add(node)
        if node.op == "get_attr":
            if not _is_same(get(module, str(node.target)), get(other, str(twin.target))):
                return None
        elif node.op != "placeholder":
            mine, theirs = (fx.node.map_arg((n.args, n.kwargs), lambda n: n.name) for n in (node, twin))
            if node.target is not twin.target or str(mine) != str(theirs):
                return None
            todo += zip(node.all_input_nodes, twin.all_input_nodes, strict=True)
        elif node.name != twin.name:
            return None
    return [twin for _, twin in pairs if twin is not None]


def _narrows(graph: fx.Graph, name: str) -> bool:
    """Return True if an output comes from a linear layer on token states and is read nowhere else.

    Such an output can be computed for a subset of the tokens.
    """
    node = named_outputs(graph).get(name)
    if node is None or op_name(node.target) != "linear" or len(node.users) != 1:
        return False
    value = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    return isinstance(value, Tensor) and value.dim() == 3


def _at(states: Tensor, positions: Tensor) -> Tensor:
    """Select N × T × features from N × L × features at N × T positions."""
    return states[torch.arange(len(positions), device=positions.device).unsqueeze(1), positions]


def _placed(fresh: fx.Graph, graph: fx.Graph, inputs: Sequence[str]) -> dict[fx.Node, fx.Node]:
    """Add placeholders of the given names to a new graph."""
    own = [node for node in graph.nodes if node.op == "placeholder"]
    return {node: fresh.placeholder(name) for node, name in zip(own, inputs, strict=True)}


def _trunk(graph: fx.Graph, kept: Sequence[fx.Node], inputs: Sequence[str]) -> fx.Graph:
    """Build the graph from the inputs to the cached values."""
    fresh = fx.Graph()
    made = _placed(fresh, graph, inputs)
    _copy(fresh, graph, ancestors(kept), made)
    fresh.output(tuple(made[node] for node in kept))
    return fresh


def _tail(graph: fx.Graph, kept: Sequence[fx.Node], inputs: Sequence[str], narrowed: str) -> fx.Graph:
    """Build the graph from the cached values and the inputs to the flat outputs."""
    fresh = fx.Graph()
    made = _placed(fresh, graph, inputs)
    made |= {node: fresh.placeholder(_name(number)) for number, node in enumerate(kept)}
    positions = fresh.placeholder(POSITIONS)
    _copy(fresh, graph, ancestors(graph.output_node().all_input_nodes, set(kept)), made)
    if narrowed:
        product = made[named_outputs(graph)[narrowed]]
        with fresh.inserting_before(product):
            states = fresh.call_function(_at, (product.args[0], positions))
        product.args = (states, *product.args[1:])
    (returned,) = graph.output_node().args
    fresh.output(fx.node.map_arg(returned, made.__getitem__))
    return fresh


def _copy(fresh: fx.Graph, graph: fx.Graph, nodes: set[fx.Node], made: dict[fx.Node, fx.Node]) -> None:
    """Copy nodes into a new graph, on top of the nodes in `made`, and record the copies there."""
    for node in graph.nodes:
        if node in nodes and node not in made:
            made[node] = fresh.node_copy(node, made.__getitem__)


def _name(number: int) -> str:
    """Return the input name of a cached value in a tail."""
    return f"kept_{number}"
