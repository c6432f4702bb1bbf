"""Named dynamic dimensions, and random example inputs at other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export.dynamic_shapes import _DimHint
from torch.utils import _pytree as pytree

from surgery.capture.types import Captured, LoadedModel
from surgery.common.errors import CaptureError, nearest

_UNBOUNDED = 1 << 30


@dataclass(frozen=True)
class Axis:
    """One dynamic axis of one input tensor. Its size is `scale * sizes[root] + offset`.

    Attributes:
        input: name of the input; a tensor inside a container is `name.0` or `name.key`.
        axis: non-negative index of the axis.
        name: name shown to the user (`seq`, or `2*seq` for a derived dimension).
        root: name of the dimension that determines the size.
        scale: factor of the root's size.
        offset: constant added to it.
        low: smallest size of the root dimension.
        high: largest size of the root dimension (2**30 if unbounded).
    """

    input: str
    axis: int
    name: str
    root: str
    scale: int
    offset: int
    low: int
    high: int


def dynamic_axes(model: LoadedModel | Captured) -> dict[str, dict[int, str]]:
    """Names of the dynamic axes by input: `{"input_ids": {0: "batch", 1: "seq"}}`. Static inputs are omitted."""
    found: dict[str, dict[int, str]] = {}
    for axis in list_axes(model):
        found.setdefault(axis.input, {})[axis.axis] = axis.name
    return found


def symbol_names(captured: Captured) -> dict[str, str]:
    """Names of the symbolic sizes of a captured graph: `{"s43": "batch"}`. Sizes derived from others have no entry."""
    inputs = [node for node in captured.graph.nodes if node.op == "placeholder"]
    nodes = dict(zip((name for name, _ in _named_leaves(captured, tensors_only=False)), inputs, strict=True))
    found: dict[str, str] = {}
    for axis in list_axes(captured):
        value = nodes[axis.input].meta.get("val")
        size = value.shape[axis.axis] if isinstance(value, torch.Tensor) else None
        if isinstance(size, torch.SymInt) and (axis.scale, axis.offset) == (1, 0):
            found.setdefault(str(size.node.expr), axis.name)
    return found


def named_sizes(model: LoadedModel | Captured) -> dict[str, int]:
    """Size of each named dynamic dimension in the example inputs."""
    tensors = dict(_named_leaves(model))
    sizes: dict[str, int] = {}
    for axis in list_axes(model):
        size = tensors[axis.input].shape[axis.axis]
        sizes.setdefault(axis.root, (size - axis.offset) // axis.scale)
    return sizes


def limited(captured: Captured, limits: Mapping[str, int]) -> Captured:
    """Copy of a capture with reduced upper bounds of named dimensions.

    Args:
        captured: the capture.
        limits: largest size by dimension name; bounds that are already lower are kept.

    Raises:
        CaptureError: the example inputs exceed a new bound.
    """
    # Axes with the same name must share one Dim object.
    known: dict[str, Any] = {}

    def narrow(spec: Any) -> Any:
        if isinstance(spec, Mapping):
            return {key: narrow(value) for key, value in spec.items()}
        if isinstance(spec, (tuple, list)):
            return type(spec)(narrow(value) for value in spec)
        name = str(getattr(spec, "__name__", ""))
        if name in limits and getattr(spec, "root", None) is None:
            low, high = int(getattr(spec, "min", 0)), int(min(getattr(spec, "max", _UNBOUNDED), limits[name]))
            return known.setdefault(name, torch.export.Dim(name, min=low, max=high))
        return spec

    for name, size in named_sizes(captured).items():
        if size > limits.get(name, size):
            raise CaptureError(
                f"the example has {name}={size}, but a pass limits it to {limits[name]}; load with a shorter example"
            )
    return replace(captured, dynamic_shapes=narrow(captured.dynamic_shapes))


def other_sizes(model: LoadedModel | Captured) -> dict[str, int]:
    """Choose, for every named dimension, a size within its bounds that differs from the example's.

    Raises:
        CaptureError: the bounds of a dimension allow no other size.
    """
    bounds: dict[str, tuple[int, int]] = {}
    for axis in list_axes(model):
        low, high = bounds.get(axis.root, (1, _UNBOUNDED))
        bounds[axis.root] = (max(low, axis.low), min(high, axis.high))
    sizes = {}
    for name, size in named_sizes(model).items():
        low, high = bounds[name]
        # An odd step gives a size that shares few factors with the example's, so that a reshape with a baked-in
        # size fails instead of dividing evenly.
        options = (size + 3, size + 1, size - 1, size - 3)
        chosen = next((option for option in options if max(low, 2) <= option <= high), None)
        if chosen is None:
            raise CaptureError(
                f"dimension '{name}' has no size other than the example's {size} in {low}..{high}; "
                "widen its bounds or leave it out of the dynamic dimensions"
            )
        sizes[name] = chosen
    return sizes


def fresh_inputs(
    model: LoadedModel | Captured, sizes: Mapping[str, int] | None = None, seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Draw random inputs that resemble the example inputs, at other sizes of the named dynamic dimensions.

    Integers are uniform over the range of the example. Attention masks have random right padding. Floats are
    normal with the mean and standard deviation of the example. If the first or last column of an integer input is
    constant in the example (a start or end token), it keeps that value.

    Args:
        model: the model whose example inputs are imitated.
        sizes: size by dimension name; other dimensions keep the example's size.
        seed: seed of the random inputs.

    Returns:
        The positional inputs and the inputs by name.

    Raises:
        CaptureError: a name is not a dynamic dimension, or a size is out of bounds.
    """
    wanted = named_sizes(model)
    for name in sizes or {}:
        if name not in wanted:
            raise CaptureError(f"'{name}' is not a dynamic dimension{nearest(name, wanted)}")
    wanted.update(sizes or {})
    shapes: dict[str, dict[int, int]] = {}
    for axis in list_axes(model):
        size = wanted[axis.root]
        if not axis.low <= size <= axis.high:
            raise CaptureError(f"size {size} of '{axis.root}' is outside {axis.low}..{axis.high}")
        shapes.setdefault(axis.input, {})[axis.axis] = axis.scale * size + axis.offset

    generator = torch.Generator().manual_seed(seed)
    leaves = []
    for name, leaf in _named_leaves(model, tensors_only=False):
        if isinstance(leaf, torch.Tensor):
            resized = shapes.get(name, {})
            shape = [resized.get(i, size) for i, size in enumerate(leaf.shape)]
            leaf = _fresh_tensor(name, leaf, shape, generator)
        leaves.append(leaf)
    _, spec = pytree.tree_flatten((model.args, dict(model.kwargs)))
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs


