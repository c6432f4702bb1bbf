"""Labels: for each index of a value, the tensor indices (atoms) that it depends on."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx

from surgery.graph.marks import mark_of
from surgery.graph.ops import module_path
from surgery.graph.propagate.sizes import hint

Labels = list[Tensor]


def covered(label: Tensor) -> set[int]:
    """Return the dimensions that a label depends on."""
    return {d for d, size in enumerate(label.shape) if size > 1}


def shrunk(label: Tensor) -> Tensor:
    """Return the label with size 1 along the dimensions that it does not depend on."""
    for d, size in enumerate(label.shape):
        if size > 1:
            first = label.narrow(d, 0, 1)
            # The stride is checked first, because it avoids comparing the elements of an expanded label.
            if label.stride(d) == 0 or bool((label == first).all()):
                label = first
    return label


def first_of(label: Tensor, dims: Iterable[int]) -> Tensor:
    """Return the label at index 0 of these dimensions, which stay with size 1."""
    for d in dims:
        label = label.narrow(d, 0, 1)
    return label


def sizes_of(node: fx.Node) -> list[int]:
    """Return the sizes of a value on the example.

    Raises:
        Unclear: if a size depends on data.
    """
    return [hint(size) for size in node.meta["val"].shape]


def where(node: fx.Node) -> str:
    """Name an op and its module, for a message."""
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
    return f"{name} in {module_path(node) or 'the model'}"


def kept_along(label: Tensor, keep: Tensor, dim: int) -> Tensor:
    """Return a mask of the indices along a dimension that remain if only some atoms are kept.

    Args:
        label: label of the value.
        keep: True for atoms that are kept.
        dim: dimension of the value.
    """
    # An index remains if any of its elements does: units along another dimension leave this one whole.
    return keep[label].movedim(dim, 0).reshape(label.shape[dim], -1).any(1)


def carries(node: fx.Node) -> str:
    """Return the reason why the units at a node of another pass cannot be removed."""
    entry = mark_of(node).entry
    return (
        f"{entry!r} is applied there and depends on the number of units; prune before it, or undo {entry!r}"
    )
