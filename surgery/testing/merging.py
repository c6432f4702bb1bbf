"""Checks of merging: tolerance, weights, tied weights, and the graph afterwards."""

from __future__ import annotations

from surgery.common.errors import PassError
from surgery.engine.base import hash_graph
from surgery.engine.contract.base import GraphPass, merges
from surgery.engine.fold import foldable, lengthening
from surgery.engine.program import Program
from surgery.engine.replay import live_entries, pass_of
from surgery.graph.sites import Site
from surgery.testing.case import Case, Skip, exactly, fingerprint
from surgery.testing.graph import live_parameters


def _merged(case: Case, program: Program) -> Program:
    """The merged program; raises Skip if the pass cannot be merged, or not in this program."""
    entry = program.journal.entries[-1].id
    if case.rewrite.simplify is not None:
        return program.merge(verify=False)
    if not merges(case.rewrite):
        try:
            program.merge(verify=False)
        except PassError:
            raise Skip("the pass merges nothing (its class defines no merge)") from None
        raise Skip("the pass merges nothing (its class defines no merge); others in this program do")
    _, kept = foldable(program.base, program.journal, program.sites, program.tensors)
    if entry in kept:
        raise Skip(f"not folded here: {kept[entry]}")
    return program.merge(verify=False)


def _gap(case: Case, program: Program) -> float:
    """Relative difference of merged and unmerged outputs."""
    return case.compare(program, _merged(case, program), case.inputs + case.reaching).difference


def _culprit(case: Case) -> str:
    """Path of the first site where the pass alone merges wrongly, or ""."""
    for planned in case.accepted:
        if _gap(case, case.fresh(case.on_one_site(planned.site))) > case.merge_tolerance:
            return planned.site.path
    return ""


def merge(case: Case) -> str:
    """Merged and unmerged outputs agree with random parameters, for one application and for two."""
    gap = _gap(case, case.random)
    if not gap <= case.merge_tolerance:
        raise case.error(
            "merge",
            f"merging moves the outputs by {gap:.1e} of their scale, more than {case.merge_tolerance:.1e}",
            _culprit(case),
        )
    again = case.pass_.model_copy(update={"label": "stacked"})
    once = case.once_only(again)
    if once:
        return f"within {gap:.1e} of the scale; allowed {case.merge_tolerance:.1e}; {once}"
    stacked = case.fresh(again, case.random)
    twice = _gap(case, stacked)
    if not twice <= case.merge_tolerance:
        raise case.error(
            "merge", f"with two applications, merging moves the outputs by {twice:.1e} of their scale"
        )
    return f"within {gap:.1e} of the scale, stacked {twice:.1e}; allowed {case.merge_tolerance:.1e}"


def restored(case: Case) -> str:
    """After merging, names, nodes and wiring are the original ones, and the base is unchanged."""
    merged = _merged(case, case.random)
    _, kept = foldable(case.random.base, case.random.journal, case.random.sites, case.random.tensors)
    names, original = set(merged.state()), set(case.base_before)
    if hash_graph(merged.base.captured.graph) != case.base_hash:
        raise case.error("restored", "merging changed the captured graph of the base")
    for name, tensor in merged.base.tensors.items():
        if fingerprint(tensor) != case.base_before[name]:
            raise case.error("restored", f"merging changed {name} of the base itself")
    if case.rewrite.simplify is not None:
        return _simplified(case, merged)
    if kept:
        raise Skip(f"an earlier adapter of the program is not folded: {', '.join(kept)}")
    if names != original:
        raise case.error("restored", f"names differ: {sorted(names ^ original)[0]}")
    own = [n for p in case.accepted for n in (p.site.weight, p.site.bias) if n is not None]
    longer = {alias for n in _lengthened(case, own) for alias in case.program.base.names.get(n, ())}
    for name, tensor in merged.state().items():
        if fingerprint(tensor)[:2] != case.base_before[name][:2] and name not in longer:
            raise case.error("restored", f"{name} has another shape or dtype than in the base")
    count, expected = len(merged.graph.nodes), len(case.program.base.captured.graph.nodes)
    if count != expected or hash_graph(merged.graph) != case.base_hash:
        raise case.error(
            "restored", f"the graph is not the original one ({count} nodes instead of {expected})"
        )
    changed = {n for n, t in merged.state().items() if fingerprint(t) != case.base_before[n]}
    allowed = {*own, *longer}
    allowed |= {r.key.owner for e in case.program.journal for r in e.sites} | case.entry.trains.keys()
    if changed - allowed and not case.program.changed:
        raise case.error(
            "restored", f"merging changed {sorted(changed - allowed)[0]}, which is at no site of the pass"
        )
    return f"{len(names)} names, {count} nodes; {len(changed)} tensors hold the merge"