def _fresh_tensor(
    name: str, like: torch.Tensor, shape: list[int], generator: torch.Generator
) -> torch.Tensor:
    """Random tensor of the given shape with the dtype and value range of `like`; see `fresh_inputs`."""
    if like.numel() == 0:
        return like.new_zeros(shape)
    if like.dtype.is_floating_point or like.dtype.is_complex:
        # A constant float input is a setting rather than data; random values could be invalid for it.
        if like.numel() > 1 and bool((like == like.reshape(-1)[0]).all()):
            return torch.full(shape, like.reshape(-1)[0].item(), dtype=like.dtype, device=like.device)
        noise = torch.randn(shape, generator=generator)
        mean, std = (like.float().mean(), like.float().std()) if like.numel() > 1 else (0.0, 1.0)
        return (noise * std + mean).to(like.dtype).to(like.device)
    low, high = int(like.min()), int(like.max())
    if "mask" in name and low == 0 and high == 1 and like.ndim == 2:
        length = shape[1]
        kept = torch.randint(max(1, length // 2), length + 1, (shape[0], 1), generator=generator)
        return (torch.arange(length)[None, :] < kept).to(like.dtype).to(like.device)
    # Exclude the edge columns from the range, so that no start or end token is drawn in the middle of a sequence.
    columns = like.ndim >= 2 and like.shape[-1] > 2
    inner = like[..., 1:-1] if columns else like
    low, high = int(inner.min()), int(inner.max())
    fresh = torch.randint(low, high + 1, shape, generator=generator).to(like.dtype).to(like.device)
    if columns and shape[-1] > 2:
        for column in (0, -1):
            edge = like[..., column]
            if bool((edge == edge.reshape(-1)[0]).all()):
                fresh[..., column] = edge.reshape(-1)[0]
    return fresh


def list_axes(model: LoadedModel | Captured) -> list[Axis]:
    """List every dynamic axis of every input tensor, in input order.

    Raises:
        CaptureError: a dimension is `Dim.AUTO` (torch.export may silently make it static), or the specification does
            not fit the inputs.
    """
    return list(_axes(model))


def _axes(model: LoadedModel | Captured) -> Iterator[Axis]:
    spec = model.dynamic_shapes
    if spec is None:
        return
    names = input_names(model)
    values = [*model.args, *model.kwargs.values()]
    if isinstance(spec, Mapping):
        unknown = [name for name in spec if name not in names]
        if unknown:
            raise CaptureError(
                f"dynamic names an input '{unknown[0]}', which is not given{nearest(unknown[0], names)}"
            )
        specs = [spec.get(name) for name in names]
    else:
        specs = list(spec)
        if len(specs) != len(values):
            raise CaptureError(
                f"dynamic has {len(specs)} entries for {len(values)} inputs; give one entry for each input"
            )
    for name, value, entry in zip(names, values, specs, strict=True):
        yield from _value_axes(name, value, entry)


def _value_axes(name: str, value: Any, spec: Any) -> Iterator[Axis]:
    """Dynamic axes of one input, which may be a nested container of tensors."""
    if spec is None:
        return
    if isinstance(value, torch.Tensor):
        entries = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
        for axis, dim in entries:
            if dim is None or isinstance(dim, int) or dim is torch.export.Dim.STATIC:
                continue
            if not isinstance(axis, int) or not -value.ndim <= axis < value.ndim:
                raise CaptureError(f"input '{name}' has {value.ndim} dimensions, so no dynamic axis {axis}")
            yield _axis(name, axis % value.ndim, dim)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _value_axes(f"{name}.{key}", item, spec.get(key))
    elif isinstance(value, (tuple, list)):
        for i, (item, entry) in enumerate(zip(value, spec, strict=True)):
            yield from _value_axes(f"{name}.{i}", item, entry)


def _axis(name: str, axis: int, dim: Any) -> Axis:
    """The Axis of one Dim. Raises CaptureError for an unnamed one such as `Dim.AUTO`."""
    if isinstance(dim, _DimHint):
        raise CaptureError(
            f"axis {axis} of input '{name}' is Dim.{dim.type.name}; name it (torch.export.Dim('seq')), "
            "because torch.export can silently make an unnamed dimension static"
        )
    root = getattr(dim, "root", None)
    scale, offset = 1, 0
    if root is not None:
        # A derived Dim is a linear function `fn` of its root; two values determine it.
        scale, offset = dim.fn(1) - dim.fn(0), dim.fn(0)
    base = root if root is not None else dim
    low, high = int(getattr(base, "min", 0)), getattr(base, "max", _UNBOUNDED)
    high = _UNBOUNDED if high > _UNBOUNDED else int(high)
    return Axis(name, axis, dim.__name__, base.__name__, int(scale), int(offset), low, high)


def input_names(model: LoadedModel | Captured) -> list[str]:
    """Names of the inputs as in the signature of forward, positional inputs first."""
    target = model.module if isinstance(model, LoadedModel) else model.graph_module
    return argument_names(target, model.args, model.kwargs)


def argument_names(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Names of the given inputs, positional inputs first.

    Positional inputs are named by the signature of forward; those collected by `*args` are `args_0`, `args_1`, ...

    Args:
        module: the module, or a captured graph module, which stores the original names.
        args: positional inputs.
        kwargs: inputs by name.

    Raises:
        CaptureError: forward takes fewer positional inputs than given.
    """
    if isinstance(module, fx.GraphModule):
        names = module.meta.get("surgery_inputs")
        if names is not None:
            return list(names)
    parameters = inspect.signature(module.forward).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][
        : len(args)
    ]
    star = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    if len(positional) < len(args):
        if star is None:
            raise CaptureError(
                f"{type(module).__name__}.forward takes {len(positional)} positional inputs, but {len(args)} are given"
            )
        positional += [f"{star}_{i}" for i in range(len(args) - len(positional))]
    return [*positional, *kwargs]


def _named_leaves(model: LoadedModel | Captured, tensors_only: bool = True) -> Iterator[tuple[str, Any]]:
    """Names and leaves of the inputs in pytree order; the names match `Axis.input`."""
    names = input_names(model)
    for i, (path, leaf) in enumerate(pytree.tree_flatten_with_path((model.args, dict(model.kwargs)))[0]):
        del i
        first, rest = path[1], path[2:]
        name = (
            names[first.idx] if isinstance(first, pytree.SequenceKey) else str(getattr(first, "key", first))
        )
        for key in rest:
            name += f".{key.idx if isinstance(key, pytree.SequenceKey) else getattr(key, 'key', key)}"
        if isinstance(leaf, torch.Tensor) or not tensors_only:
            yield name, leaf
