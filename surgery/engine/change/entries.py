"""What the journal writes of a pass that is applied, with the names of its tensors."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING

from surgery.errors import PassError
from surgery.journal import Entry, SiteRecord
from surgery.pass_base import Pass, RewritePass, SelectPass
from surgery.plans import PassPlan, SitePlan
from surgery.reverting import trained_before

if TYPE_CHECKING:
    from surgery.program import Program


@cache
def core_version() -> str:
    try:
        return metadata.version("torch-surgery")
    except metadata.PackageNotFoundError:
        return ""


def entry_of(program: Program, planned: PassPlan) -> Entry:
    """What the journal writes of a planned pass, with the names of its tensors. Raises PassError."""
    pass_ = planned.pass_
    info = program.base.plugins.find_pass(pass_.name)
    if isinstance(pass_, SelectPass):
        count = sum(e.pass_name == pass_.name and not e.label for e in program.journal)
        ident = pass_.entry_id if pass_.label or not count else f"{pass_.entry_id}:{count + 1}"
        records: tuple[SiteRecord, ...] = ()
        kind = "select"
    else:
        assert isinstance(pass_, RewritePass)
        ident, kind = pass_.entry_id, "rewrite"
        if not planned.sites:
            raise PassError(f"{pass_.entry_id}: {pass_.nothing(program.view)}")
        if not planned.accepted:
            first = planned.refused[0]
            more = f" (and {len(planned.refused) - 1} more)" if len(planned.refused) > 1 else ""
            raise PassError(f"{pass_.name} at {first.site.path}: refused, {first.refusal}{more}")
        records = tuple(
            SiteRecord(s.site.key, s.site.path, s.site.decided, _tensor_names(program, pass_, s))
            for s in planned.accepted
        )
    chosen = planned.selection
    windows, unit = dict(chosen.windows), chosen.unit
    if isinstance(pass_, RewritePass) and pass_.pacing is not None:
        window, unit = pass_.pacing
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


def _limits(pass_: Pass, planned: PassPlan) -> dict[str, int]:
    found: dict[str, int] = {}
    if isinstance(pass_, RewritePass):
        for accepted in planned.accepted:
            for name, high in pass_.limits(accepted.site).items():
                found[name] = min(high, found.get(name, high))
    return found


def _own_name(program: Program, parameter: str, ident: str, what: str) -> str:
    owner, _, leaf = parameter.rpartition(".")
    name = f"{owner}.{ident.replace(':', '_')}.{leaf}_{what}".lstrip(".")
    if name in program.base.tensors or name in program.tensors:
        raise PassError(f"{ident}: the name {name} is taken; choose another --as")
    return name


def _tensor_names(program: Program, pass_: RewritePass, planned: SitePlan) -> dict[str, str]:
    """Tensor of the pass -> its name in the program. Raises PassError where that is taken."""
    site = planned.site
    prefix = pass_.tensor_prefix(site)
    names = {name: f"{prefix}.{name}" for name in planned.specs}
    names.update(pass_.tensor_names(site))
    for full in names.values():
        if full in program.base.tensors or full in program.tensors:
            raise PassError(f"{pass_.entry_id} at {site.path}: the name {full} is taken; choose another --as")
    return names
