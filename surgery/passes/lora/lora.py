"""LoRA: a trained low-rank update beside a frozen weight.

Variants are in dora.py and pissa.py, parts of a fused projection in parts.py, the bias of B in bias.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor, fx

from surgery.engine.contract.effect import ADAPTER, Effect
from surgery.engine.contract.expectations import Expectations
from surgery.engine.contract.folds import Combiner, Fold
from surgery.engine.contract.numerics import Numerics
from surgery.engine.contract.specs import TensorSpec
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, LINEAR
from surgery.graph.rewrite.refusals import computed_weight
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra import low_rank
from surgery.passes.lora.bias import AddTo, add_bias, bias_refusal, why_bias_stays
from surgery.passes.lora.choose import choose_variant
from surgery.passes.lora.combine import combine
from surgery.passes.lora.options import LoraOptions
from surgery.passes.lora.parts import add_branches, chosen_rows, pairs_of, parts_refusal
from surgery.passes.lora.variant import Variant


class Lora(LoraOptions):
    """LoRA: y = W x + b becomes y + s·B(A x), with s = α/r (Hu et al. 2021, arXiv:2106.09685).

    A (r × in) starts Kaiming-uniform, or normal with standard deviation 1/r (`--init gaussian`), and B (out × r) starts
    at zero, so insertion is exact. A convolution has A with its own kernel, stride and groups (r filters per group)
    and a pointwise B. An embedding has A (r × vocabulary) at zero and a normal B (dim × r), as in PEFT. Stacked experts
    have one pair each: A (experts × r × in), B (experts × out × r). Chosen parts of a fused projection have one pair
    each. Merge at weight w: W + w·s·B A.

    `--across`: A of a grouped convolution has no groups and r filters in all, as in PEFT. A grouped weight cannot hold
    such an update, so it is not merged.

    `--rslora`: s = α/√r, so that the update does not shrink as the rank grows (Kalajdzievski 2023, arXiv:2312.03732).

    `--dropout p`: drops input values of the branch in train mode, with one mask for all parts of a projection. Token
    ids of an embedding are not dropped, as in PEFT.

    `--dora`: W becomes V = m ⊙ (W + s·B A)/‖W + s·B A‖, with a trained magnitude m per output that starts at the norm
    of W (Liu et al. 2024, arXiv:2402.09353). Insertion is exact. The norm is detached from the gradient (section 4.3 of
    the paper) unless `--full-gradient` is given. Merge at weight w: W + w·(V − W).

    `--bias`: B has a bias β, which starts at zero: the update is s·(B(A x) + β). Merge: b + s·β, where there is a b.

    `--init pissa`: A and B start as the part of W along its r largest singular values, and the op reads the frozen
    residual W − s·B A (Meng et al. 2024, arXiv:2404.02948). Insertion rounds: outputs may move by 2e-5 of their scale
    in fp32 (5e-14 in fp64, 1e-2 in fp16, 8e-2 in bf16). `--svd-iterations n` takes a faster, randomized SVD. At an op,
    apply it before passes other than plain LoRA. Merge: residual + s·B A; undo restores W bit for bit.

    Packed weights (of a plugin's `WeightOp` with `dequantize`) keep their codes, and nothing is merged into them. DoRA
    unpacks W in the graph for its norms (not of stacked experts). PiSSA adds s·(B A − B₀ A₀) x instead, with frozen
    copies A₀ and B₀ of the starting factors; insertion is then exact.
    """

    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EMBEDDING, EXPERTS)
    combiner: ClassVar[Combiner | None] = staticmethod(combine)

    @model_validator(mode="after")
    def _together(self) -> Self:
        choose_variant(self)  # raises if options exclude each other
        return self

    def _at(self, site: Site, rows: Mapping[str, Any] | None = None) -> Variant:
        """The variant at a site, with a pair for each part in `rows`; by default, in `site.decided`."""
        pairs = pairs_of(site.decided.get("rows") if rows is None else rows)
        return choose_variant(self, site.packed)(self, site, pairs)

    @property
    def numerics(self) -> Numerics:
        return choose_variant(self).numerics

    @property
    def effect(self) -> Effect:
        return replace(ADAPTER, scalable=True, partial=True, reads_weight=choose_variant(self).reads_weight)

    @property
    def expectations(self) -> Expectations:
        return choose_variant(self).expectations(self)

    def check(self, site: Site) -> str | None:
        if site.kind == CONV and site.layout == "io":
            return "a transposed convolution has no low-rank branch here; target its neighbours"
        if not site.float_dtype.is_floating_point:
            return f"its weight is {site.dtype}; LoRA needs a floating-point base or an op that dequantizes"
        if site.packed and site.kind == CONV and (missing := low_rank.lacks(site)):
            return f"its op {site.op} has no argument {missing}, so the shape of a branch is unknown"
        if self.crosses(site) and self.rank % site.groups:
            return f"it has {site.groups} groups, and --across needs a rank that they divide"
        refused = computed_weight(site) or parts_refusal(site, self.parts)
        if refused:
            return refused
        rows = chosen_rows(site, self.parts)
        return (self.bias and bias_refusal(site, bool(rows))) or self._at(site, rows).refusal()

    def decide(self, site: Site) -> dict[str, Any]:
        return {"rows": chosen_rows(site, self.parts)}

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        variant = self._at(site)
        specs: dict[str, TensorSpec] = {}
        for pair in variant.pairs:
            a, b = low_rank.factor_shapes(site, self.rank, pair.features, self.crosses(site))
            fill_a, fill_b = variant.start(pair)
            factors = {"A": TensorSpec(a, fill_a), "B": TensorSpec(b, fill_b)}
            own = factors | variant.pair_tensors(pair, factors)
            specs |= {pair.named(name): spec for name, spec in own.items()}
            specs |= pair.indices(site, variant.reads_weight)
        beta = {"b": TensorSpec((site.out_features,))} if self.bias else {}
        return specs | beta | variant.site_tensors()

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node:
        dropped = None
        if g.training and self.dropout and site.kind != EMBEDDING:
            dropped = g.call(torch.ops.aten.dropout.default, g.x, self.dropout, True)
        branches, out = self._at(site).branches(g, dropped)
        value = add_branches(site, g, branches, self.scale * g.weight, dropped, out)
        return add_bias(site, g, value, self.scale * g.weight) if self.bias else value

    def why_not_merged(self, site: Site) -> str | None:
        if self.crosses(site):
            return "the update reads the channels of all groups, which a grouped weight cannot hold"
        return why_bias_stays(site) if self.bias else None

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> Mapping[str, Fold]:
        variant = self._at(site)
        folds = variant.site_folds(tensors, weight)
        for pair in variant.pairs:
            a, b = tensors[pair.named("A")], tensors[pair.named("B")]
            plain = low_rank.AddLowRank(site, a, b, self.scale * weight, pair.rows)
            folds[f"weight:{pair.part}"] = variant.pair_fold(pair, tensors, weight) or plain
        if self.bias:
            folds["bias"] = AddTo(tensors["b"], self.scale * weight)
        return folds
