"""Labels: for each index of a value, the indices of tensors (atoms) that it depends on."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx

from surgery.graph.marks import META
from surgery.graph.ops import module_path
from surgery.graph.propagate.sizes import hint

Labels = list[Tensor]


def covered(label: Tensor) -> set[int]:
    """The dimensions that a label depends on."""
    return {d for d, size in enumerate(label.shape) if size > 1}


def shrunk(label: Tensor) -> Tensor:
    """The label with size 1 along what it does not depend on."""
    for d, size in enumerate(label.shape):
        if size > 1:
            first = label.narrow(d, 0, 1)
            if label.stride(d) == 0 or bool((label == first).all()):
                label = first
    return label


def first_of(label: Tensor, dims: Iterable[int]) -> Tensor:
    """The label at index 0 of these dimensions, which stay, with size 1."""
    for d in dims:
        label = label.narrow(d, 0, 1)
    return label


def sizes_of(node: fx.Node) -> list[int]:
    """The sizes of a value on the example. Raises Unclear where they depend on data."""
    return [hint(size) for size in node.meta["val"].shape]


def where(node: fx.Node) -> str:
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
    return f"{name} in {module_path(node) or 'the model'}"


def kept_along(label: Tensor, keep: Tensor, dim: int) -> Tensor:
    """Which indices along a dimension stay, where these atoms do."""
    return keep[label].movedim(dim, 0).reshape(label.shape[dim], -1).any(1)


def carries(node: fx.Node) -> str:
    entry = node.meta[META]["entry"]
    return f"it carries {entry!r}, made for the units that it has; prune before that, or undo {entry!r}"
