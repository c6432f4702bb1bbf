"""Reasons why a weight cannot be quantized, shared by all passes that quantize."""

from __future__ import annotations

import torch

from surgery.engine.contract.base import RewritePass
from surgery.engine.replay import pass_of
from surgery.graph.marks import mark_of
from surgery.graph.ops import CONV, LINEAR, parameter_of
from surgery.graph.rewrite.current import no_weight_to_replace, weight_reader
from surgery.graph.sites import Site
from surgery.passes.quantize.matrix import Layout
from surgery.passes.quantize.ops import dequantize, fake_quantize


def hindrance(site: Site, layout: Layout, dynamic: bool, calibrated: bool = False) -> str | None:
    """Return the reason why a weight cannot be quantized, as a clause with a remedy, or None.

    Args:
        site: The site of the weight.
        layout: Number format and matrix form of its codes.
        dynamic: The input of the op is rounded too.
        calibrated: Rounding errors of some values are compensated in others (GPTQ).
    """
    refused = no_weight_to_replace(site, "leave it out", "quantize before it, or leave the site out")
    if refused:
        return refused
    _, current = weight_reader(site.calls[0])
    there = mark_of(current).entry
    if current.target in (dequantize._opoverload, fake_quantize._opoverload):
        return f"{there!r} has quantized it already; undo that first"
    # An earlier pass computes the weight that the op reads. Only a mask of zeros can stay below the codes.
    if parameter_of(current) is not None:
        why = "quantize first, and apply it afterwards"
        if _makes_zeros(site, str(there)):
            why = _filled(layout.format, calibrated)
        if why:
            return f"{there!r} has replaced its weight; {why}"
    if site.kind == CONV and site.layout == "io" and site.groups > 1:
        return (
            "it is a transposed convolution with groups, whose outputs are not rows of a matrix; leave it out"
        )
    if dynamic and (site.kind != LINEAR or any(call.x_axis == "column" for call in site.calls)):
        what = f"a {site.kind} weight" if site.kind != LINEAR else "W @ x, with its weight on the left"
        return (
            f"int8-dynamic is for linear layers x Wᵀ, and this is {what}; quantize it to int8 in another pass"
        )
    if layout.misfit:
        return layout.misfit
    in_memory = site.probe.in_memory
    if in_memory and not bool(torch.isfinite(site.probe.stored(site)).all()):
        return "its weight contains inf or NaN; fix the model first"
    return None


def _makes_zeros(site: Site, entry: str) -> bool:
    """True if a journal entry is a pass that sets weights to zero."""
    program = site.probe.program
    pass_ = pass_of(program.journal.find(entry)[0], program.base.plugins)
    return isinstance(pass_, RewritePass) and pass_.effect.makes_zeros


def _filled(format: str, calibrated: bool) -> str:
    """Return the reason why codes would not keep the zeros of a weight, with a remedy, or ""."""
    if format == "binary":
        return "binary codes cannot represent its zeros, so use another --format"
    if calibrated:
        return "gptq would move values into its zeros, so use --method nearest"
    return ""
