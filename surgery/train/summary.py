"""Notes to log about a training: skipped rows, learning rates, unfinished schedules, tokens per batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.engine.replay import GradualEntry
from surgery.train.data_context import Setting
from surgery.train.objective import Batch


def rates(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe the learning rates if there are several. The log of steps shows only the largest."""
    found: dict[float, list[str]] = {}
    for group in groups:
        found.setdefault(group["lr"], []).extend(group["names"])
    if len(found) == 1:
        return []
    return [
        f"learning rate {rate:.3g} for {len(names)} parameters ({names[0]}, …)"
        for rate, names in sorted(found.items())
    ]


def counted(setting: Setting, which: str) -> list[str]:
    """Describe how many rows were cut or skipped."""
    return [f"{count} {which}rows: each {sentence}" for sentence, count in setting.counts.items()]


def unfinished(paced: Sequence[GradualEntry], steps: int, epoch: int) -> list[str]:
    """Describe the gradual passes whose schedule ends after the training.

    Args:
        paced: gradual passes of the program.
        steps: steps of the training.
        epoch: steps per epoch.
    """
    said = []
    for each in paced:
        (_, last), unit = each.gradual.window, each.gradual.unit
        if last is not None and (last - 1) * (epoch if unit == "epoch" else 1) >= steps:
            said.append(
                f"the schedule of {each.entry} ends at {unit} {last - 1}, but this training ends after {steps} steps"
            )
    return said


def tokens_of(batch: Batch) -> int:
    """Return the number of tokens in a batch without padding, or its rows if it has no tokens."""
    inputs = batch["inputs"]
    if isinstance(inputs, Mapping) and "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    if isinstance(inputs, Mapping) and "position_ids" in inputs:  # packed: there is no padding
        return int(inputs["input_ids"].numel())
    first = next(tensor for tensor in pytree.tree_leaves(inputs) if isinstance(tensor, Tensor))
    return len(first)
