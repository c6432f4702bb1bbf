"""Named dynamic dimensions, their ranges, and the names of the inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export.dynamic_shapes import _DimHint
from torch.utils import _pytree as pytree

from surgery.capture.types import Captured, LoadedModel
from surgery.common.errors import CaptureError, nearest

UNBOUNDED = 1 << 30


@dataclass(frozen=True)
class Axis:
    """One dynamic axis of one input tensor. Its size is `scale * sizes[root] + offset`.

    torch writes "multiples of 8" as 8 times another dimension, `8*_h`. Here that is the dimension `h` with the step 8,
    unless axes of several steps share `_h`.

    Attributes:
        input: name of the input; a tensor inside a container is `name.0` or `name.key`.
        axis: non-negative index of the axis.
        name: name shown to the user (`seq`, or `2*seq` for a derived dimension).
        root: name of the dimension that determines the size.
        scale: factor of the root's size.
        offset: constant added to it.
        low: smallest size of the root dimension.
        high: largest size of the root dimension (2**30 if unbounded).
        step: sizes of the root dimension are `shift` plus a multiple of this.
        shift: see `step`.
        torch_name: torch's name of the dimension: `_h` for multiples of a step.
    """

    input: str
    axis: int
    name: str
    root: str
    scale: int
    offset: int
    low: int
    high: int
    step: int = 1
    shift: int = 0
    torch_name: str = ""

    def allows(self, size: int) -> bool:
        """True if the root dimension may have this size."""
        return self.low <= size <= self.high and (size - self.shift) % self.step == 0

    @property
    def range(self) -> str:
        """The sizes of the root dimension as text: "at most 63", "multiples of 8 up to 512"; "any" without bounds."""
        high = f"{self.high}" if self.high < UNBOUNDED - self.step else ""
        if self.step > 1:
            first = f"multiples of {self.step}"
            if self.shift:
                sign, number = "+" if self.shift > 0 else "-", abs(self.shift)
                first += f" {sign} {number}"
            low = f" from {self.low}" if self.low > self.step + self.shift else ""
            return f"{first}{low}{f' up to {high}' if high else ''}"
        # torch treats 0 and 1 as special, so a lower bound of up to 2 excludes nothing that a user would try.
        if self.low <= 2:
            return f"at most {high}" if high else "any"
        return f"{self.low} to {high}" if high else f"{self.low} or more"


def dynamic_axes(model: LoadedModel | Captured) -> dict[str, dict[int, str]]:
    """Names of the dynamic axes by input: `{"input_ids": {0: "batch", 1: "seq"}}`. Static inputs are omitted."""
    found: dict[str, dict[int, str]] = {}
    for axis in list_axes(model):
        found.setdefault(axis.input, {})[axis.axis] = axis.name
    return found


def symbol_names(captured: Captured) -> dict[str, tuple[str, int, int]]:
    """Names of the symbolic sizes of a captured graph: `{"s43": ("batch", 1, 0)}`.

    The size of the dimension is the second number times the symbol plus the third: `("h", 8, 0)` for multiples of 8.
    Sizes derived from others have no entry.
    """
    inputs = [node for node in captured.graph.nodes if node.op == "placeholder"]
    nodes = dict(zip((name for name, _ in named_leaves(captured, tensors_only=False)), inputs, strict=True))
    found: dict[str, tuple[str, int, int]] = {}
    for axis in list_axes(captured):
        value = nodes[axis.input].meta.get("val")
        size = value.shape[axis.axis] if isinstance(value, torch.Tensor) else None
        if isinstance(size, torch.SymInt) and (axis.scale, axis.offset) == (1, 0):
            symbols = size.node.expr.free_symbols
            if len(symbols) == 1:
                symbol = next(iter(symbols))
                scale = size.node.expr.coeff(symbol)
                shift = size.node.expr - scale * symbol
                if scale.is_Integer and shift.is_Integer:
                    found.setdefault(str(symbol), (axis.name, int(scale), int(shift)))
    return found


def named_sizes(model: LoadedModel | Captured) -> dict[str, int]:
    """Size of each named dynamic dimension in the example inputs."""
    tensors = dict(named_leaves(model))
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
        root = getattr(spec, "root", None)
        name = str(getattr(spec, "__name__", "")) if root is None else root.__name__.lstrip("_")
        if name in limits and (root is None or root.__name__ != name):
            scale, offset = (1, 0) if root is None else (spec.fn(1) - spec.fn(0), spec.fn(0))
            base = spec if root is None else root
            most = (limits[name] - offset) // scale
            low, high = int(getattr(base, "min", 0)), int(min(getattr(base, "max", UNBOUNDED), most))
            made = known.setdefault(base.__name__, torch.export.Dim(base.__name__, min=low, max=high))
            return made if root is None else scale * made + offset if offset else scale * made
        return spec

    for name, size in named_sizes(captured).items():
        if size > limits.get(name, size):
            raise CaptureError(
                f"the example has {name}={size}, but a pass limits it to {limits[name]}; load with a shorter example"
            )
    return replace(captured, dynamic_shapes=narrow(captured.dynamic_shapes))


def list_axes(model: LoadedModel | Captured) -> list[Axis]:
    """List every dynamic axis of every input tensor, in input order.

    Raises:
        CaptureError: a dimension is `Dim.AUTO` (torch.export may silently make it static), or the specification does
            not fit the inputs.
    """
    return _with_steps(list(_axes(model)))


def _with_steps(axes: list[Axis]) -> list[Axis]:
    """Axes in which "8 times `_h`" is the dimension `h` with the step 8."""
    shown = _shown((axis.root, axis.scale, axis.offset) for axis in axes)
    found = []
    for axis in axes:
        if axis.root not in shown:
            found.append(axis)
            continue
        low, high = axis.scale * axis.low + axis.offset, axis.scale * axis.high + axis.offset
        found.append(
            replace(
                axis,
                name=shown[axis.root],
                root=shown[axis.root],
                scale=1,
                offset=0,
                low=max(low, 0),
                high=UNBOUNDED if axis.high >= UNBOUNDED else high,
                step=axis.scale,
                shift=axis.offset,
            )
        )
    return found


def _shown(factors: Iterable[tuple[str, int, int]]) -> dict[str, str]:
    """Names of dimensions with a step by those of their roots: `{"_h": "h"}`.

    Args:
        factors: root, scale and offset of each axis.
    """
    known: dict[str, set[tuple[int, int]]] = {}
    for root, scale, offset in factors:
        known.setdefault(root, set()).add((scale, offset))
    return {
        root: root.lstrip("_")
        for root, found in known.items()
        if root.startswith("_") and len(found) == 1 and found != {(1, 0)} and root.lstrip("_") not in known
    }


def axis_names(dynamic_shapes: Any) -> Any:
    """Copy of dynamic shapes with each Dim replaced by its name and each static dimension by None."""
    leaves = [leaf for leaf in pytree.tree_leaves(dynamic_shapes) if hasattr(leaf, "__name__")]
    shown = _shown(_linear(leaf) for leaf in leaves)

    def named(spec: Any) -> Any:
        if isinstance(spec, Mapping):
            return {key: named(value) for key, value in spec.items()}
        if isinstance(spec, (tuple, list)):
            return type(spec)(named(value) for value in spec)
        if isinstance(spec, str):
            return spec
        if not isinstance(spec, type(torch.export.Dim("d"))):
            return None
        return shown.get(_linear(spec)[0], spec.__name__)

    return named(dynamic_shapes)


def _linear(dim: Any) -> tuple[str, int, int]:
    """Root, scale and offset of a Dim. A derived one is a linear function, so two values determine it."""
    root = getattr(dim, "root", None)
    if root is None:
        return str(dim.__name__), 1, 0
    return str(root.__name__), int(dim.fn(1) - dim.fn(0)), int(dim.fn(0))


def outside(model: LoadedModel | Captured, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Describe the first input whose size is outside the range of its dimension, or return "".

    Args:
        model: the model.
        args: positional inputs.
        kwargs: inputs by name.
    """
    try:
        tensors = dict(named_leaves(replace(model, args=args, kwargs=kwargs)))
    except Exception:  # other inputs than the model has, which is reported otherwise
        return ""
    return outside_of(list_axes(model), tensors)


def outside_of(axes: Iterable[Axis], tensors: Mapping[str, torch.Tensor]) -> str:
    """Describe the first of the tensors whose size is outside the range of its axis, or return ""."""
    for axis in axes:
        value = tensors.get(axis.input)
        if value is not None and value.ndim > axis.axis and (axis.scale, axis.offset) == (1, 0):
            size = int(value.shape[axis.axis])
            if not axis.allows(size):
                return f"axis {axis.axis} of '{axis.input}' has the size {size}, but '{axis.root}' takes {axis.range}"
    return ""


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
    own, scale, offset = _linear(dim)
    base = getattr(dim, "root", None) or dim
    low, high = int(getattr(base, "min", 0)), getattr(base, "max", UNBOUNDED)
    high = UNBOUNDED if high > UNBOUNDED else int(high)
    return Axis(name, axis, dim.__name__, own, scale, offset, low, high, torch_name=own)


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


def named_leaves(model: LoadedModel | Captured, tensors_only: bool = True) -> Iterator[tuple[str, Any]]:
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
