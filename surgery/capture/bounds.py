"""Gives up what torch.export will not have of a dynamic dimension: an end of its range, or the whole of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch.export import Dim

from surgery.capture.shapes import Axis

# What torch.export will not have: `L['ids'].size()[1] != 64` or `((-1) + L['ids'].size()[1]) != 1`, because a
# slice to the full table and a slice to one element are cases of their own to it.
_EXCLUDED = re.compile(r"(?:\(\((-?\d+)\) \+ )?L\['(\w+)'\]\.size\(\)\[(\d+)\]\)? != (\d+)")
# Its own advice: `seq = Dim('seq', min=3, max=64)`.
_ADVICE = re.compile(r"^\s*(\w+) = Dim\('\w+', min=(\d+)", re.MULTILINE)
_SMALL = 4
_FIXED = re.compile(r"You marked (.+?) as dynamic but your code specialized it to be a constant \((\d+)\)")
_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")


def fixed_dimensions(message: str, axes: list[Axis]) -> dict[str, int]:
    """The named dimensions that the model's code makes constants of, from torch.export's error, with their sizes."""
    found: dict[str, int] = {}
    for name, size in _FIXED.findall(message):
        place = _SIZE.match(name)
        axis = next(
            (a for a in axes if (place and (a.input, a.axis) == (place[1], int(place[2]))) or name == a.name),
            None,
        )
        if axis is not None:
            found[axis.root] = (int(size) - axis.offset) // axis.scale
    return found


def without(shapes: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """`shapes` with named dimensions left out, and what is derived from them."""

    def leave_out(spec: Any) -> Any:
        if isinstance(spec, Mapping):
            return {key: leave_out(item) for key, item in spec.items()}
        if isinstance(spec, (tuple, list)):
            return type(spec)(leave_out(item) for item in spec)
        root = getattr(spec, "root", None)
        return None if getattr(spec if root is None else root, "__name__", "") in names else spec

    return {name: leave_out(spec) for name, spec in shapes.items()}


def without_ends(shapes: Mapping[str, Any], axes: list[Axis], message: str) -> dict[str, Any] | None:
    """`shapes` with every value that torch excludes cut off its dimension's range; None where that is not just
    an end of it (a few of the smallest sizes, or the very largest).

    A GPT-Neo whose table has 2048 positions has `seq` up to 2047 then: torch.export makes a slice of all 2048
    a case of its own.
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
            base, scale, offset = fresh[root.__name__], spec.fn(1) - spec.fn(0), spec.fn(0)
            return scale * base + offset if offset else scale * base
        return fresh.get(getattr(spec, "__name__", ""), spec)

    return {name: replace(spec) for name, spec in shapes.items()}
