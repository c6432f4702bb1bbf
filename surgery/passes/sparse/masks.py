"""Which values of weights stay: by scores, in a pattern, to a sparsity or above a threshold."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["weight", "row", "global"]


@dataclass(frozen=True)
class Pattern:
    """group: (n, m): of m inputs side by side n stay. block: (r, c): r outputs by c inputs stay or go together.
    Neither: every value by itself."""

    group: tuple[int, int] | None = None
    block: tuple[int, int] = (1, 1)

    @staticmethod
    def parse(text: str) -> Pattern:
        """Of "unstructured", "2:4" or "4x4". Raises ValueError."""
        if text == "unstructured":
            return Pattern()
        found = re.fullmatch(r"(\d{1,6})([:x])(\d{1,6})", text)
        if found is None:
            raise ValueError(
                f"{text!r} is no pattern; it is unstructured, n:m such as 2:4, or a block such as 4x4"
            )
        first, second = int(found[1]), int(found[3])
        if found[2] == "x":
            if min(first, second) < 1 or first * second == 1:
                raise ValueError(f"a block of {text} is no block; give one such as 4x4, or unstructured")
            return Pattern(block=(first, second))
        if not 0 < first < second:
            raise ValueError(
                f"{text} keeps {first} of {second} values; n:m keeps fewer than all, and at least one"
            )
        return Pattern(group=(first, second))

    @property
    def sparsity(self) -> float | None:
        """What the pattern alone says."""
        return None if self.group is None else 1 - self.group[0] / self.group[1]

    def units(self, laid: Tensor) -> Tensor:
        """Scores of what stays or goes together: the mean over each block of a laid-out tensor."""
        if self.block == (1, 1):
            return laid
        rows, columns = self.block
        experts, outputs, places, inputs = laid.shape
        blocks = laid.reshape(experts, outputs // rows, rows, places, inputs // columns, columns)
        return blocks.mean((2, 5))

    def spread(self, units: Tensor) -> Tensor:
        """One value for each of the laid-out tensor from one for each unit."""
        rows, columns = self.block
        wide = units if rows == 1 else units.repeat_interleave(rows, 1)
        return wide if columns == 1 else wide.repeat_interleave(columns, 3)

    def numel(self, sizes: Sequence[int]) -> int:
        """How many units a weight of these sizes has."""
        return math.prod(sizes) // math.prod(self.block)


def count(sizes: Sequence[Sequence[int]], pattern: Pattern, sparsity: float, scope: Scope) -> list[int]:
    """How many values of each weight go, or in the one item of all of them together, with scope global."""
    block = math.prod(pattern.block)
    if scope == "global":
        return [round(sparsity * sum(pattern.numel(s) for s in sizes)) * block]
    if scope == "row":
        return [round(sparsity * s[2] * s[3]) * s[0] * s[1] for s in sizes]
    return [round(sparsity * pattern.numel(s)) * block for s in sizes]


def choose(scores: Sequence[Tensor], pattern: Pattern, sparsity: float, scope: Scope) -> list[Tensor]:
    """Masks (bool, True for what stays) of laid-out scores. Of equal scores the first go.

    With n:m and less sparsity than that of the pattern, the least of those go that the pattern would let go.
    """
    units = [pattern.units(s if s.dtype == torch.float64 else s.float()) for s in scores]
    if pattern.group is not None:
        units = [_protected(u, pattern.group) for u in units]
    if scope == "global":
        joined = torch.cat([u.flatten() for u in units])
        parts = _least(joined, round(sparsity * len(joined))).split([u.numel() for u in units])
        gone = [part.view(u.shape) for part, u in zip(parts, units, strict=True)]
    elif scope == "row":
        gone = [_least(u.flatten(2), round(sparsity * u[0, 0].numel())).view(u.shape) for u in units]
    else:
        gone = [_least(u.flatten(), round(sparsity * u.numel())).view(u.shape) for u in units]
    return [pattern.spread(~g) for g in gone]


def above(scores: Tensor, pattern: Pattern, threshold: float) -> Tensor:
    """The mask of what is above a threshold."""
    return pattern.spread(pattern.units(scores) > threshold)


def _protected(scores: Tensor, group: tuple[int, int]) -> Tensor:
    """The scores, infinite for the n best of each group."""
    kept, of = group
    groups = scores.reshape(-1, of)
    return groups.masked_fill(~_least(groups, of - kept), math.inf).view(scores.shape)


def _least(scores: Tensor, number: int) -> Tensor:
    """Where the least `number` of each row of the last axis are, the first of those that are equal."""
    if number == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(number, dim=-1, keepdim=True).values
    below, equal = scores < limit, scores == limit
    room = number - below.sum(-1, keepdim=True)
    return below | (equal & (equal.cumsum(-1) <= room))
