"""Planning and applying a pipeline of passes: tensors, graph rewrites, comparison of outputs, and journal entries."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn, random

from surgery.common.errors import PassError
from surgery.common.guard import is_core, reported
from surgery.common.progress import stage, track
from surgery.common.threads import one_at_a_time
from surgery.engine import replay
from surgery.engine.change.entries import entry_of, trained_before
from surgery.engine.change.plan import complete, plan_pass, taken
from surgery.engine.change.plans import PassPlan, PassReport, PlanReport
from surgery.engine.change.rebase import rebase
from surgery.engine.contract.base import GraphPass, Pass, RewritePass
from surgery.engine.contract.observe import Observed, observe
from surgery.engine.dropped import refuse_dropped
from surgery.engine.journal import Entry
from surgery.engine.probe import InputSet, Probe
from surgery.engine.state import State
from surgery.graph.fake import MetaCache
from surgery.graph.graphs import copy_graph
from surgery.graph.outputs import named_outputs
from surgery.graph.view import View

S = TypeVar("S", bound=State)

# A pass may add 20 times as many values as the base has; 200 MB in float32 are always allowed.
_LARGEST_GROWTH, _ALWAYS_ALLOWED = 20, 50_000_000
_NAMED = 3  # refused sites that a warning names


def plan(
    program: State,
    passes: Sequence[Pass],
    freeze_base: bool | None = None,
    data: Sequence[InputSet] = (),
) -> PlanReport:
    """Report what `apply` would do; see Program.plan.

    Args:
        program: The program; it is not changed.
        passes: Passes to plan.
        freeze_base: As for Program.apply.
        data: As for Program.apply.

    Raises:
        TargetError: A target names no site.
        PassError: The passes cannot be applied together, or an argument is not a pass.
    """
    if program.journal.merged:
        program = rebase(program)
    ordered = complete(program, passes, freeze_base)
    probe = Probe(program, data)
    rewrites = [p for p, _ in ordered if isinstance(p, RewritePass)]
    for index, rewrite in enumerate(rewrites):
        if any(rewrite.entry_id == other.entry_id for other in rewrites[:index]):
            raise PassError(taken(rewrite))
    plans: list[PassPlan] = []
    with random.fork_rng(devices=[]):
        for index, (pass_, auto) in enumerate(ordered):
            planned = plan_pass(program, pass_, auto, probe)
            plans.append(planned)
            # Later passes that depend on the result are planned on a copy with this pass applied.
            if planned.accepted and _is_seen(pass_, [p for p, _ in ordered[index + 1 :]]):
                program = apply(program, [pass_], False, False, data)
                probe.clear()
                probe = Probe(program, data)
    probe.clear()
    return PlanReport(tuple(plans))


def _is_seen(pass_: Pass, following: Sequence[Pass]) -> bool:
    """True if the following passes can only be planned on the program with this pass applied."""
    replacing = any(
        isinstance(p, RewritePass) and (p.effect.replaces_weight or p.effect.makes_zeros)
        for p in (pass_, *following)
    )
    return bool(following) and (
        isinstance(pass_, GraphPass) or (isinstance(pass_, RewritePass) and replacing)
    )


@one_at_a_time
def apply(
    program: S,
    passes: Sequence[Pass],
    freeze_base: bool | None,
    verify: bool,
    data: Sequence[InputSet] = (),
) -> S:
    """Apply passes to a program; see Program.apply.

    Args:
        program: The program; it is not changed.
        passes: Passes to apply.
        freeze_base: Freeze all existing parameters first; None: only before an adapter, without a selection.
        verify: Compare the outputs on the example inputs with the numerics that each pass declares.
        data: Inputs to measure on, a sequence of (args, kwargs).

    Raises:
        TargetError: A target names no site.
        PassError: A pass is refused at every site, or changes the outputs by more than it declares.
    """

    if not passes and not freeze_base:
        raise PassError("no pass was given; see `surgery passes`")
    if program.journal.merged:
        program = rebase(program)
    checking = verify and program.base.in_memory
    tensors, changed = program.copies()
    program = program.derive(tensors=tensors, changed=changed, graph=program.graph, reports=program.reports)
    # Outputs before the next rewrite, on the example inputs; computed when a rewrite needs them.
    reference: Any = None
    call = 1 + max((entry.call for entry in program.journal), default=0)
    for pass_, auto in complete(program, passes, freeze_base):
        begun = perf_counter()
        more = pass_.expectations.adds_outputs
        probe = Probe(program, data)
        planned = plan_pass(program, pass_, auto, probe)
        entry = replace(entry_of(program, planned), call=call)
        kept = {entry.before[name]: value for name, value in trained_before(program, entry).items()}
        if isinstance(pass_, RewritePass):
            if checking and reference is None:
                with stage("running the example inputs"):
                    reference = program.run()
            graph, tensors, entry = _rewrite(program, pass_, planned, entry)
            tensors.update(kept)
            adapted = program.derive(
                program.journal.add(entry), tensors, graph=graph, reports=program.reports
            )
            _forget_labels(adapted, pass_)
            with stage(f"checking {entry.id}"):
                observed = observe(reference, adapted.run(), more) if checking else None
        else:
            masks = {entry.masks[n]: mask for n, mask in planned.selection.masks.items()}
            tensors = {**program.tensors, **masks, **kept}
            adapted = program.derive(
                program.journal.add(entry), tensors, graph=program.graph, reports=program.reports
            )
            observed = Observed(True, 0.0)
            # Run again: torch can use other kernels, which round differently, when a tensor needs no gradient.
            reference = None
        declared = pass_.numerics.on(program.precision)
        if observed is not None and not observed.within(declared):
            raise PassError(
                f"{entry.id} declares {declared}, but the outputs moved by {observed.difference:.1e} of "
                f"their scale on the example inputs; nothing was changed"
            )
        if observed is not None and checking and (more or not observed.equal):
            reference = adapted.run()
        why = (
            "" if observed else ("verification was turned off" if not verify else "weights are not in memory")
        )
        entry = replace(
            entry, numerics={"declared": str(declared), "observed": str(observed) if observed else why}
        )
        adapted.journal = program.journal.add(entry)
        _warn(entry.id, pass_, planned)
        report = PassReport(entry, planned, observed, why, perf_counter() - begun)
        adapted.reports = (*program.reports, report) if program.journal.entries else (report,)
        plugins = program.base.plugins
        for impl in plugins.implementations("surgery_after_pass"):
            plugins.call(impl, program=adapted, result=report)
        probe.clear()
        program = adapted
    return program


def _rewrite(
    program: State, pass_: RewritePass, planned: PassPlan, entry: Entry
) -> tuple[fx.Graph, dict[str, Tensor], Entry]:
    """A copy of the program's graph with an entry applied, all inserted tensors by name, and the entry."""
    _check_size(program, planned, entry)
    tensors = dict(program.tensors)
    pairs = list(zip(planned.accepted, entry.sites, strict=True))
    for site_plan, record in track(pairs, f"applying {entry.id}"):
        site = site_plan.site
        for name, spec in site_plan.specs.items():
            if record.tensors[name] in tensors:  # made at an earlier site, which shares it with this one
                continue
            with (
                nullcontext() if is_core(type(pass_)) else reported(type(pass_), "pass", "tensors", site.path)
            ):
                tensors[record.tensors[name]] = spec.make(site.float_dtype, program.device)
    if pass_.gradual is None and program.base.in_memory:
        entry = _sharing(program, entry, tensors)
    graph = copy_graph(program.graph)
    plugins = program.base.plugins
    view = View(graph, program.names, plugins.weight_ops)
    sites = replay.find_sites(entry, replay.places_of(pass_, view))
    replay.rewrite_entry(entry, pass_, graph, MetaCache(graph), sites, tensors, view)
    refuse_dropped(graph, replay.live_entries(program.journal), plugins, entry.id)
    graph.lint()
    return graph, tensors, entry