def _simplified(case: Case, merged: Program) -> str:
    """After simplification, the replaced tensors are gone, and all other tensors are unchanged."""
    (plain,) = [e for e in live_entries(merged.journal) if e.id == case.entry.id]
    gone = set(case.entry.tensor_names) - set(plain.tensor_names)
    state, before = merged.state(), case.random.state()
    if not gone or gone & set(state):
        left = sorted(gone & set(state)) or ["every tensor"]
        raise case.error(
            "restored", f"{left[0]} is still there after merging, although the pass defines a simpler form"
        )
    read = live_parameters(merged.graph)
    for name in plain.tensor_names:
        if name not in state or name not in read:
            raise case.error("restored", f"{name} was computed by the merge, but no output depends on it")
    for name, tensor in state.items():
        if name in before and fingerprint(tensor) != fingerprint(before[name]):
            raise case.error("restored", f"merging changed {name}")
    back = merged.undo(merged.journal.entries[-1].id)
    if set(back.state()) != set(before) or not case.compare(case.random, back).equal:
        raise case.error(
            "restored", "undoing the merge does not restore the tensors that it simplified, bit for bit"
        )
    return f"{len(gone)} tensors gone for {len(plain.tensor_names)}; undone, bit for bit"


def _lengthened(case: Case, own: list[str]) -> list[str]:
    """Weights that this pass, or an earlier one of the program, makes longer when it is folded."""
    program = case.random
    entries = [
        entry
        for entry in program.journal
        if entry.kind == "rewrite" and merges(pass_of(entry, program.base.plugins))
    ]
    longer = lengthening(program.base, entries, program.tensors, program.sites)
    found = list(own) if any(entry.id == case.entry.id for entry in longer) else []
    for entry in longer:
        if entry.id != case.entry.id:
            found += [record.key.owner for record in entry.sites]
    return found


def weights(case: Case) -> str:
    """Weight 0 equals the program without the pass, 1 the trained one; 0.5 differs and merges, or is refused."""
    name = case.entry.id
    _ = case.rewrite
    if not case.compare(case.program, case.random.weighted({name: 0.0})).equal:
        raise case.error("weights", "with weight 0 the outputs differ from those without the pass")
    if not case.compare(case.random, case.random.weighted({name: 1.0})).equal:
        raise case.error("weights", "with weight 1 the outputs differ from the trained ones")
    if not case.rewrite.effect.scalable:
        try:
            case.random.weighted({name: 0.5})
        except PassError:
            return "left out is exact; it cannot be scaled, and says so"
        raise case.error("weights", "weight 0.5 was accepted although the pass is not scalable")
    half = case.random.weighted({name: 0.5})
    if case.trainable and case.compare(case.random, half).equal:
        raise case.error("weights", "weight 0.5 has the same outputs as 1: rewrite has to use g.weight")
    if not merges(case.rewrite):
        return "left out is exact; a half differs; the pass merges nothing"
    gap = _gap(case, half)
    if not gap <= case.merge_tolerance:
        raise case.error("weights", f"at weight 0.5 merged and unmerged differ by {gap:.1e} of their scale")
    return f"left out is exact; a half merges within {gap:.1e}"


def tied(case: Case) -> str:
    """Tied weights stay one tensor with the same bits; merging at one use does not change the others."""
    _ = case.rewrite
    places = list(case.program.sites)
    if isinstance(case.pass_, GraphPass):
        places = case.pass_.candidates(case.program.view)
    sites = [site for site in places if site.tied]
    if not sites:
        raise Skip("the program has no tied weight, or none that the pass acts on")
    here = case.pass_.model_copy(update={"target": exactly(sites)})
    plan = case.program.plan(here, freeze_base=False).passes[-1]
    if not plan.accepted:
        first = next(iter(plan.refused), None)
        raise Skip(
            f"{first.site.path} is tied and refused: {first.refusal}"
            if first
            else "the pass passes tied weights over"
        )
    adapted = case.fresh(here)
    for planned in plan.accepted:
        _still_tied(case, adapted, planned.site)
        _still_tied(case, adapted.undo(case.entry.id), planned.site)
    paths = ", ".join(p.site.path for p in plan.accepted)
    if not merges(case.rewrite):
        return f"{paths}: stays tied; the pass merges nothing"
    gap = _gap(case, adapted)
    if not gap <= max(case.merge_tolerance, 1e-5):
        raise case.error(
            "tied", f"merging moves the outputs by {gap:.1e} of their scale", plan.accepted[0].site.path
        )
    return f"{paths}: stays tied; merges within {gap:.1e}"


def _still_tied(case: Case, program: Program, site: Site) -> None:
    """Raise ConformanceError if a tied weight is no longer one tensor, or has changed without being selected."""
    state = program.state()
    for name in (site.weight, *site.tied):
        if name is None:
            continue
        if state[name] is not state[str(site.weight)]:
            raise case.error("tied", f"{name} and {site.weight} are no longer one tensor", site.path)
        entry = next((e for e in program.journal if e.id == case.entry.id), None)
        selected = entry is not None and entry.trains.get(program.names[name][0], False)
        if not selected and fingerprint(state[name]) != case.before[name]:
            raise case.error("tied", f"{name} has changed", site.path)
