"""PiSSA: A and B start as the principal part of W, and the op reads the residual (arXiv:2404.02948).

W = (W − s·B A) + s·B A, where s·B A is the part of W along its r largest singular values, each shared evenly between A
and B. The op reads the frozen residual W − s·B A instead of W, and the branch adds the rest. Outputs differ from the
base only by rounding: of the residual to the weight's dtype, and of two summed products instead of one. The residual is
as large as W and is stored, so that loading computes no SVD. W itself does not train there, even if the base is not
frozen. Undo restores W bit for bit, and other uses of a tied weight still read W. A pass that changes the input or the
output of the op was made for all of W, so PiSSA is refused after it (plain LoRA only adds a branch and may precede it).

`--svd-iterations n` computes a randomized SVD with n power iterations (Halko et al. 2011, arXiv:0909.4061).

A packed weight stays as it is. No residual is stored, and the branch adds s·(B A − B₀ A₀) x, where A₀ and B₀ are frozen
copies of the starting factors. At insertion this is zero, bit for bit, so other passes may act on the op already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, fx

from surgery.engine.contract.folds import Fold
from surgery.engine.contract.numerics import Numerics, rounded
from surgery.engine.contract.specs import TensorSpec
from surgery.graph.marks import adapters_around, input_before_adapters, mark_of
from surgery.graph.ops import EXPERTS, operand
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra import factor, low_rank
from surgery.passes.algebra.instead import Become, read_instead
from surgery.passes.lora.parts import Branch, Pair
from surgery.passes.lora.variant import Fill, Variant, unreadable_weight

# At insertion on every linear map of MiniLM (6 layers), SmolLM2 (30) and tiny T5 and ViT, at ranks 4 to 64, outputs
# moved by at most 3.9e-6 of their scale in fp32, 6.7e-15 in fp64, 5.5e-3 in fp16 and 3.6e-2 in bf16. That is a unit in
# the last place of each layer, amplified by the layers above it. The tolerances are five times the worst in fp32 and
# twice the worst in half precision.
PISSA_MOVES = rounded(
    2e-5,
    "the residual is rounded to the weight's dtype, and two products are summed instead of one",
    {torch.float64: 5e-14, torch.float16: 1e-2, torch.bfloat16: 8e-2},
)
OVERSAMPLED = 8  # columns beyond the rank in the randomized SVD (Halko et al. 2011, arXiv:0909.4061)


class Pissa(Variant):
    """PiSSA on a weight in floats: the op reads the residual, and A and B start as the principal part."""

    numerics: ClassVar[Numerics] = PISSA_MOVES

    @cached_property
    def _split(self) -> Split:
        # A, B and the residual must come from one SVD: a randomized one differs from call to call.
        return Split(self.site, self.lora.rank, self.lora.scale, self.pairs, self.lora.svd_iterations)

    def refusal(self) -> str | None:
        reason = unreadable_weight(self.site, "--init pissa")
        if reason:
            return reason
        largest = min(largest_rank(self.site, pair) for pair in self.pairs)
        if self.lora.rank > largest:
            return f"its weight has no more than {largest} singular values; give --rank {largest} or less"
        return self._refused_order()

    def _refused_order(self) -> str | None:
        journal = {entry.id: entry for entry in self.site.probe.journal}
        for name in entries_at(self.site):
            if journal[name].pass_name != self.lora.name or journal[name].options.get("dora"):
                return (
                    f"{name} acts on the op with all of its weight, which PiSSA splits; apply it after this"
                )
        return None

    def start(self, pair: Pair) -> tuple[Fill, Fill]:
        return (
            lambda tensor: tensor.copy_(self._split.factors[pair.part][0]),
            lambda tensor: tensor.copy_(self._split.factors[pair.part][1]),
        )

    def site_tensors(self) -> dict[str, TensorSpec]:
        return {
            "residual": TensorSpec(
                self.site.shape, lambda tensor: tensor.copy_(self._split.residual), trainable=False
            )
        }

    def branches(self, g: Rewriter, dropped: fx.Node | None) -> tuple[list[Branch], fx.Node | None]:
        read_instead(g, g["residual"])
        return super().branches(g, dropped)

    def site_folds(self, tensors: Mapping[str, Tensor], weight: float) -> dict[str, Fold]:
        return {"weight:residual": Displace(tensors["residual"], weight)}


class PackedPissa(Pissa):
    """PiSSA on a packed weight: the op stays, and frozen copies of the starting factors are subtracted."""

    def _refused_order(self) -> str | None:
        return None  # the op still computes with all of W

    def pair_tensors(self, pair: Pair, factors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        return {f"{name}0": replace(factors[name], trainable=False) for name in ("A", "B")}

    def site_tensors(self) -> dict[str, TensorSpec]:
        return {}

    def branches(self, g: Rewriter, dropped: fx.Node | None) -> tuple[list[Branch], fx.Node | None]:
        found = []
        for pair in self.pairs:
            a, b, a_start, b_start = (g[pair.named(name)] for name in ("A", "B", "A0", "B0"))
            found.append(Branch(pair, a, b, (a_start, b_start)))
        return found, None


@dataclass(frozen=True, eq=False)
class Split:
    """The principal part of a weight and the residual, computed when first used.

    Attributes:
        site: The site.
        rank: Number of singular values in the principal part of each pair.
        scale: The factor s of B A.
        pairs: Pairs of the site; each has the principal part of its own output features.
        iterations: Power iterations of a randomized SVD; 0 is the full SVD.
    """

    site: Site
    rank: int
    scale: float
    pairs: Sequence[Pair]
    iterations: int

    @cached_property
    def weight(self) -> Tensor:
        """The weight in floats."""
        return self.site.probe.dequantized(self.site)

    @cached_property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B by part, in the dtype of the weight; the residual compensates for their rounding."""
        matrices = factor.matrices(self.site, self.weight)
        found = {}
        for pair in self.pairs:
            own = matrices if pair.rows is None else matrices[:, list(pair.rows)]
            shapes = low_rank.factor_shapes(self.site, self.rank, pair.features)
            # The branch is scaled by s, so each factor takes 1/√s.
            values = (value / self.scale**0.5 for value in self._principal(own))
            a, b = (value.reshape(shape) for value, shape in zip(values, shapes, strict=True))
            found[pair.part] = a.to(self.weight.dtype), b.to(self.weight.dtype)
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
        """W − s·B A, in the shape of the weight, before it is rounded to the weight's dtype."""
        left = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32), copy=True)
        for pair in self.pairs:
            a, b = self.factors[pair.part]
            low_rank.AddLowRank(self.site, a, b, -self.scale, pair.rows).apply(left, left)
        return left


def largest_rank(site: Site, pair: Pair) -> int:
    """Number of singular values of a pair's part of the weight (per group of a convolution, per expert)."""
    a, b = low_rank.factor_shapes(site, 1, pair.features)
    experts = site.kind == EXPERTS
    outputs = b[1] if experts else b[0] // site.groups
    stack = site.size("e") if experts else site.groups
    return min(outputs, int(torch.Size(a).numel()) // stack)


class Displace(Become):
    """Merge: W ← W + w·(residual − W₀), rounded as in earlier versions, so that saved merges keep their bits."""

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        return weight.add_(self.value.detach().to(weight.dtype) - original, alpha=self.weight)


def entries_at(site: Site) -> list[str]:
    """Ids of the entries that changed the input or the output of the site's op."""
    found: dict[str, None] = {}
    for call in site.calls:
        node, first = operand(call), input_before_adapters(operand(call))
        while node is not first:
            found[mark_of(node).entry] = None
            node = node.args[0]  # type: ignore[assignment]
        for node in adapters_around(call.node):
            found[mark_of(node).entry] = None
    return list(found)
