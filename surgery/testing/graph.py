"""Checks of the graph: what a pass may touch, and what its nodes must carry."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from surgery.common.errors import PassError
from surgery.graph.graphs import live_nodes
from surgery.graph.marks import META
from surgery.testing.case import Case, Skip, exactly


def untouched(case: Case) -> str:
    """Sites refused or not targeted keep their op and inputs, and a pass refused everywhere changes nothing."""
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
                "untouched", f"node {node.name} is gone or another op", owners.get(node.name, "")
            )
        if _mark(twin).get("entry") == entry:
            raise case.error(
                "untouched", f"node {node.name} claims to be inserted", owners.get(node.name, "")
            )
        args: Any = _without_added(case, twin) if twin.op == "output" else twin.args
        args, given = (args, twin.kwargs), (node.args, node.kwargs)
        if _mark(twin).get("resized") == entry:
            args, given = _without_sizes(args), _without_sizes(given)
        found = fx.node.map_arg(args, lambda n: _original(case, n, after, touched))
        if str(found) != str(given):
            raise case.error("untouched", f"node {node.name} has other inputs", owners.get(node.name, ""))
    for name in sorted(touched - set(allowed)):
        raise case.error(
            "untouched", f"node {name} was touched, and is no accepted site", owners.get(name, "")
        )
    return f"{_refused_alone(case)}; {len(after) - len(case.program.graph.nodes)} nodes more"


def _without_sizes(args: Any) -> Any:
    """The arguments of an op less what may be a length in them: only tensors, and numbers that are no integers."""

    def blank(value: Any) -> Any:
        number = isinstance(value, fx.Node) and not isinstance(value.meta.get("val"), torch.Tensor)
        return "size" if number or type(value) is int else value

    return pytree.tree_map(blank, args)


def _without_added(case: Case, output: fx.Node) -> tuple[Any, ...]:
    """What the graph returns, less the outputs that the pass says it adds."""
    (returned,) = output.args
    if not case.pass_.extends or not isinstance(returned, (tuple, list)):
        return output.args
    added = [n for n in returned if isinstance(n, fx.Node) and _adds(case, n)]
    return (type(returned)(n for n in returned if n not in added),)


def _adds(case: Case, node: fx.Node) -> bool:
    mark = _mark(node)
    return mark.get("entry") == case.entry.id and "output" in mark


def _original(case: Case, node: fx.Node, after: dict[str, fx.Node], touched: set[str]) -> fx.Node:
    """What stood here before the pass; notes which ops it wrapped or fed."""
    while _mark(node).get("entry") == case.entry.id and (node.op != "get_attr" or "wraps" in _mark(node)):
        mark = _mark(node)
        stands_for = next((mark[key] for key in ("wraps", "instead_of", "follows") if key in mark), None)
        if stands_for is not None:
            node = after[stands_for]
            touched.add(mark.get("call", node.name))
        elif "feeds" in mark:
            touched.add(mark["call"])
            node = after[mark["feeds"]]
        elif mark.get("input"):
            touched.add(mark["call"])
            node = node.args[0]  # type: ignore[assignment]
        else:
            raise case.error(
                "untouched", f"a node of the model reads {node.name}, which stands for no value of the model"
            )
    return node


def _refused_alone(case: Case) -> str:
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
    """Inserted nodes are live and carry meta and provenance; every declared tensor is used."""
    _ = case.rewrite
    known = {node.name for node in case.program.graph.nodes}
    new = [node for node in case.adapted.graph.nodes if node.name not in known]
    if not new:
        raise Skip("it inserts no node")
    live = live_nodes(case.adapted.graph)
    for node in new:
        site = str(_mark(node).get("site", ""))
        if _mark(node).get("entry") != case.entry.id:
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
    """Names of tensors on which an output depends."""
    return {str(node.target) for node in live_nodes(graph) if node.op == "get_attr"}


def learning_parameters(graph: fx.Graph) -> set[str]:
    """Names of tensors to which a gradient leads back from an output: on a way of floating values alone."""
    stack = [node for node in graph.nodes if node.op == "output"]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(n for n in node.all_input_nodes if _may_have_gradient(n))
    return {str(node.target) for node in seen if node.op == "get_attr"}


def _may_have_gradient(node: fx.Node) -> bool:
    values = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in values)


def _mark(node: fx.Node) -> dict[str, Any]:
    return node.meta.get(META, {})
