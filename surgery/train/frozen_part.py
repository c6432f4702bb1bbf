"""What of a program nothing that trains reaches: run once for inputs that are then read many times.

Where adapters are on the last layers, most of a forward pass gives what it gave before. Reinforcement learning reads a
batch of responses in several epochs, beside a reference policy, and in every product with the Fisher matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from surgery.engine.module import get, memory_of, over
from surgery.graph.analysis.dataflow import op_name
from surgery.graph.graphs import behind, writes
from surgery.graph.outputs import named_outputs

if TYPE_CHECKING:
    from surgery.engine.program import Program

POSITIONS = "positions"


class FrozenPart(nn.Module):
    """trunk: gives what the tails read, for the program's inputs; a tuple. tails: the rest of the program, and of each
    of the others; called with the program's inputs by name, what `run` gave, and `positions`.

    narrowed: the output that a tail gives at `positions` (N × T, of a row's tokens) alone, N × T × features, or "".
    """

    def __init__(self, trunk: nn.Module, tails: Sequence[Tail], narrowed: str) -> None:
        super().__init__()
        self.trunk, self.narrowed = trunk, narrowed
        self.tails = nn.ModuleList(tails)

    @classmethod
    def of(cls, program: Program, others: Sequence[Program] = (), narrow: str = "") -> FrozenPart | None:
        """others: programs on the same base whose frozen part is the same, such as a reference policy. narrow: an
        output whose last op is a linear map, so that it need not be computed for every token.

        None where nothing is frozen below what trains, where a pass changes tensors as the training goes on, where an
        op writes into a tensor, and where another program differs below.
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
            frozen.discard(named_outputs(graph)[narrow])  # of every token it is more than all else
        kept = _kept(graph, frozen)
        if not any(node.op == "get_attr" for node in behind(kept)):
            return None  # masks and the like, which cost nothing
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
        """What the tails read for inputs of N rows, N rows each, by name; so many rows at a time."""
        count = len(next(iter(inputs.values())))
        parts = [
            self.trunk(**{name: tensor[start : start + rows] for name, tensor in inputs.items()})
            for start in range(0, count, rows)
        ]
        return {_name(number): torch.cat(each) for number, each in enumerate(zip(*parts, strict=True))}


class Tail(nn.Module):
    """A program from its frozen part on; returns what the program returns."""

    def __init__(self, graph_module: fx.GraphModule, whole: fx.Graph, narrowed: str) -> None:
        super().__init__()
        self.graph_module, self.narrowed = graph_module, narrowed
        codegen: Any = whole._codegen
        self.spec = codegen.pytree_info.out_spec

    def forward(self, **given: Tensor) -> Any:
        return pytree.tree_unflatten(self.graph_module(**given), self.spec)


def _input_names(graph: fx.Graph) -> tuple[str, ...] | None:
    """The names by which the graph is called, one for each placeholder; None where they are nested."""
    info = getattr(graph._codegen, "pytree_info", None)
    names = tuple(name for name in info.orig_args if name != "self") if info is not None else ()
    count = sum(node.op == "placeholder" for node in graph.nodes)
    return names if count and len(names) == count else None


def _frozen(graph: fx.Graph, module: nn.Module, trained: set[int]) -> set[fx.Node]:
    """The ops that read the inputs, and nothing that trains, and whose first axis is that of the inputs' rows."""
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
            if op_name(node.target) != "sym_size" and not reading.isdisjoint(node.all_input_nodes):
                reading.add(node)
    return {node for node in reading - moving if node.op == "call_function" and _by_rows(node, rows)}


def _by_rows(node: fx.Node, rows: Any) -> bool:
    """Whether a node gives a tensor with so many rows; what is fixed at one row may be broadcast to all."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.dim() or not isinstance(rows, torch.SymInt):
        return False
    size = value.shape[0]
    return isinstance(size, torch.SymInt) and size.node.expr == rows.node.expr


def _kept(graph: fx.Graph, frozen: set[fx.Node]) -> list[fx.Node]:
    """The frozen ops that others read which are not, in graph order."""
    read = behind(graph.output_node().all_input_nodes, frozen)
    return [
        node
        for node in graph.nodes
        if node in frozen and any(u in read or u.op == "output" for u in node.users)
    ]


def _matched(
    kept: Sequence[fx.Node], module: nn.Module, other: nn.Module, graph: fx.Graph
) -> list[fx.Node] | None:
    """The nodes of another graph that compute the same of the same tensors; None where one has none."""
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
            if memory_of(get(module, str(node.target))) != memory_of(get(other, str(twin.target))):
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
    """Whether an output is a linear map's alone, of rows of tokens, which can be left out for most of these."""
    node = named_outputs(graph).get(name)
    if node is None or op_name(node.target) != "linear" or len(node.users) != 1:
        return False
    value = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    return isinstance(value, Tensor) and value.dim() == 3


def _at(states: Tensor, positions: Tensor) -> Tensor:
    """N × T × features of N × L × features."""
    return states[torch.arange(len(positions), device=positions.device).unsqueeze(1), positions]


def _placed(fresh: fx.Graph, graph: fx.Graph, inputs: Sequence[str]) -> dict[fx.Node, fx.Node]:
    """Placeholders of the same names in a fresh graph."""
    own = [node for node in graph.nodes if node.op == "placeholder"]
    return {node: fresh.placeholder(name) for node, name in zip(own, inputs, strict=True)}


def _trunk(graph: fx.Graph, kept: Sequence[fx.Node], inputs: Sequence[str]) -> fx.Graph:
    """From the inputs to what is kept."""
    fresh = fx.Graph()
    made = _placed(fresh, graph, inputs)
    _copy(fresh, graph, behind(kept), made)
    fresh.output(tuple(made[node] for node in kept))
    return fresh


def _tail(graph: fx.Graph, kept: Sequence[fx.Node], inputs: Sequence[str], narrowed: str) -> fx.Graph:
    """From what is kept, and the inputs, to what the graph returns, flat."""
    fresh = fx.Graph()
    made = _placed(fresh, graph, inputs)
    made |= {node: fresh.placeholder(_name(number)) for number, node in enumerate(kept)}
    positions = fresh.placeholder(POSITIONS)
    _copy(fresh, graph, behind(graph.output_node().all_input_nodes, set(kept)), made)
    if narrowed:
        product = made[named_outputs(graph)[narrowed]]
        with fresh.inserting_before(product):
            states = fresh.call_function(_at, (product.args[0], positions))
        product.args = (states, *product.args[1:])
    (returned,) = graph.output_node().args
    fresh.output(fx.node.map_arg(returned, made.__getitem__))
    return fresh


def _copy(fresh: fx.Graph, graph: fx.Graph, nodes: set[fx.Node], made: dict[fx.Node, fx.Node]) -> None:
    """Put copies of nodes into a graph, on top of those that are `made`, which takes them up."""
    for node in graph.nodes:
        if node in nodes and node not in made:
            made[node] = fresh.node_copy(node, made.__getitem__)


def _name(number: int) -> str:
    """By which a tail is given what is kept."""
    return f"kept_{number}"
