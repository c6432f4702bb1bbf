"""Capture of a live module, from a copy of its module tree over the same parameters and buffers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.capture import LoadedModel, diffusers, from_module
from surgery.capture.diffusers import is_diffusers
from surgery.capture.hf import from_model, make_traceable
from surgery.capture.trace import as_found
from surgery.common.errors import CaptureError


@dataclass
class Seen:
    """Inputs that a layer received on the example inputs.

    Attributes:
        shapes: Shape of the first tensor argument, one for each rank.
        more: Other arguments that were not None, by name or position.
        dtype: Dtype of the first tensor argument.
    """

    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    more: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.float32


def mirror(model: nn.Module) -> nn.Module:
    """A deep copy of a model that shares its parameters and buffers.

    Raises:
        CaptureError: The model cannot be copied.
    """
    # A tensor in the memo of deepcopy counts as copied already, and is used itself.
    tensors: dict[int, Any] = {id(t): t for t in model.parameters()}
    tensors.update({id(t): t for t in model.buffers()})
    try:
        return copy.deepcopy(model, tensors)
    except Exception as error:
        raise CaptureError(f"{type(model).__name__} cannot be deep-copied: {error}") from error


def loaded_of(model: nn.Module, inputs: Any, dynamic: Any, example: Mapping[str, int]) -> LoadedModel:
    """A mirror of the model, with example inputs.

    Args:
        model: The live module.
        inputs: Example inputs, as for `surgery.capture`; None for a transformers model, whose inputs are known.
        dynamic: Dynamic dimensions, as for `surgery.capture`.
        example: Sizes of the example inputs of a transformers model, by dimension name.

    Raises:
        CaptureError: The model cannot be copied, or needs inputs.
    """
    copied = mirror(model)
    if inputs is not None:
        cached = make_traceable(copied) if hasattr(copied, "config") else ()
        loaded = from_module(copied, inputs, dynamic, copy_module=False)
        return replace(loaded, config=copy.deepcopy(getattr(model, "config", None)), cached=cached)
    if is_diffusers(model):
        return diffusers.from_model(copied, example=example)
    if not hasattr(model, "config"):
        raise CaptureError(
            f"{type(model).__name__} is no model of transformers or diffusers, so its inputs are unknown; give inputs="
        )
    return from_model(copied, example=example)


def watch(loaded: LoadedModel) -> dict[str, Seen]:
    """Run the example inputs and record the inputs of every module that is called, under each of its paths."""
    found: dict[int, Seen] = {}
    paths: dict[int, list[str]] = {}
    handles = []
    for path, module in loaded.module.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen = found.setdefault(id(module), Seen())
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if first is not None:
            seen.shapes.setdefault(first.dim(), tuple(first.shape))
            seen.dtype = first.dtype
        given = {**{f"argument {i}": a for i, a in enumerate(args, 1)}, **kwargs}
        more = [name for name, value in given.items() if value is not None and value is not first]
        seen.more.extend(name for name in more if name not in seen.more)

    for module in loaded.module.modules():
        handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
    try:
        with as_found(loaded.module), torch.no_grad():
            loaded.module(*loaded.args, **loaded.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: seen for key, seen in found.items() for path in paths[key]}
