"""What is said of a training beside its losses: rows, learning rates, how much a batch holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.training.objective import Batch
from surgery.training.setting import Setting


def rates(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the learning rates are, where these are several; the largest is the one that is logged."""
    found: dict[float, list[str]] = {}
    for group in groups:
        found.setdefault(group["lr"], []).extend(group["names"])
    if len(found) == 1:
        return []
    return [
        f"learning rate {rate:.3g} of {len(names)} parameters ({names[0]}, …)"
        for rate, names in sorted(found.items())
    ]


def counted(setting: Setting, which: str) -> list[str]:
    return [f"{which}rows: {count} {sentence}" for sentence, count in setting.counts.items()]


def tokens_of(batch: Batch) -> int:
    """How many tokens a batch has, padding left out; of one without tokens, its rows."""
    inputs = batch["inputs"]
    if isinstance(inputs, Mapping) and "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    if isinstance(inputs, Mapping) and "position_ids" in inputs:  # packed: there is no padding
        return int(inputs["input_ids"].numel())
    first = next(tensor for tensor in pytree.tree_leaves(inputs) if isinstance(tensor, Tensor))
    return len(first)
