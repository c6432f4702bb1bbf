"""Marks on graph nodes: what a pass has noted about the nodes that it inserted or changed."""

from __future__ import annotations

from torch import fx

# node.meta key: {"entry", "site", "aux", "call", "wraps", "wrapped_by", "input", "weight_of"; "grown", "output",
# "instead_of", "gone_for", "feeds", "once", "resized": see Rewriter.wrap, add_output, supersede, feed, once, settle;
# "follows", "gate": see Rewriter.go_on, surgery.graph.analysis.residuals.gated_by; "role", "at": see
# Rewriter.has_role, and of what is gone replace}
META = "surgery"


def is_aux(node: fx.Node) -> bool:
    """True for nodes that an adapter inserted: later passes do not match them."""
    return bool(node.meta.get(META, {}).get("aux"))


def is_gone(node: fx.Node) -> bool:
    """True for ops in whose place a pass has put others for good: those are the sites now."""
    return "gone_for" in node.meta.get(META, {})


def tail(node: fx.Node, whole: bool = False) -> fx.Node:
    """The value that stands for a site's output now: the last adapter wrapped round it, or the op itself.

    whole: beyond what made the output larger (see `wrappers`).
    """
    return next(reversed(wrappers(node, whole)), node)


def wrappers(node: fx.Node, whole: bool = False) -> list[fx.Node]:
    """The values that adapters put in the place of an op's, from the innermost.

    whole: those too that made the output larger than the op's own (`grown` in their mark): other adapters, made for
    the op as it is, stay inside of these.
    """
    found: list[fx.Node] = []
    current = node
    while True:
        outer = next((u for u in current.users if u.meta.get(META, {}).get("wraps") == current.name), None)
        if outer is None:
            # An op put in the place of another need not read it.
            name = current.meta.get(META, {}).get("wrapped_by")
            outer = next((n for n in node.graph.nodes if n.name == name), None) if name else None
        if outer is None or (outer.meta[META].get("grown") and not whole):
            return found
        found.append(outer)
        current = outer


def head(node: fx.Node, whole: bool = False) -> fx.Node:
    """The value that enters a site, before adapters that change what its op reads; `whole` as in `wrappers`."""
    while node.meta.get(META, {}).get("input") and (whole or not node.meta[META].get("grown")):
        node = node.args[0]  # type: ignore[assignment]
    return node
