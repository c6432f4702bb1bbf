"""Checks of merging: tolerance, weights, ties, and what is left in the graph afterwards."""

from __future__ import annotations

from surgery.common.errors import PassError
from surgery.engine.base import hash_graph
from surgery.engine.contract.base import GraphPass
from surgery.engine.fold import foldable
from surgery.engine.program import Program
from surgery.engine.replay import live_entries, pass_of
from surgery.graph.sites import Site
from surgery.testing.case import Case, Skip, exactly, fingerprint
from surgery.testing.graph import live_parameters


def _merged(case: Case, program: Program) -> Program:
    """The program merged; skips the check where the pass, or this program, has nothing to fold."""
    entry = program.journal.entries[-1].id
    if case.rewrite.simplifies:
        return program.merge(verify=False)
    if not case.rewrite.mergeable:
        try:
            program.merge(verify=False)
        except PassError:
            raise Skip("the pass merges nothing (mergeable is False)") from None
        raise Skip("the pass merges nothing (mergeable is False); others in this program do")
    _, kept = foldable(program.base, program.journal, program.sites)
    if entry in kept:
        raise Skip(f"not folded here: {kept[entry]}")
    return program.merge(verify=False)


def _gap(case: Case, program: Program) -> float:
    return case.compare(program, _merged(case, program), case.inputs + case.reaching).difference


def _culprit(case: Case) -> str:
    """The first site whose merge alone is wrong."""
    for planned in case.accepted:
        if _gap(case, case.fresh(case.on_one_site(planned.site))) > case.merge_tolerance:
            return planned.site.path
    return ""


def merge(case: Case) -> str:
    """Merged against unmerged with random parameters, alone and with a second application on top."""
    gap = _gap(case, case.random)
    if not gap <= case.merge_tolerance:
        raise case.error(
            "merge",
            f"merging moves the outputs by {gap:.1e} of their scale, over {case.merge_tolerance:.1e}",
            _culprit(case),
        )
    again = case.pass_.model_copy(update={"label": "stacked"})
    once = case.once_only(again)
    if once:
        return f"within {gap:.1e} of the scale; allowed {case.merge_tolerance:.1e}; {once}"
    stacked = case.fresh(again, case.random)
    twice = _gap(case, stacked)
    if not twice <= case.merge_tolerance:
        raise case.error("merge", f"two on top of each other merge to within {twice:.1e} only")
    return f"within {gap:.1e} of the scale, stacked {twice:.1e}; allowed {case.merge_tolerance:.1e}"


def restored(case: Case) -> str:
    """After merging: the original names, nodes and wiring, and the base's captured graph as it was."""
    merged = _merged(case, case.random)
    _, kept = foldable(case.random.base, case.random.journal, case.random.sites)
    names, original = set(merged.state()), set(case.base_before)
    if hash_graph(merged.base.captured.graph) != case.base_hash:
        raise case.error("restored", "merging changed the captured graph of the base")
    for name, tensor in merged.base.tensors.items():
        if fingerprint(tensor) != case.base_before[name]:
            raise case.error("restored", f"merging wrote into {name} of the base itself")
    if case.rewrite.simplifies:
        return _simplified(case, merged)
    if kept:
        raise Skip(f"an earlier adapter of the program is not folded: {', '.join(kept)}")
    if names != original:
        raise case.error("restored", f"names differ: {sorted(names ^ original)[0]}")
    own = [n for p in case.accepted for n in (p.site.weight, p.site.bias) if n is not None]
    longer = {alias for n in _lengthened(case, own) for alias in case.program.base.names.get(n, ())}
    for name, tensor in merged.state().items():
        if fingerprint(tensor)[:2] != case.base_before[name][:2] and name not in longer:
            raise case.error("restored", f"{name} has another shape or dtype than the base's")
    count, expected = len(merged.graph.nodes), len(case.program.base.captured.graph.nodes)
    if count != expected or hash_graph(merged.graph) != case.base_hash:
        raise case.error("restored", f"the graph is not the original one ({count} nodes, were {expected})")
    changed = {n for n, t in merged.state().items() if fingerprint(t) != case.base_before[n]}
    allowed = {*own, *longer}
    allowed |= {r.key.owner for e in case.program.journal for r in e.sites} | case.entry.trains.keys()
    if changed - allowed and not case.program.changed:
        raise case.error(
            "restored", f"merging changed {sorted(changed - allowed)[0]}, which is at no site of it"
        )
    return f"{len(names)} names, {count} nodes; {len(changed)} tensors hold the merge"


