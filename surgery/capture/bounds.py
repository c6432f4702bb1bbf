"""Narrowing of dynamic dimensions that torch.export rejects: an end of the range, or the whole dimension."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch.export import Dim

from surgery.capture.shapes import Axis

# A guard that excludes one size: `L['ids'].size()[1] != 64` or `((-1) + L['ids'].size()[1]) != 1`. torch.export adds
# it because it treats a slice of the full table, and a slice of one element, as special cases.
_EXCLUDED = re.compile(r"(?:\(\((-?\d+)\) \+ )?L\['(\w+)'\]\.size\(\)\[(\d+)\]\)? != (\d+)")
# A fix suggested by torch.export: `seq = Dim('seq', min=3, max=64)`.
_ADVICE = re.compile(r"^\s*(\w+) = Dim\('\w+', min=(\d+)", re.MULTILINE)
# Largest lower bound to accept from such a suggestion: a higher one excludes more than an end of the range.
_SMALL = 4
_FIXED = re.compile(r"You marked (.+?) as dynamic but your code specialized it to be a constant \((\d+)\)")
_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")


def fixed_dimensions(message: str, axes: list[Axis]) -> dict[str, int]:
    """Parse torch.export's error for dynamic dimensions that the model's code specializes to a constant.

    Returns:
        The constant size of each such dimension by name.
    """
    found: dict[str, int] = {}
    for name, size in _FIXED.findall(message):
        place = _SIZE.match(name)
        axis = next(
            (a for a in axes if (place and (a.input, a.axis) == (place[1], int(place[2]))) or name == a.name),
            None,
        )
        if axis is not None:
            # Convert the size of a derived dimension (scale * root + offset) to that of its root.
            found[axis.root] = (int(size) - axis.offset) // axis.scale
    return found


def without(shapes: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Copy of `shapes` in which the named dimensions, and dimensions derived from them, are static."""

    def leave_out(spec: Any) -> Any:
        if isinstance(spec, Mapping):
            return {key: leave_out(item) for key, item in spec.items()}
        if isinstance(spec, (tuple, list)):
            return type(spec)(leave_out(item) for item in spec)
        root = getattr(spec, "root", None)
        return None if getattr(spec if root is None else root, "__name__", "") in names else spec

    return {name: leave_out(spec) for name, spec in shapes.items()}


def without_ends(shapes: Mapping[str, Any], axes: list[Axis], message: str) -> dict[str, Any] | None:
    """Narrow the ranges of dimensions so that they no longer contain sizes that torch.export excludes.

    Only an end of a range is cut off: a few of the smallest sizes, or the largest. For example, `seq` of a GPT-Neo
    with 2048 positions gets the upper bound 2047, because torch.export treats a slice of all 2048 as a special case.

    Args:
        shapes: dynamic shapes by input name.
        axes: the dynamic axes in `shapes`.
        message: error message of torch.export.

    Returns:
        The narrowed shapes, or None if the message excludes no size at an end of a range.
    """
    roots = {(axis.input, axis.axis): axis for axis in axes if (axis.scale, axis.offset) == (1, 0)}
    cut: dict[str, tuple[int, int]] = {}
    for shift, name, index, value in _EXCLUDED.findall(message):
        axis = roots.get((name, int(index)))
        if axis is None:
            continue
        excluded = int(value) - int(shift or 0)
        low, high = cut.get(axis.root, (axis.low, axis.high))
        if excluded == high:
            cut[axis.root] = (low, high - 1)
        # torch.export specializes sizes 0 and 1, so 2 is the smallest dynamic size.
        elif max(low, 2) == excluded:
            cut[axis.root] = (excluded + 1, high)
    for root, low_text in _ADVICE.findall(message):
        known = next((axis for axis in roots.values() if axis.root == root), None)
        if known is not None and max(known.low, 2) < int(low_text) <= _SMALL:
            cut[root] = (int(low_text), cut.get(root, (0, known.high))[1])
    if not cut:
        return None
    fresh = {
        name: Dim(name, **({"min": low} if low else {}), **({"max": high} if high < 1 << 30 else {}))
        for name, (low, high) in cut.items()
    }

    def replace(spec: Any) -> Any:
        if isinstance(spec, Mapping):
            return {key: replace(item) for key, item in spec.items()}
        if isinstance(spec, (tuple, list)):
            return type(spec)(replace(item) for item in spec)
        root = getattr(spec, "root", None)
        if root is not None and root.__name__ in fresh:
            # Derive the dimension again from the new root; `fn` is linear, so two values determine it.
            base, scale, offset = fresh[root.__name__], spec.fn(1) - spec.fn(0), spec.fn(0)
            return scale * base + offset if offset else scale * base
        return fresh.get(getattr(spec, "__name__", ""), spec)

    return {name: replace(spec) for name, spec in shapes.items()}
