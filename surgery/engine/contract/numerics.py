"""TODO"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Numerics:
    """What inserting a pass may do to the outputs: nothing (tolerance 0), or a stated deviation with a reason.

    tolerance: largest absolute difference over the largest absolute output; infinite where the pass changes
    what the model computes, by design. by_dtype: other tolerances, for programs of these dtypes.
    """

    tolerance: float = 0.0
    reason: str = ""
    by_dtype: tuple[tuple[torch.dtype, float], ...] = ()

    def on(self, dtype: torch.dtype) -> Numerics:
        """What it says for a program whose coarsest weights have this dtype."""
        return Numerics(dict(self.by_dtype).get(dtype, self.tolerance), self.reason)

    def __str__(self) -> str:
        if math.isinf(self.tolerance):
            return f"changes({self.reason})"
        return "exact" if not self.tolerance else f"rounded({self.tolerance:g}: {self.reason})"


EXACT = Numerics()


def rounded(tolerance: float, reason: str, by_dtype: Mapping[torch.dtype, float] | None = None) -> Numerics:
    """A pass that changes outputs by at most `tolerance` of their scale, and why it must.

    by_dtype: what it allows in place of that where the program's coarsest weights have another dtype than fp32.
    """
    return Numerics(tolerance, reason, tuple((by_dtype or {}).items()))


def changes(reason: str) -> Numerics:
    """A pass that changes the outputs by design (it approximates, ties, or attends to something new), and how."""
    return Numerics(math.inf, reason)


# One rounding of W + s·BA against two products: a few ulp per layer, growing with depth; measured on fp32
# transformers of 6 to 30 layers as 1e-6 to 2e-5 of the output's scale. Half precision rounds each weight once.
MERGE_TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-10, torch.bfloat16: 5e-2, torch.float16: 1e-2}