def _simplified(case: Case, merged: Program) -> str:
    """What was there only to compute the plainer form is gone; the base and what else there was is as it was."""
    (plain,) = [e for e in live_entries(merged.journal) if e.id == case.entry.id]
    gone = set(case.entry.tensor_names) - set(plain.tensor_names)
    state, before = merged.state(), case.random.state()
    if not gone or gone & set(state):
        left = sorted(gone & set(state)) or ["every tensor"]
        raise case.error(
            "restored", f"{left[0]} is still there after merging, and the pass says it has a plainer form"
        )
    read = live_parameters(merged.graph)
    for name in plain.tensor_names:
        if name not in state or name not in read:
            raise case.error("restored", f"{name} was computed by the merge, and no output depends on it")
    for name, tensor in state.items():
        if name in before and fingerprint(tensor) != fingerprint(before[name]):
            raise case.error("restored", f"merging changed {name}")
    back = merged.undo(merged.journal.entries[-1].id)
    if set(back.state()) != set(before) or not case.compare(case.random, back).equal:
        raise case.error("restored", "undoing the merge does not give back what it simplified, bit for bit")
    return f"{len(gone)} tensors gone for {len(plain.tensor_names)}; undone, bit for bit"


def _lengthened(case: Case, own: list[str]) -> list[str]:
    """Weights that this pass, or an earlier one of the program, folds into a longer one."""
    found = list(own) if case.rewrite.lengthens else []
    for entry in case.program.journal:
        if entry.kind == "rewrite" and getattr(pass_of(entry, case.program.base.plugins), "lengthens", False):
            found += [record.key.owner for record in entry.sites]
    return found


def weights(case: Case) -> str:
    """Weight 0 is the program without it, 1 as trained, a half in between and merged alike."""
    name = case.entry.id
    _ = case.rewrite
    if not case.compare(case.program, case.random.weighted({name: 0.0})).equal:
        raise case.error("weights", "left out (weight 0) it is not bit for bit what it was without it")
    if not case.compare(case.random, case.random.weighted({name: 1.0})).equal:
        raise case.error("weights", "weight 1 is not bit for bit as trained")
    if not case.rewrite.can_weigh:
        try:
            case.random.weighted({name: 0.5})
        except PassError:
            return "left out is exact; it cannot be scaled, and says so"
        raise case.error("weights", "it is not weightable, and weight 0.5 was accepted")
    half = case.random.weighted({name: 0.5})
    if case.trainable and case.compare(case.random, half).equal:
        raise case.error("weights", "weight 0.5 is the same as 1: rewrite has to use g.weight")
    if not case.rewrite.mergeable:
        return "left out is exact; a half differs; the pass merges nothing"
    gap = _gap(case, half)
    if not gap <= case.merge_tolerance:
        raise case.error("weights", f"at weight 0.5 merged and unmerged differ by {gap:.1e} of their scale")
    return f"left out is exact; a half merges within {gap:.1e}"


def tied(case: Case) -> str:
    """Tied weights stay one tensor, with their bits, until a merge, which leaves their other uses alone."""
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
            f"{first.site.path} is tied, and refused: {first.refusal}"
            if first
            else "the pass passes tied weights over"
        )
    adapted = case.fresh(here)
    for planned in plan.accepted:
        _still_tied(case, adapted, planned.site)
        _still_tied(case, adapted.undo(case.entry.id), planned.site)
    paths = ", ".join(p.site.path for p in plan.accepted)
    if not case.rewrite.mergeable:
        return f"{paths}: stays tied; the pass merges nothing"
    gap = _gap(case, adapted)
    if not gap <= max(case.merge_tolerance, 1e-5):
        raise case.error(
            "tied", f"merging moves the outputs by {gap:.1e} of their scale", plan.accepted[0].site.path
        )
    return f"{paths}: stays tied; merges within {gap:.1e}"


def _still_tied(case: Case, program: Program, site: Site) -> None:
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
