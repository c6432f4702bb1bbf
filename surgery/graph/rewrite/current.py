"""Finds the current weight, bias and output of a site after earlier passes have changed it."""

from __future__ import annotations

from torch import fx

from surgery.graph.graphs import live_nodes, writes
from surgery.graph.marks import input_before_adapters, mark_of, output_with_adapters
from surgery.graph.ops import Call, arguments, operand, parameter_of
from surgery.graph.rewrite.refusals import computed_weight, not_floating
from surgery.graph.sites import Site


def standing_for(source: fx.Node) -> set[fx.Node]:
    """A parameter's node, and the values that passes have replaced it with."""
    return {n for n in source.graph.nodes if n is source or parameter_of(n) == source.target}


def weight_reader(call: Call) -> tuple[fx.Node, fx.Node]:
    """The node that reads the weight, on the path from the weight to the call's op, and the value that it reads now.

    A model can transpose or reshape a weight before its op reads it.
    """
    assert call.weight is not None
    standing = standing_for(call.weight)
    name = call.op.x if call.x_axis == "column" else call.op.weights[0]
    node, value = call.node, arguments(call.node)[name]
    while value not in standing:
        node, value = value, value.args[0]
    return node, value


def bias_now(call: Call) -> fx.Node | None:
    """The value that the call's op reads as its bias now; None if there is none."""
    value = arguments(call.node).get(call.op.bias) if call.op.bias else None
    return value if isinstance(value, fx.Node) else None


def replaced_by(node: fx.Node) -> str | None:
    """Id of the entry that replaced this op, so that no output depends on it any more; or None."""
    fresh = mark_of(node).gone_for
    if fresh is not None:
        return mark_of(next(n for n in node.graph.nodes if n.name == fresh)).entry
    last, current, entry = output_with_adapters(node), node, None
    while current is not last:
        outer = _outer(current)
        if current not in outer.all_input_nodes:
            entry = entry or mark_of(outer).entry
        current = outer
    return entry if entry and node not in live_nodes(node.graph) else None


def swapped_op(node: fx.Node) -> fx.Node | None:
    """The output of the op that a pass computes instead of this one, under the adapters of this one; or None."""
    name = mark_of(node).wrapped_by
    fresh = next((n for n in node.graph.nodes if n.name == name), None) if name else None
    return fresh if fresh is not None and mark_of(fresh).op_of == node.name else None


def replaced_at(site: Site) -> str | None:
    """Id of the entry that replaced an op of a site, or None."""
    return next((entry for entry in (replaced_by(call.node) for call in site.calls) if entry), None)


def replaced_op(site: Site, remedy: str) -> str | None:
    """The refusal of a site whose op an earlier pass has replaced.

    Args:
        site: The site.
        remedy: An imperative clause, such as "undo that first".
    """
    gone = replaced_at(site)
    return None if gone is None else f"{gone!r} has put another op in its place; {remedy}"


def no_weight_to_replace(site: Site, packed: str, replaced: str) -> str | None:
    """The refusal of a site whose weight is computed, packed, or no longer read by its op; None if it can be replaced.

    Args:
        site: The site.
        packed: Remedy for a packed weight, an imperative clause.
        replaced: Remedy for an op that an earlier pass has replaced.
    """
    return computed_weight(site) or not_floating(site, packed) or replaced_op(site, replaced)


def _outer(node: fx.Node) -> fx.Node:
    """The next outer value that replaces this one; see `adapters_around`."""
    found = next((u for u in node.users if mark_of(u).wraps == node.name), None)
    return found or next(n for n in node.graph.nodes if n.name == mark_of(node).wrapped_by)


def weight_given_by(site: Site) -> str | None:
    """Id of the last entry that replaced the weight which the site's op reads, or None."""
    _, value = weight_reader(site.calls[0])
    return mark_of(value).entry if parameter_of(value) else None


def adapted_by(call: Call) -> str | None:
    """Id of an entry that has changed the input or the output of the call's op, or None."""
    for now, bare in (
        (output_with_adapters(call.node), call.node),
        (operand(call), input_before_adapters(operand(call))),
    ):
        if now is not bare:
            return mark_of(now).entry
    return None


def tensors_now(site: Site) -> tuple[str, str | None] | str:
    """Names of the tensors that the site's op reads as weight and bias now; the bias can be None.

    Returns:
        (weight, bias), or the reason as a text if the op was replaced or reads a value that a pass computes.
    """
    computed = computed_weight(site)
    if computed:
        return computed
    found: set[tuple[str, str | None]] = set()
    for call in site.calls:
        gone = replaced_by(call.node)
        if gone:
            return f"{gone!r} has put another op in its place; undo that first"
        _, weight = weight_reader(call)
        bias = bias_now(call) if call.bias is not None else None
        for value in (weight, bias):
            entry = _changes(call, value) if value is not None else None
            if entry:
                return f"{entry!r} changes its weight; undo that, or apply it after this"
        found.add((str(weight.target), str(bias.target) if bias is not None else None))
    if len(found) > 1:
        return "its calls do not read one weight and one bias"
    return found.pop()


def _changes(call: Call, value: fx.Node) -> str | None:
    """Id of the entry that computes the replacement of a parameter, or replaced it for its own adapter; or None."""
    if parameter_of(value) is None:
        return None
    entry, node, last = mark_of(value).entry, call.node, output_with_adapters(call.node)
    if value.op != "get_attr":
        return entry
    while node is not last:
        node = _outer(node)
        if mark_of(node).entry == entry:
            return entry
    return None


def read_elsewhere(site: Site, name: str, names: tuple[str, ...] = ()) -> bool:
    """True if an output depends on a tensor through other ops than those of this site.

    Args:
        site: The site.
        name: Name of the tensor.
        names: Its other names.
    """
    own = {call.node: operand(call) for call in site.calls}
    graph = site.calls[0].node.graph
    wanted = {name, *names}
    live = live_nodes(graph)
    stack = [n for n in live if n.op == "output" or writes(n)]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "get_attr" and node.target in wanted:
            return True
        stack.extend([own[node]] if node in own else node.all_input_nodes)
    return False
