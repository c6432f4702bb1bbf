"""Biases: the parameters that some op adds to a value, whether as an argument of its own or in a sum."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from surgery.graph.analysis.dataflow import Dataflow, op_name
from surgery.graph.ops import arguments
from surgery.graph.sites import Site, SiteIndex, SiteKey

_PASSES_ON = ("view reshape unsqueeze squeeze expand expand_as to _to_copy type_as detach alias clone contiguous t "
              "transpose permute")  # fmt: skip
_MOVES = frozenset(_PASSES_ON.split())
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def biases_by_op(graph: fx.Graph, names: Collection[str]) -> dict[str, fx.Node]:
    """The op that adds it, the first in the graph, by the name of every vector parameter that is added.

    That is: what an op takes as its argument `bias` (linear, convolution, norm), the vectors of recurrent layers,
    and what a plain sum adds to something that rests on the inputs (Mamba's dt_proj). Learned positions and other
    tables that are added are no biases.
    """
    rests: set[fx.Node] = set()
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" or not rests.isdisjoint(node.all_input_nodes):
            rests.add(node)
        if node.op == "call_function" and node in rests:
            for operand in _added(node, rests):
                name = _vector(operand, names)
                if name is not None:
                    found.setdefault(name, node)
    return found


def site_biases(
    graph: fx.Graph, names: Collection[str], sites: SiteIndex, flow: Dataflow
) -> dict[SiteKey, list[str]]:
    """The biases by the site that they belong to: whose op adds them, whose result they are added to, or, where
    that is no single site, the one that comes before them in the graph."""
    by_node = {call.node: site for site in sites for call in site.calls}
    order = {node: index for index, node in enumerate(graph.nodes)}
    first = next(iter(sites), None)
    found: dict[SiteKey, list[str]] = {}
    for name, node in biases_by_op(graph, names).items():
        site = by_node.get(node) or _origin(flow, node, by_node)
        if site is None:
            earlier = [n for n in by_node if order[n] < order[node]]
            site = by_node[max(earlier, key=order.__getitem__)] if earlier else first
        if site is not None:
            found.setdefault(site.key, []).append(name)
    return found


def _added(node: fx.Node, rests: set[fx.Node]) -> list[fx.Node]:
    """What a node takes as a bias."""
    name, args = op_name(node.target), arguments(node)
    if name in ("add", "add_"):
        pair = [n for n in (args.get("self"), args.get("other")) if isinstance(n, fx.Node)]
        return [n for n in pair if n not in rests] if len(pair) == 2 else []
    if name in _RECURRENT:
        return [n for n in args.get("params") or () if isinstance(n, fx.Node)]
    taken = [args.get("bias"), args.get("self") if name == "addmm" else None]
    return [n for n in taken if isinstance(n, fx.Node)]


def _vector(node: fx.Node, names: Collection[str]) -> str | None:
    """The vector parameter that a value is, by way of casts and views."""
    while node.op == "call_function" and op_name(node.target) in _MOVES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    value = node.meta.get("val")
    if node.op != "get_attr" or node.target not in names or not isinstance(value, torch.Tensor):
        return None
    return str(node.target) if value.numel() == max(value.shape, default=0) else None


def _origin(flow: Dataflow, node: fx.Node, by_node: dict[fx.Node, Site]) -> Site | None:
    values = [n for n in node.all_input_nodes if n not in flow.constant]
    origins = {origin for value in values for origin in flow.of(value)}
    return by_node.get(origins.pop()) if len(origins) == 1 else None
