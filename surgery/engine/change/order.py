"""Order of the passes of a pipeline: required passes first, passes that create layers before adapters."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx

from surgery.common.errors import PassError
from surgery.engine.contract.base import Pass, RewritePass
from surgery.engine.journal import Journal


def in_order(passes: Sequence[Pass], journal: Journal) -> list[Pass]:
    """Sort passes so that every ordering constraint is met, otherwise in the given order.

    A pass that should have come before an entry of the journal is not an error here: `plan` refuses it site by site.

    Raises:
        PassError: A required pass is missing, or two passes each have to come before the other.
    """
    there = {*(entry.pass_name for entry in journal), *(p.name for p in passes)}
    for pass_ in passes:
        if pass_.requires and there.isdisjoint(pass_.requires):
            raise PassError(
                f"{pass_.name} needs {' or '.join(pass_.requires)} in the program; add it to the same pipeline"
            )
    return _sorted(list(passes))


def _makes_targets(first: Pass, second: Pass) -> bool:
    """True if the first creates layers that the second, an adapter, attaches to."""
    if not isinstance(first, RewritePass) or not isinstance(second, RewritePass):
        return False
    return first.effect.comes_first and second.effect.attaches


def _sorted(passes: list[Pass]) -> list[Pass]:
    order: nx.DiGraph = nx.DiGraph()
    order.add_nodes_from(range(len(passes)))
    for i, first in enumerate(passes):
        for j, second in enumerate(passes):
            named = second.name in first.before or first.name in second.requires
            if i != j and (named or _makes_targets(first, second)):
                order.add_edge(i, j)
    try:
        return [passes[i] for i in nx.lexicographical_topological_sort(order)]
    except nx.NetworkXUnfeasible:
        names = " and ".join(sorted({p.name for p in passes if p.before or p.requires}))
        raise PassError(f"{names} each have to come before the other; apply one of them") from None
