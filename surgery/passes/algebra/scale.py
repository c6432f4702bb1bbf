"""Scaling the input or the output of a weight by a vector: the graph and the merge.

A scaled output (W x + b) ⊙ s is (diag(s) W) x + s ⊙ b, and a scaled input W (x ⊙ s) + b is (W diag(s)) x + b. With
s = 1 both are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from surgery.engine.contract.folds import Fold
from surgery.graph.ops import CONV
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site

aten = torch.ops.aten


def channels(site: Site, axis: str) -> int:
    """Number of input (axis "i") or output features ("o") of a site, over all groups of a convolution."""
    if site.kind == CONV:
        return site.size(axis) * (site.groups if _per_group(site, axis) else 1)
    return site.out_features if axis == "o" else site.in_features


def scale_output(site: Site, g: Rewriter, vector: fx.Node) -> fx.Node:
    """Insert the site's output, with earlier adapters, times a vector.

    Args:
        site: The site.
        g: The rewriter at a call of the site. At weight w the factor is 1 + w·(vector − 1).
        vector: Graph value with one factor for each output feature.
    """
    return g.call(aten.mul.Tensor, g.output, _factor(site, g, vector))


def scale_input(site: Site, g: Rewriter, vector: fx.Node) -> fx.Node:
    """Multiply the input of the site's op and of its earlier adapters by a vector; returns the site's output.

    Args:
        site: The site.
        g: The rewriter at a call of the site. At weight w the factor is 1 + w·(vector − 1).
        vector: Graph value with one factor for each input feature.
    """
    g.replace_input(lambda x: g.call(aten.mul.Tensor, x, _factor(site, g, vector)))
    return g.output


def ones_elsewhere(g: Rewriter, vectors: Sequence[fx.Node], index: fx.Node) -> fx.Node:
    """Insert one vector over all output features, with the vectors of some parts and ones elsewhere.

    Args:
        g: The rewriter.
        vectors: Graph values, one vector for each part.
        index: Graph value of the index from `part_index`.
    """
    joined = vectors[0] if len(vectors) == 1 else g.call(aten.cat.default, list(vectors))
    padded = g.call(aten.constant_pad_nd.default, joined, [0, 1], 1.0)
    return g.call(aten.index_select.default, padded, 0, index)


def part_index(parts: Sequence[Sequence[int]], total: int) -> Tensor:
    """Index for `ones_elsewhere`: each output feature's position in the concatenated vectors of the parts.

    Features of no part get the position after the last, which `ones_elsewhere` pads with a one. The index is int64 of
    shape (total,).
    """
    rows = [row for part in parts for row in part]
    index = torch.full((total,), len(rows), dtype=torch.int64)
    index[torch.tensor(rows)] = torch.arange(len(rows))
    return index


def _factor(site: Site, g: Rewriter, vector: fx.Node) -> fx.Node:
    """Insert the vector at the weight of the application, shaped to multiply the features of an activation."""
    if g.weight != 1:
        vector = g.call(aten.add.Scalar, g.call(aten.mul.Scalar, vector, g.weight), 1 - g.weight)
    if site.kind != CONV:
        return vector
    return g.call(aten.reshape.default, vector, [-1, *(1 for _ in site.float_shape[2:])])


def _per_group(site: Site, axis: str) -> bool:
    """True for the second axis of a convolution's weight, which has the channels of one group only."""
    return site.kind == CONV and site.layout.index(axis) == 1


@dataclass(frozen=True)
class ScaleAxis(Fold):
    """Merge: multiplies the weight along one axis, in place.

    Attributes:
        site: The site.
        vector: The factors.
        axis: "o" for output features, "i" for input features.
        bias: The tensor is the bias, not the weight.
        rows: Output features that the vector covers; None for all.
    """

    keeps_zeros: ClassVar[bool] = True

    site: Site
    vector: Tensor
    axis: str = "o"
    bias: bool = False
    rows: tuple[int, ...] | None = None

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        site = self.site
        factor = self.vector.detach().to(weight.dtype)
        if self.rows is not None:
            whole = torch.ones(channels(site, self.axis), dtype=factor.dtype, device=factor.device)
            whole[torch.tensor(self.rows, device=factor.device)] = factor
            factor = whole
        if self.bias:
            weight.mul_(factor)
        elif _per_group(site, self.axis):
            groups = site.groups
            grouped = weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
            grouped.mul_(factor.view(groups, 1, weight.shape[1], 1))
        else:
            shape = [1] * weight.dim()
            shape[site.layout.index(self.axis)] = -1
            weight.mul_(factor.view(shape))
        return weight
