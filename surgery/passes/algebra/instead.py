"""Another value instead of a weight: the op reads it, and merging writes it into the weight.

At weight w the op reads W + w·(V − W). Earlier passes may have replaced W already; the change is then added to their
value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from surgery.engine.contract.folds import Fold, Stage
from surgery.graph.rewrite.rewriter import Rewriter

aten = torch.ops.aten


def read_instead(g: Rewriter, value: fx.Node) -> None:
    """Let the op of a site read a value instead of its weight."""
    parameter = g.site_call.weight
    g.swap_weight(lambda current: _moved(g, current, parameter, value))


def read_bias_instead(g: Rewriter, value: fx.Node) -> None:
    """Let the op of a site read a value instead of its bias."""
    parameter = g.site_call.bias
    g.swap_bias(lambda current: _moved(g, current, parameter, value))


def _moved(g: Rewriter, current: fx.Node, parameter: fx.Node | None, value: fx.Node) -> fx.Node:
    """The value itself, or current + w·(value − parameter) where that differs."""
    if current is parameter and g.weight == 1:
        return value
    change = g.call(aten.sub.Tensor, value, parameter)
    return g.call(aten.add.Tensor, current, change, alpha=g.weight)


@dataclass(frozen=True)
class Become(Fold):
    """Merge: W ← W + w·(V − W₀), before any branch is added. An unchanged weight at w = 1 becomes V bit for bit.

    Attributes:
        value: V.
        weight: Scale w of the application.
    """

    stage: ClassVar[Stage] = Stage.WEIGHT
    reads_original: ClassVar[bool] = True

    value: Tensor
    weight: float = 1.0

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        value = self.value.detach().to(weight.dtype)
        # Adding V − W₀ to an unchanged weight could round differently than copying V.
        if self.weight == 1 and weight.equal(original):
            return weight.copy_(value)
        return weight.add_(value - original, alpha=self.weight)
