"""A program with one adapter in the place of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

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
    """See Program.combine."""
    if not label:
        raise PassError("combine: the result needs a name; give --as NAME (label= in Python)")
    chosen = _sources(program, weights)
    _check(program, chosen, label)
    places = places_of(program, chosen, "combine")
    cls = type(_rewriting(program, chosen[0][0]))
    if cls.combiner is None:
        raise PassError(
            f"combine: {cls.name} has no form in which several are one; switch them with --only or --weight instead"
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
    """The program with a pass at these places in the stead of the chosen ones, which stay, left out.

    values: its tensors by their names in the pass, at each place; what is missing starts as the pass has it.
    """

    planned = [SitePlan(place.site, None, pass_.tensors(place.site)) for _, place in places]
    entry = entry_of(program, PassPlan(pass_, tuple(planned)))
    made = {}
    for (_, place), plan, record, own in zip(places, planned, entry.sites, values, strict=True):
        like = next(iter(place.sources[0].tensors.values()))
        for name, spec in plan.specs.items():
            value = own[name].to(like) if name in own else spec.make(place.site.float_dtype, like.device)
            value = value.reshape(spec.shape).detach().clone()
            made[record.tensors[name]] = nn.Parameter(value) if spec.trainable else value
    # In the place of the first: what came after them acts on what they added.
    first = program.journal.entries.index(chosen[0][0])
    entries = (*program.journal.entries[:first], entry, *program.journal.entries[first:])
    tensors, changed = program.copies()
    both = program.derive(Journal(entries), {**tensors, **made}, changed, clock=program.clock)
    return both.without(*(e.id for e, _ in chosen))


def _rewriting(program: State, entry: Entry) -> RewritePass:
    pass_ = replay.pass_of(entry, program.base.plugins)
    assert isinstance(pass_, RewritePass)
    return pass_


def _sources(program: State, weights: Mapping[str, float]) -> list[tuple[Entry, float]]:
    """Entries in the journal's order with their weights."""
    given: dict[str, float] = {}
    for name, weight in weights.items():
        for entry in program.journal.find(name):
            if entry.kind != "rewrite":
                raise PassError(f"combine: {entry.id!r} is no adapter")
            if entry.id in given:
                raise PassError(f"combine: {entry.id!r} is named twice")
            given[entry.id] = float(weight)
    if given and not any(given.values()):
        raise PassError("combine: every weight is zero, so nothing would be left")
    if not given:
        raise PassError("combine: no adapter is named; give --weight NAME=W for each")
    return [(e, given[e.id]) for e in program.journal if e.id in given]


def _check(program: State, chosen: Sequence[tuple[Entry, float]], label: str) -> None:
    names = {entry.pass_name for entry, _ in chosen}
    if len(names) > 1:
        raise PassError(f"combine: {' and '.join(sorted(names))} are different things; combine each alone")
    if program.journal.merged:
        raise PassError("combine: the program is merged; undo the merge first")
    taken = f"{names.pop()}:{label}"
    if any(e.id == taken or e.label == label for e in program.journal):
        raise PassError(f"combine: {taken!r} is applied already; give the result another name with --as")


def places_of(
    program: State, chosen: Sequence[tuple[Entry, float]], what: str
) -> list[tuple[SiteRecord, Place]]:
    """Every site that one of these acts on, in the order of the first that does.

    what: who asks, for the PassError where two act on different parts of a site.
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
                    f"does not hold; choose those that act on the same (--only)"
                )
            own = {name: program.tensors[full] for name, full in record.tensors.items()}
            sources.setdefault(record.key, []).append(Source(entry.id, pass_, own, weight))
    return [(record, Place(site, tuple(sources[key]))) for key, (record, site, _) in first.items()]


def _observed(
    program: State, chosen: Sequence[tuple[Entry, float]], combined: State, how: Combination
) -> str:
    """How far the outputs are from those of the weighted sum. Raises PassError where that is what was promised."""
    if not program.base.in_memory:
        return ""
    summed = program.weighted({e.id: weight for e, weight in chosen})
    seen = observe(summed.run(), combined.run())
    if how.method == "cat" and seen.difference > program.merge_tolerance:
        raise PassError(
            f"combine: with {how.method} the outputs are {seen.difference:.1e} of their scale from those of the "
            f"weighted adapters, over {program.merge_tolerance:g}; does another pass act on them?"
        )
    return f"{seen.difference:.1e} of the outputs' scale from the weighted sum"
