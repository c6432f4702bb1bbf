"""Merging: what base weights become when adapters are folded into them, rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery.errors import JournalError
from surgery.journal import Entry, Journal
from surgery.pass_base import RewritePass
from surgery.replay import find_sites, pass_of
from surgery.sites import Site, SiteIndex

if TYPE_CHECKING:
    from surgery.base import Base


def foldable(base: Base, journal: Journal, sites: SiteIndex) -> tuple[list[str], dict[str, str]]:
    """Ids of the adapters that can be folded, and the reason for each that cannot. sites: the program's.

    Folding stops at the first adapter of a site that cannot be folded: those wrapped round it stay too.
    """
    folded: list[str] = []
    kept: dict[str, str] = {}
    blocked: set[str] = set()
    for entry in journal:
        if entry.kind != "rewrite" or entry.weight == 0:
            continue
        pass_ = pass_of(entry, base.plugins)
        owners = {record.key.owner for record in entry.sites}
        why = None
        if not isinstance(pass_, RewritePass) or not pass_.mergeable:
            why = f"{entry.pass_name} has no merged form"
        elif owners & blocked:
            why = f"it stands on an adapter of {sorted(owners & blocked)[0]} that cannot be folded"
        else:
            why = _unfoldable(sites, entry, pass_)
        if why:
            kept[entry.id] = why
            blocked |= owners
        else:
            folded.append(entry.id)
    return folded, kept


def _unfoldable(sites: SiteIndex, entry: Entry, pass_: RewritePass) -> str | None:
    for record in entry.sites:
        site = sites.by_key.get(record.key)
        if site is not None and site.packed:
            return f"the weight of {record.path} is packed for {site.op}, and folding would have to unpack it"
        why = pass_.keeps(site.deciding(record.decided)) if site is not None else None
        if why:
            return f"{record.path}: {why}"
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
    """
    work: dict[str, Tensor] = {}
    originals: dict[str, Tensor] = {}
    with torch.no_grad():
        for entry in entries:
            pass_ = pass_of(entry, base.plugins)
            assert isinstance(pass_, RewritePass)
            for site, record in zip(find_sites(entry, sites), entry.sites, strict=True):
                own = {name: tensors[full] for name, full in record.tensors.items()}
                for slot, op in pass_.merge(site, own, entry.weight).items():
                    name = _place(site, slot, entry)
                    if name is None:
                        continue
                    if name not in work:
                        originals[name] = weight_of[name].detach()
                        work[name] = _working(originals[name], in_place)
                    from_original = getattr(op, "apply_from", None)
                    if from_original is None:
                        op.apply_(work[name])
                    else:
                        if in_place and originals[name].data_ptr() == work[name].data_ptr():
                            raise JournalError(
                                f"{entry.id} at {site.path} needs the base weight beside the folded one; merge "
                                f"without in_place"
                            )
                        from_original(work[name], originals[name].to(work[name].dtype))
        for name, folded in work.items():
            original = originals[name]
            if folded.dtype != original.dtype:
                work[name] = original.copy_(folded) if in_place else folded.to(original.dtype)
    return work


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
