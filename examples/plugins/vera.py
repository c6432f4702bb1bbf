"""Pass vera for torch-surgery: VeRA, trained scales around random matrices that all layers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from surgery.api import (
    ADAPTER,
    LINEAR,
    AddLowRank,
    Effect,
    Field,
    Fold,
    RewritePass,
    Rewriter,
    Site,
    TensorSpec,
    factor_shapes,
    hookimpl,
)

aten = torch.ops.aten


class Vera(RewritePass):
    """VeRA: y becomes y + b ⊙ B(d ⊙ (A x)), with trained b and d (Kopiczko et al. 2024, arXiv:2310.11454).

    A (r × in) and B (out × r) are random, frozen, and the same for all layers of one shape. d starts at --d-initial and
    b at zero, so insertion is exact. Merge at weight w: W becomes W + w·diag(b) B diag(d) A.
    """

    name: ClassVar[str] = "vera"
    on: ClassVar[tuple[str, ...]] = (LINEAR,)
    effect: ClassVar[Effect] = replace(ADAPTER, scalable=True)

    rank: int = Field(default=256, gt=0, description="inner dimension r of the random matrices")
    d_initial: float = Field(default=0.1, description="start value of d")

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        a, b = factor_shapes(site, self.rank)
        return {
            "A": TensorSpec(a, nn.init.kaiming_uniform_, trainable=False, shared=True),
            "B": TensorSpec(b, nn.init.kaiming_uniform_, trainable=False, shared=True),
            "d": TensorSpec((self.rank,), lambda d: d.fill_(self.d_initial)),
            "b": TensorSpec((site.out_features,)),
        }

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node:
        hidden = g.call(aten.mul.Tensor, g.call(aten.linear.default, g.x, g["A"]), g["d"])
        added = g.call(aten.mul.Tensor, g.call(aten.linear.default, hidden, g["B"]), g["b"])
        return g.call(aten.add.Tensor, g.output, added, alpha=g.weight)

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> Mapping[str, Fold]:
        a, b = tensors["d"].unsqueeze(1) * tensors["A"], tensors["b"].unsqueeze(1) * tensors["B"]
        return {"weight": AddLowRank(site, a, b, weight)}


@hookimpl
def surgery_passes() -> list[type]:
    return [Vera]
