"""What passes say of each other: what has to be there, what cannot, and which comes first."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx

from surgery.common.errors import PassError
from surgery.common.plugins import Plugins
from surgery.engine.contract.base import Pass, RewritePass
from surgery.engine.journal import Journal
from surgery.engine.registry import find_pass


def in_order(passes: Sequence[Pass], journal: Journal, plugins: Plugins) -> list[Pass]:
    """The passes so that each precedes those it has to precede, and otherwise as given.

    Raises PassError, in a sentence, for a conflict, a missing requirement or a cycle. What had to come before an
    entry of the journal is refused site by site, where the two meet (see surgery.engine.change.plan).
    """
    applied = {entry.pass_name: entry.id for entry in journal}
    kinds = {name: find_pass(plugins, name).cls for name in applied if name != "merge"}
    for index, pass_ in enumerate(passes):
        _check_conflicts(pass_, [*kinds.values(), *(type(p) for p in passes[:index])])
        there = {*applied, *(p.name for p in passes)}
        if pass_.requires and not there & set(pass_.requires):
            raise PassError(
                f"{pass_.name} needs {' or '.join(pass_.requires)} in the program; put it in the same pipeline"
            )
    return _sorted(list(passes))


def _check_conflicts(pass_: Pass, others: Sequence[type[Pass]]) -> None:
    for other in others:
        why = pass_.conflicts.get(other.name) or other.conflicts.get(pass_.name)
        if why:
            raise PassError(f"{pass_.name} and {other.name} cannot stand in one program: {why}")


def _makes_targets(first: Pass, second: Pass) -> bool:
    """Whether one makes anew what the other, an adapter, would stand on."""
    if not isinstance(first, RewritePass) or not isinstance(second, RewritePass):
        return False
    adapts = second.freezes and not second.adds_weights and not second.lengthens
    return first.leads and adapts


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
