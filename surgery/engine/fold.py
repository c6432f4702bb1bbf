"""Merging: what base weights become when adapters are folded into them, rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.common.errors import JournalError
from surgery.engine.contract.base import RewritePass
from surgery.engine.contract.folds import MergeFrom, MergeLonger, MergeOp
from surgery.engine.journal import Entry, Journal, SiteRecord
from surgery.engine.replay import find_sites, live_entries, pass_of
from surgery.graph.sites import Site, SiteIndex

if TYPE_CHECKING:
    from surgery.engine.base import Base


def foldable(base: Base, journal: Journal, sites: SiteIndex) -> tuple[list[str], dict[str, str]]:
    """Ids of the adapters that can be folded, and the reason for each that cannot. sites: the program's.

    Folding stops at the first adapter of a site that cannot be folded: those wrapped round it stay too. And nothing is
    folded into a weight with which an adapter that stays computes.
    """
    forced: dict[str, str] = {}
    while True:
        folded, kept = _foldable(base, journal, sites, forced)
        more = _under_readers(base, journal, folded, kept)
        if not more:
            return folded, kept
        forced |= more


def _under_readers(
    base: Base, journal: Journal, folded: list[str], kept: Mapping[str, str]
) -> dict[str, str]:
    """What would be folded into a weight that an adapter which stays reads, and why it must not."""
    found: dict[str, str] = {}
    entries = {entry.id: entry for entry in journal}
    for name in kept:
        pass_ = pass_of(entries[name], base.plugins)
        if isinstance(pass_, RewritePass) and pass_.reads_weight:
            owners = {record.key.owner for record in entries[name].sites}
            for other in folded:
                if any(record.key.owner in owners for record in entries[other].sites):
                    found[other] = f"{name} computes with the weight as it is, and is not folded"
    return found


def _foldable(
    base: Base, journal: Journal, sites: SiteIndex, forced: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """forced: what has to stay, and why."""
    folded: list[str] = []
    kept: dict[str, str] = {}
    blocked: set[str] = set()
    adapters = [e for e in journal if e.kind == "rewrite" and e.weight != 0]
    replaced = {r.key.owner: e.id for e in adapters if _replaces(e, base) for r in e.sites}
    zeros: dict[str, str] = {}  # by weight, who has left zeros there so far
    for entry in adapters:
        pass_ = pass_of(entry, base.plugins)
        owners = {record.key.owner for record in entry.sites}
        gone = next((owner for owner in sorted(owners) if owner in replaced), None)
        why = None
        if entry.id in forced:
            why = forced[entry.id]
        elif not isinstance(pass_, RewritePass) or not pass_.mergeable:
            own = _kept(base.sites, entry, pass_) or _kept(sites, entry, pass_)
            why = own or f"{entry.pass_name} has no merged form; export to ONNX, or save the program"
        elif gone is not None:
            why = f"{replaced[gone]} has put something else in the place of {gone}, into which it would be folded"
        elif not pass_.keeps_zeros and (filled := next((o for o in sorted(owners) if o in zeros), None)):
            why = f"folding it into {filled} would fill the zeros of {zeros[filled]}; it stays beside it"
        elif owners & blocked:
            why = f"it stands on an adapter of {sorted(owners & blocked)[0]} that cannot be folded"
        else:
            why = _unfoldable(sites, entry, pass_)
        if why:
            kept[entry.id] = why
            if not (isinstance(pass_, RewritePass) and (pass_.beside or pass_.adds_weights)):
                blocked |= owners
        else:
            folded.append(entry.id)
        if isinstance(pass_, RewritePass) and pass_.makes_zeros:
            zeros |= {r.key.owner: entry.id for r in entry.sites}
    longer = {
        e.id: e for e in adapters if e.id in folded and getattr(pass_of(e, base.plugins), "lengthens", False)
    }
    for entry in longer.values():
        why = _too_long(entry, sites, [e for e in adapters if e.id not in folded])
        if why:
            kept[entry.id] = why
            folded.remove(entry.id)
    return folded, kept


def _too_long(entry: Entry, sites: SiteIndex, left: list[Entry]) -> str | None:
    """Why a weight cannot be stored longer: what stays would read it at its old length."""
    owners = {record.key.owner for record in entry.sites}
    for site in sites:
        if site.weight and site.weight not in owners and not owners.isdisjoint(site.tied):
            return f"{site.path} reads the same weight, and was not made longer"
    stays = next((e.id for e in left if any(r.key.owner in owners for r in e.sites)), None)
    return f"{stays} is not folded, and was made for the weight as it was" if stays else None


def simplifiable(base: Base, journal: Journal) -> list[str]:
    """Ids of the adapters that are not folded but have a plainer form, and are not in it yet."""
    return [
        entry.id
        for entry in live_entries(journal)
        if getattr(pass_of(entry, base.plugins), "simplifies", False)
        and not any(r.decided.get("simplified") for r in entry.sites)
    ]


def simplify(
    base: Base, entries: list[Entry], tensors: Mapping[str, Tensor], sites: SiteIndex
) -> tuple[tuple[SiteRecord, ...], dict[str, Tensor]]:
    """What takes the place of the entries' tensors: a record for each of their sites, and the tensors by name.

    Computed in fp32 (or fp64) and rounded to the dtype of the site's own.
    """
    records: list[SiteRecord] = []
    made: dict[str, Tensor] = {}
    for entry in entries:
        pass_ = pass_of(entry, base.plugins)
        assert isinstance(pass_, RewritePass)
        places = []
        for site, record in zip(find_sites(entry, sites.by_key), entry.sites, strict=True):
            own = {name: tensors[full].detach() for name, full in record.tensors.items()}
            places.append((site, {n: _working(t, in_place=True) for n, t in own.items()}))
        with torch.no_grad():
            plain = pass_.simplify(places)
        for (site, _), record, found in zip(places, entry.sites, plain, strict=True):
            names = {name: f"{pass_.tensor_prefix(site)}.{name}" for name in found}
            # A tensor that stays as it is keeps its name, and is shared.
            names.update({n: full for n, full in record.tensors.items() if n in found})
            dtype = tensors[next(iter(record.tensors.values()))].dtype
            for name, value in found.items():
                if name in record.tensors:
                    continue
                if names[name] in base.tensors or names[name] in tensors:
                    raise JournalError(f"{entry.id}: the name {names[name]} is taken by another tensor")
                made[names[name]] = torch.nn.Parameter(value.to(dtype), requires_grad=False)
            records.append(SiteRecord(site.key, site.path, {"entry": entry.id}, names))
    return tuple(records), made


def _replaces(entry: Entry, base: Base) -> bool:
    pass_ = pass_of(entry, base.plugins)
    return isinstance(pass_, RewritePass) and pass_.replaces


def _kept(sites: SiteIndex, entry: Entry, pass_: object) -> str | None:
    """The pass's own reason why an entry cannot be folded, or None."""
    for record in entry.sites:
        site = sites.by_key.get(record.key)
        if site is not None and isinstance(pass_, RewritePass):
            why = pass_.keeps(site.deciding(record.decided))
            if why:
                return f"{record.path}: {why}"
    return None


