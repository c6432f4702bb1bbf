"""Scaling what enters or leaves a weight: vectors, graph, and what the merged weight becomes.

Scaling the output, (W x + b) ⊙ s, is (diag(s) W) x + s ⊙ b; scaling the input, W (x ⊙ s) + b, is
(W diag(s)) x + b. Both are exact where s is one.
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
    """How many features enter (axis "i") or leave ("o") the site, over all groups of a convolution."""
    if site.kind == CONV:
        return site.size(axis) * (site.groups if _per_group(site, axis) else 1)
    return site.out_features if axis == "o" else site.in_features


def scale_output(site: Site, g: Rewriter, vector: fx.Node) -> fx.Node:
    """The site's output, earlier adapters included, times the vector (1 + w·(vector − 1) at weight w)."""
    return g.call(aten.mul.Tensor, g.output, _factor(site, g, vector))


def scale_input(site: Site, g: Rewriter, vector: fx.Node) -> fx.Node:
    """The site's output with the vector times what enters it and earlier adapters (weighted likewise)."""
    g.replace_input(lambda x: g.call(aten.mul.Tensor, x, _factor(site, g, vector)))
    return g.output


def ones_elsewhere(g: Rewriter, vectors: Sequence[fx.Node], index: fx.Node) -> fx.Node:
    """One vector over all output features from those of some parts; index: see `part_index`."""
    joined = vectors[0] if len(vectors) == 1 else g.call(aten.cat.default, list(vectors))
    padded = g.call(aten.constant_pad_nd.default, joined, [0, 1], 1.0)
    return g.call(aten.index_select.default, padded, 0, index)


def part_index(parts: Sequence[Sequence[int]], total: int) -> Tensor:
    """For each output feature its position in the parts' vectors laid end to end, or just past their end."""
    rows = [row for part in parts for row in part]
    index = torch.full((total,), len(rows), dtype=torch.int64)
    index[torch.tensor(rows)] = torch.arange(len(rows))
    return index


def _factor(site: Site, g: Rewriter, vector: fx.Node) -> fx.Node:
    """The weighted vector along the channels: the last axis, or before a convolution's spatial axes."""
    if g.weight != 1:
        vector = g.call(aten.add.Scalar, g.call(aten.mul.Scalar, vector, g.weight), 1 - g.weight)
    if site.kind != CONV:
        return vector
    return g.call(aten.reshape.default, vector, [-1, *(1 for _ in site.float_shape[2:])])


def _per_group(site: Site, axis: str) -> bool:
    """The second axis of a convolution's weight counts one group's channels."""
    return site.kind == CONV and site.layout.index(axis) == 1


@dataclass(frozen=True)
class ScaleAxis(Fold):
    """Merge: the weight is multiplied along its output ("o") or input ("i") axis, in place.

    bias: it is the bias that is multiplied. rows: output features that the vector covers (all by default).
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
