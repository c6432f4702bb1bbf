"""Propagates changed shapes through a graph and updates the sizes that were baked into arguments.

Example: an edit makes the sequence longer at `cat` and cuts it back at `slice`.

graph: x ──▶ cat(x, tokens) ──▶ blocks ──▶ slice ──▶ head
propagate(graph, {cat: x, slice: last})
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx

from surgery.graph.propagate.propagation import Propagation, Repair

__all__ = ["Repair", "propagate"]


def propagate(
    graph: fx.Graph, replaced: Mapping[fx.Node, fx.Node], fixed: Collection[fx.Node] = ()
) -> Repair:
    """Recompute `meta["val"]` of all nodes after an edit, and update baked sizes.

    The shapes of a node's inputs before and after the edit show which dimensions changed, and a rule for each op
    determines its output. If operands must agree and one of them still has the old length (an attention mask,
    positions), that length is traced back to the op that made it (`arange`, `expand`, `full`, a slice) and changed
    there. Symbolic dimensions stay symbolic, and no guard is added.

    Args:
        graph: graph to update in place.
        replaced: inserted node → the node that it replaces for its users. It must hold both ends of an edit: the
            node that makes the sequence longer, and the node that makes it short again. Nodes without `val` get one.
        fixed: other inserted nodes, whose arguments must not be changed.

    Returns:
        The nodes that were changed, inserted or removed.

    Raises:
        PassError: if a length comes from an input or a fixed tensor, or if an argument is ambiguous. The graph is
            restored.
    """
    return Propagation(graph, replaced, fixed).run()
