"""Why a weight cannot be quantized, for every pass that does it."""

from __future__ import annotations

import torch

from surgery.engine.contract.base import RewritePass
from surgery.engine.replay import pass_of
from surgery.graph.marks import mark_of
from surgery.graph.ops import CONV, LINEAR, parameter_of
from surgery.graph.rewrite.current import replaced_op, weight_reader
from surgery.graph.rewrite.refusals import computed_weight, not_floating
from surgery.graph.sites import Site
from surgery.passes.quantize.matrix import Layout
from surgery.passes.quantize.ops import dequantize, fake_quantize


def hindrance(site: Site, layout: Layout, dynamic: bool, calibrated: bool = False) -> str | None:
    """A clause, or None. dynamic: what enters is rounded too. calibrated: errors of values go into others."""
    refused = (
        computed_weight(site)
        or not_floating(site, "there is nothing left to quantize")
        or replaced_op(site, "quantize before it, or leave the site out")
    )
    if refused:
        return refused
    _, current = weight_reader(site.calls[0])
    there = mark_of(current).entry
    if current.target in (dequantize._opoverload, fake_quantize._opoverload):
        return f"{there!r} has quantized it already; undo that first"
    if parameter_of(current) is not None:
        why = "quantize first, and adapt then"
        if _makes_zeros(site, str(there)):
            why = _filled(str(there), layout.format, calibrated)
        if why:
            return f"{there!r} has put another weight there; {why}"
    if site.kind == CONV and site.layout == "io" and site.groups > 1:
        return "a transposed convolution with groups has no rows of its own; target its neighbours"
    if dynamic and (site.kind != LINEAR or any(call.x_axis == "column" for call in site.calls)):
        what = f"a {site.kind} weight" if site.kind != LINEAR else "one with its weight on the left"
        return f"int8-dynamic is for linear maps of rows, and this is {what}; quantize it to int8 in another pass"
    if layout.misfit:
        return layout.misfit
    in_memory = site.probe.in_memory
    if in_memory and not bool(torch.isfinite(site.probe.stored(site)).all()):
        return "its weight holds values that are infinite or no numbers; mend the model first"
    return None


def _makes_zeros(site: Site, entry: str) -> bool:
    program = site.probe.program
    pass_ = pass_of(program.journal.find(entry)[0], program.base.plugins)
    return isinstance(pass_, RewritePass) and pass_.effect.makes_zeros


def _filled(entry: str, format: str, calibrated: bool) -> str:
    """Why codes would not keep the zeros that an entry has put into a weight, or empty."""
    if format == "binary":
        return "binary codes have no zero; use another --format"
    if calibrated:
        return f"gptq would move values into the zeros of {entry!r}; use --method nearest"
    return ""
