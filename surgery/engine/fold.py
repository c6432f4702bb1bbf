"""Merging: computes base weights with adapters folded into them, rounded once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery.common.errors import JournalError, PassError, SurgeryError
from surgery.common.progress import track
from surgery.common.readers import first_line
from surgery.engine.contract.base import RewritePass, default_names, merges
from surgery.engine.contract.folds import Fold, Stage, apply_folds
from surgery.engine.journal import Entry, Journal, SiteRecord
from surgery.engine.replay import find_sites, live_entries, pass_of
from surgery.graph.sites import Site, SiteIndex

if TYPE_CHECKING:
    from surgery.engine.base import Base


def foldable(
    base: Base, journal: Journal, sites: SiteIndex, tensors: Mapping[str, Tensor]
) -> tuple[list[str], dict[str, str]]:
    """Find the adapters that can be folded into base weights.

    If one adapter of a site cannot be folded, the later ones around it are not folded either. No adapter is folded into
    a weight that a remaining adapter reads (DoRA reads its norms, for example).

    Args:
        base: The program's base.
        journal: The program's journal.
        sites: Sites of the program's graph.
        tensors: Inserted tensors, by name.

    Returns:
        The ids of the adapters that can be folded, and the reason for each adapter that cannot, by id.
    """
    # Keeping one adapter can force others to stay, so this repeats until nothing changes.
    forced: dict[str, str] = {}
    while True:
        folded, kept = _foldable(base, journal, sites, tensors, forced)
        more = _under_readers(base, journal, folded, kept)
        if not more:
            return folded, kept
        forced |= more


def _under_readers(
    base: Base, journal: Journal, folded: list[str], kept: Mapping[str, str]
) -> dict[str, str]:
    """Adapters that would be folded into a weight that a remaining adapter reads: id -> reason to keep it."""
    found: dict[str, str] = {}
    entries = {entry.id: entry for entry in journal}
    for name in kept:
        pass_ = pass_of(entries[name], base.plugins)
        if isinstance(pass_, RewritePass) and pass_.effect.reads_weight:
            owners = {record.key.owner for record in entries[name].sites}
            for other in folded:
                if any(record.key.owner in owners for record in entries[other].sites):
                    found[other] = f"{name} computes with the unmerged weight, and is not folded"
    return found


def _foldable(
    base: Base,
    journal: Journal,
    sites: SiteIndex,
    tensors: Mapping[str, Tensor],
    forced: Mapping[str, str],
) -> tuple[list[str], dict[str, str]]:
    """One pass of `foldable`; `forced` has the adapters that must stay, with the reason."""
    folded: list[str] = []
    kept: dict[str, str] = {}
    blocked: set[str] = set()
    adapters = [e for e in journal if e.kind == "rewrite" and e.weight != 0]
    replaced = {r.key.owner: e.id for e in adapters if _replaces(e, base) for r in e.sites}
    # Name of a weight -> id of the last earlier entry that set some of its values to zero.
    zeros: dict[str, str] = {}
    for entry in adapters:
        pass_ = pass_of(entry, base.plugins)
        assert isinstance(pass_, RewritePass)
        owners = {record.key.owner for record in entry.sites}
        gone = next((owner for owner in sorted(owners) if owner in replaced), None)
        sparse = next((owner for owner in sorted(owners) if owner in zeros), None)
        why = None
        if entry.id in forced:
            why = forced[entry.id]
        elif not merges(pass_):
            own = _kept(base.sites, entry, pass_) or _kept(sites, entry, pass_)
            why = own or f"{entry.pass_name} has no merged form; export to ONNX, or save the program"
        elif gone is not None:
            why = f"{replaced[gone]} has replaced {gone}, the weight that it would be folded into"
        elif sparse is not None and not _keeps_zeros(entry, pass_, tensors, sites):
            why = f"folding it into {sparse} would fill the zeros of {zeros[sparse]}; it stays a separate branch"
        elif owners & blocked:
            why = f"it acts on top of an adapter of {sorted(owners & blocked)[0]} that cannot be folded"
        else:
            why = _unfoldable(sites, entry, pass_)
        if why:
            kept[entry.id] = why
            # A parallel branch, or a new layer, does not change the value that later adapters are folded into.
            if not (pass_.effect.independent or pass_.effect.adds_weights):
                blocked |= owners
        else:
            folded.append(entry.id)
        if pass_.effect.makes_zeros:
            zeros |= {r.key.owner: entry.id for r in entry.sites}
    for entry in lengthening(base, [e for e in adapters if e.id in folded], tensors, sites):
        why = _too_long(entry, sites, [e for e in adapters if e.id not in folded])
        if why:
            kept[entry.id] = why
            folded.remove(entry.id)
    return folded, kept


def _keeps_zeros(entry: Entry, pass_: RewritePass, tensors: Mapping[str, Tensor], sites: SiteIndex) -> bool:
    """True if zeros of the weights stay zeros when the entry is folded."""
    return all(step.fold.keeps_zeros for step in _steps_of(entry, pass_, tensors, sites))


def lengthening(
    base: Base, entries: Iterable[Entry], tensors: Mapping[str, Tensor], sites: SiteIndex
) -> list[Entry]:
    """Entries whose fold makes a weight longer.

    Every other adapter that reads such a weight must be folded as well, since it was made for the old length.

    Args:
        base: The program's base.
        entries: Entries of the journal.
        tensors: Inserted tensors, by name.
        sites: Sites of the program's graph.
    """
    found = []
    for entry in entries:
        pass_ = pass_of(entry, base.plugins)
        assert isinstance(pass_, RewritePass)
        if any(step.fold.stage is Stage.SIZE for step in _steps_of(entry, pass_, tensors, sites)):
            found.append(entry)
    return found


def _too_long(entry: Entry, sites: SiteIndex, left: list[Entry]) -> str | None:
    """Reason why a weight cannot become longer: another op or a remaining adapter needs the old length; or None."""
    owners = {record.key.owner for record in entry.sites}
    for site in sites:
        if site.weight and site.weight not in owners and not owners.isdisjoint(site.tied):
            return f"{site.path} reads the same weight, and was not made longer"
    stays = next((e.id for e in left if any(r.key.owner in owners for r in e.sites)), None)
    return f"{stays} is not folded, and was made for the old size of the weight" if stays else None


def simplifiable(base: Base, journal: Journal) -> list[str]:
    """Ids of the adapters in the graph that have a simpler form (`RewritePass.simplify`) and are not in it yet."""
    return [
        entry.id
        for entry in live_entries(journal)
        if isinstance(pass_ := pass_of(entry, base.plugins), RewritePass)
        and pass_.simplify is not None
        and not any(r.decided.get("simplified") for r in entry.sites)
    ]


def simplify(
    base: Base, entries: list[Entry], tensors: Mapping[str, Tensor], sites: SiteIndex
) -> tuple[tuple[SiteRecord, ...], dict[str, Tensor]]:
    """Compute the simpler form of adapters that cannot be folded.

    The computation is in fp32 (or fp64); the result is rounded to the dtype of the tensors it replaces.

    Args:
        base: The program's base.
        entries: Entries whose passes define `simplify`.
        tensors: Inserted tensors, by name.
        sites: Sites of the program's graph.

    Returns:
        A record for each site of the entries, and the new tensors by name.

    Raises:
        JournalError: The name of a new tensor is in use.
    """
    records: list[SiteRecord] = []
    made: dict[str, Tensor] = {}
    for entry in entries:
        pass_ = pass_of(entry, base.plugins)
        assert isinstance(pass_, RewritePass)
        assert pass_.simplify is not None
        places = []
        for site, record in zip(find_sites(entry, sites.by_key), entry.sites, strict=True):
            own = {name: tensors[full].detach() for name, full in record.tensors.items()}
            places.append((site, {n: _working(t, in_place=True) for n, t in own.items()}))
        with torch.no_grad():
            plain = pass_.simplify(places)
        for (site, _), record, found in zip(places, entry.sites, plain, strict=True):
            names = default_names(pass_, site, found)
            # A tensor that does not change keeps its name and is shared with the form before.
            names.update({n: full for n, full in record.tensors.items() if n in found})
            dtype = tensors[next(iter(record.tensors.values()))].dtype
            for name, value in found.items():
                if name in record.tensors:
                    continue
                if names[name] in base.tensors or names[name] in tensors:
                    raise JournalError(
                        f"{entry.id}: the name {names[name]} is taken; apply the pass under another name with --as"
                    )
                made[names[name]] = torch.nn.Parameter(value.to(dtype), requires_grad=False)
            records.append(SiteRecord(site.key, site.path, {"entry": entry.id}, names))
    return tuple(records), made


def _replaces(entry: Entry, base: Base) -> bool:
    pass_ = pass_of(entry, base.plugins)
    return isinstance(pass_, RewritePass) and pass_.effect.replaces_weight


def _kept(sites: SiteIndex, entry: Entry, pass_: RewritePass) -> str | None:
    """The pass's own reason why an entry cannot be folded, or None."""
    for record in entry.sites:
        site = sites.by_key.get(record.key)
        if site is not None:
            why = pass_.why_not_merged(site.deciding(record.decided))
            if why:
                return f"{record.path}: {why}"
    return None


