"""Packed weights as floats: the ops of a third party's `WeightOp.dequantize`, for passes that compute with values.

The same ops run eagerly and in a graph, so a pass measures bit for bit the weight that its graph computes later.
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
    """The reason why a pass cannot compute with a packed weight as floats, or None."""
    if site.kind == EXPERTS:
        return f"its weight is packed for {site.op}, and stacked experts cannot be unpacked"
    try:
        made = unpacking(site.calls[0]).val
    except PassError as error:
        return f"its weight is packed, and {error}"
    if tuple(made.shape) != site.float_shape or not made.dtype.is_floating_point:
        return (
            f"its weight is packed, and the dequantize of {site.op} returns {made.dtype} of shape {list(made.shape)}, "
            f"but the op computes with {list(site.float_shape)}"
        )
    return None


def constants(site: Site) -> tuple[Tensor, ...]:
    """Tensors that `dequantize` reads and that are not arguments of the op, such as a codebook.

    The pass stores the n-th of them as its tensor `constant_n`, for `unpacked`.
    """
    return unpacking(site.calls[0]).constants if site.packed else ()


def unpacked(site: Site, g: Rewriter) -> fx.Node:
    """Insert the packed weight of the site as floats. The pass must have its `constants` as tensors."""
    found = unpacking(g.site_call)
    args = arguments(g.site_call.node)
    own = [g[f"constant_{number}"] for number in range(len(found.constants))]
    return found.run(g.call, args, own, site.float_dtype)
