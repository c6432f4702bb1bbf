"""What a unit is worth, and which go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from surgery.common.errors import PassError
from surgery.passes.prune.coupling import Group

Value = Callable[[str], Tensor]  # of a tensor: what each of its values is worth


def scores(group: Group, worth: Value, counted: frozenset[str], relative: bool) -> Tensor:
    """For each unit the sum over its values. relative: of each tensor over its mean, so that all count alike."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for axis in group.axes:
        if axis.tensor not in counted:
            continue
        index, unit = group.on(axis)
        value = worth(axis.tensor).cpu().movedim(axis.axis, 0).reshape(axis.size, -1).sum(1)
        if not bool(value.isfinite().all()):
            raise PassError(f"{axis.tensor} holds values that are not finite; mend it before pruning")
        found = torch.zeros_like(total).index_add_(0, unit, value[index])
        mean = found.mean()
        total += found / mean if relative and mean > 0 else found
    return total


def count_removed(group: Group, ratio: float, round_to: int, rows: int) -> int:
    """How many units go: a part of them, so that what is left is a multiple. rows: indices of one unit."""
    removed = int(group.units * ratio + 1e-9)
    while removed > 0 and (group.units - removed) * rows % round_to:
        removed -= 1
    return min(removed, group.units - 1)


def least(found: Tensor, count: int) -> Tensor:
    """The units of least worth; of equals the later go."""
    last_first = torch.argsort(found.flip(0), stable=True)[:count]
    return (len(found) - 1 - last_first).sort().values


def shared_out(
    found: Mapping[int, Tensor], ratio: float, allowed: Callable[[int, int], int]
) -> dict[int, int]:
    """How many units of each group go where all are ranked together, over the mean of their group.

    allowed: (group, count wanted) -> what may go of it.
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
    """Indices that one unit has on the first axis that makes it."""
    axis = next((a for a in group.axes if a.tensor in tensors), group.axes[0])
    index, _ = group.on(axis)
    return max(len(index) // group.units, 1)
