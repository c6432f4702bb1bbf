"""What is said of a training beside its losses: rows, learning rates, how much a batch holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.engine.replay import Paced
from surgery.train.data_context import Setting
from surgery.train.objective import Batch


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


def unfinished(paced: Sequence[Paced], steps: int, epoch: int) -> list[str]:
    """What passes will not have done to their tensors when so many steps are; epoch: how many of them make one."""
    said = []
    for each in paced:
        assert each.pass_.pacing is not None
        (_, last), unit = each.pass_.pacing
        if last is not None and (last - 1) * (epoch if unit == "epoch" else 1) >= steps:
            said.append(
                f"the schedule of {each.pass_.entry_id} ends at {unit} {last - 1}, and this training with {steps} steps"
            )
    return said


def tokens_of(batch: Batch) -> int:
    """How many tokens a batch has, padding left out; of one without tokens, its rows."""
    inputs = batch["inputs"]
    if isinstance(inputs, Mapping) and "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    if isinstance(inputs, Mapping) and "position_ids" in inputs:  # packed: there is no padding
        return int(inputs["input_ids"].numel())
    first = next(tensor for tensor in pytree.tree_leaves(inputs) if isinstance(tensor, Tensor))
    return len(first)
