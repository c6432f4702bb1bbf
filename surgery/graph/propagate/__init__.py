"""Gives every node behind an edit its new shape, and mends the sizes that were baked into arguments.

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
    """Recompute `meta["val"]` behind nodes that were put in other nodes' places, and mend baked sizes.

    replaced: inserted node → the node whose place it took for its users. Both ends of an edit belong here: what
        makes the sequence longer, and what makes it short again. Those without `val` are given it.
    fixed: more inserted nodes whose arguments are right as they are.

    How it decides: the shapes that a node's inputs had and have say which dimensions moved, and each op says how
    its output follows. Where operands must agree and one stayed behind (an attention mask, positions), its
    length is followed back to the `arange`, `expand`, `full`, slice or the like that made it, and changed there.
    Symbolic dimensions stay symbolic, and no guard is added.

    Raises PassError, with the graph as it was, where a length comes from an input or a fixed tensor, or an
    argument has more than one reading.
    """
    return Propagation(graph, replaced, fixed).run()
