"""Journal entries of planned passes, with the names of their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from surgery.common.errors import PassError
from surgery.engine.change.plans import PassPlan, SitePlan
from surgery.engine.change.selection import SelectPass
from surgery.engine.contract.base import Pass, RewritePass
from surgery.engine.contract.pattern import PatternPass
from surgery.engine.journal import Entry, SiteRecord
from surgery.engine.registry import registered
from surgery.engine.restore import made_trainable
from surgery.engine.state import State


def entry_of(program: State, planned: PassPlan) -> Entry:
    """The journal entry of a planned pass.

    Raises:
        PassError: The pass has no site, is refused at every site, or the name of a tensor is taken.
    """
    pass_ = planned.pass_
    plugins = program.base.plugins
    info = registered(plugins, type(pass_))
    if isinstance(pass_, SelectPass):
        count = sum(e.pass_name == pass_.name and not e.label for e in program.journal)
        ident = pass_.entry_id if pass_.label or not count else f"{pass_.entry_id}:{count + 1}"
        records: tuple[SiteRecord, ...] = ()
        kind = "select"
    else:
        assert isinstance(pass_, RewritePass)
        ident, kind = pass_.entry_id, "rewrite"
        if not planned.sites:
            raise PassError(f"{pass_.entry_id}: {_no_site(pass_, program)}")
        if not planned.accepted:
            first = planned.refused[0]
            more = f" (and {len(planned.refused) - 1} more)" if len(planned.refused) > 1 else ""
            raise PassError(f"{pass_.name} at {first.site.path}: refused, {first.refusal}{more}")
        records = tuple(
            SiteRecord(s.site.key, s.site.path, s.site.decided, _tensor_names(program, pass_, s))
            for s in planned.accepted
        )
        _check_shared(ident, planned.accepted, records)
    chosen = planned.selection
    windows, unit = dict(chosen.windows), chosen.unit
    gradual = pass_.gradual if isinstance(pass_, RewritePass) else None
    if gradual is not None:
        window, unit = gradual.window, gradual.unit
        windows.update({full: window for record in records for full in record.tensors.values()})
    masks = {name: _own_name(program, name, ident, "mask") for name in chosen.masks}
    entry = Entry(
        id=ident,
        pass_name=pass_.name,
        kind=kind,
        distribution=info.distribution,
        distribution_version=info.version,
        version=pass_.version,
        options=pass_.options(),
        sites=records,
        trains=dict(chosen.trains),
        rates=dict(chosen.rates),
        windows=windows,
        unit=unit,
        masks=masks,
        limits=_limits(pass_, planned),
        auto=planned.auto,
    )
    before = {name: _own_name(program, name, ident, "before") for name in trained_before(program, entry)}
    return replace(entry, before=before)


def _no_site(pass_: RewritePass, program: State) -> str:
    """Message for a pass without a single site."""
    if isinstance(pass_, PatternPass):
        return pass_.no_match_message(program.view)
    return "it has nothing to do at the targeted sites; target other sites"


def _limits(pass_: Pass, planned: PassPlan) -> dict[str, int]:
    """Smallest upper bound of each dynamic dimension over all sites."""
    found: dict[str, int] = {}
    if isinstance(pass_, RewritePass):
        for accepted in planned.accepted:
            for name, high in pass_.outcome(accepted.site).limits.items():
                found[name] = min(high, found.get(name, high))
    return found


def _own_name(program: State, parameter: str, ident: str, what: str) -> str:
    """Name of the tensor that an entry keeps for a parameter: its "mask", or its value "before"."""
    owner, _, leaf = parameter.rpartition(".")
    name = f"{owner}.{ident.replace(':', '_')}.{leaf}_{what}".lstrip(".")
    if name in program.base.tensors or name in program.tensors:
        raise PassError(f"{ident}: the name {name} is taken; choose another --as")
    return name


def _tensor_names(program: State, pass_: RewritePass, planned: SitePlan) -> dict[str, str]:
    """Name of a tensor in the pass -> its name in the program. Raises PassError if that is taken."""
    site = planned.site
    names = pass_.names(site, planned.specs)
    for full in names.values():
        if full in program.base.tensors or full in program.tensors:
            raise PassError(f"{pass_.entry_id} at {site.path}: the name {full} is taken; choose another --as")
    return names


def _check_shared(ident: str, plans: Sequence[SitePlan], records: Sequence[SiteRecord]) -> None:
    """Raise PassError if two sites give their tensors one name without declaring one tensor that they share."""
    first: dict[str, tuple[str, tuple[object, ...], bool]] = {}
    for planned, record in zip(plans, records, strict=True):
        for name, spec in planned.specs.items():
            full = record.tensors[name]
            dtype = spec.dtype or planned.site.float_dtype
            declared = (tuple(spec.shape), dtype, spec.trainable)
            if full not in first:
                first[full] = (record.path, declared, spec.shared)
                continue
            path, other, shared = first[full]
            where = f"{ident}: {path} and {record.path} both name their tensor {full}"
            if not (spec.shared and shared):
                raise PassError(
                    f"{where}; declare it with TensorSpec(…, shared=True) at both, or return other names"
                )
            if other != declared:
                raise PassError(
                    f"{where}, but it differs in shape, dtype or `trainable`; a tensor is shared by sites that declare "
                    "it alike, so leave its name to the default, which has the shape"
                )


def trained_before(program: State, entry: Entry) -> dict[str, Tensor]:
    """Copies of the parameters that an entry lets train, if they were trained earlier and are frozen now.

    Args:
        program: The program before the entry.
        entry: The entry.

    Returns:
        Name of a parameter -> a copy of its value.
    """
    found: dict[str, Tensor] = {}
    for name in made_trainable(entry):
        said = program.journal.decided(program.names.get(name, (name,)))
        held = program.changed.get(name)
        if held is not None:
            kept = said is not True and not torch.equal(held, program.base.tensors[name])
        else:
            held = program.tensors.get(name)
            kept = said is False
        if kept and held is not None:
            found[name] = held.detach().clone()
    return found
