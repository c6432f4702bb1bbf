"""Check of packed weights: a `WeightOp.dequantize` returns the weight that its op computes with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from surgery.common.errors import PassError
from surgery.engine.contract.observe import relative_difference
from surgery.engine.module import get
from surgery.engine.probe import Probe
from surgery.engine.program import Program
from surgery.graph.ops import CONV, EMBEDDING, LINEAR, Call, arguments
from surgery.graph.propagate.sizes import hint
from surgery.graph.sites import Site
from surgery.testing.case import Case

# An op may round its input: rows of the identity lose nothing in that. Two of 127 steps are 1.6%.
_ALLOWED = 8e-3
_ROWS = 512


def packed(case: Case) -> str:
    """Run each op with a packed weight on the identity, or look up its table: the results are the unpacked weight."""
    program = case.adapted
    sites = [s for s in program.sites if s.packed and s.kind in (LINEAR, EMBEDDING, CONV) and s.weight]
    if not sites:
        return "no packed weight"
    probe, seen, worst = Probe(program, ()), 0, 0.0
    for site in sites:
        try:
            weight = probe.dequantized(replace(site, measured=probe)).float()
        except PassError:
            continue  # It cannot be traced; passes that would compute with it refuse the site.
        pair = _of_conv(program, site, weight) if site.kind == CONV else _of_matrix(program, site, weight)
        if pair is None:
            continue
        gap = relative_difference(*pair)
        if gap > _ALLOWED:
            raise case.error(
                "packed",
                f"the dequantize of {site.op} is off by {gap:.1%} of what the op computes with",
                site.path,
            )
        seen, worst = seen + 1, max(worst, gap)
    return f"{seen} of {len(sites)} within {worst:.1e}" if seen else "no packed op runs on inputs of the kit"


def _of_matrix(program: Program, site: Site, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """The unpacked weight and the one that the op computes with; None if the op does not run."""
    got = _weight_of(program, site.calls[0], site)
    # Linear weights are read out × in by the op; the identity gives their transpose.
    wanted = weight.T if site.kind == LINEAR and site.layout == "oi" else weight
    return None if got is None else (wanted[: got.shape[0]], got)


def _of_conv(program: Program, site: Site, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Outputs of a convolution with the unpacked weight, and of the op, on positive inputs; None if it does not run."""
    call = site.calls[0]
    given, shape = arguments(call.node), [hint(size) for size in call.x.meta["val"].shape]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    spatial = {n: given[n] for n in ("stride", "padding", "dilation", "groups") if n in given}
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[weight.dim() - 2]
    try:
        with torch.no_grad():
            plain, found = (
                _run(program, call, v.to(call.x.meta["val"].dtype)) for v in (torch.zeros_like(x), x)
            )
            return function(x, weight, None, **spatial), (found - plain).float()
    except Exception:  # An op of a plugin can raise anything: it may need other sizes.
        return None


def _weight_of(program: Program, call: Call, site: Site) -> Tensor | None:
    """The first rows of the weight as the op itself computes with it; None if the op does not run on the identity."""
    rows = min(site.size("v" if site.kind == EMBEDDING else "i"), _ROWS)
    value = call.x.meta["val"]
    if site.kind == EMBEDDING:
        given = torch.arange(rows)
    else:
        given = torch.eye(site.size("i"), dtype=value.dtype)[:rows]
    try:
        with torch.no_grad():
            found = _run(program, call, given.to(value.dtype))
            zero = 0 if site.kind == EMBEDDING else _run(program, call, torch.zeros_like(given[:1]))
    except Exception:  # An op of a plugin can raise anything: it may need other sizes.
        return None
    return (found - zero).float()


def _run(program: Program, call: Call, x: Tensor) -> Tensor:
    """Call the op on another input, with the program's own tensors."""
    module = program.graph_module
    known: dict[str, Any] = arguments(call.node)

    def value(name: str, given: Any) -> Any:
        if name == call.op.x:
            return x
        return fx.node.map_arg(given, lambda n: get(module, str(n.target)).detach())

    schema = call.node.target._schema.arguments  # type: ignore[union-attr]
    result: Tensor = call.node.target(  # type: ignore[operator]
        *(value(a.name, known[a.name]) for a in schema if not a.kwarg_only),
        **{a.name: value(a.name, known[a.name]) for a in schema if a.kwarg_only},
    )
    return result
