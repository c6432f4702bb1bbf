"""Graphs as wholes: a copy of one, and one without what passes have replaced."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from surgery.graph.marks import META


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with its own nodes; metadata dictionaries are copied one level deep."""
    fresh = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = fresh.graph_copy(graph, mapping)
    source = next(node for node in reversed(graph.nodes) if node.op == "output")
    output = fresh.output(result)
    output.meta = copy.copy(source.meta)
    fresh._codegen = copy.copy(graph._codegen)
    return fresh


def without_replaced(graph: fx.Graph) -> fx.Graph:
    """The graph less the ops in whose place passes put others, and less what only these read.

    The graph itself, where there are none: later passes match the replaced ops, but nobody has to run them.
    """
    live = live_nodes(graph)
    marks = [n.meta.get(META, {}) for n in graph.nodes if n not in live]
    if not any(mark.get("wrapped_by") or mark.get("gone_for") for mark in marks):
        return graph
    lean = copy_graph(graph)
    kept = live_nodes(lean)
    for node in reversed(lean.nodes):
        if node not in kept and node.op != "placeholder":
            lean.erase_node(node)
    return lean


def flat_inputs(program: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The values of a GraphModule's placeholders, in their order, whatever the order of the keywords."""
    spec = getattr(getattr(program.graph._codegen, "pytree_info", None), "in_spec", None)
    if spec is not None:
        order = spec.child(1).context if hasattr(spec, "child") else spec.children_specs[1].context
        kwargs = {name: kwargs[name] for name in order if name in kwargs}
        return pytree.tree_leaves((tuple(args), kwargs))
    names = [node.target for node in program.graph.nodes if node.op == "placeholder"]
    return [*args, *(kwargs[name] for name in names[len(args) :])]


def writes(node: fx.Node) -> bool:
    """Whether a node does something beside giving a value; to draw random numbers (a dropout) is no such thing."""
    return node.op == "call_function" and node.is_impure(impure_random=False)


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that an output of the graph, or a write, depends on."""
    acts: dict[Any, bool] = {}  # by op: torch takes its time to say so
    stack = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in acts:
            acts[node.target] = writes(node)
        if node.op == "output" or (node.op == "call_function" and acts[node.target]):
            stack.append(node)
    return behind(stack)


def behind(nodes: Iterable[fx.Node], stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Nodes with all that they are computed from, down to `stop`, which is left out."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and node not in stop:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
