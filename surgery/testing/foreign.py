"""Checks with other adapters at the same sites, with other rows in the batch, and of the live form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.common.errors import PassError, SurgeryError, TargetError
from surgery.engine.change.plans import PassPlan
from surgery.engine.contract.base import Pass, RewritePass
from surgery.engine.contract.observe import observe, relative_difference
from surgery.engine.program import Program
from surgery.engine.replay import live_entries, pass_of
from surgery.graph.ops import CONV, EMBEDDING, LINEAR
from surgery.passes.lora.lora import Lora
from surgery.testing.case import Case, Inputs, exactly, tensors_of

# Part of the outputs' scale that an adapter with random values has to move.
_ACTS = 1e-6


def foreign(case: Case) -> str:
    """Put a random LoRA beneath and above the pass: each still acts, and everything merges and comes apart again."""
    if not isinstance(case.pass_, RewritePass):
        return "a selection changes no graph"
    owners = {record.key.owner for record in case.entry.sites}
    kinds = (LINEAR, CONV, EMBEDDING)
    sites = [s for s in case.program.sites if s.kind in kinds]
    here = [s for s in sites if s.key.owner in owners] or sites
    if not here:
        return "no other adapter attaches to such weights"
    return f"beneath: {_beneath(case, exactly(here))}; above: {_above(case, exactly(here))}"


def _adapter(case: Case, program: Program, target: str, label: str) -> tuple[Program | None, str]:
    """The program with a random LoRA, and its id; None and the reason if every site refuses it."""
    adapter = Lora(target=target, rank=2, label=label)
    try:
        planned = program.plan(adapter, freeze_base=False).passes[-1]
    except (PassError, TargetError) as error:
        return None, str(error)
    if not planned.accepted:
        return None, str(planned.refused[0].refusal) if planned.refused else "no site"
    # Some sites may be refused: those that nothing reads any more, or with a packed weight.
    target = exactly([p.site for p in planned.accepted])
    adapter = adapter.model_copy(update={"target": target})
    return case.fresh(adapter, program, freeze_base=False), adapter.entry_id


def _planned(program: Program, pass_: Pass) -> PassPlan | str:
    try:
        return program.plan(pass_, freeze_base=False).passes[-1]
    except (PassError, TargetError) as error:
        return str(error)


def _beneath(case: Case, target: str) -> str:
    under, name = _adapter(case, case.program, target, "kit_beneath")
    if under is None:
        return f"none ({name})"
    planned = _planned(under, case.pass_)
    if isinstance(planned, str) or not planned.accepted:
        if isinstance(planned, str):
            return f"refused ({planned})"
        first = next(iter(planned.refused), None)
        return f"refused ({first.refusal})" if first is not None else "it finds nothing there"
    try:
        both = case.apply(under, case.pass_, freeze_base=False)
    except PassError as error:
        raise case.error(
            "foreign", f"on top of {name!r}, which its plan accepts, it fails: {error}"
        ) from error
    seen = case.compare(under, both, more=True)
    if not seen.within(case.declared):
        raise case.error(
            "foreign",
            f"declares {case.declared}, but on top of {name!r} it moves the outputs by {seen.difference:.1e}",
        )
    case.randomise(both, both.journal.entries[-1])
    _acts(case, both, name, "beneath it")
    return f"{seen}; {_merges(case, both, 'on top of a LoRA')}"


def _above(case: Case, target: str) -> str:
    over, name = _adapter(case, case.random, target, "kit_above")
    if over is None:
        return f"none ({name})"
    _acts(case, over, name, "above it")
    if case.trainable:
        _acts(case, over, case.entry.id, f"under {name!r}")
    if not case.compare(case.random, over.undo(name)).equal:
        raise case.error("foreign", f"undoing {name!r} above it does not restore its outputs")
    return _merges(case, over, "under a LoRA")


def _acts(case: Case, program: Program, name: str, where: str) -> None:
    """Raise ConformanceError if the outputs do not depend on an adapter."""
    # Inputs that reach the pass can be invalid without it, and an output that it adds has nothing to be compared with.
    if name == case.entry.id and (case.reaching or case.pass_.expectations.adds_outputs):
        return
    moved = case.compare(program.without(name), program, [*case.inputs, *case.reaching], more=True).difference
    if not moved > _ACTS:
        raise case.error("foreign", f"{name!r} {where} has no effect any more")


def _merges(case: Case, program: Program, where: str) -> str:
    """Compare merged and unmerged outputs of a program with both adapters."""
    passes = (pass_of(entry, program.base.plugins) for entry in live_entries(program.journal))
    if any(isinstance(p, RewritePass) and p.effect.rounding for p in passes):
        return "activations are rounded, so merges are not compared"
    try:
        merged = program.merge(verify=False)
    except PassError:
        return "nothing merges"
    gap = case.compare(program, merged, case.inputs + case.reaching).difference
    if not gap <= program.merge_tolerance:
        raise case.error("foreign", f"merging it {where} moves the outputs by {gap:.1e} of their scale")
    return f"merges within {gap:.1e}"


# -- rows of a batch


def rows(case: Case) -> str:
    """Rows of a batch do not see each other: the first stays the same when all others become copies of it."""
    entries = live_entries(case.random.journal)
    passes = [pass_of(entry, case.program.base.plugins) for entry in entries]
    if any(isinstance(p, RewritePass) and p.effect.rounding for p in passes):
        return "activations are rounded by the range of the whole batch"
    # Inputs that reach the inserted part (new token ids, say) can be invalid without it.
    args, kwargs = case.inputs[1 % len(case.inputs)]
    given = [t for t in tensors_of((args, kwargs)) if t.dim()]
    size = given[0].shape[0] if given else 0
    if size < 2 or any(t.shape[0] != size for t in given):
        return "the inputs have no batch"
    alike = _alike((args, kwargs))
    base = _first_row(case.program, (args, kwargs), alike, size)
    if base is None or base > 1e-5:
        return "the rows of the model itself see each other"
    sets = [((args, kwargs), alike), *((one, _alike(one)) for one in case.reaching)]
    moved = max(_first_row(case.random, one, other, size) or 0 for one, other in sets)
    # Kernels sum in another order for other values of the batch in half precision.
    allowed = max(1e-5, case.program.merge_tolerance if case.program.precision.itemsize < 4 else 0)
    if moved > allowed:
        raise case.error(
            "rows",
            f"the outputs of one row move by {moved:.1e} of their scale when the other rows of the batch change",
        )
    return f"the first of {size} rows moves by {moved:.1e} when the others change"


def _alike(inputs: Inputs) -> Inputs:
    """The inputs with a copy of the first row in every row."""
    alike: Inputs = pytree.tree_map_only(Tensor, _first_everywhere, inputs)
    return alike


def _first_everywhere(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor).contiguous() if tensor.dim() else tensor


def _first_row(program: Program, one: Inputs, other: Inputs, size: int) -> float | None:
    """Difference of the first rows of the outputs for two inputs; None if no output has a batch."""
    pairs = zip(*(tensors_of(program.run(*args, **kwargs)) for args, kwargs in (one, other)), strict=True)
    found = [
        relative_difference(a[0], b[0])
        for a, b in pairs
        if a.dim() and a.shape[0] == size and a.shape == b.shape and a.is_floating_point()
    ]
    return max(found, default=None)


# -- the live form


def live(case: Case) -> str:
    """The live module of the program has the same outputs, or the pass says why it has no live form."""
    try:
        module = case.random.live()
    except SurgeryError as error:
        return f"no live form: {error}"
    worst = 0.0
    for args, kwargs in [*case.inputs[:2], *case.reaching]:
        expected = case.random.run(*args, **kwargs)
        with torch.no_grad():
            found = module(*args, **kwargs)
        seen = observe(expected, _like(expected, found))
        worst = max(worst, seen.difference)
        # The model's own forward may use other kernels than the captured graph.
        if not seen.difference <= max(1e-4, case.program.merge_tolerance):
            raise case.error(
                "live", f"the outputs of the live module differ by {seen.difference:.1e} of their scale"
            )
    return f"within {worst:.1e}"


def _like(expected: Any, found: Any) -> Any:
    """The outputs of a live module in the form of the program's, without those that a program leaves out (a cache)."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        return {key: _like(value, found[key]) for key, value in expected.items() if key in found}
    return found
