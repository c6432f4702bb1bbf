"""Packed weights as floats: what a third party's `WeightOp.dequantize` computes, traced into ops.

The same ops run eagerly and in a graph, so that what a pass measures of the weight when it is applied is, to the bit,
what its graph computes with later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from surgery.common.errors import PassError
from surgery.graph.ops import EXPERTS, arguments
from surgery.graph.packed import unpacking

if TYPE_CHECKING:
    from surgery.graph.rewrite.rewriter import Rewriter
    from surgery.graph.sites import Site

aten = torch.ops.aten


def refusal(site: Site) -> str | None:
    """Why a pass cannot compute with a packed weight as floats, or None."""
    if site.kind == EXPERTS:
        return f"its weight is packed for {site.op}, and of stacked experts nothing is unpacked"
    try:
        made = unpacking(site.calls[0]).val
    except PassError as error:
        return f"its weight is packed, and {error}"
    if tuple(made.shape) != site.float_shape or not made.dtype.is_floating_point:
        return (
            f"its weight is packed, and the dequantize of {site.op} gives {made.dtype} of shape {list(made.shape)} "
            f"where the op computes with {list(site.float_shape)}"
        )
    return None


def constants(site: Site) -> tuple[Tensor, ...]:
    """What `unpacked` reads of a packed site's weight that is no argument of the op: tensors of the pass."""
    return unpacking(site.calls[0]).constants if site.packed else ()


def unpacked(site: Site, g: Rewriter) -> fx.Node:
    """The packed weight of the site as floats, computed in the graph; the pass has its `constants` by their numbers."""
    found = unpacking(g.site_call)
    args = arguments(g.site_call.node)
    own = [g[f"constant_{number}"] for number in range(len(found.constants))]
    return found.run(g.call, args, own, site.float_dtype)
