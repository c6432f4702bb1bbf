"""Checks of a live model: compares its outputs on the example inputs before and after passes or a merge."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from surgery.capture.trace import to_plain
from surgery.common.errors import PassError
from surgery.engine.contract.base import RewritePass
from surgery.engine.contract.numerics import rounded
from surgery.engine.contract.observe import observe
from surgery.engine.program import Program
from surgery.engine.replay import find_sites, live_entries, pass_of
from surgery.graph.ops import LINEAR
from surgery.live.state import LiveState, sharing


def verify_merge(model: nn.Module, state: LiveState, before: Program, then: Any) -> None:
    """Compare a merged live model with the unmerged one on the example inputs, if there are any.

    Args:
        model: The live module, merged.
        state: Its state.
        before: Its program before the merge.
        then: Its outputs before the merge.

    Raises:
        PassError: The outputs differ by more than rounding the weights once can cause.
    """
    if state.example is None:
        return
    seen = observe(then, run_live(model, state.example))
    allowed = before.merge_tolerance
    rounds = any(
        isinstance(pass_ := pass_of(e, before.base.plugins), RewritePass) and pass_.effect.rounding
        for e in live_entries(before.journal)
    )
    if rounds and not state.uncaptured:
        # Quantized activations turn a tiny difference into a whole quantization step; the program itself differs too.
        allowed += 2 * observe(before.run(), state.program.run()).difference
    if not seen.within(rounded(allowed, "weights are rounded once more")):
        merged = state.program.journal.entries[-1].options.get("folded", ())
        sites = [r.path for e in before.journal if e.id in merged for r in e.sites]
        raise PassError(
            f"merge_: the live model's outputs moved by {seen.difference:.1e} of their scale, more than {allowed:.0e}: "
            f"a weight of {', '.join(sites[:5])} is also read outside of its layer. The model is unchanged; keep the "
            "adapters unmerged, or merge the model's program"
        )


def verify_insertion(model: nn.Module, state: LiveState, before: Program) -> None:
    """Compare the outputs of a live model without and with the new passes on the example inputs.

    Args:
        model: The live module, with the new passes.
        state: Its state.
        before: Its program without them.

    Raises:
        PassError: The outputs differ by more than any of the new passes declares.
    """
    loaded = state.program.base.loaded
    fresh = [e for e in state.program.journal if e not in before.journal.entries and e.kind == "rewrite"]
    if not fresh:
        return
    now, program = run_live(model, loaded), state.program
    # The new passes are switched off instead of undone, so that frozen parameters stay frozen: torch computes a weight
    # norm differently if it needs no gradient.
    state.adopt(model, sharing(program.without(*(e.id for e in fresh)), program))
    then = run_live(model, loaded)
    state.adopt(model, program)
    seen = observe(then, now)
    declared = (pass_of(e, program.base.plugins).numerics.on(program.precision) for e in fresh)
    if any(seen.within(numerics) for numerics in declared):
        return
    raise PassError(
        f"{fresh[-1].id}: in place, the outputs moved by {seen.difference:.1e} of their scale on the example inputs, "
        f"more than {' or '.join(e.id for e in fresh)} declares; the model is unchanged"
    )


def run_live(model: nn.Module, loaded: Any) -> Any:
    """Outputs of the model in eval mode on the example inputs, without its cache; None without inputs."""
    if loaded is None:
        return None
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            outputs = to_plain(model(*loaded.args, **loaded.kwargs))
            # A cache is an object of the model that cannot be compared; the outputs depend on its contents anyway.
            return (
                {k: v for k, v in outputs.items() if k != "past_key_values"}
                if isinstance(outputs, dict)
                else outputs
            )
    finally:
        for module, training in modes:
            module.training = training


def refuse_caches(model: nn.Module, program: Program) -> None:
    """Raise PassError if a branch reads other positions in a model that generates with a cache."""
    generates = getattr(model, "can_generate", None)
    if generates is None or not generates():
        return
    for entry in program.journal:
        pass_ = pass_of(entry, program.base.plugins) if entry.kind == "rewrite" else None
        if isinstance(pass_, RewritePass):
            for site in find_sites(entry, program.base.sites.by_key):
                if pass_.effect.mixes_positions and site.kind == LINEAR:
                    raise PassError(
                        f"{entry.id} at {site.path}: it reads earlier positions, which a layer does not get when the "
                        f"model generates with a cache; capture the model and apply the pass to its program, or use "
                        f"another pass"
                    )
