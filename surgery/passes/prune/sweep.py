"""Sends the labels of every tensor through a graph, and forms units from the couplings that the rules report."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from surgery.graph.graphs import live_nodes
from surgery.graph.marks import is_aux
from surgery.graph.propagate.sizes import Unclear
from surgery.graph.view import View
from surgery.passes.prune import rules
from surgery.passes.prune.coupling import Coupling
from surgery.passes.prune.labels import carries


def coupling_of(view: View) -> Coupling:
    """Return the coupling analysis of a view's graph, computed once for the view."""
    return view.once(Coupling, lambda: couple(view.graph, view.names))


def couple(graph: fx.Graph, names: Mapping[str, tuple[str, ...]]) -> Coupling:
    """Analyze which units of a graph must be removed together.

    Args:
        graph: a captured graph whose nodes have `val`.
        names: parameter name -> all names of that tensor.
    """
    run = Coupling(graph, names)
    live = live_nodes(graph)
    for node in graph.nodes:
        if node in live:
            _visit(run, node)
    run.resolve()
    return run


def _visit(run: Coupling, node: fx.Node) -> None:
    if node.op == "get_attr":
        run.labels[node] = run.tensor_labels(node)
        return
    if node.op == "output":
        for operand in node.all_input_nodes:
            for label in run.labels.get(operand, ()):
                run.freeze(label, "the model returns them")
        return
    if node.op != "call_function" or not any(
        run.labels.get(n) or any(run.parts.get(n, ())) for n in node.all_input_nodes
    ):
        return
    # An adapter was built for the present number of units, so the units around it are kept.
    if is_aux(node):
        run.labels[node] = run.unknown(node, carries(node))
        return
    try:
        found = rules.follow(run, node)
    except Unclear as error:
        found = run.unknown(node, str(error))
    # An op with several results (split, chunk) returns one list of labels for each.
    if found and isinstance(found[0], list):
        run.parts[node] = [run.checked(node, part) for part in found]
    else:
        run.labels[node] = run.checked(node, found)  # type: ignore[arg-type]
