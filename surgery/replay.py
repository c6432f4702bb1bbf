"""From a journal to a graph: the one way a graph is made, for eval and train captures, loads and undos alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, fx

from surgery.base import Base
from surgery.capture import Captured
from surgery.errors import JournalError, nearest
from surgery.journal import Entry, Journal
from surgery.pass_base import Pass, RewritePass
from surgery.plugins import Plugins
from surgery.rewriter import MetaCache, Rewriter, copy_graph
from surgery.sites import Site, SiteIndex


def pass_of(entry: Entry, plugins: Plugins) -> Pass:
    """The pass that an entry applied, with its options. Names the distribution where it is not installed."""
    return plugins.find_pass(entry.pass_name, entry.distribution).cls.parse(entry.options)


def find_sites(entry: Entry, index: SiteIndex) -> list[Site]:
    """The entry's sites in a graph, with what was decided there. Raises JournalError for one that is gone."""
    found = []
    for record in entry.sites:
        site = index.by_key.get(record.key)
        if site is None:
            near = nearest(record.key.owner, [s.key.owner for s in index])
            raise JournalError(f"{entry.id} cannot be replayed: the model has no site {record.path}{near}")
        found.append(site.deciding(record.decided))
    return found


def rewrite_entry(
    entry: Entry,
    pass_: RewritePass,
    graph: fx.Graph,
    cache: MetaCache,
    sites: Iterable[Site],
    tensors: Mapping[str, Tensor],
) -> None:
    """Apply one journalled entry to a graph, in place."""
    for site, record in zip(sites, entry.sites, strict=True):
        rewriter = Rewriter(graph, cache, entry.id, record.tensors, tensors, entry.weight)
        rewriter.rewrite(site, pass_.rewrite)


def live_entries(journal: Journal) -> list[Entry]:
    """Entries that stand in the graph: not folded by a merge, and not left out."""
    folded = {name for e in journal if e.kind == "merge" for name in e.options.get("folded", ())}
    return [e for e in journal if e.kind == "rewrite" and e.id not in folded and e.weight != 0]


def build_graph(base: Base, journal: Journal, tensors: Mapping[str, Tensor], captured: Captured) -> fx.Graph:
    """The captured graph with every live entry applied."""
    graph = copy_graph(captured.graph)
    entries = live_entries(journal)
    if not entries:
        return graph
    cache = MetaCache(graph)
    index = SiteIndex(graph, base.names, base.plugins.weight_ops)
    for entry in entries:
        pass_ = pass_of(entry, base.plugins)
        if not isinstance(pass_, RewritePass):
            raise JournalError(f"{entry.id}: pass {entry.pass_name!r} rewrites nothing in this version of it")
        rewrite_entry(entry, pass_, graph, cache, find_sites(entry, index), tensors)
    return graph
