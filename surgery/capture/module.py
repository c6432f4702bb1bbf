"""Builder of a LoadedModel from a user's own module and example inputs: `from_module`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from surgery.capture.ranges import named_range
from surgery.capture.shapes import argument_names, list_axes
from surgery.capture.types import LoadedModel, tensor_leaves
from surgery.common.errors import CaptureError, nearest

ExampleInputs = torch.Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def from_module(
    module: nn.Module,
    example_inputs: ExampleInputs,
    dynamic: Any = None,
    *,
    copy_module: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Build a LoadedModel from a deep copy of `module`, in eval mode.

    Args:
        module: the module to capture.
        example_inputs: a tensor, a tuple of positional inputs, or a mapping of inputs by name.
        dynamic: the dynamic dimensions. None makes axis 0 of every tensor the dimension `batch` if all tensors
            have the same size of at least 2 there; otherwise everything is static, and a note of the capture says so.
            `{}` makes everything static. `{input: {axis: "name"}}` names dimensions; axes with the same name have the
            same size. "name=8..512" also sets bounds, "name=8..512/4" allows multiples of 4 alone, and a
            `torch.export.Dim` may be given instead of a name.
        copy_module: False uses `module` itself instead of a copy; the caller must not use it afterwards.
        metadata: JSON-compatible facts about the model; None records only the loader.

    Raises:
        CaptureError: the inputs or `dynamic` do not fit the module, or the module cannot be copied.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, torch.Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    else:
        raise CaptureError(
            f"example inputs are a {type(example_inputs).__name__}; pass a tensor, a tuple or a dict"
        )
    if copy_module:
        try:
            module = copy.deepcopy(module)
        except Exception as error:
            raise CaptureError(
                f"{type(module).__name__} cannot be deep-copied: {error}; pass copy_module=False"
            ) from error
    module.eval()
    names = argument_names(module, args, kwargs)
    values = [*args, *kwargs.values()]
    notes: tuple[str, ...] = ()
    if dynamic is None:
        shapes = _batch(values, names)
        notes = () if shapes else _static_note(values, names)
    else:
        shapes = _named(dynamic, dict(zip(names, values, strict=True)))
    loaded = LoadedModel(
        module,
        args,
        kwargs,
        shapes,
        unsourced=_names(module),
        metadata=dict(metadata or {"loader": "module"}),
        notes=notes,
    )
    # Listing the axes validates `dynamic` here, before the slow trace.
    list_axes(loaded)
    return loaded


def _names(module: nn.Module) -> frozenset[str]:
    """Names of all parameters and persistent buffers; a tied tensor contributes each of its names."""
    state = module.state_dict(keep_vars=True)
    return frozenset(name for name, value in state.items() if isinstance(value, torch.Tensor))


def _batch(values: list[Any], names: list[str]) -> dict[str, Any] | None:
    """Dynamic shapes with `batch` on axis 0 of every tensor; None if the tensors do not share a batch size."""
    tensors = [tensor for value in values for tensor in tensor_leaves(value)]
    sizes = {tensor.shape[0] if tensor.ndim else None for tensor in tensors}
    # torch.export specializes sizes 0 and 1, so an example batch of 1 cannot become dynamic.
    if len(sizes) != 1 or any(size is None or size < 2 for size in sizes):
        return None
    batch = Dim("batch")
    return {
        name: pytree.tree_map(lambda leaf: {0: batch} if isinstance(leaf, torch.Tensor) else None, value)
        for name, value in zip(names, values, strict=True)
    }


def _static_note(values: list[Any], names: list[str]) -> tuple[str, ...]:
    """A note that says why no dimension is dynamic."""
    sizes = {
        name: leaf.shape[0] if leaf.ndim else "no axes"
        for name, value in zip(names, values, strict=True)
        for leaf in tensor_leaves(value)
    }
    if not sizes:
        return ()
    listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
    why = "is 1" if set(sizes.values()) == {1} else "differs"
    return (
        f"every dimension is fixed, because the first size of the inputs {why} ({listed}); give a batch of at least 2, "
        f"or name the dynamic dimensions: dynamic={{{next(iter(sizes))!r}: {{0: 'batch'}}}}",
    )


def _named(dynamic: Any, inputs: Mapping[str, Any]) -> Any:
    """Copy of `dynamic` with each name replaced by a Dim; equal names share one Dim."""
    dims: dict[str, Any] = {}
    if isinstance(dynamic, Mapping):
        for name in dynamic:
            if name not in inputs:
                raise CaptureError(
                    f"dynamic names an input '{name}', which is not given{nearest(name, inputs)}"
                )

    def convert(spec: Any) -> Any:
        if isinstance(spec, str):
            name, dim = named_range(spec)
            if name in dims and "=" in spec and _bounds(dims[name]) != _bounds(dim):
                raise CaptureError(f"dimension '{name}' is given two ranges; give it one")
            return dims.setdefault(name, dim)
        if isinstance(spec, Mapping):
            return {key: convert(item) for key, item in spec.items()}
        if isinstance(spec, (tuple, list)):
            return type(spec)(convert(item) for item in spec)
        return spec

    # Names with a range come first, so that the range holds wherever the name occurs.
    for leaf in pytree.tree_leaves(dynamic, is_leaf=lambda spec: isinstance(spec, str)):
        if isinstance(leaf, str) and "=" in leaf:
            convert(leaf)
    converted = convert(dynamic)
    return converted if converted else None


def _bounds(dim: Any) -> tuple[Any, ...]:
    root = getattr(dim, "root", None)
    base = dim if root is None else root
    return (getattr(base, "min", None), getattr(base, "max", None), root is None or dim.fn(1))
