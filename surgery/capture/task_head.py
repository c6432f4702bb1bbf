"""The head of a transformers checkpoint: the task that it was saved with, or one that its model type supports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.capture.hf_config import (
    PREFIX,
    auto_class_for,
    check_directory,
    read_config,
    require_transformers,
    silenced,
)


def task_head(ref: str, tasks: Sequence[str], model_kwargs: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Choose a task for a model whose head has to compute what a training needs.

    Args:
        ref: reference of the model.
        tasks: names of tasks that would do, by preference.
        model_kwargs: arguments of the model's constructor.

    Returns:
        The task, and True if the checkpoint has no such head, so that it is new and random. The task is None if the
        reference is no `hf:` one, or the model type supports none of the tasks.
    """
    if not ref.startswith(PREFIX):
        return None, False
    name = ref.removeprefix(PREFIX)
    transformers = require_transformers()
    check_directory(ref, name, model_kwargs)
    with silenced(transformers):
        config, _ = read_config(transformers, ref, name, dict(model_kwargs))
    named = set(getattr(config, "architectures", None) or ())
    for task in tasks:
        auto = auto_class_for(transformers, config, task)
        if auto is not None:
            found = auto._model_mapping[type(config)]
            classes = found if isinstance(found, tuple) else (found,)
            return task, named.isdisjoint(each.__name__ for each in classes)
    return None, False
