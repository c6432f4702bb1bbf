"""Marks on graph nodes: notes of a pass about the nodes that it inserted or changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

META = "surgery"  # the key in `node.meta`


@dataclass(frozen=True)
class Mark:
    """Notes of a pass on a node. Other nodes are referred to by their names.

    Attributes:
        entry: Id of the journal entry that inserted the node, or "" for a node of the model.
        site: Path of the site that it was inserted at.
        aux: An adapter inserted the node, so later passes do not match it. False for ops like the model's own.
        call: The op of the site's call that it was inserted for.
        wraps: The value that this one replaces for its users: the next inner adapter, or the op itself.
        wrapped_by: The value that replaces this one without reading it.
        input: The node changes the input of its op.
        weight_of: The parameter that its op reads this value instead of.
        grown: The value is larger than the op's own. Adapters that were made for the op stay inside of it.
        output: Name under which the program returns the value.
        instead_of: The value that a model op of a pass replaces for good.
        gone_for: The node that replaced this one for good.
        feeds: The value that this one replaces for a single reader.
        once: Key under which the pass finds the node again at its other places.
        resized: The entry that changed a size among the node's arguments.
        follows: The value that this one was inserted after, as an op like the model's own.
        gate: The branch that passes through this gate; see `analysis.residuals.gated_by`.
        role: Role of a weight op, if later analysis cannot derive it.
        at: Path of the site that replaced this node for good.
        rows: Number of rows that a longer table adds.
        prefix: Number of positions that a prefix adds.
        op_of: The op of the model whose output this value is instead; adapters of that op act on it.
    """

    entry: str = ""
    site: str = ""
    aux: bool = False
    call: str | None = None
    wraps: str | None = None
    wrapped_by: str | None = None
    input: bool = False
    weight_of: str | None = None
    grown: bool = False
    output: str | None = None
    instead_of: str | None = None
    gone_for: str | None = None
    feeds: str | None = None
    once: str | None = None
    resized: str | None = None
    follows: str | None = None
    gate: Any = None
    role: str | None = None
    at: str | None = None
    rows: int = 0
    prefix: int = 0
    op_of: str | None = None


_NONE = Mark()


def mark_of(node: fx.Node) -> Mark:
    """The mark of a node; an empty mark if no pass has changed the node."""
    mark: Mark = node.meta.get(META, _NONE)
    return mark


def set_mark(node: fx.Node, **changes: Any) -> None:
    """Change fields of a node's mark."""
    node.meta[META] = replace(mark_of(node), **changes)


def is_aux(node: fx.Node) -> bool:
    """True for nodes that an adapter inserted: later passes do not match them."""
    return bool(mark_of(node).aux)


def is_superseded(node: fx.Node) -> bool:
    """True for ops that a pass has replaced for good; the new ops are the sites now."""
    return mark_of(node).gone_for is not None


def output_with_adapters(node: fx.Node, whole: bool = False) -> fx.Node:
    """The current value of an op's output: the outermost adapter around it, or the op itself.

    Args:
        node: The op.
        whole: Include values that are larger than the op's own, see `adapters_around`.
    """
    return next(reversed(adapters_around(node, whole)), node)


def adapters_around(node: fx.Node, whole: bool = False) -> list[fx.Node]:
    """The values that replace an op's output, from the innermost adapter to the outermost.

    Args:
        node: The op.
        whole: Include values that are larger than the op's own (`grown` in their mark). Adapters that were made for
            the op stay inside of these.
    """
    found: list[fx.Node] = []
    current = node
    while True:
        outer = next((u for u in current.users if mark_of(u).wraps == current.name), None)
        if outer is None:
            # A value can replace another one without reading it, so it is not among its users.
            name = mark_of(current).wrapped_by
            outer = next((n for n in node.graph.nodes if n.name == name), None) if name else None
        if outer is None or (mark_of(outer).grown and not whole):
            return found
        found.append(outer)
        current = outer


def input_before_adapters(node: fx.Node, whole: bool = False) -> fx.Node:
    """The input of a site before adapters that change it.

    Args:
        node: The value that the op reads now.
        whole: Go back also beyond values that are larger than the op's own input.
    """
    while mark_of(node).input and (whole or not mark_of(node).grown):
        node = node.args[0]  # type: ignore[assignment]
    return node
