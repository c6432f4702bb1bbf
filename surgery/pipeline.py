"""Planning and applying passes: targets to sites, refusals, tensors, rewrites, proof, journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch import Tensor, device, fx, random

from surgery import replay, target
from surgery.base import Base
from surgery.configured import Configured
from surgery.errors import PassError
from surgery.graphs import copy_graph
from surgery.journal import Entry, SiteRecord
from surgery.meta_cache import MetaCache
from surgery.numerics import Observed, observe
from surgery.ordering import in_order
from surgery.pass_base import GraphPass, Pass, RewritePass, Selection, SelectPass, TensorSpec
from surgery.passes.freeze import Freeze
from surgery.pattern_pass import PatternPass
from surgery.patterns import NearMiss
from surgery.probe import InputSet, Probe
from surgery.reverting import trained_before
from surgery.schedule import Schedule
from surgery.selecting import Candidates, checked, select
from surgery.sites import Site, live_nodes, tail
from surgery.standing import replaced_by
from surgery.view import View

if TYPE_CHECKING:
    from surgery.program import Program


@dataclass(frozen=True)
class SitePlan:
    """One targeted site: refused with a reason, or the tensors that would be added there."""

    site: Site
    refusal: str | None = None
    specs: dict[str, TensorSpec] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return sum(spec.numel() for spec in self.specs.values() if spec.trainable)


@dataclass(frozen=True)
class PassPlan:
    """What one pass would do. selection: which parameters of the base would train, when and how fast. misses: where
    the pattern of a pass nearly is."""

    pass_: Pass
    sites: tuple[SitePlan, ...] = ()
    selection: Selection = field(default_factory=Selection)
    auto: bool = False
    notes: tuple[str, ...] = ()
    misses: tuple[NearMiss, ...] = ()

    @property
    def trains(self) -> Mapping[str, bool]:
        return self.selection.trains

    @property
    def accepted(self) -> list[SitePlan]:
        return [s for s in self.sites if s.refusal is None]

    @property
    def refused(self) -> list[SitePlan]:
        return [s for s in self.sites if s.refusal is not None]

    @property
    def parameters(self) -> int:
        """How many values it adds that train; a tensor that several sites share counts once."""
        found: dict[Any, int] = {}
        for planned in self.accepted:
            shared = self.pass_.tensor_names(planned.site) if isinstance(self.pass_, RewritePass) else {}
            for name, spec in planned.specs.items():
                if spec.trainable:
                    found[shared.get(name, (planned.site.key, name))] = spec.numel()
        return sum(found.values())

    @property
    def freed(self) -> set[str]:
        """Parameters that nothing would read any more."""
        pass_ = self.pass_
        return (
            {n for s in self.accepted for n in pass_.frees(s.site)}
            if isinstance(pass_, RewritePass)
            else set()
        )


@dataclass(frozen=True)
class PlanReport:
    """What a pipeline would do, pass by pass."""

    passes: tuple[PassPlan, ...]


@dataclass(frozen=True)
class PassReport:
    """What one pass did. observed: None where the outputs were not compared, with `unverified` saying why."""

    entry: Entry
    plan: PassPlan
    observed: Observed | None
    unverified: str = ""
    seconds: float = 0.0


@cache
def core_version() -> str:
    try:
        return metadata.version("torch-surgery")
    except metadata.PackageNotFoundError:
        return ""


def plan(
    program: Program,
    passes: Sequence[Pass],
    freeze_base: bool | None = None,
    data: Sequence[InputSet] = (),
) -> PlanReport:
    """What `apply` would do. Raises TargetError where a target misses, PassError for a bad request."""
    complete = _complete(program, passes, freeze_base)
    probe = Probe(program, data)
    rewrites = [p for p, _ in complete if isinstance(p, RewritePass)]
    for index, rewrite in enumerate(rewrites):
        if any(rewrite.entry_id == other.entry_id for other in rewrites[:index]):
            raise PassError(_taken(rewrite))
    plans: list[PassPlan] = []
    with random.fork_rng(devices=[]):
        for index, (pass_, auto) in enumerate(complete):
            planned = _plan_pass(program, pass_, auto, probe)
            plans.append(planned)
            if planned.accepted and _is_seen(pass_, [p for p, _ in complete[index + 1 :]]):
                program = apply(program, [pass_], False, False, data)
                probe.clear()
                probe = Probe(program, data)
    probe.clear()
    return PlanReport(tuple(plans))


def _is_seen(pass_: Pass, following: Sequence[Pass]) -> bool:
    """Whether those that follow can be planned only on what this pass makes."""
    replacing = any(isinstance(p, RewritePass) and (p.replaces or p.makes_zeros) for p in (pass_, *following))
    return bool(following) and (
        isinstance(pass_, GraphPass) or (isinstance(pass_, RewritePass) and replacing)
    )


def _taken(pass_: Pass) -> str:
    return f"{pass_.entry_id!r} is applied already; give this one a name with --as (label= in Python)"


def _complete(program: Program, passes: Sequence[Pass], freeze_base: bool | None) -> list[tuple[Pass, bool]]:
    """The passes in order, with the freezing of the base where it is wanted: first, or else before the first pass
    that adapts, so that factors made before that freeze with the rest, as they do in a pipeline of their own."""
    for pass_ in passes:
        if not isinstance(pass_, Pass):
            what = f"the class {pass_.__name__}" if isinstance(pass_, type) else repr(pass_)
            raise PassError(
                f"{what} is no pass that can be applied; give an instance, such as Lora(target='attn.*')"
            )
    passes = in_order(passes, program.journal, program.base.plugins)
    selects = any(isinstance(p, SelectPass) for p in passes) or any(
        e.kind == "select" for e in program.journal
    )
    adapts = [i for i, p in enumerate(passes) if isinstance(p, RewritePass) and p.freezes]
    listed = [(p, False) for p in passes]
    if freeze_base is True or (freeze_base is None and adapts and not selects):
        listed.insert(0 if freeze_base else adapts[0], (_freeze_base(program.base), True))
    return listed


def _freeze_base(base: Base) -> Freeze:
    """Freeze everything, except what the checkpoint did not hold: a new head has to train."""
    terms = ",".join(f"!path:{name}" for name in base.fresh)
    return Freeze(target=f"all,{terms}" if terms else "all")


def _plan_pass(program: Program, pass_: Pass, auto: bool, probe: Probe) -> PassPlan:
    if isinstance(pass_, SelectPass):
        return _plan_selection(program, pass_, auto, probe)
    assert isinstance(pass_, RewritePass)
    if any(e.id == pass_.entry_id for e in program.journal):
        raise PassError(_taken(pass_))
    if any(e.kind == "merge" for e in program.journal):
        raise PassError(
            f"{pass_.name}: the program is merged; undo the merge, or save it with --format hf first"
        )
    sites = pass_.find(program.view)
    live = live_nodes(program.graph)
    late = {r.key: e.id for e in program.journal if e.pass_name in pass_.before for r in e.sites}
    plans = tuple(_plan_site(pass_, site, live, probe, late.get(site.key)) for site in sites)
    trains: dict[str, bool] = {}
    for planned in plans:
        if planned.refusal is None:
            trains.update(pass_.selects(planned.site))
    asked = pass_.target or pass_.default_target
    read_apart = asked is not None and not isinstance(pass_, GraphPass)
    notes = target.readings_differ(program.sites.sites, asked) if read_apart and asked else ()
    selection = checked(program, pass_.entry_id, Selection(trains))
    if pass_.pacing is not None:
        window, unit = pass_.pacing
        said = Entry(pass_.entry_id, pass_.name, "rewrite", windows={pass_.entry_id: window}, unit=unit)
        Schedule.of([*program.journal, said])  # refuses two units in one program
    misses = pass_.misses(program.view) if isinstance(pass_, PatternPass) else ()
    return PassPlan(pass_, plans, selection, notes=tuple(notes), misses=misses)


def _plan_site(
    pass_: RewritePass, site: Site, live: set[fx.Node], probe: Probe, late: str | None = None
) -> SitePlan:
    """late: an entry at this site that the pass had to precede."""
    if live.isdisjoint(tail(call.node) for call in site.calls):
        gone = next((entry for entry in (replaced_by(call.node) for call in site.calls) if entry), None)
        refusal: str | None = (
            f"{gone!r} has put another op in its place" if gone else "no output of the model depends on it"
        )
    elif site.kind not in pass_.on:
        refusal = f"{pass_.name} works on {', '.join(pass_.on)}, and this is a {site.kind} weight"
    elif site.selected_parts and not pass_.partial:
        refusal = f"it is a fused projection and {pass_.name} cannot act on a part of it; target {site.role}"
    else:
        site = replace(site, measured=probe)
        hindrance = probe.program.base.hindrance
        refusal = pass_.check(site) or (hindrance(site) if hindrance else None)
        if late and late not in (refusal or ""):  # a reason of the pass's own that names the entry says more
            refusal = f"it carries {late!r}, and {pass_.name} has to come before that; undo {late!r} first"
    if refusal is not None:
        return SitePlan(site, refusal)
    decided = site.deciding(pass_.decide(site))
    return SitePlan(decided, None, pass_.tensors(decided))


def _plan_selection(program: Program, pass_: SelectPass, auto: bool, probe: Probe) -> PassPlan:
    asked = pass_.target or pass_.default_target
    if asked is None:
        raise PassError(f"pass {pass_.name!r} needs a target, such as --target 'embed.*'")
    chosen = select(program, asked)
    selection = checked(program, pass_.entry_id, pass_.selection(Candidates(program, chosen, probe)))
    said = Entry(pass_.entry_id, pass_.name, "select", trains=selection.trains, windows=selection.windows)
    Schedule.of([*program.journal, replace(said, unit=selection.unit)])  # refuses two units in one program
    return PassPlan(pass_, selection=selection, auto=auto, notes=_stops(program, selection))


def _stops(program: Program, selection: Selection) -> tuple[str, ...]:
    """What earlier passes let train and a selection does not: of one parameter the last that names it counts."""
    notes = []
    for entry in program.journal:
        if entry.auto:
            continue
        asked = {program.names.get(n, (n,))[0] for n, trains in entry.trains.items() if trains}
        # Weights that a pass made like the base's own are selected like these.
        asked |= {n for n in entry.tensor_names if n in program.names and n not in program.base.tensors}
        stopped = [n for n in asked if selection.trains.get(n) is False and program.trains(n)]
        if stopped:
            notes.append(
                f"{len(stopped)} of the {len(asked)} parameters that {entry.id!r} lets train stop; name that pass last "
                f"to keep them"
            )
    return tuple(notes)


def apply(
    program: Program,
    passes: Sequence[Pass],
    freeze_base: bool | None,
    verify: bool,
    data: Sequence[InputSet] = (),
) -> Program:
    """See Program.apply."""
    from surgery.program import Program

    if not passes and not freeze_base:
        raise PassError("no pass was given; see `surgery passes`")
    checking = verify and program.base.in_memory
    tensors, changed = program.copies()
    program = Program(program.base, program.journal, tensors, changed, program.graph, program.reports)
    reference: Any = None  # the outputs that a rewrite is held to, run when one needs them
    for pass_, auto in _complete(program, passes, freeze_base):
        begun = perf_counter()
        probe = Probe(program, data)
        planned = _plan_pass(program, pass_, auto, probe)
        entry = entry_of(program, planned)
        kept = {entry.before[name]: value for name, value in trained_before(program, entry).items()}
        if isinstance(pass_, RewritePass):
            if checking and reference is None:
                reference = program.run()
            graph, tensors = _rewrite(program, pass_, planned, entry)
            tensors.update(kept)
            adapted = Program(
                program.base, program.journal.add(entry), tensors, program.changed, graph, program.reports
            )
            observed = observe(reference, adapted.run(), pass_.extends) if checking else None
        else:
            masks = {entry.masks[n]: mask for n, mask in planned.selection.masks.items()}
            tensors = {**program.tensors, **masks, **kept}
            adapted = Program(
                program.base, program.journal.add(entry), tensors, program.changed, program.graph
            )
            adapted.reports = program.reports
            observed = Observed(True, 0.0)
            # torch takes other ways, and rounds otherwise, where a tensor needs no gradient.
            reference = None
        declared = pass_.contract.on(program.precision)
        if observed is not None and not observed.within(declared):
            raise PassError(
                f"{entry.id} declares {declared}, but the outputs moved by {observed.difference:.1e} of "
                f"their scale on the example inputs; nothing was changed"
            )
        if observed is not None and checking and (pass_.extends or not observed.equal):
            reference = adapted.run()
        why = (
            "" if observed else ("verification was turned off" if not verify else "weights are not in memory")
        )
        entry = replace(
            entry, numerics={"declared": str(declared), "observed": str(observed) if observed else why}
        )
        adapted.journal = program.journal.add(entry)
        report = PassReport(entry, planned, observed, why, perf_counter() - begun)
        adapted.reports = (*program.reports, report) if program.journal.entries else (report,)
        plugins = program.base.plugins
        for impl in plugins.implementations("surgery_after_pass"):
            plugins.call(impl, program=adapted, result=report)
        probe.clear()
        program = adapted
    return program


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


def _rewrite(
    program: Program, pass_: RewritePass, planned: PassPlan, entry: Entry
) -> tuple[fx.Graph, dict[str, Tensor]]:
    tensors = dict(program.tensors)
    for site_plan, record in zip(planned.accepted, entry.sites, strict=True):
        site = site_plan.site
        place = _device(program, site)
        for name, spec in site_plan.specs.items():
            tensors[record.tensors[name]] = spec.make(site.float_dtype, place)
    graph = copy_graph(program.graph)
    plugins = program.base.plugins
    view = View(graph, program.names, plugins.weight_ops)
    sites = replay.find_sites(entry, replay.places_of(pass_, view))
    replay.rewrite_entry(entry, pass_, graph, MetaCache(graph), sites, tensors, view)
    graph.lint()
    return graph, tensors


def _device(program: Program, site: Site) -> device:
    held = program.base.tensors.get(site.weight or "")
    return held.device if held is not None else device("cpu")


def describe_options(pass_: type[Configured]) -> list[dict[str, Any]]:
    """The options of a pass, say, from its schema: name, type, default, description."""
    rows = []
    for name, info in pass_.model_fields.items():
        annotation = info.annotation
        shown = getattr(annotation, "__name__", None) if not hasattr(annotation, "__args__") else None
        rows.append(
            {
                "option": "--" + (info.alias or name).replace("_", "-"),
                "type": shown or str(annotation).replace("typing.", "").replace(" | None", ""),
                "default": None if info.is_required() else info.default,
                "required": info.is_required(),
                "description": info.description or "",
            }
        )
    return rows