def _unfoldable(sites: SiteIndex, entry: Entry, pass_: RewritePass) -> str | None:
    for record in entry.sites:
        site = sites.by_key.get(record.key)
        if site is not None and site.packed:
            return f"the weight of {record.path} is packed for {site.op}, and folding would have to unpack it"
    why = _kept(sites, entry, pass_)
    if why:
        return why
    uses: dict[str, int] = {}
    for site in sites:
        if site.weight:
            uses[site.weight] = uses.get(site.weight, 0) + 1
    for record in entry.sites:
        if uses.get(record.key.owner, 0) > 1:
            return f"{record.key.owner} is also used in another place, which folding would change"
    return None


def fold(
    base: Base,
    entries: list[Entry],
    tensors: Mapping[str, Tensor],
    weight_of: Mapping[str, Tensor],
    sites: SiteIndex,
    in_place: bool = False,
) -> dict[str, Tensor]:
    """Base weights with the entries folded in, by parameter name (the site's own name, where it is tied).

    weight_of: tensors by name. sites: the program's. Half precision is folded in fp32 and rounded once for all
    entries. With in_place, fp32 and fp64 weights are changed where they lie, without a copy.

    What passes put in the place of a weight (`inner`) is folded first: all else at the site stands on it.
    """
    work: dict[str, Tensor] = {}
    originals: dict[str, Tensor] = {}
    standing: dict[str, Tensor] = {}  # what the op reads, in the working dtype
    with torch.no_grad():
        steps = _steps(base, entries, tensors, sites)
        for inner in (True, False):
            for step in (
                s for s in steps if getattr(s.op, "inner", False) is inner and not hasattr(s.op, "longer")
            ):
                name = step.name
                if name not in work:
                    originals[name] = weight_of[name].detach()
                    work[name] = _working(originals[name], in_place)
                op: Any = step.op
                if not hasattr(op, "apply_from"):
                    op.apply_(work[name])
                    continue
                if in_place and originals[name].data_ptr() == work[name].data_ptr():
                    raise JournalError(
                        f"{step.entry.id} at {step.site.path} needs the base weight beside the folded one; merge "
                        f"without in_place"
                    )
                op.apply_from(work[name], standing.get(name, originals[name].to(work[name].dtype)))
            if inner:
                standing = {s.name: work[s.name].clone() for s in steps if s.name in work and _compares(s.op)}
        grown = _lengthen(steps, work, weight_of, originals, in_place)
        for name, folded in work.items():
            original = originals[name]
            if folded.dtype != original.dtype:
                work[name] = original.copy_(folded) if in_place else folded.to(original.dtype)
        for name in grown:
            for alias in base.names.get(name, ()):  # a name that no op reads is as long as the others
                if alias not in work or torch.equal(work[alias], work[name]):
                    work[alias] = work[name]
    return work


