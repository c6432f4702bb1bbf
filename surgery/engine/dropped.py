"""Adapters that a later pass has taken out of the graph without a word: refused."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from surgery.common.errors import PassError
from surgery.common.plugins import Plugins
from surgery.engine.contract.base import RewritePass
from surgery.engine.journal import Entry
from surgery.engine.registry import find_pass
from surgery.graph.graphs import live_nodes
from surgery.graph.marks import mark_of


def refuse_dropped(graph: fx.Graph, entries: Iterable[Entry], plugins: Plugins, by: str = "") -> None:
    """Raise PassError if no output depends any more on what an adapter inserted at one of its calls.

    A pass drops the adapters beneath it if its `rewrite` returns a value that is computed from `g.x` or `g.op_output`
    instead of `g.output`, for example. Weights that a pass has replaced are another matter: what replaces them was
    computed from them.

    Args:
        graph: The graph.
        entries: Entries that act in it.
        plugins: The plugin manager.
        by: Id of the entry that was applied last, or "".
    """
    adapters = {entry.id for entry in entries if _attaches(entry, plugins)}
    if not adapters:
        return
    live = live_nodes(graph)
    # (entry, site, op) -> True if an output depends on a node that the entry inserted there.
    found: dict[tuple[str, str, str], bool] = {}
    for node in graph.nodes:
        mark = mark_of(node)
        if mark.entry in adapters and mark.call is not None:
            key = mark.entry, mark.site, mark.call
            found[key] = found.get(key, False) or node in live
    for (entry, site, _), lives in found.items():
        if not lives and entry != by:
            raise PassError(
                f"{by or 'a later pass'} at {site}: it would leave the trained {entry!r} without effect; merge or undo "
                f"{entry!r} first (for its author: build on g.output, or refuse such a site in `check`)"
            )


def _attaches(entry: Entry, plugins: Plugins) -> bool:
    pass_ = find_pass(plugins, entry.pass_name, entry.distribution).cls.parse(entry.options)
    return isinstance(pass_, RewritePass) and pass_.effect.attaches
