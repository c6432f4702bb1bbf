"""Finds the reference that a live module was loaded from, so that a saved directory does not contain its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.capture import LoadOptions
from surgery.capture.diffusers import is_diffusers
from surgery.capture.hf_config import TASKS
from surgery.capture.reference import load_model
from surgery.common.errors import LoadError
from surgery.engine.base import Base
from surgery.engine.program import Program


def sourced(
    program: Program, ref: str | None, task: str | None, model_kwargs: Mapping[str, Any] | None
) -> tuple[Program, bool]:
    """The program on a base with a reference, so that saving it writes only the tensors that differ from the reference.

    If tensors differ from the directory that the model was loaded from in name or shape (after
    `resize_token_embeddings`, say), the saved directory has to include the base.

    Args:
        program: The program of a live module.
        ref: Reference of the base, as for `surgery.load`. None: the directory that a transformers model was loaded
            from; if there is none, the program is returned unchanged, and saving it writes all weights.
        task: Name of the transformers task; by default that of the module's class.
        model_kwargs: Keyword arguments of the model's constructor; by default the number of labels.

    Returns:
        The program, and True if the saved directory has to include the base.

    Raises:
        LoadError: The given reference is another model: its tensors differ in name or shape.
    """
    base, given = program.base, ref is not None
    module: Any = base.loaded.model
    if ref is None:
        folder = getattr(getattr(module, "config", None), "_name_or_path", "")
        if not folder or not (Path(folder) / "config.json").is_file():
            return program, False
        if is_diffusers(module):
            ref = f"diffusers:{folder}"
        else:
            ref = f"hf:{folder}"
            task = task or task_of(module)
            model_kwargs = model_kwargs or labels_of(module)
    options = LoadOptions(task, dict(model_kwargs or {}), False, base.options.example)
    loaded = load_model(ref, options, base.plugins)
    wanted = _dtypes(module)
    if "dtype" not in options.model_kwargs and len(wanted) == 1 and _dtypes(loaded.module) != wanted:
        # The model was converted after it had been loaded, so it is to be loaded in its present dtype.
        dtype = str(*wanted).removeprefix("torch.")
        options = replace(options, model_kwargs={**options.model_kwargs, "dtype": dtype})
        loaded = load_model(ref, options, base.plugins)
    other = _other(loaded.module, base, ref)
    if other and given:
        raise LoadError(other)
    if other:
        own = replace(base.loaded, files=(), unsourced=frozenset())
        scheme = "diffusers:" if is_diffusers(module) else "hf:"
        fresh = Base(own, base.captured, base.plugins, scheme, LoadOptions(example=base.options.example))
        return _on(fresh, program), True
    differ = _differing(loaded.module, base)
    own = replace(
        base.loaded,
        files=loaded.files,
        unsourced=loaded.unsourced,
        stored=differ,
        metadata=dict(loaded.metadata),
    )
    return _on(Base(own, base.captured, base.plugins, ref, options), program), False


def _on(base: Base, program: Program) -> Program:
    """The program on another description of its base."""
    base.heads = program.base.heads
    named = Program(base, program.journal, program.tensors, program.changed, program._graph)
    named.labels = dict(program.labels)
    return named


def _dtypes(module: nn.Module) -> set[torch.dtype]:
    """Dtypes of the floating-point parameters."""
    return {p.dtype for p in module.parameters() if p.is_floating_point()}


def _other(module: nn.Module, base: Base, ref: str) -> str:
    """Message that a loaded module has tensors of other names or shapes than the base; empty if it has the same."""
    there = module.state_dict(keep_vars=True)
    here = base.loaded.module.state_dict(keep_vars=True)
    for name in [*here, *there]:
        ours, theirs = (tuple(state[name].shape) if name in state else "none" for state in (here, there))
        if ours != theirs:
            return (
                f"{ref} is another model: {name} has shape {theirs} there and {ours} here; give the reference (and "
                f"task, model_kwargs) that the model was loaded with, or leave out ref to include the base"
            )
    return ""


def _differing(module: nn.Module, base: Base) -> frozenset[str]:
    """Names of the base's tensors whose values differ from those of a loaded module."""
    there = module.state_dict(keep_vars=True)
    here = base.loaded.module.state_dict(keep_vars=True)
    # Converting a model also converts buffers that are in no state dict, such as the frequencies of rotary positions.
    here.update(base.loaded.module.named_buffers(remove_duplicate=False))
    there.update(module.named_buffers(remove_duplicate=False))
    return frozenset(
        name
        for name in here
        if name in base.tensors and name in there and not _equal(base.tensors[name], there[name])
    )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.detach().cpu(), b.detach().cpu())


def task_of(module: nn.Module) -> str | None:
    """Name of the transformers task that loads a model of this class; None if there is none."""
    import transformers

    config: Any = module.config
    for task, names in TASKS.items():
        for name in names:
            auto = getattr(transformers, name, None)
            if auto is not None and auto._model_mapping.get(type(config), None) is type(module):
                return task
    return None


def labels_of(module: nn.Module) -> dict[str, Any]:
    """Number of labels of a classification head; a new head can differ from the directory's configuration."""
    if "Classification" not in type(module).__name__:
        return {}
    config: Any = module.config
    return {"num_labels": config.num_labels}
