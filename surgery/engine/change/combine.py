"""Combining several adapters of a program into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from surgery.common.errors import PassError
from surgery.engine import replay
from surgery.engine.change.entries import entry_of
from surgery.engine.change.plans import PassPlan, SitePlan
from surgery.engine.change.undo import undo
from surgery.engine.contract.base import Place, RewritePass, Source
from surgery.engine.contract.combination import Combination
from surgery.engine.contract.observe import observe
from surgery.engine.journal import Entry, Journal, SiteRecord
from surgery.engine.state import State
from surgery.graph.sites import Site, SiteKey

S = TypeVar("S", bound=State)


def combine(program: S, weights: Mapping[str, float], how: Combination, label: str, keep: bool) -> S:
    """Combine adapters into one; see Program.combine.

    Args:
        program: The program; it is not changed.
        weights: Name of an adapter -> its weight in the combination.
        how: Method and options.
        label: Label of the result.
        keep: Keep the sources in the program, switched off.

    Raises:
        PassError: The adapters cannot be combined by this method.
        JournalError: The program has no such adapter.
    """
    if not label:
        raise PassError("combine: the result needs a name; give --as NAME (label= in Python)")
    chosen = _sources(program, weights)
    _check(program, chosen, label)
    places = places_of(program, chosen, "combine")
    cls = type(_rewriting(program, chosen[0][0]))
    if cls.combiner is None:
        raise PassError(
            f"combine: several {cls.name} cannot be combined into one; switch them with --only or --weight instead"
        )
    pass_, values = cls.combiner([place for _, place in places], how, label)
    combined = carried(program, chosen, pass_, places, values)
    ids = [e.id for e, _ in chosen]
    said = {
        "declared": f"combines {', '.join(ids)} ({how.method})",
        "observed": _observed(program, chosen, combined, how),
    }
    combined.journal = Journal(
        tuple(replace(e, numerics=said) if e.id == pass_.entry_id else e for e in combined.journal)
    )
    if not keep:
        for name in ids:
            combined = undo(combined, name)
    return combined


def carried(
    program: S,
    chosen: Sequence[tuple[Entry, float]],
    pass_: RewritePass,
    places: Sequence[tuple[SiteRecord, Place]],
    values: Sequence[Mapping[str, Tensor]],
) -> S:
    """The program with a new pass instead of the chosen entries, which stay in the journal with weight 0.

    Args:
        program: The program; it is not changed.
        chosen: Entries to replace, with their weights.
        pass_: The new pass.
        places: Record and place of each site where it acts.
        values: Tensors of the pass at each place, by their names in the pass. Missing ones are initialized by the pass.
    """

    planned = [SitePlan(place.site, None, pass_.tensors(place.site)) for _, place in places]
    entry = entry_of(program, PassPlan(pass_, tuple(planned)))
    made: dict[str, Tensor] = {}
    for (_, place), plan, record, own in zip(places, planned, entry.sites, values, strict=True):
        like = next(iter(place.sources[0].tensors.values()))
        for name, spec in plan.specs.items():
            value = own[name].to(like) if name in own else spec.make(place.site.float_dtype, like.device)
            value = value.reshape(spec.shape).detach().clone()
            known = made.setdefault(record.tensors[name], nn.Parameter(value) if spec.trainable else value)
            if name in own and not torch.equal(known, value):
                raise PassError(
                    f"combine at {record.path}: {pass_.name} gives {record.tensors[name]}, which sites share, another "
                    "value than at an earlier site; its combiner must return the same one at every site"
                )
    # The new entry takes the position of the first chosen one, since later passes act on their outputs.
    first = program.journal.entries.index(chosen[0][0])
    entries = (*program.journal.entries[:first], entry, *program.journal.entries[first:])
    tensors, changed = program.copies()
    both = program.derive(Journal(entries), {**tensors, **made}, changed, clock=program.clock)
    return both.without(*(e.id for e, _ in chosen))


def _rewriting(program: State, entry: Entry) -> RewritePass:
    """The pass of a "rewrite" entry."""
    pass_ = replay.pass_of(entry, program.base.plugins)
    assert isinstance(pass_, RewritePass)
    return pass_


def _sources(program: State, weights: Mapping[str, float]) -> list[tuple[Entry, float]]:
    """The named entries with their weights, in journal order."""
    given: dict[str, float] = {}
    for name, weight in weights.items():
        for entry in program.journal.find(name):
            if entry.kind != "rewrite":
                raise PassError(f"combine: {entry.id!r} is not an adapter; leave it out")
            if entry.id in given:
                raise PassError(f"combine: {entry.id!r} is named twice; name it once")
            given[entry.id] = float(weight)
    if given and not any(given.values()):
        raise PassError("combine: every weight is zero, so the result would be zero; give a nonzero weight")
    if not given:
        raise PassError("combine: no adapter is named; give --weight NAME=W for each")
    return [(e, given[e.id]) for e in program.journal if e.id in given]


def _check(program: State, chosen: Sequence[tuple[Entry, float]], label: str) -> None:
    """Raise PassError if the entries cannot be combined in this program under this label."""
    names = {entry.pass_name for entry, _ in chosen}
    if len(names) > 1:
        raise PassError(
            f"combine: {' and '.join(sorted(names))} are different passes; combine the adapters of each separately"
        )
    if program.journal.merged:
        raise PassError("combine: the program is merged; undo the merge first")
    taken = f"{names.pop()}:{label}"
    if any(e.id == taken or e.label == label for e in program.journal):
        raise PassError(f"combine: {taken!r} is applied already; give the result another name with --as")


def places_of(
    program: State, chosen: Sequence[tuple[Entry, float]], what: str
) -> list[tuple[SiteRecord, Place]]:
    """Every site that one of the entries acts on, in order of first use, with all entries that act there.

    Args:
        program: The program.
        chosen: Entries with their weights.
        what: The operation, for the error message.

    Raises:
        PassError: Two entries act on different parts of a site.
    """
    first: dict[SiteKey, tuple[SiteRecord, Site, str]] = {}
    sources: dict[SiteKey, list[Source]] = {}
    for entry, weight in chosen:
        pass_ = _rewriting(program, entry)
        sites = replay.find_sites(entry, program.sites.by_key)
        for record, site in zip(entry.sites, sites, strict=True):
            known, _, other = first.setdefault(record.key, (record, site, entry.id))
            if dict(known.decided) != dict(record.decided):
                raise PassError(
                    f"{what} at {record.path}: {other} and {entry.id} act on different parts of it, which one adapter "
                    f"cannot represent; choose adapters that act on the same parts (--only)"
                )
            own = {name: program.tensors[full] for name, full in record.tensors.items()}
            sources.setdefault(record.key, []).append(Source(entry.id, pass_, own, weight))
    return [(record, Place(site, tuple(sources[key]))) for key, (record, site, _) in first.items()]


def _observed(
    program: State, chosen: Sequence[tuple[Entry, float]], combined: State, how: Combination
) -> str:
    """Text with the difference of the outputs from those of the weighted sum.

    Raises:
        PassError: The method is "cat", which is exact, and the difference is above the merge tolerance.
    """
    if not program.base.in_memory:
        return ""
    summed = program.weighted({e.id: weight for e, weight in chosen})
    seen = observe(summed.run(), combined.run())
    if how.method == "cat" and seen.difference > program.merge_tolerance:
        raise PassError(
            f"combine: with {how.method} the outputs differ by {seen.difference:.1e} of their scale from those of the "
            f"weighted adapters, more than {program.merge_tolerance:g}; undo a pass that acts on the adapters"
        )
    return f"{seen.difference:.1e} of the outputs' scale from the weighted sum"
