"""Masks of the values of weights that are kept: by score, in a pattern, to a sparsity or above a threshold."""

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
    """Structure of the zeros in a weight. Without a group or a block, each value is chosen by itself.

    Attributes:
        group: (n, m): n of every m consecutive inputs are kept.
        block: (r, c): blocks of r outputs by c inputs are kept or removed as a whole.
    """

    group: tuple[int, int] | None = None
    block: tuple[int, int] = (1, 1)

    @staticmethod
    def parse(text: str) -> Pattern:
        """Parse "unstructured", n:m such as "2:4", or a block such as "4x4".

        Raises:
            ValueError: The text is none of these.
        """
        if text == "unstructured":
            return Pattern()
        found = re.fullmatch(r"(\d{1,6})([:x])(\d{1,6})", text)
        if found is None:
            raise ValueError(
                f"{text!r} is not a pattern; write unstructured, n:m such as 2:4, or a block such as 4x4"
            )
        first, second = int(found[1]), int(found[3])
        if found[2] == "x":
            if min(first, second) < 1 or first * second == 1:
                raise ValueError(f"{text} is not a block; write one such as 4x4, or unstructured")
            return Pattern(block=(first, second))
        if not 0 < first < second:
            raise ValueError(f"{text} keeps {first} of {second} values; keep at least one and fewer than all")
        return Pattern(group=(first, second))

    @property
    def sparsity(self) -> float | None:
        """Sparsity that the pattern itself sets, or None."""
        return None if self.group is None else 1 - self.group[0] / self.group[1]

    def units(self, laid: Tensor) -> Tensor:
        """Return the mean score of each block. The scores are in the order of `Layout`."""
        if self.block == (1, 1):
            return laid
        rows, columns = self.block
        experts, outputs, places, inputs = laid.shape
        blocks = laid.reshape(experts, outputs // rows, rows, places, inputs // columns, columns)
        return blocks.mean((2, 5))

    def spread(self, units: Tensor) -> Tensor:
        """Repeat one value for each block to one for each value of the weight, in the order of `Layout`."""
        rows, columns = self.block
        wide = units if rows == 1 else units.repeat_interleave(rows, 1)
        return wide if columns == 1 else wide.repeat_interleave(columns, 3)

    def numel(self, sizes: Sequence[int]) -> int:
        """Return the number of blocks (or single values) of a weight of these sizes."""
        return math.prod(sizes) // math.prod(self.block)


def count(sizes: Sequence[Sequence[int]], pattern: Pattern, sparsity: float, scope: Scope) -> list[int]:
    """Return the number of values to remove from each weight; with scope "global", one number for all together.

    Args:
        sizes: `Layout.sizes` of each weight.
        pattern: Structure of the zeros.
        sparsity: Share of values to remove.
        scope: "weight", "row" or "global".
    """
    block = math.prod(pattern.block)
    if scope == "global":
        return [round(sparsity * sum(pattern.numel(s) for s in sizes)) * block]
    if scope == "row":
        return [round(sparsity * s[2] * s[3]) * s[0] * s[1] for s in sizes]
    return [round(sparsity * pattern.numel(s)) * block for s in sizes]


def choose(scores: Sequence[Tensor], pattern: Pattern, sparsity: float, scope: Scope) -> list[Tensor]:
    """Choose the values to keep; among equal scores, the first ones are removed.

    With n:m and a sparsity below that of the pattern (during a schedule), only the smallest of the values that the
    pattern would remove are removed.

    Args:
        scores: Importance of the values of each weight, in the order of `Layout`.
        pattern: Structure of the zeros.
        sparsity: Share of values to remove.
        scope: Values that are compared: of each "weight", each "row", or all weights ("global").

    Returns:
        A bool mask for each weight, in the order of `Layout`; True for values that are kept.
    """
    units = [pattern.units(s if s.dtype == torch.float64 else s.float()) for s in scores]
    # With infinite scores, the n best values of each group survive any sparsity up to that of the pattern.
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
    """Return the mask of values whose score is above a threshold.

    Args:
        scores: Importance of the values, in the order of `Layout`.
        pattern: Structure of the zeros.
        threshold: Scores up to this are removed.
    """
    return pattern.spread(pattern.units(scores) > threshold)


def _protected(scores: Tensor, group: tuple[int, int]) -> Tensor:
    """Return the scores, set to infinity for the n best of each group, so that these are never removed."""
    kept, of = group
    groups = scores.reshape(-1, of)
    return groups.masked_fill(~_least(groups, of - kept), math.inf).view(scores.shape)


def _least(scores: Tensor, number: int) -> Tensor:
    """Mark the `number` smallest scores along the last axis; among equal scores, the first ones."""
    if number == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(number, dim=-1, keepdim=True).values
    # kthvalue alone does not decide between equal scores; counting them does, in the same way on every device.
    below, equal = scores < limit, scores == limit
    room = number - below.sum(-1, keepdim=True)
    return below | (equal & (equal.cumsum(-1) <= room))
