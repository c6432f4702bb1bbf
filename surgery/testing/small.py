"""Checks of a pass on the kit's own models: fused, transposed and shared layers in fp64, with exact gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from surgery.common.errors import PassError, SurgeryError, TargetError
from surgery.engine.contract.base import Pass, RewritePass
from surgery.engine.contract.observe import relative_difference
from surgery.engine.module import ProgramModule
from surgery.engine.program import Program
from surgery.testing import foreign, merging, values
from surgery.testing.case import Case, ConformanceError, Skip, tensors_of
from surgery.testing.training import grads, held_gradient, loss_of, slope
from surgery.testing.zoo import MODELS, zoo_program

# Central differences in fp64 are right to about 1e-6; a gradient that is 2% wrong is far outside.
_GRADIENT = 1e-3
_STEPS = (1e-3, 1e-4, 1e-5, 1e-6)


def zoo(case: Case) -> str:
    """Apply the pass to the kit's own models wherever it accepts a site, and run the checks that depend on the layer.

    The checks are numerics, merge, rows, gradients of every tensor by central differences in fp64, and, for a
    pass that acts on parts of fused projections, that the other parts stay as they are.
    """
    if not isinstance(case.pass_, RewritePass):
        return "a selection changes no graph"
    # Decisions that a caller made for one model (names of its tensors, say) mean nothing in another.
    pass_ = case.pass_.model_copy(update={"target": "all"}) if case.pass_.target else case.pass_
    said = []
    for name in MODELS:
        program = zoo_program(name, case.program.base.plugins)
        try:
            accepted = program.plan(pass_, freeze_base=False).passes[-1].accepted
        except (PassError, TargetError) as error:
            said.append(f"{name}: {error}")
            continue
        if not accepted:
            said.append(f"{name}: refused")
            continue
        small = Case(pass_, program, case.seed, min(case.scale, 0.5), case.folder)
        try:
            said.append(f"{name}: {_checked(small)}")
        except ConformanceError as error:
            raise case.error(
                "zoo", f"on the kit's {name} model: {error.args[0].partition(': ')[2]}"
            ) from error
    return "; ".join(said)


def _checked(case: Case) -> str:
    checks: tuple[Callable[[Case], str], ...] = (
        values.numerics,
        merging.merge,
        foreign.rows,
        _gradients,
        _parts,
    )
    done = 0
    for check in checks:
        try:
            check(case)
            done += 1
        except Skip:
            continue
        except SurgeryError as error:
            raise case.error(check.__name__.strip("_"), str(error)) from error
    return f"{done} checks at {len(case.accepted)} sites"


# -- gradients


def _gradients(case: Case) -> str:
    """Compare the gradient of each tensor of the pass with central differences, all sites together."""
    if not case.trainable or held_gradient(case):
        raise Skip("nothing trains, or the gradient is not the true one by intent")
    program = case.to_train(case.random)
    module = program.module()
    got = grads(module, case.exercised)
    by_name: dict[str, list[str]] = {}
    for record in case.entry.sites:
        for own, full in record.tensors.items():
            if full in case.trainable and full in got:
                by_name.setdefault(own, []).append(full)
    worst = max((_gap(case, program, module, got, own, full) for own, full in by_name.items()), default=0.0)
    return f"within {worst:.1e}"


def _gap(
    case: Case, program: Program, module: ProgramModule, got: Mapping[str, Tensor], own: str, names: list[str]
) -> float:
    """Relative difference of the slope along the gradient of one kind of tensor, and of the gradient's own norm."""
    tensors = {name: program.tensors[name] for name in dict.fromkeys(names)}
    norm = sum(float(got[n].double().square().sum()) for n in tensors) ** 0.5
    if not norm:
        return 0.0
    size = max(sum(float(t.detach().double().square().sum()) for t in tensors.values()) ** 0.5, 1e-3)
    along = {name: got[name].double() / norm * size for name in tensors}

    def loss() -> Tensor:
        return loss_of(module(*case.exercised[0], **case.exercised[1]))

    gap = min(abs(slope(loss, tensors, along, s) / (norm * size) - 1) for s in _STEPS)
    if gap > _GRADIENT:
        raise case.error("gradients", f"that of {own!r} differs from central differences by {gap:.1%}")
    return gap


# -- parts of fused projections


def _parts(case: Case) -> str:
    """A part of a fused projection changes alone: in the graph, and after merging."""
    pass_ = case.rewrite
    if not pass_.effect.partial:
        raise Skip("it does not act on parts")
    fused = next((site for site in case.program.sites if site.parts and site.kind in pass_.on), None)
    if fused is None:
        raise Skip("no fused projection")
    worst = 0.0
    for part in ("q", "v"):
        role = next((name for name in fused.parts if name.rpartition(".")[2] == part), None)
        if role is not None:
            worst = max(worst, _part(case, pass_, role, fused.parts[role]))
    return f"within {worst:.1e}"


def _part(case: Case, pass_: Pass, role: str, features: tuple[int, ...]) -> float:
    target = role if "." in role else f"attn.{role}"
    own = pass_.model_copy(update={"target": target})
    try:
        program = case.fresh(own, freeze_base=False)
    except (PassError, TargetError) as error:
        raise Skip(str(error)) from error
    forms = [program]
    with contextlib.suppress(PassError):  # It may have no merged form.
        forms.append(program.merge(verify=False))
    worst = 0.0
    for form in forms:
        # The second output is what the fused projection computes.
        before, after = (tensors_of(p.run())[1] for p in (case.program, form))
        chosen = torch.zeros(before.shape[-1], dtype=torch.bool)
        chosen[list(features)] = True
        if torch.equal(before[..., chosen], after[..., chosen]):
            raise case.error("parts", f"target {target} does not change its features")
        gap = relative_difference(before[..., ~chosen], after[..., ~chosen])
        worst = max(worst, gap)
        if gap > 1e-9:
            merged = " after merging" if form is not program else ""
            raise case.error(
                "parts",
                f"target {target} moves the other parts by {gap:.1e}{merged}; see Site.selected_parts",
            )
    return worst
