"""PiSSA's algebra: W = (W − s·B A) + s·B A, where s·B A is the part of W along its r largest singular values.

The op reads the residual in the place of W, and the branch adds the rest, so that nothing is moved but by
rounding: that of the residual to the weight's dtype, and of two sums in the place of one. A packed weight stays as it
is, and the branch adds s·(B A − B₀ A₀) x, where A₀ and B₀ are the factors as they started: zero, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, fx

from surgery.engine.contract.folds import Fold, Stage
from surgery.graph.marks import adapters_around, input_before_adapters, mark_of
from surgery.graph.ops import operand
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra import factor, low_rank

aten = torch.ops.aten
OVERSAMPLED = 8  # columns beyond the rank in the randomised SVD (Halko et al. 2011, arXiv:0909.4061)


@dataclass(frozen=True, eq=False)
class Split:
    """The principal part of a weight and what is left, made when first asked for.

    rows: output features by part of a fused projection, each with a principal part of its own; {"": None} is all.
    iterations: power iterations of a randomised SVD; 0: the full one.
    """

    site: Site
    rank: int
    scale: float
    rows: Mapping[str, Sequence[int] | None]
    iterations: int

    @cached_property
    def weight(self) -> Tensor:
        return self.site.probe.dequantized(self.site)

    @cached_property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B by part, in the dtype of the weight: the residual makes up for their rounding."""
        matrices = factor.matrices(self.site, self.weight)
        found = {}
        for part, rows in self.rows.items():
            own = matrices if rows is None else matrices[:, list(rows)]
            shapes = low_rank.factor_shapes(self.site, self.rank, None if rows is None else len(rows))
            pair = (value / self.scale**0.5 for value in self._principal(own))
            a, b = (value.reshape(shape) for value, shape in zip(pair, shapes, strict=True))
            found[part] = a.to(self.weight.dtype), b.to(self.weight.dtype)
        return found

    def _principal(self, matrices: Tensor) -> tuple[Tensor, Tensor]:
        if not self.iterations:
            return factor.factors(matrices, factor.directions(matrices, None, False), self.rank)
        columns = min(self.rank + OVERSAMPLED, *matrices.shape[1:])
        u, s, v = torch.svd_lowrank(matrices, columns, self.iterations)
        root = s[:, None, : self.rank].sqrt()
        return (v[..., : self.rank] * root).transpose(1, 2), u[..., : self.rank] * root

    @cached_property
    def residual(self) -> Tensor:
        """W − s·B A, of the weight's shape, before it is rounded."""
        left = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32), copy=True)
        for part, (a, b) in self.factors.items():
            rows = self.rows[part]
            chosen = None if rows is None else tuple(rows)
            low_rank.AddLowRank(self.site, a, b, -self.scale, chosen).apply(left, left)
        return left


def largest_rank(site: Site, rows: Sequence[int] | None) -> int:
    """How many singular values the weight has (per group of a convolution, per expert)."""
    a, b = low_rank.factor_shapes(site, 1, None if rows is None else len(rows))
    outputs = b[1] if len(site.layout) == 3 and "e" in site.layout else b[0] // site.groups
    return min(outputs, int(torch.Size(a).numel()) // _stack(site))


def _stack(site: Site) -> int:
    return site.size("e") if "e" in site.layout else site.groups


def read_residual(g: Rewriter, residual: fx.Node) -> None:
    """Let the op read the residual (at weight w, W + w·(residual − W)); on top of what earlier passes put there."""
    parameter = g.site_call.weight

    def build(current: fx.Node) -> fx.Node:
        if current is parameter and g.weight == 1:
            return residual
        moved = g.call(aten.sub.Tensor, residual, parameter)
        return g.call(aten.add.Tensor, current, moved, alpha=g.weight)

    g.swap_weight(build)


@dataclass(frozen=True)
class Displace(Fold):
    """Merge: W ← W + w·(residual − W₀), before anything else is folded, as the op reads it."""

    stage: ClassVar[Stage] = Stage.WEIGHT
    reads_original: ClassVar[bool] = True

    residual: Tensor
    weight: float

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        return weight.add_(self.residual.detach().to(weight.dtype) - original, alpha=self.weight)


def entries_at(site: Site) -> list[str]:
    """Ids of the entries that changed what enters the site's op or what leaves it."""
    found: dict[str, None] = {}
    for call in site.calls:
        node, entering = operand(call), input_before_adapters(operand(call))
        while node is not entering:
            found[mark_of(node).entry] = None
            node = node.args[0]  # type: ignore[assignment]
        for node in adapters_around(call.node):
            found[mark_of(node).entry] = None
    return list(found)
