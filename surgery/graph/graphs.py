"""Graphs as wholes: a copy of one, and one without what passes have replaced."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from surgery.sites import META, live_nodes


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
