"""`surgery.load` and `surgery.capture`: from a reference or a module to a Program."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from surgery.capture import LoadOptions, from_module, trace
from surgery.capture.reference import load_model
from surgery.common.errors import LoadError
from surgery.common.plugins import Plugins, make_plugin_manager
from surgery.engine.base import Base
from surgery.engine.program import Program
from surgery.store.saved import is_saved, load_saved


def load(
    ref: str,
    *,
    task: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    trust: bool = False,
    base: str | None = None,
    example: Mapping[str, int] | None = None,
    plugins: Plugins | None = None,
) -> Program:
    """A Program of a model reference or of a directory that surgery saved.

    ref: `hf:DIR_OR_ID`, `timm:NAME`, `py:package.module:callable`, `FILE.pt2` (with trust=True), a plugin's
    own scheme, or a saved directory. task: a transformers task name. model_kwargs: for the model's own
    constructor. base: for a saved directory, where its base lies now (required, as a confirmation, where the
    base is `py:` code). example: sizes of the example inputs by dimension name.
    Raises LoadError, CaptureError, JournalError, MissingExtraError.
    """
    plugins = plugins or make_plugin_manager()
    if "://" not in ref and Path(ref).is_dir():
        if is_saved(Path(ref)):
            return _noting(ref, load_saved(Path(ref), base=base, trust=trust, plugins=plugins))
        raise LoadError(
            f"{ref} is a directory, but not one that surgery saved; for a transformers model write hf:{ref}"
        )
    options = LoadOptions(
        task=task, model_kwargs=dict(model_kwargs or {}), trust=trust, example=dict(example or {})
    )
    loaded = load_model(ref, options, plugins)
    return _noting(ref, Program(Base(loaded, trace(loaded), plugins, ref, options)))


def _noting(ref: str, program: Program) -> Program:
    for note in program.base.captured.notes:
        warnings.warn(f"{ref}: {note}", stacklevel=3)
    return program


def capture(
    module: nn.Module, example_inputs: Any, dynamic: Any = None, *, plugins: Plugins | None = None
) -> Program:
    """A Program of a module of yours; the module is copied and never changed.

    example_inputs: a tensor, a tuple or a dict, with a batch of at least 2. dynamic: `{input: {axis: "batch"}}`
    or torch.export Dims; None makes axis 0 of every input the dimension `batch`.
    Raises CaptureError, naming the input or the operation, where it cannot be captured.
    """
    loaded = from_module(module, example_inputs, dynamic)
    return Program(Base(loaded, trace(loaded), plugins or make_plugin_manager()))
