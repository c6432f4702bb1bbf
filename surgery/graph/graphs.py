"""Operations on whole graphs: copy, removal of replaced nodes, and the nodes that outputs depend on."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from surgery.graph.marks import mark_of


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Copy a graph with new nodes; metadata dictionaries are copied one level deep."""
    fresh = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = fresh.graph_copy(graph, mapping)
    source = next(node for node in reversed(graph.nodes) if node.op == "output")
    output = fresh.output(result)
    output.meta = copy.copy(source.meta)
    fresh._codegen = copy.copy(graph._codegen)
    return fresh


def without_replaced(graph: fx.Graph) -> fx.Graph:
    """Return the graph without the ops that passes have replaced, and without nodes that only these read.

    If nothing was replaced, this is the graph itself. The full graph is still needed for matching: later passes match
    replaced ops, although these need not run.
    """
    live = live_nodes(graph)
    dead = [n for n in graph.nodes if n not in live]
    # A tensor that no output depends on is read in vain, and a module need not have it.
    if not any(n.op == "get_attr" or mark_of(n).wrapped_by or mark_of(n).gone_for for n in dead):
        return graph
    lean = copy_graph(graph)
    kept = live_nodes(lean)
    for node in reversed(lean.nodes):
        if node not in kept and node.op != "placeholder":
            lean.erase_node(node)
    return lean


def flat_inputs(program: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the values of a GraphModule's placeholders in their order, for any order of the keywords.

    Args:
        program: the GraphModule.
        args: positional arguments of a call.
        kwargs: keyword arguments of a call.
    """
    spec = getattr(getattr(program.graph._codegen, "pytree_info", None), "in_spec", None)
    if spec is not None:
        order = spec.child(1).context if hasattr(spec, "child") else spec.children_specs[1].context
        kwargs = {name: kwargs[name] for name in order if name in kwargs}
        return pytree.tree_leaves((tuple(args), kwargs))
    names = [node.target for node in program.graph.nodes if node.op == "placeholder"]
    return [*args, *(kwargs[name] for name in names[len(args) :])]


def writes(node: fx.Node) -> bool:
    """True if a node has a side effect. Drawing random numbers (a dropout) does not count."""
    return node.op == "call_function" and node.is_impure(impure_random=False)


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that an output of the graph, or a write, depends on."""
    # Cached by op, because `is_impure` is slow.
    acts: dict[Any, bool] = {}
    stack = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in acts:
            acts[node.target] = writes(node)
        if node.op == "output" or (node.op == "call_function" and acts[node.target]):
            stack.append(node)
    return ancestors(stack)


def ancestors(nodes: Iterable[fx.Node], stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Return the nodes and all nodes they are computed from, down to `stop`, which is left out."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and node not in stop:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
