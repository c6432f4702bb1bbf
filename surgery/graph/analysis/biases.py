"""Bias parameters: vectors that an op adds to a value, as its bias argument or in a plain sum."""

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
    """Map every bias parameter to the first op in the graph that adds it.

    A bias is the `bias` argument of an op (linear, convolution, norm), a vector of a recurrent layer, or a vector
    that a plain sum adds to a value computed from the inputs (Mamba's dt_proj). Position embeddings and other
    tables that are added do not count.

    Args:
        graph: graph to search.
        names: names of the parameters to look for.

    Returns:
        Op by parameter name.
    """
    rests: set[fx.Node] = set()
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        # A sum of two constants adds no bias to an activation, so only ops computed from an input are looked at.
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
    """Assign every bias to a site.

    That is the site whose op adds the bias, else the site whose result the bias is added to. If several sites
    qualify, it is the last site before the bias in the graph, or the first site of all.

    Args:
        graph: graph to search.
        names: names of the parameters to look for.
        sites: sites of the program.
        flow: dataflow of the graph.

    Returns:
        Bias names by site key.
    """
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
    """Return the operands that a node adds as a bias."""
    name, args = op_name(node.target), arguments(node)
    if name in ("add", "add_"):
        pair = [n for n in (args.get("self"), args.get("other")) if isinstance(n, fx.Node)]
        # Only a sum of an activation and a constant has a bias; between two activations there is none.
        return [n for n in pair if n not in rests] if len(pair) == 2 else []
    if name in _RECURRENT:
        return [n for n in args.get("params") or () if isinstance(n, fx.Node)]
    # addmm(self, mat1, mat2) adds its first argument: that is how t + matmul is traced for a bias.
    taken = [args.get("bias"), args.get("self") if name == "addmm" else None]
    return [n for n in taken if isinstance(n, fx.Node)]


def _vector(node: fx.Node, names: Collection[str]) -> str | None:
    """Return the name of the vector parameter that a value is a cast or view of, or None."""
    while node.op == "call_function" and op_name(node.target) in _MOVES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    value = node.meta.get("val")
    if node.op != "get_attr" or node.target not in names or not isinstance(value, torch.Tensor):
        return None
    # A vector may be stored with axes of length 1, but a table (learned positions) is not a bias.
    return str(node.target) if value.numel() == max(value.shape, default=0) else None


def _origin(flow: Dataflow, node: fx.Node, by_node: dict[fx.Node, Site]) -> Site | None:
    values = [n for n in node.all_input_nodes if n not in flow.constant]
    origins = {origin for value in values for origin in flow.of(value)}
    return by_node.get(origins.pop()) if len(origins) == 1 else None