def _unfoldable(sites: SiteIndex, entry: Entry, pass_: RewritePass) -> str | None:
    """Reason why an entry cannot be folded at one of its sites, or None."""
    for record in entry.sites:
        site = sites.by_key.get(record.key)
        if site is not None and site.packed:
            return f"the weight of {record.path} is packed for {site.op}; folding would have to unpack it"
    why = _kept(sites, entry, pass_)
    if why:
        return why
    uses: dict[str, int] = {}
    for site in sites:
        if site.weight:
            uses[site.weight] = uses.get(site.weight, 0) + 1
    for record in entry.sites:
        if uses.get(record.key.owner, 0) > 1:
            return f"{record.key.owner} is also used in another place, whose result folding would change"
        for site in sites:
            if any(record.key.owner in call.computed_from for call in site.calls):
                made = f"{site.op} of {site.calls[0].module_path or 'the model itself'}"
                return f"{record.key.owner} is also read to compute the weight of {made}, which folding would change"
    return None


def fold(
    base: Base,
    entries: list[Entry],
    tensors: Mapping[str, Tensor],
    weight_of: Mapping[str, Tensor],
    sites: SiteIndex,
    in_place: bool = False,
) -> dict[str, Tensor]:
    """Base weights with entries folded in, by parameter name. Of a tied weight, the name is the site's own.

    Half precision is folded in fp32 and rounded once for all entries.

    Args:
        base: The program's base.
        entries: Entries to fold, in journal order.
        tensors: Inserted tensors, by name.
        weight_of: Current values of base tensors, by name.
        sites: Sites of the program's graph.
        in_place: Change fp32 and fp64 weights in their own storage, without a copy.

    Raises:
        JournalError: An entry cannot be folded in place.
    """
    steps: dict[str, list[_Step]] = {}
    for entry in entries:
        pass_ = pass_of(entry, base.plugins)
        assert isinstance(pass_, RewritePass)
        for step in _steps_of(entry, pass_, tensors, sites):
            steps.setdefault(step.name, []).append(step)
    folded: dict[str, Tensor] = {}
    longer = []
    for name, own in track(steps.items(), "merging"):
        original = weight_of[name].detach()
        work = _working(original, in_place)
        if in_place:
            _check_in_place(own, original.data_ptr() == work.data_ptr())
        reads = any(step.fold.reads_original for step in own)
        with _reported(own[-1].entry, own[-1].site.path):
            work = apply_folds(work, [step.fold for step in own], original.to(work.dtype) if reads else work)
        if work.dtype != original.dtype:
            with torch.no_grad():
                work = original.copy_(work) if in_place else work.to(original.dtype)
        folded[name] = work
        if any(step.fold.stage is Stage.SIZE for step in own):
            longer.append(name)
    read = {str(n.target) for n in base.captured.graph.nodes if n.op == "get_attr" and n.users}
    for name, value in list(folded.items()):
        group = base.names.get(name, ())
        # A module under two names, or a name that no op reads, follows the only use of the tensor.
        if len(read.intersection(group)) <= 1:
            folded.update({alias: value for alias in group if alias not in folded})
    for name in longer:
        # All names of a tied weight get the new length, also those that no op reads.
        for alias in base.names.get(name, ()):
            if alias not in folded or torch.equal(folded[alias], folded[name]):
                folded[alias] = folded[name]
    return folded


