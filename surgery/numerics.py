"""Whether two structures of outputs agree: bit for bit, or within a stated tolerance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.pass_base import Numerics


@dataclass(frozen=True)
class Observed:
    """equal: torch.equal for every output, NaN equal to NaN. difference: the largest, over the largest output."""

    equal: bool
    difference: float

    def within(self, declared: Numerics) -> bool:
        return self.equal if not declared.tolerance else self.difference <= declared.tolerance

    def __str__(self) -> str:
        return "bit for bit" if self.equal else f"within {self.difference:.1e}"


def observe(before: Any, after: Any) -> Observed:
    """Compare two outputs of one structure; a different structure or shape is an infinite difference."""
    left, left_spec = pytree.tree_flatten(before)
    right, right_spec = pytree.tree_flatten(after)
    if left_spec != right_spec:
        return Observed(False, float("inf"))
    equal, worst = True, 0.0
    for a, b in zip(left, right, strict=True):
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return Observed(False, float("inf"))
        if _same(a, b):
            continue
        equal = False
        worst = max(worst, relative_difference(a, b))
    return Observed(equal, worst)


def _same(a: Tensor, b: Tensor) -> bool:
    """torch.equal, where NaN in the same place is the same (a fully masked row, say)."""
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()) or not torch.equal(a.isnan(), b.isnan()):
        return False
    return torch.equal(a[~a.isnan()], b[~b.isnan()])


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max|a−b| / max|a| in float64 over finite places; infinite where one is finite and the other not."""
    x, y = a.detach().double(), b.detach().double()
    if not torch.equal(torch.isfinite(x), torch.isfinite(y)):
        return float("inf")
    finite = torch.isfinite(x)
    if not finite.any():
        return 0.0
    scale = float(x[finite].abs().max())
    gap = float((x[finite] - y[finite]).abs().max())
    return gap / scale if scale else gap
