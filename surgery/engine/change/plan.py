"""Planning passes on a program: order, targeted sites, refusals, and tensors to add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from surgery.common.errors import PassError, TargetError
from surgery.common.progress import track
from surgery.engine.base import Base
from surgery.engine.change.freeze import Freeze
from surgery.engine.change.order import in_order
from surgery.engine.change.plans import PassPlan, SitePlan
from surgery.engine.change.selection import Candidates, SelectPass, checked, select
from surgery.engine.contract.base import GraphPass, Pass, RewritePass
from surgery.engine.contract.pattern import PatternPass
from surgery.engine.contract.selection import Selection
from surgery.engine.journal import Entry
from surgery.engine.probe import Probe
from surgery.engine.schedule import Schedule
from surgery.engine.state import State
from surgery.graph import targets
from surgery.graph.graphs import live_nodes
from surgery.graph.marks import output_with_adapters
from surgery.graph.rewrite.current import replaced_by
from surgery.graph.sites import Site
from surgery.graph.unread import in_words, targeted


def complete(program: State, passes: Sequence[Pass], freeze_base: bool | None) -> list[tuple[Pass, bool]]:
    """The passes in order, with a Freeze pass added if the base is to be frozen.

    With freeze_base=True it comes first. With None it comes just before the first adapter, so that weights created by
    earlier passes of the pipeline (low-rank factors, say) are frozen too.

    Args:
        program: The program.
        passes: The passes.
        freeze_base: True: freeze the base. None: freeze it if there is an adapter and no selection. False: do not.

    Returns:
        (pass, True if it was added here) for each pass.

    Raises:
        PassError: An argument is not a pass, or the passes cannot be ordered.
    """
    for pass_ in passes:
        if not isinstance(pass_, Pass):
            what = f"the class {pass_.__name__}" if isinstance(pass_, type) else repr(pass_)
            raise PassError(
                f"{what} is not a pass that can be applied; give an instance, such as Lora(target='attn.*')"
            )
    passes = in_order(passes, program.journal)
    selects = any(isinstance(p, SelectPass) for p in passes) or any(
        e.kind == "select" for e in program.journal
    )
    adapts = [i for i, p in enumerate(passes) if isinstance(p, RewritePass) and p.effect.freezes_base]
    listed = [(p, False) for p in passes]
    if freeze_base is True or (freeze_base is None and adapts and not selects):
        listed.insert(0 if freeze_base else adapts[0], (_freeze_base(program.base), True))
    return listed


def _freeze_base(base: Base) -> Freeze:
    """A Freeze of all parameters except those missing from the checkpoint: a new head has to train."""
    terms = ",".join(f"!path:{name}" for name in base.fresh)
    return Freeze(target=f"all,{terms}" if terms else "all")


def plan_pass(program: State, pass_: Pass, auto: bool, probe: Probe) -> PassPlan:
    """Plan one pass.

    Args:
        program: The program that the pass would be applied to.
        pass_: The pass.
        auto: True if the pipeline added the pass, not the user.
        probe: Measurements on the program.

    Raises:
        TargetError: The target names no site.
        PassError: The pass is applied already, or the pass makes an invalid selection.
    """
    if isinstance(pass_, SelectPass):
        return _plan_selection(program, pass_, auto, probe)
    assert isinstance(pass_, RewritePass)
    if any(e.id == pass_.entry_id for e in program.journal):
        raise PassError(taken(pass_))
    asked = pass_.target or pass_.default_target
    try:
        sites = pass_.find(program.view)
    except TargetError as error:
        missed = targeted(program.view, asked) if asked else {}
        if not missed:
            raise
        raise TargetError(
            f"{str(error).partition(';')[0]}; it names {in_words(missed)}, and no pass rewrites these ops; "
            f"train them with --pass full --target {asked!r}"
        ) from None
    live = live_nodes(program.graph)
    late = {r.key: e.id for e in program.journal if e.pass_name in pass_.before for r in e.sites}
    plans = tuple(
        _plan_site(pass_, site, live, probe, late.get(site.key))
        for site in track(sites, f"planning {pass_.name}")
    )
    trains: dict[str, bool] = {}
    for planned in plans:
        if planned.refusal is None:
            trains.update(pass_.outcome(planned.site).trains)
    read_apart = asked is not None and not isinstance(pass_, GraphPass)
    notes = list(targets.readings_differ(program.sites.sites, asked)) if read_apart and asked else []
    if pass_.target is not None and (missed := targeted(program.view, pass_.target)):
        notes.append(
            f"the target also names {in_words(missed)}, and no pass rewrites these ops; --pass full trains them"
        )
    selection = checked(program, pass_.entry_id, Selection(trains))
    gradual = pass_.gradual
    if gradual is not None:
        windows = {pass_.entry_id: gradual.window}
        said = Entry(pass_.entry_id, pass_.name, "rewrite", windows=windows, unit=gradual.unit)
        # Raises PassError if the program has a schedule in another unit.
        Schedule.of([*program.journal, said])
    misses = pass_.misses(program.view) if isinstance(pass_, PatternPass) else ()
    return PassPlan(pass_, plans, selection, notes=tuple(notes), misses=misses)


def _plan_site(
    pass_: RewritePass, site: Site, live: set[fx.Node], probe: Probe, late: str | None = None
) -> SitePlan:
    """Plan one site; `late` is the id of an entry at the site that should have come after the pass."""
    if live.isdisjoint(output_with_adapters(call.node) for call in site.calls):
        gone = next((entry for entry in (replaced_by(call.node) for call in site.calls) if entry), None)
        refusal: str | None = (
            f"{gone!r} has put another op in its place" if gone else "no output of the model depends on it"
        )
    elif site.kind not in pass_.on:
        article = "an" if site.kind[0] in "aeiou" else "a"
        refusal = f"{pass_.name} works on {', '.join(pass_.on)}, and this is {article} {site.kind} weight"
    elif site.selected_parts and not pass_.effect.partial:
        refusal = f"it is a fused projection and {pass_.name} cannot act on a part of it; target {site.role}"
    else:
        site = replace(site, measured=probe)
        hindrance = probe.program.base.hindrance
        refusal = pass_.check(site) or (hindrance(site) if hindrance else None)
        # A refusal by the pass itself that names the entry is more specific.
        if late and late not in (refusal or ""):
            refusal = f"it carries {late!r}, and {pass_.name} has to come before that; undo {late!r} first"
    if refusal is not None:
        return SitePlan(site, refusal)
    decided = site.deciding(pass_.decide(site))
    return SitePlan(decided, None, pass_.tensors(decided))


def _plan_selection(program: State, pass_: SelectPass, auto: bool, probe: Probe) -> PassPlan:
    """Plan a pass that selects parameters."""
    asked = pass_.target or pass_.default_target
    if asked is None:
        raise PassError(f"pass {pass_.name!r} needs a target, such as --target 'embed.*'")
    chosen = select(program, asked)
    selection = checked(program, pass_.entry_id, pass_.selection(Candidates(program, chosen, probe)))
    said = Entry(pass_.entry_id, pass_.name, "select", trains=selection.trains, windows=selection.windows)
    # Raises PassError if the program has a schedule in another unit.
    Schedule.of([*program.journal, replace(said, unit=selection.unit)])
    return PassPlan(pass_, selection=selection, auto=auto, notes=_stops(program, selection))


def _stops(program: State, selection: Selection) -> tuple[str, ...]:
    """Notes on parameters that earlier passes let train and the selection stops, since the last selection wins."""
    notes = []
    for entry in program.journal:
        if entry.auto:
            continue
        asked = {program.names.get(n, (n,))[0] for n, trains in entry.trains.items() if trains}
        # Weights that a pass created are selected like the base's own, although no entry names them as training.
        asked |= {n for n in entry.tensor_names if n in program.names and n not in program.base.tensors}
        stopped = [n for n in asked if selection.trains.get(n) is False and program.trains(n)]
        if stopped:
            notes.append(
                f"stops {len(stopped)} of the {len(asked)} parameters that {entry.id!r} trains; apply {entry.id!r} "
                f"last to train them"
            )
    return tuple(notes)


def taken(pass_: Pass) -> str:
    """Message for a pass that is applied already under the same name."""
    return f"{pass_.entry_id!r} is applied already; give this one a name with --as (label= in Python)"
