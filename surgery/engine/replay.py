"""Replay: builds a graph from a journal. Every graph is built here, after a load, an undo or a switch to train mode."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.capture import Captured
from surgery.common.errors import JournalError, SurgeryError, nearest
from surgery.common.plugins import Plugins
from surgery.common.readers import first_line
from surgery.common.threads import one_at_a_time
from surgery.engine.base import Base
from surgery.engine.contract.base import GraphPass, Pass, RewritePass, merges
from surgery.engine.contract.gradual import Gradual
from surgery.engine.contract.pattern import PatternPass
from surgery.engine.contract.specs import TensorSpec
from surgery.engine.dropped import refuse_dropped
from surgery.engine.journal import Entry, Journal, SiteRecord
from surgery.engine.registry import find_pass
from surgery.graph.fake import MetaCache
from surgery.graph.graphs import copy_graph
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site, SiteIndex, SiteKey
from surgery.graph.view import View

# A size in a decision that is no reason to doubt it, whatever the model has.
_ALWAYS_ALLOWED = 2**20


def pass_of(entry: Entry, plugins: Plugins) -> Pass:
    """The pass of an entry, with its options.

    Raises:
        PassError: The pass is not installed; the message names the distribution that provides it.
        PluginError: The plugin that provides the pass does not load.
    """
    return find_pass(plugins, entry.pass_name, entry.distribution).cls.parse(entry.options)


def find_sites(entry: Entry, places: Mapping[SiteKey, Site]) -> list[Site]:
    """The sites of an entry in a graph, with the decisions that the entry recorded.

    Raises:
        JournalError: The graph has no such site.
    """
    found = []
    for record in entry.sites:
        site = places.get(record.key)
        if site is None:
            near = nearest(record.key.owner, [key.owner for key in places])
            raise JournalError(f"{entry.id} cannot be replayed: the model has no site {record.path}{near}")
        found.append(site.deciding(record.decided))
    return found


def places_of(pass_: RewritePass, view: View, index: SiteIndex | None = None) -> Mapping[SiteKey, Site]:
    """Sites where a pass can be replayed, by key: matches of the pattern for a PatternPass, else uses of weights.

    Args:
        pass_: The pass.
        view: Analysis of the graph.
        index: Sites of the graph, if they have been indexed already.
    """
    if isinstance(pass_, PatternPass):
        return {site.key: site for site in pass_.candidates(view)}
    return (index or view.sites).by_key


def rewrite_entry(
    entry: Entry,
    pass_: RewritePass,
    graph: fx.Graph,
    cache: MetaCache,
    sites: Sequence[Site],
    tensors: Mapping[str, Tensor],
    view: View,
) -> None:
    """Apply one journal entry to a graph, in place.

    Args:
        entry: The entry.
        pass_: Its pass.
        graph: The graph to edit.
        cache: Computes the fake results of inserted ops.
        sites: Sites of the entry in the graph.
        tensors: Inserted tensors, by name.
        view: Analysis of the graph as it is before the edits.
    """
    if isinstance(pass_, GraphPass) and not isinstance(pass_, PatternPass):
        # The view computes these on first use; they must not include the edits of this entry.
        _ = view.sites, view.branches, view.attentions
    for site, record in zip(sites, entry.sites, strict=True):
        rewriter = Rewriter(graph, cache, entry.id, record.tensors, tensors, entry.weight, view)
        act = rewriter.rewrite_once if isinstance(pass_, GraphPass) else rewriter.rewrite
        act(site, pass_.rewrite)
    if isinstance(pass_, GraphPass) and sites:
        pass_.finish(sites, rewriter)


def live_entries(journal: Journal) -> list[Entry]:
    """Entries that act in the graph, in the form that merges have left them in.

    Excluded are entries that a merge folded, entries of weight 0, and entries that depend on tensors of these.
    """
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


def paced(base: Base, journal: Journal) -> list[GradualEntry]:
    """Entries in the graph whose tensors change as training proceeds."""
    found = []
    for entry in live_entries(journal):
        pass_ = pass_of(entry, base.plugins)
        if isinstance(pass_, RewritePass) and pass_.gradual is not None:
            found.append(GradualEntry(pass_.entry_id, pass_.gradual, entry.sites))
    return found


def weight_names(base: Base, journal: Journal, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Parameter name -> all names of that tensor, for the base and for passes that add weights.

    Args:
        base: The program's base.
        journal: The program's journal.
        tensors: Inserted tensors, by name.
    """
    names = dict(base.names)
    for entry in live_entries(journal):
        if is_structural(entry, base.plugins):
            names.update({n: (n,) for n in entry.tensor_names if isinstance(tensors.get(n), nn.Parameter)})
    return names


