"""How several adapters become one: the methods by PEFT's names, and what a pass gets to combine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from surgery.common.errors import PassError, nearest
from surgery.engine.contract import task_vectors

if TYPE_CHECKING:
    pass

Majority = Literal["total", "frequency"]
SVD = "_svd"
METHODS = (
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip


@dataclass(frozen=True)
class Combination:
    """How adapters become one, by the names that PEFT's `add_weighted_adapter` has for it.

    method: `cat` is the weighted sum itself, of the summed rank; `svd` the nearest one of `rank`; `*_svd` combine the
    dense updates elementwise and then take the nearest of `rank`; the others combine the factors themselves.
    rank: that of the result for the svd methods (default: the largest of the sources). density: the fraction of values
    that ties, dare and magnitude_prune keep. majority: how ties elects a sign. seed: of what dare drops.
    Raises PassError for what does not go together.
    """

    method: str = "svd"
    rank: int | None = None
    density: float | None = None
    majority: Majority = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise PassError(
                f"combine: there is no method {self.method!r}"
                f"{nearest(self.method, METHODS) or '; there are ' + ', '.join(METHODS)}"
            )
        prunes = self.elementwise in task_vectors.PRUNES
        if prunes != (self.density is not None):
            what = "needs a density, the fraction of values to keep" if prunes else "keeps every value"
            raise PassError(f"combine: {self.method} {what}; {'give' if prunes else 'leave out'} --density")
        if self.density is not None and not 0 < self.density <= 1:
            raise PassError(f"combine: --density {self.density} is no fraction over 0 and up to 1")
        if self.rank is not None and not self.by_svd:
            raise PassError(
                f"combine: the rank of {self.method} follows from the sources; leave out --rank, or take an svd method"
            )
        if self.majority != "total" and not self.elementwise.endswith("ties"):
            raise PassError(f"combine: {self.method} elects no sign; leave out --majority")
        if self.rank is not None and (
            isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1
        ):
            raise PassError(f"combine: --rank {self.rank} is no rank; give a positive number")
        if self.majority not in ("total", "frequency"):
            raise PassError(f"combine: --majority {self.majority!r} is neither total nor frequency")

    @property
    def by_svd(self) -> bool:
        return self.method.endswith("svd")

    @property
    def elementwise(self) -> str:
        """The rule for dense updates or factors: `linear` where there is no other."""
        return "linear" if self.method in ("cat", "svd") else self.method.removesuffix(SVD)

    def of(self, vectors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        """Task vectors of one shape combined elementwise."""
        stacked = torch.stack([v.detach() for v in vectors])
        factors = torch.tensor(weights, dtype=torch.float64)
        return task_vectors.combine(
            stacked, factors, self.elementwise, self.density or 1.0, self.majority, generator
        )
