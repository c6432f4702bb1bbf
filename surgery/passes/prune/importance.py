"""Importance of units, and the selection of units to remove."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from surgery.common.errors import PassError
from surgery.passes.prune.coupling import Group

# Maps a tensor's name to the importance of each of its values.
Value = Callable[[str], Tensor]


def scores(group: Group, worth: Value, counted: frozenset[str], relative: bool) -> Tensor:
    """Return the importance of each unit: the sum over its values.

    Args:
        group: units to score.
        worth: importance of each value of a tensor.
        counted: names of the tensors that count.
        relative: divide each tensor's sums by their mean, so that all tensors count equally.

    Raises:
        PassError: if a tensor holds inf or NaN.
    """
    total = torch.zeros(group.units, dtype=torch.float64)
    for axis in group.axes:
        if axis.tensor not in counted:
            continue
        index, unit = group.on(axis)
        value = worth(axis.tensor).cpu().movedim(axis.axis, 0).reshape(axis.size, -1).sum(1)
        if not bool(value.isfinite().all()):
            raise PassError(f"{axis.tensor} holds values that are not finite; fix the weights before pruning")
        found = torch.zeros_like(total).index_add_(0, unit, value[index])
        mean = found.mean()
        total += found / mean if relative and mean > 0 else found
    return total


def count_removed(group: Group, ratio: float, round_to: int, rows: int) -> int:
    """Return the number of units to remove, such that the number of remaining indices is a multiple.

    Args:
        group: group of units.
        ratio: fraction of the units to remove.
        round_to: divisor of the remaining number of indices.
        rows: number of indices of one unit.
    """
    # The small term keeps products such as 10 · 0.3 = 2.999… from being rounded down.
    removed = int(group.units * ratio + 1e-9)
    while removed > 0 and (group.units - removed) * rows % round_to:
        removed -= 1
    return min(removed, group.units - 1)


def least(found: Tensor, count: int) -> Tensor:
    """Return the units of least importance; among equal ones, later units are removed first."""
    last_first = torch.argsort(found.flip(0), stable=True)[:count]
    return (len(found) - 1 - last_first).sort().values


def shared_out(
    found: Mapping[int, Tensor], ratio: float, allowed: Callable[[int, int], int]
) -> dict[int, int]:
    """Return the number of units to remove from each group, ranking all units together.

    Scores are divided by the mean of their group.

    Args:
        found: importance of each group's units, by group number.
        ratio: fraction of all units to remove.
        allowed: maps (group, wanted count) to the count that may be removed.
    """
    ranked: list[tuple[float, int]] = []
    for number, score in found.items():
        mean = float(score.mean()) or 1.0
        ranked += [(value / mean, number) for value in score.tolist()]
    going: dict[int, int] = dict.fromkeys(found, 0)
    for _, number in sorted(ranked)[: int(len(ranked) * ratio + 1e-9)]:
        going[number] += 1
    return {number: allowed(number, count) for number, count in going.items()}


def rows_of(group: Group, tensors: Sequence[str]) -> int:
    """Return the number of indices that one unit has on the first axis of these tensors."""
    axis = next((a for a in group.axes if a.tensor in tensors), group.axes[0])
    index, _ = group.on(axis)
    return max(len(index) // group.units, 1)
