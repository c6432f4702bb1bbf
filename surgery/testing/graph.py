"""Checks of the graph: nodes that a pass may change, and properties of the nodes that it inserts."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from surgery.common.errors import PassError
from surgery.graph.graphs import live_nodes
from surgery.graph.marks import mark_of
from surgery.testing.case import Case, Skip, exactly


def untouched(case: Case) -> str:
    """Sites that are refused or not targeted keep their op and inputs; a pass refused everywhere changes nothing."""
    _ = case.rewrite
    allowed = {call.node.name: plan.site.path for plan in case.accepted for call in plan.site.calls}
    owners = {call.node.name: site.path for site in case.program.sites for call in site.calls}
    after = {node.name: node for node in case.adapted.graph.nodes}
    entry = case.entry.id
    touched: set[str] = set()
    for node in case.program.graph.nodes:
        twin = after.get(node.name)
        if twin is None or twin.op != node.op or twin.target != node.target:
            raise case.error(
                "untouched", f"node {node.name} is gone or is another op", owners.get(node.name, "")
            )
        if mark_of(twin).entry == entry:
            raise case.error(
                "untouched", f"node {node.name} of the model is marked as inserted", owners.get(node.name, "")
            )
        args: Any = _without_added(case, twin) if twin.op == "output" else twin.args
        args, given = (args, twin.kwargs), (node.args, node.kwargs)
        if mark_of(twin).resized == entry:
            args, given = _without_sizes(args), _without_sizes(given)
        found = fx.node.map_arg(args, lambda n: _original(case, n, after, touched))
        if str(found) != str(given):
            raise case.error("untouched", f"node {node.name} has other inputs", owners.get(node.name, ""))
    for name in sorted(touched - set(allowed)):
        raise case.error(
            "untouched", f"node {name} was changed, but is at no accepted site", owners.get(name, "")
        )
    return f"{_refused_alone(case)}; {len(after) - len(case.program.graph.nodes)} nodes more"


def _without_sizes(args: Any) -> Any:
    """The arguments of an op with integers and symbolic sizes replaced by a placeholder."""

    def blank(value: Any) -> Any:
        number = isinstance(value, fx.Node) and not isinstance(value.meta.get("val"), torch.Tensor)
        return "size" if number or type(value) is int else value

    return pytree.tree_map(blank, args)


def _without_added(case: Case, output: fx.Node) -> tuple[Any, ...]:
    """The arguments of the output node without the outputs that the pass adds."""
    (returned,) = output.args
    if not case.pass_.expectations.adds_outputs or not isinstance(returned, (tuple, list)):
        return output.args
    added = [n for n in returned if isinstance(n, fx.Node) and _adds(case, n)]
    return (type(returned)(n for n in returned if n not in added),)


def _adds(case: Case, node: fx.Node) -> bool:
    """True if a node is an output that the pass added."""
    mark = mark_of(node)
    return mark.entry == case.entry.id and mark.output is not None


def _original(case: Case, node: fx.Node, after: dict[str, fx.Node], touched: set[str]) -> fx.Node:
    """The node of the model that a node replaces; `touched` collects the ops that were wrapped or fed."""
    while mark_of(node).entry == case.entry.id and (node.op != "get_attr" or mark_of(node).wraps is not None):
        mark = mark_of(node)
        stands_for = mark.wraps or mark.instead_of or mark.follows
        if stands_for is not None:
            node = after[stands_for]
            touched.add(mark.call or node.name)
        elif mark.feeds is not None:
            touched.add(str(mark.call))
            node = after[mark.feeds]
        elif mark.input:
            touched.add(str(mark.call))
            node = node.args[0]  # type: ignore[assignment]
        else:
            raise case.error(
                "untouched", f"a node of the model reads {node.name}, which replaces no value of the model"
            )
    return node


def _refused_alone(case: Case) -> str:
    """Apply the pass to a site that it refuses: the error must name the site, and the program must not change."""
    everywhere = case.pass_.model_copy(update={"target": "all"})
    try:
        refused = [plan.site for plan in case.program.plan(everywhere, freeze_base=False).passes[-1].refused]
    except PassError as error:
        return f"everywhere at once it is refused: {error}"
    if not refused:
        return "no site of this program is refused"
    journal, nodes = case.program.journal, len(case.program.graph.nodes)
    try:
        case.program.apply(case.pass_.model_copy(update={"target": exactly(refused[:1])}), verify=False)
    except PassError as error:
        if refused[0].path not in str(error):
            raise case.error("untouched", f"its refusal does not name the site: {error}") from None
    else:
        raise case.error("untouched", "a refused site was rewritten", refused[0].path)
    if case.program.journal is not journal or len(case.program.graph.nodes) != nodes:
        raise case.error("untouched", "a refusal left something behind", refused[0].path)
    return f"{len(refused)} sites of {len(case.program.sites)} refused"


def inserted(case: Case) -> str:
    """Inserted nodes are live and have meta and provenance; every declared tensor is used."""
    _ = case.rewrite
    known = {node.name for node in case.program.graph.nodes}
    new = [node for node in case.adapted.graph.nodes if node.name not in known]
    if not new:
        raise Skip("it inserts no node")
    live = live_nodes(case.adapted.graph)
    for node in new:
        site = mark_of(node).site
        if mark_of(node).entry != case.entry.id:
            raise case.error("inserted", f"node {node.name} was not inserted through the Rewriter", site)
        if node not in live:
            raise case.error("inserted", f"node {node.name} is left behind: no output depends on it", site)
        wanted = ("val", "nn_module_stack") if node.op == "call_function" else ("val",)
        missing = next((key for key in wanted if key not in node.meta), None)
        if missing:
            raise case.error("inserted", f"node {node.name} has no meta[{missing!r}]", site)
    read = {str(node.target) for node in new if node.op == "get_attr"}
    for record in case.entry.sites:
        unused = [name for name, full in record.tensors.items() if full not in read]
        if unused:
            raise case.error("inserted", f"tensor {unused[0]!r} is declared and never used", record.path)
    return f"{len(new)} nodes, {len(read)} tensors at {len(case.entry.sites)} sites"


def live_parameters(graph: fx.Graph) -> set[str]:
    """Names of the tensors that an output depends on."""
    return {str(node.target) for node in live_nodes(graph) if node.op == "get_attr"}


def learning_parameters(graph: fx.Graph) -> set[str]:
    """Names of the tensors that a gradient can reach from an output, through floating-point values only."""
    stack = [node for node in graph.nodes if node.op == "output"]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(n for n in node.all_input_nodes if _may_have_gradient(n))
    return {str(node.target) for node in seen if node.op == "get_attr"}


def _may_have_gradient(node: fx.Node) -> bool:
    """True if a node has a floating-point or complex value."""
    values = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in values)
