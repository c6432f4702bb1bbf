"""Pass hra for torch-surgery: Householder reflections of the input of frozen layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from surgery.api import (
    ADAPTER,
    LINEAR,
    Effect,
    Field,
    Fold,
    Numerics,
    RewritePass,
    Rewriter,
    Site,
    TensorSpec,
    hookimpl,
    rounded,
)


class Hra(RewritePass):
    """HRA: y = W x becomes y = W H x, with H = H₁ … H_r and reflections Hᵢ = I − 2 uᵢ uᵢᵀ/‖uᵢ‖² (Yuan et al. 2024,
    arXiv:2405.17484).

    The trained u (in × r) starts in equal pairs, whose reflections cancel. Merge at weight w: W becomes
    W + w·W (H − I).
    """

    name: ClassVar[str] = "hra"
    on: ClassVar[tuple[str, ...]] = (LINEAR,)
    effect: ClassVar[Effect] = replace(ADAPTER, scalable=True)
    numerics: ClassVar[Numerics] = rounded(1e-5, "pairs of reflections cancel up to rounding")

    rank: int = Field(default=8, gt=0, multiple_of=2, description="number of reflections r, an even number")

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {"u": TensorSpec((site.in_features, self.rank), _pairs)}

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node:
        g.replace_input(lambda x: g.trace(reflect, x, g["u"], g.weight))
        return g.output

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> Mapping[str, Fold]:
        return {"weight": Reflect(site, tensors["u"], weight)}


@dataclass(frozen=True)
class Reflect(Fold):
    """Merge: W ← W + w·W (H − I)."""

    site: Site
    u: Tensor
    weight: float

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        matrix = weight if self.site.layout == "oi" else weight.t()
        # The rows of W H are the rows of W, reflected in the other order.
        matrix.copy_(reflect(matrix, self.u.detach().to(weight.dtype).flip(1), self.weight))
        return weight


def reflect(x: Tensor, u: Tensor, weight: float) -> Tensor:
    """x + w·(H x − x) for each row x."""
    value = x
    for column in (u / u.norm(dim=0)).flip(1).unbind(1):
        value = value - 2 * (value @ column).unsqueeze(-1) * column
    return x + weight * (value - x)


def _pairs(u: Tensor) -> None:
    half = torch.empty(u.shape[0], u.shape[1] // 2)
    nn.init.kaiming_uniform_(half, a=math.sqrt(5))
    u.copy_(half.repeat_interleave(2, dim=1))


@hookimpl
def surgery_passes() -> list[type]:
    return [Hra]