def _lengthen(
    steps: list[_Step],
    work: dict[str, Tensor],
    weight_of: Mapping[str, Tensor],
    originals: dict[str, Tensor],
    in_place: bool,
) -> list[str]:
    """Make longer what passes want longer, after all else was folded into it as it was; the names."""
    names = []
    for step in steps:
        op: Any = step.op
        if not hasattr(op, "longer"):
            continue
        if in_place:
            raise JournalError(
                f"{step.entry.id} makes {step.name} longer, which has no room; merge without in_place"
            )
        if step.name not in work:
            originals[step.name] = weight_of[step.name].detach()
            work[step.name] = _working(originals[step.name], in_place=True)
        work[step.name] = op.longer(work[step.name])
        names.append(step.name)
    return names


@dataclass(frozen=True)
class _Step:
    entry: Entry
    site: Site
    name: str
    op: MergeOp | MergeFrom | MergeLonger


def _steps(base: Base, entries: list[Entry], tensors: Mapping[str, Tensor], sites: SiteIndex) -> list[_Step]:
    """What the entries' passes do to the base, in journal order."""
    steps = []
    for entry in entries:
        pass_ = pass_of(entry, base.plugins)
        assert isinstance(pass_, RewritePass)
        for site, record in zip(find_sites(entry, sites.by_key), entry.sites, strict=True):
            own = {name: tensors[full] for name, full in record.tensors.items()}
            for slot, op in pass_.merge(site, own, entry.weight).items():
                name = _place(site, slot, entry)
                if name is not None:
                    steps.append(_Step(entry, site, name, op))
    return steps


def _compares(op: MergeOp | MergeFrom | MergeLonger) -> bool:
    return hasattr(op, "apply_from") and not getattr(op, "inner", False)


def _place(site: Site, slot: str, entry: Entry) -> str | None:
    if slot.partition(":")[0] == "bias":
        return site.bias
    if site.weight is None:
        raise JournalError(f"{entry.id} at {site.path}: a computed weight cannot be merged into")
    return site.weight


def _working(tensor: Tensor, in_place: bool) -> Tensor:
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor if in_place else tensor.clone(memory_format=torch.contiguous_format)
    return tensor.to(torch.float32)
