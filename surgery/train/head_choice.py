"""Chooses the head of a transformers model from the objective and the data, where the user names none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.capture.task_head import task_head
from surgery.train.data import Rows, together
from surgery.train.objective import Objective


@dataclass(frozen=True)
class HeadChoice:
    """Head to load.

    Attributes:
        task: task name for transformers, or None for the model's own class.
        model_kwargs: arguments of the model's constructor.
        note: sentence for the user, or "" if nothing was chosen.
    """

    task: str | None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def choose_head(
    objective: Objective, rows: Rows, ref: str, task: str | None, model_kwargs: Mapping[str, Any]
) -> HeadChoice:
    """Choose the head that an objective trains, with as many outputs as the data needs.

    Args:
        objective: objective to train with.
        rows: data to train on.
        ref: reference of the model.
        task: task that the user named, or None.
        model_kwargs: arguments of the model's constructor that the user gave. They are kept.

    Raises:
        LoadError: the configuration of the model cannot be read.
        TrainingError: the data does not fit the objective.
    """
    wanted = (task,) if task is not None else objective.heads
    found, is_new = task_head(ref, wanted, model_kwargs) if wanted else (None, False)
    if found is None or not is_new:
        # The checkpoint's own head is loaded by the class that its configuration names.
        return HeadChoice(task, model_kwargs)
    outputs = objective.outputs_for(together(rows)) if "num_labels" not in model_kwargs else None
    more = {} if outputs is None else {"num_labels": outputs}
    size = "" if outputs is None else f" with {outputs} output{'s' if outputs > 1 else ''}"
    note = "" if task is not None and outputs is None else f"{ref} gets a new {found} head{size}"
    return HeadChoice(found, {**model_kwargs, **more}, note)
