"""Comparison of the outputs of two programs: equal bit for bit, or the largest relative difference."""

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
    """Result of a comparison of outputs.

    Attributes:
        equal: True if every output is equal bit for bit; NaN equals NaN.
        difference: Largest absolute difference divided by the largest absolute output; infinite if the outputs differ
            in structure or shape.
    """

    equal: bool
    difference: float

    def within(self, declared: Numerics) -> bool:
        """True if the difference is within the declared tolerance; a tolerance of 0 requires equal bits."""
        return self.equal if not declared.tolerance else self.difference <= declared.tolerance

    def __str__(self) -> str:
        if math.isinf(self.difference):
            return "not comparable (different outputs or shapes, or values that are not finite)"
        return "bit for bit" if self.equal else f"within {self.difference:.1e}"


def shared(before: Any, after: Any) -> Any:
    """The part of `after` that corresponds to the outputs `before`, without additional entries and columns.

    It handles a tensor that became the entry "output" of a dict, items added at the end of a tuple, and columns added
    at the end of the last axis. In all other cases it returns `after` unchanged.

    Args:
        before: Outputs before a pass.
        after: Outputs after it.
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
    """Compare two outputs. A different structure or shape counts as an infinite difference.

    Args:
        before: Outputs to compare with.
        after: Outputs to compare.
        extended: Ignore additional outputs and columns of `after`; see `shared`.
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
    """torch.equal, except that NaN equals NaN: a fully masked row of an attention is NaN in both outputs."""
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()) or not torch.equal(a.isnan(), b.isnan()):
        return False
    return torch.equal(a[~a.isnan()], b[~b.isnan()])


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max|a−b| / max|a| in float64 over the finite values; infinite if only one of two values is finite."""
    x, y = a.detach().double(), b.detach().double()
    if not torch.equal(torch.isfinite(x), torch.isfinite(y)):
        return float("inf")
    finite = torch.isfinite(x)
    if not finite.any():
        return 0.0
    scale = float(x[finite].abs().max())
    gap = float((x[finite] - y[finite]).abs().max())
    return gap / scale if scale else gap
