"""Combination of several adapters into one: the method, by PEFT's names, and its options."""

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
    """Method and options of a combination, named as in PEFT's `add_weighted_adapter`.

    Attributes:
        method: "cat" is the exact weighted sum, with the sum of the ranks. "svd" is its best approximation of rank
            `rank`. Methods "*_svd" combine the dense updates elementwise and approximate the result with rank `rank`.
            All others combine the low-rank factors elementwise.
        rank: Rank of the result, for the svd methods; the largest rank of the sources by default.
        density: Fraction of values that the ties, dare and magnitude_prune methods keep.
        majority: Rule that the ties methods elect a sign by: "total" value or "frequency".
        seed: Seed of the values that the dare methods drop.

    Raises:
        PassError: The options do not fit the method.
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
                f"{nearest(self.method, METHODS) or '; choose one of ' + ', '.join(METHODS)}"
            )
        prunes = self.elementwise in task_vectors.PRUNES
        if prunes != (self.density is not None):
            what = "needs a density, the fraction of values to keep" if prunes else "keeps every value"
            raise PassError(f"combine: {self.method} {what}; {'give' if prunes else 'leave out'} --density")
        if self.density is not None and not 0 < self.density <= 1:
            raise PassError(f"combine: --density is {self.density}; give a fraction above 0 and up to 1")
        if self.rank is not None and not self.by_svd:
            raise PassError(
                f"combine: the sources determine the rank of {self.method}; leave out --rank, or use an svd method"
            )
        if self.majority != "total" and not self.elementwise.endswith("ties"):
            raise PassError(f"combine: {self.method} does not elect signs; leave out --majority")
        if self.rank is not None and (
            isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1
        ):
            raise PassError(f"combine: --rank is {self.rank}; give a positive integer")
        if self.majority not in ("total", "frequency"):
            raise PassError(f"combine: --majority is {self.majority!r}; give total or frequency")

    @property
    def by_svd(self) -> bool:
        """True if the result is a low-rank approximation of a dense update."""
        return self.method.endswith("svd")

    @property
    def elementwise(self) -> str:
        """Elementwise rule for dense updates or factors; "linear" for "cat" and "svd"."""
        return "linear" if self.method in ("cat", "svd") else self.method.removesuffix(SVD)

    def of(self, vectors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        """Combine task vectors of one shape elementwise.

        Args:
            vectors: Task vectors of the same shape.
            weights: Weight of each vector.
            generator: Random generator of the dare methods.
        """
        stacked = torch.stack([v.detach() for v in vectors])
        factors = torch.tensor(weights, dtype=torch.float64)
        return task_vectors.combine(
            stacked, factors, self.elementwise, self.density or 1.0, self.majority, generator
        )