def _check_in_place(steps: list[_Step], shared: bool) -> None:
    """Raise JournalError for folds that need the original weight as well, or more storage than it has."""
    for step in steps:
        if step.fold.stage is Stage.SIZE:
            raise JournalError(
                f"{step.entry.id} makes {step.name} longer than its storage; merge without in_place"
            )
        if step.fold.reads_original and shared:
            raise JournalError(
                f"{step.entry.id} at {step.site.path} needs the original weight as well as the folded one; merge "
                f"without in_place"
            )


@contextmanager
def _reported(entry: Entry, path: str) -> Iterator[None]:
    """Report any other error than a SurgeryError with its pass and site: a stored decision can be anything."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:
        raise JournalError(
            f"{entry.id} at {path} cannot be folded: pass {entry.pass_name!r} of {entry.distribution!r} fails in "
            f"merge ({type(error).__name__}: {first_line(error)}); undo the merge"
        ) from error


@dataclass(frozen=True)
class _Step:
    """One change of one base tensor: `name` is the tensor's."""

    entry: Entry
    site: Site
    name: str
    fold: Fold


def _steps_of(
    entry: Entry, pass_: RewritePass, tensors: Mapping[str, Tensor], sites: SiteIndex
) -> list[_Step]:
    """Changes of base tensors by one entry, site by site."""
    steps = []
    for site, record in zip(find_sites(entry, sites.by_key), entry.sites, strict=True):
        own = {name: tensors[full] for name, full in record.tensors.items()}
        with _reported(entry, record.path):
            changes = dict(pass_.merge(site, own, entry.weight))
        for slot, change in changes.items():
            name = _place(site, slot, entry)
            if not isinstance(change, Fold):
                raise PassError(
                    f"{entry.id} at {site.path}: merge returned {type(change).__name__} for {slot!r}; return a Fold, "
                    "such as AddLowRank or ScaleAxis (surgery.api)"
                )
            if name is not None:
                steps.append(_Step(entry, site, name, change))
    return steps


def _place(site: Site, slot: str, entry: Entry) -> str | None:
    """Name of the base tensor for a key that `merge` returned: "weight" or "bias", with a suffix after a colon."""
    kind = slot.partition(":")[0]
    if kind not in ("weight", "bias"):
        raise PassError(
            f"{entry.id} at {site.path}: merge returned the key {slot!r}; use 'weight' or 'bias', with a suffix "
            "after a colon for several folds of one"
        )
    if kind == "bias":
        return site.bias
    if site.weight is None:
        raise JournalError(
            f"{entry.id} at {site.path}: its weight is computed, so nothing can be merged into it"
        )
    return site.weight


def _working(tensor: Tensor, in_place: bool) -> Tensor:
    """A float32 or float64 copy of a tensor; with `in_place` the tensor itself if it has one of these dtypes."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor if in_place else tensor.clone(memory_format=torch.contiguous_format)
    return tensor.to(torch.float32)
