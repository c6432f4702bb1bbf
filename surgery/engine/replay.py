"""From a journal to a graph: the one way a graph is made, for eval and train captures, loads and undos alike."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from surgery.capture import Captured
from surgery.common.errors import JournalError, nearest
from surgery.common.plugins import Plugins
from surgery.engine.base import Base
from surgery.engine.contract.base import GraphPass, Pass, RewritePass
from surgery.engine.journal import Entry, Journal, SiteRecord
from surgery.engine.registry import find_pass
from surgery.graph.fake import MetaCache
from surgery.graph.graphs import copy_graph
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site, SiteIndex, SiteKey
from surgery.graph.view import View


def pass_of(entry: Entry, plugins: Plugins) -> Pass:
    """The pass that an entry applied, with its options. Names the distribution where it is not installed."""
    return find_pass(plugins, entry.pass_name, entry.distribution).cls.parse(entry.options)


def find_sites(entry: Entry, places: Mapping[SiteKey, Site]) -> list[Site]:
    """The entry's sites in a graph, with what was decided there. Raises JournalError for one that is gone."""
    found = []
    for record in entry.sites:
        site = places.get(record.key)
        if site is None:
            near = nearest(record.key.owner, [key.owner for key in places])
            raise JournalError(f"{entry.id} cannot be replayed: the model has no site {record.path}{near}")
        found.append(site.deciding(record.decided))
    return found


def places_of(pass_: RewritePass, view: View, index: SiteIndex | None = None) -> Mapping[SiteKey, Site]:
    """Where a pass can be replayed. index: of the view's sites, where there is one."""
    own = pass_.own_places(view)
    return (index or view.sites).by_key if own is None else own


def rewrite_entry(
    entry: Entry,
    pass_: RewritePass,
    graph: fx.Graph,
    cache: MetaCache,
    sites: Sequence[Site],
    tensors: Mapping[str, Tensor],
    view: View,
) -> None:
    """Apply one journalled entry to a graph, in place. view: of the graph as it is."""
    if isinstance(pass_, GraphPass) and not pass_.regroups:
        _ = view.sites, view.branches, view.attentions  # seen before any of this entry's own edits
    for site, record in zip(sites, entry.sites, strict=True):
        rewriter = Rewriter(graph, cache, entry.id, record.tensors, tensors, entry.weight, view)
        act = rewriter.rewrite_once if isinstance(pass_, GraphPass) else rewriter.rewrite
        act(site, pass_.rewrite)
    if isinstance(pass_, GraphPass) and sites:
        pass_.finish(sites, rewriter)


def live_entries(journal: Journal) -> list[Entry]:
    """Entries that stand in the graph: not folded by a merge, not left out, nor standing on one that is; as a merge
    has simplified them."""
    folded = {name for e in journal if e.kind == "merge" for name in e.options.get("folded", ())}
    live: list[Entry] = []
    missing: set[str] = set()
    for entry in journal:
        if entry.kind != "rewrite":
            continue
        if entry.weight == 0 or any(not missing.isdisjoint(r.stands_on) for r in entry.sites):
            missing.update(entry.tensor_names)
        elif entry.id not in folded:
            standing = journal.standing(entry)
            if standing.sites or not entry.sites:
                live.append(standing)
    return live


def paced(base: Base, journal: Journal) -> list[Paced]:
    """What changes tensors of its own as training goes on, of the entries that are in force."""
    found = []
    for entry in live_entries(journal):
        pass_ = pass_of(entry, base.plugins)
        if isinstance(pass_, RewritePass) and pass_.pacing is not None:
            found.append(Paced(pass_, entry.sites))
    return found


def weight_names(base: Base, journal: Journal, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Parameter name -> all names of that tensor: the base's, and those that structural passes added."""
    names = dict(base.names)
    for entry in live_entries(journal):
        if is_structural(entry, base.plugins):
            names.update({n: (n,) for n in entry.tensor_names if isinstance(tensors.get(n), nn.Parameter)})
    return names


def is_structural(entry: Entry, plugins: Plugins) -> bool:
    pass_ = pass_of(entry, plugins)
    return isinstance(pass_, RewritePass) and pass_.adds_weights


def is_regrouped(base: Base, journal: Journal) -> bool:
    """Whether ops of the model stand in the place of others, so that its roles are no longer the base's."""
    passes = (pass_of(entry, base.plugins) for entry in live_entries(journal))
    return any(isinstance(pass_, RewritePass) and pass_.regroups for pass_ in passes)


def build_graph(base: Base, journal: Journal, tensors: Mapping[str, Tensor], captured: Captured) -> fx.Graph:
    """The captured graph with every live entry applied."""
    graph = copy_graph(captured.graph)
    entries = live_entries(journal)
    if not entries:
        return graph
    cache = MetaCache(graph)
    names = weight_names(base, journal, tensors)
    ops = base.plugins.weight_ops
    index: SiteIndex | None = None
    for entry in entries:
        pass_ = pass_of(entry, base.plugins)
        if not isinstance(pass_, RewritePass):
            raise JournalError(f"{entry.id}: pass {entry.pass_name!r} rewrites nothing in this version of it")
        view = View(graph, names, ops, training=captured.training)
        index = index or SiteIndex(graph, names, ops)
        sites = find_sites(entry, places_of(pass_, view, index))
        rewrite_entry(entry, pass_, graph, cache, sites, tensors, view)
        if pass_.adds_weights or pass_.regroups:
            index = None
    return graph


@dataclass
class Paced:
    """An entry whose tensors change as training goes on. done: what of `due` they were last changed for."""

    pass_: RewritePass
    sites: tuple[SiteRecord, ...]
    done: float | None = None

    def advance(self, module: nn.Module, step: int) -> None:
        """Let the pass change its tensors in a module for a step."""
        due = self.pass_.due(step)
        if due == self.done:
            return

        def get(name: str) -> Tensor:
            return operator.attrgetter(name)(module).detach()

        places = [
            (record.decided, get(record.key.owner), {n: get(full) for n, full in record.tensors.items()})
            for record in self.sites
        ]
        with torch.no_grad():
            self.pass_.pace(step, places)
        self.done = due
