"""LoRA: a trained low-rank update beside a frozen weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from surgery import lowrank
from surgery.pass_base import MergeOp, RewritePass, TensorSpec
from surgery.rewriter import Rewriter
from surgery.sites import Site
from surgery.weight_ops import CONV, EMBEDDING, EXPERTS, LINEAR


def _kaiming(tensor: Tensor) -> None:
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


class Lora(RewritePass):
    """LoRA: y = x Wᵀ + b becomes y + (α/r)·(x Aᵀ) Bᵀ (Hu et al. 2021, arXiv:2106.09685).

    A (r × in) starts Kaiming-uniform and B (out × r) at zero, so insertion is exact. A convolution takes A
    with its own kernel, stride and groups (r filters per group) and B pointwise; an embedding takes A
    (r × vocabulary) zero and B (dim × r) normal, as PEFT does; stacked experts take one pair per expert,
    A (experts × r × in) and B (experts × out × r). On a fused qkv, parts get a pair each. Merge: W + (α/r)·B A.
    """

    name: ClassVar[str] = "lora"
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EMBEDDING, EXPERTS)
    partial: ClassVar[bool] = True
    weightable: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True

    rank: int = Field(8, gt=0, description="inner dimension r of the update")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")
    parts: str | None = Field(
        None, description="of a fused projection, the parts to adapt: q,k,v (default: all, as one)"
    )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def check(self, site: Site) -> str | None:
        if site.kind == CONV and site.layout == "io":
            return "a transposed convolution has no low-rank branch here; target its neighbours"
        if not site.float_dtype.is_floating_point:
            return f"its weight is {site.dtype}; LoRA needs a floating-point base or an op that dequantizes"
        if site.weight is None:
            return f"its weight is computed from {', '.join(site.computed_from)}; target those"
        if self.parts is not None and not site.parts:
            return "it is no fused projection, so parts cannot be chosen; leave out --parts"
        unknown = [part for part in self._parts(site) if part not in site.parts]
        if unknown:
            return f"it has no part {unknown[0]!r}; its parts are {', '.join(site.parts)}"
        return None

    def _parts(self, site: Site) -> tuple[str, ...]:
        asked = tuple(part.strip() for part in self.parts.split(",")) if self.parts is not None else ()
        if site.selected_parts:
            return tuple(p for p in site.selected_parts if not asked or p in asked) or asked
        return asked

    def decide(self, site: Site) -> dict[str, Any]:
        return {"rows": {part: list(site.parts[part]) for part in self._parts(site)}}

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        rows = site.decided.get("rows") or {}
        if not rows:
            a, b = lowrank.factor_shapes(site, self.rank)
            if site.kind == EMBEDDING:
                return {"A": TensorSpec(a), "B": TensorSpec(b, nn.init.normal_)}
            return {"A": TensorSpec(a, _kaiming), "B": TensorSpec(b)}
        specs: dict[str, TensorSpec] = {}
        for part, features in rows.items():
            a, b = lowrank.factor_shapes(site, self.rank, len(features))
            specs[f"A_{part}"], specs[f"B_{part}"] = TensorSpec(a, _kaiming), TensorSpec(b)
            if features != list(range(features[0], features[-1] + 1)):
                index = lowrank.gather_index(features, site.out_features)
                specs[f"rows_{features[0]}"] = TensorSpec(
                    tuple(index.shape), trainable=False, dtype=torch.int64, value=index
                )
        return specs

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node:
        scale = self.scale * g.weight
        rows = site.decided.get("rows") or {}
        if not rows:
            return lowrank.add_branch(site, g, g["A"], g["B"], scale)
        updates = [
            (lowrank.branch(site, g, g[f"A_{part}"], g[f"B_{part}"]), features)
            for part, features in rows.items()
        ]
        return lowrank.add_rows(site, g, updates, scale)

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> dict[str, MergeOp]:
        scale = self.scale * weight
        rows = site.decided.get("rows") or {}
        if not rows:
            return {"weight": lowrank.AddLowRank(site, tensors["A"], tensors["B"], scale)}
        return {
            f"weight:{part}": lowrank.AddLowRank(
                site, tensors[f"A_{part}"], tensors[f"B_{part}"], scale, tuple(features)
            )
            for part, features in rows.items()
        }
