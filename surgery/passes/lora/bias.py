"""The bias β of B in LoRA (`--bias`): where a site can have one, its op in the graph, and its merge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from surgery.engine.contract.folds import Fold
from surgery.graph.ops import CONV, LINEAR
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site

aten = torch.ops.aten


def bias_refusal(site: Site, in_parts: bool) -> str | None:
    """The reason why the update at a site cannot have a bias, or None.

    Args:
        site: The site.
        in_parts: The update covers chosen parts of a fused projection.
    """
    if site.kind not in (LINEAR, CONV):
        return f"an update of a weight of kind {site.kind} has no bias; leave out --bias"
    if in_parts:
        return "the update of a part has no bias of its own; target the whole projection, or leave out --bias"
    return None


def why_bias_stays(site: Site) -> str | None:
    """The reason why β cannot be merged at a site, or None."""
    return "the base has no bias that could hold the one of the update" if site.bias is None else None


def add_bias(site: Site, g: Rewriter, value: fx.Node, scale: float) -> fx.Node:
    """Insert value + scale · β.

    Args:
        site: The site.
        g: The rewriter at a call of the site.
        value: Output of the site with the update.
        scale: Factor of β.
    """
    beta = g["b"]
    if site.kind == CONV:  # one value for each channel, the second dimension
        beta = g.call(aten.reshape.default, beta, [-1, *(1 for _ in site.float_shape[2:])])
    return g.call(aten.add.Tensor, value, beta, alpha=scale)


@dataclass(frozen=True)
class AddTo(Fold):
    """Merge: b ← b + scale · β.

    Attributes:
        value: β.
        scale: Factor of β.
    """

    value: Tensor
    scale: float

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        return weight.add_(self.value.detach().to(weight.dtype), alpha=self.scale)
