"""Where a live module's weights come from, so that a saved directory need not hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.capture import LoadOptions
from surgery.capture.hf import TASKS
from surgery.capture.reference import load_model
from surgery.common.errors import LoadError
from surgery.engine.base import Base
from surgery.engine.program import Program


def sourced(
    program: Program, ref: str | None, task: str | None, model_kwargs: Mapping[str, Any] | None
) -> Program:
    """The program on a base that a reference gives again, with the tensors that differ noted as not from there.

    ref: None takes the directory that a transformers model was loaded from, where there is one; else the program is
    returned as it is, with all of its weights its own. Raises LoadError where the reference is another model.
    """
    base = program.base
    module: Any = base.loaded.module
    if ref is None:
        folder = getattr(getattr(module, "config", None), "_name_or_path", "")
        if not folder or not (Path(folder) / "config.json").is_file():
            return program
        ref = f"hf:{folder}"
        task = task or task_of(module)
        model_kwargs = model_kwargs or labels_of(module)
    options = LoadOptions(task, dict(model_kwargs or {}), False, base.options.example)
    loaded = load_model(ref, options, base.plugins)
    differ = _differing(loaded.module, base, ref)
    own = replace(
        base.loaded, files=loaded.files, unsourced=loaded.unsourced | differ, metadata=dict(loaded.metadata)
    )
    fresh = Base(own, base.captured, base.plugins, ref, options)
    return Program(fresh, program.journal, program.tensors, program.changed, program._graph)


def _differing(module: nn.Module, base: Base, ref: str) -> frozenset[str]:
    there = module.state_dict(keep_vars=True)
    here = base.loaded.module.state_dict(keep_vars=True)
    for name in [*here, *there]:
        ours, theirs = (tuple(state[name].shape) if name in state else "none" for state in (here, there))
        if ours != theirs:
            raise LoadError(
                f"{ref} is another model: of {name}, this one has {ours} and that has {theirs}; give the reference "
                f"(and task, model_kwargs) that it was loaded with"
            )
    return frozenset(
        name for name in here if name in base.tensors and not _equal(base.tensors[name], there[name])
    )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.detach().cpu(), b.detach().cpu())


def task_of(module: nn.Module) -> str | None:
    """The transformers task whose class this model has."""
    import transformers

    config: Any = module.config
    for task, names in TASKS.items():
        for name in names:
            auto = getattr(transformers, name, None)
            if auto is not None and auto._model_mapping.get(type(config), None) is type(module):
                return task
    return None


def labels_of(module: nn.Module) -> dict[str, Any]:
    """What a new head was made with, which the directory's own configuration need not say."""
    if "Classification" not in type(module).__name__:
        return {}
    config: Any = module.config
    return {"num_labels": config.num_labels}
