"""Whether two structures of outputs agree: bit for bit, or within a stated tolerance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.engine.contract.numerics import Numerics
from surgery.graph.outputs import ONLY


@dataclass(frozen=True)
class Observed:
    """equal: torch.equal for every output, NaN equal to NaN. difference: the largest, over the largest output."""

    equal: bool
    difference: float

    def within(self, declared: Numerics) -> bool:
        return self.equal if not declared.tolerance else self.difference <= declared.tolerance

    def __str__(self) -> str:
        if math.isinf(self.difference):
            return "not comparable (other outputs or shapes, or values that are not finite)"
        return "bit for bit" if self.equal else f"within {self.difference:.1e}"


def shared(before: Any, after: Any) -> Any:
    """What `after` still has of the outputs `before`: without further entries and further columns.

    A tensor that became the entry "output" of a dict, the last items of a tuple, the last columns of the last axis.
    Where it is nothing of the kind, `after` itself.
    """
    if isinstance(before, Tensor):
        found = after.get(ONLY, after) if isinstance(after, Mapping) else after
        if not isinstance(found, Tensor) or found.dim() != before.dim() or not before.dim():
            return found
        longer = found.shape[:-1] == before.shape[:-1] and found.shape[-1] > before.shape[-1]
        return found[..., : before.shape[-1]] if longer else found
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return {key: shared(value, after[key]) for key, value in before.items() if key in after}
    if type(before) is type(after) and isinstance(before, (tuple, list)):
        return type(before)(shared(a, b) for a, b in zip(before, after, strict=False))
    return after


def observe(before: Any, after: Any, extended: bool = False) -> Observed:
    """Compare two outputs of one structure; a different structure or shape is an infinite difference.

    extended: `after` may have more; see `shared`.
    """
    if extended:
        after = shared(before, after)
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