def _sharing(program: State, entry: Entry, tensors: dict[str, Tensor]) -> Entry:
    """The entry with one tensor where the uses of a tied weight got equal frozen ones, such as codes of a vocabulary.

    Args:
        program: The program before the entry.
        entry: The entry.
        tensors: Inserted tensors, by name; those that are not needed any more are removed.
    """
    # First name of a base tensor, name of the tensor in the pass -> names of the tensors so far.
    known: dict[tuple[str, str], list[str]] = {}
    records = []
    for record in entry.sites:
        owner = program.names.get(record.key.owner, (record.key.owner,))
        own = dict(record.tensors)
        for name, full in record.tensors.items() if len(owner) > 1 else ():
            there = known.setdefault((owner[0], name), [])
            same = next((other for other in there if _same(tensors[other], tensors[full])), None)
            if same is None:
                there.append(full)
            elif same != full:
                own[name] = same
                del tensors[full]
        records.append(replace(record, tensors=own))
    return replace(entry, sites=tuple(records))


def _same(a: Tensor, b: Tensor) -> bool:
    """True if two tensors are frozen and equal."""
    frozen = not isinstance(a, nn.Parameter) and not isinstance(b, nn.Parameter)
    return frozen and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _warn(name: str, pass_: Pass, planned: PassPlan) -> None:
    """Warn about targeted sites that a pass leaves out; the command line prints them from the report instead."""
    refused = (
        [f"{row.site.path}: {row.refusal}" for row in planned.refused] if pass_.target is not None else []
    )
    if refused:
        more = f"; and {len(refused) - _NAMED} more" if len(refused) > _NAMED else ""
        said = "; ".join(refused[:_NAMED]) + more
        warnings.warn(f"{name} leaves out {len(refused)} of {len(planned.sites)} sites: {said}", stacklevel=5)
    for note in planned.notes if isinstance(pass_, RewritePass) else ():
        warnings.warn(f"{name}: {note}", stacklevel=5)


def _forget_labels(program: State, pass_: RewritePass) -> None:
    """Remove class names that the outputs no longer have: of a new head, or of an output of another width."""
    is_new = pass_.effect.freezes_base and pass_.effect.adds_weights and math.isinf(pass_.numerics.tolerance)
    for output, names in list(program.labels.items()):
        node = named_outputs(program.graph).get(output)
        shape = getattr(node.meta.get("val"), "shape", ()) if node is not None else ()
        if is_new or (shape and shape[-1] != len(names)):
            del program.labels[output]


def _check_size(program: State, planned: PassPlan, entry: Entry) -> None:
    """Raise PassError if a pass would add far more than the model has: an option is wrong, or from a bad file."""
    sizes: dict[str, int] = {}
    for site_plan, record in zip(planned.accepted, entry.sites, strict=True):
        for name, spec in site_plan.specs.items():
            sizes[record.tensors[name]] = math.prod(spec.shape)
    held = sum(tensor.numel() for tensor in {id(t): t for t in program.base.tensors.values()}.values())
    added = sum(sizes.values())
    if added > _LARGEST_GROWTH * held + _ALWAYS_ALLOWED:
        raise PassError(
            f"{entry.id}: it would add {added:,} values to a model of {held:,}; choose smaller sizes in its options"
        )