def is_structural(entry: Entry, plugins: Plugins) -> bool:
    """True if the tensors of an entry are weights that later passes can target."""
    pass_ = pass_of(entry, plugins)
    return isinstance(pass_, RewritePass) and pass_.effect.adds_weights


def is_regrouped(base: Base, journal: Journal) -> bool:
    """True if a pass has replaced ops of the model by others, so that roles differ from those of the base."""
    passes = (pass_of(entry, base.plugins) for entry in live_entries(journal))
    return any(isinstance(pass_, PatternPass) for pass_ in passes)


def check_fit(entry: Entry, pass_: RewritePass, sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> None:
    """Check the tensors of a stored entry against its options and decisions, without allocating memory.

    Args:
        entry: The entry, in the form that merges have left it in.
        pass_: Its pass.
        sites: Its sites in the graph, with the recorded decisions.
        tensors: Inserted tensors, by name.

    Raises:
        JournalError: A tensor is missing, has another shape, or is integer instead of floating point or vice versa.
    """
    most = max(_ALWAYS_ALLOWED, sum(tensor.numel() for tensor in tensors.values()))
    for site, record in zip(sites, entry.sites, strict=True):
        if (size := _largest(record.decided)) > max(most, math.prod(site.float_shape)):
            raise JournalError(
                f"{entry.id} at {record.path}: the journal has the size {size}; the file was edited"
            )
        specs = pass_.tensors(site)
        missing = specs.keys() - record.tensors.keys()
        if missing and not record.decided.get("simplified"):
            raise JournalError(
                f"{entry.id} at {record.path}: the journal names no tensor for {min(missing)[:100]!r}"
            )
        for name, spec in specs.items():
            full = record.tensors.get(name)
            if full is None:
                continue
            held, wanted = tensors[full], tuple(int(size) for size in spec.shape)
            if tuple(held.shape) != wanted:
                raise JournalError(
                    f"{entry.id} at {record.path}: the stored tensor {full} has shape {list(held.shape)}, and the "
                    f"journal asks for {list(wanted)}; the file was edited, or is for another model"
                )
            if not _holds_indices(held, spec):
                raise JournalError(
                    f"{entry.id} at {record.path}: the stored tensor {full} holds other indices than the journal asks "
                    f"for; the file was edited"
                )
            floats = (spec.dtype or site.float_dtype).is_floating_point
            if held.is_floating_point() != floats:
                raise JournalError(
                    f"{entry.id} at {record.path}: the stored tensor {full} is {held.dtype}, and the journal asks for "
                    f"{'floats' if floats else str(spec.dtype)}; the file was edited"
                )


def _largest(decided: Any) -> int:
    """The largest size in a decision, apart from limits of dimensions and from savings, which are only reported."""
    if isinstance(decided, bool):
        return 0
    if isinstance(decided, int):
        return abs(decided)
    if isinstance(decided, Mapping):
        decided = [value for name, value in decided.items() if name not in ("limits", "saved")]
    return max(map(_largest, decided), default=0) if isinstance(decided, list) else 0


def _holds_indices(held: Tensor, spec: TensorSpec) -> bool:
    """False if a tensor of indices is out of bounds, or differs from the one that follows from the decisions."""
    if spec.value is not None and not spec.value.is_floating_point():
        return torch.equal(held.cpu(), spec.value.to(held.dtype))
    if spec.below is None or not held.numel():
        return True
    return int(held.min()) >= 0 and int(held.max()) < spec.below


@one_at_a_time
def build_graph(
    base: Base,
    journal: Journal,
    tensors: Mapping[str, Tensor],
    captured: Captured,
    stored: bool = False,
) -> fx.Graph:
    """A copy of the captured graph with every live entry applied.

    Args:
        base: The program's base.
        journal: The program's journal.
        tensors: Inserted tensors, by name.
        captured: The capture to start from, in eval or train mode.
        stored: True for a journal from a file: each entry is checked against its tensors before it is applied.

    Raises:
        JournalError: An entry does not fit the model or its tensors.
    """
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
            raise JournalError(
                f"{entry.id}: the installed pass {entry.pass_name!r} rewrites no graph; install the version of "
                f"{entry.distribution} that wrote the journal ({entry.distribution_version or 'unknown'})"
            )
        view = View(graph, names, ops, training=captured.training)
        index = index or SiteIndex(graph, names, ops)
        sites = find_sites(entry, places_of(pass_, view, index))
        if stored:
            check_fit(entry, pass_, sites, tensors)
        rewrite_entry(entry, pass_, graph, cache, sites, tensors, view)
        # Only these passes create or replace ops with weights, which the index lists.
        if pass_.effect.adds_weights or isinstance(pass_, PatternPass):
            index = None
    refuse_dropped(graph, entries, base.plugins)
    if stored:
        _check_dormant(base, journal, tensors)
    return graph


def _check_dormant(base: Base, journal: Journal, tensors: Mapping[str, Tensor]) -> None:
    """Check the stored entries that are not in the graph: folded ones, and those of weight 0.

    Raises:
        JournalError: A merge names an entry that cannot be folded, or the tensors of an entry do not fit.
    """
    known = {entry.id: entry for entry in journal if entry.kind == "rewrite"}
    for merge in journal:
        for name in merge.options.get("folded", ()) if merge.kind == "merge" else ():
            entry = known.get(name)
            if entry is None or not merges(type(pass_of(entry, base.plugins))):
                raise JournalError(f"{merge.id} folds {name!r}, which is no entry that can be folded")
    live = {entry.id for entry in live_entries(journal)}
    for entry in known.values():
        pass_ = pass_of(entry, base.plugins)
        places = [base.sites.by_key.get(record.key) for record in entry.sites]
        # Sites that another pass has made are not in the base, and are checked when the entry acts again.
        if entry.id not in live and isinstance(pass_, RewritePass) and None not in places:
            sites = [
                site.deciding(record.decided)
                for site, record in zip(places, entry.sites, strict=True)
                if site
            ]
            check_fit(entry, pass_, sites, tensors)


@dataclass
class GradualEntry:
    """An entry whose tensors change as training proceeds.

    Attributes:
        entry: Its id in the journal.
        gradual: The schedule of its pass.
        sites: Records of the sites where it acts.
        done: Progress that the tensors were last updated for; None before the first update.
    """

    entry: str
    gradual: Gradual
    sites: tuple[SiteRecord, ...]
    done: float | None = None

    def advance(self, module: nn.Module, step: int) -> None:
        """Update the tensors of the pass in a module for a training step."""
        due = self.gradual.value(step)
        if due == self.done:
            return

        def get(name: str) -> Tensor:
            return operator.attrgetter(name)(module).detach()

        places = [
            (record.decided, get(record.key.owner), {n: get(full) for n, full in record.tensors.items()})
            for record in self.sites
        ]
        try:
            with torch.no_grad():
                self.gradual.apply(step, places)
        except SurgeryError:
            raise
        except Exception as error:  # a stored decision can be anything
            raise JournalError(
                f"{self.entry}: its tensors cannot be updated for step {step} ({type(error).__name__}: "
                f"{first_line(error)}); undo it, or restore the saved directory"
            ) from error
        self.done = due
