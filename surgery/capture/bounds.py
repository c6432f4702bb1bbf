"""Narrowing of dynamic dimensions that torch.export rejects: an end of the range, or the whole dimension."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from surgery.capture.ranges import made
from surgery.capture.shapes import Axis

# A guard that excludes one size: `L['ids'].size()[1] != 64` or `((-1) + L['ids'].size()[1]) != 1`. torch.export adds
# it because it treats a slice of the full table, and a slice of one element, as special cases.
_EXCLUDED = re.compile(r"(?:\(\((-?\d+)\) \+ )?L\['(\w+)'\]\.size\(\)\[(\d+)\]\)? != (\d+)")
# A fix suggested by torch.export: `seq = Dim('seq', min=3, max=64)`.
_ADVICE = re.compile(r"^\s*(\w+) = Dim\('\w+', min=(\d+)", re.MULTILINE)
# Largest lower bound to accept from such a suggestion: a higher one excludes more than an end of the range.
_SMALL = 4
# The whole of a suggested fix: `h = Dim('h', min=11, max=64)` or `h = 2*_h`.
_RANGE = re.compile(r"^\s*(\w+) = Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?", re.MULTILINE)
_MULTIPLE = re.compile(r"^\s*(\w+) = (\d+)\*(\w+)\s*$", re.MULTILINE)
_UNBOUNDED = 1 << 30
_GUARD = re.compile(r"satisfy the generated guard (.+?) != (\d+)\.?\s*$", re.MULTILINE)
_TRIED = 4096  # sizes at which guards are evaluated
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
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
    return _with(
        shapes,
        {n: made(n, low or None, high if high < _UNBOUNDED else None) for n, (low, high) in cut.items()},
    )


def derived(
    shapes: Mapping[str, Any], axes: list[Axis], sizes: Mapping[str, int], message: str
) -> tuple[dict[str, Any], tuple[str, ...]] | None:
    """Give dimensions without bounds the range that torch.export derives from the model's code.

    Args:
        shapes: dynamic shapes by input name.
        axes: the dynamic axes in `shapes`.
        sizes: size of each dimension in the example inputs.
        message: error message of torch.export.

    Returns:
        The shapes with these ranges, and a sentence for each. None if the message suggests no range for a dimension
        without bounds, or one that excludes the example.
    """
    free = {
        axis.root
        for axis in axes
        if (axis.scale, axis.offset, axis.high) == (1, 0, _UNBOUNDED) and axis.low <= 2 and axis.root in sizes
    }
    ranges = {
        name: (int(low or 0), int(high) if high else None) for name, low, high in _RANGE.findall(message)
    }
    for name, low, high in _guarded(axes, sizes, message):
        known = ranges.get(name, (0, None))
        ranges[name] = max(known[0], low), min(known[1] or _UNBOUNDED, high) if high else known[1]
    fresh: dict[str, Any] = {}
    said = []
    for name, step, other in _MULTIPLE.findall(message):
        if name in free and sizes[name] % int(step) == 0:
            low, high = ranges.get(other, (0, None))
            fresh[name] = int(step) * made(other, max(low, 1), high)
            most = f" up to {int(step) * high}" if high else ""
            said.append(f"{name} is limited to multiples of {step}{most}, as the model's code requires")
    for name, (low, high) in ranges.items():
        if (
            name in free
            and name not in fresh
            and low <= sizes[name] <= (high or _UNBOUNDED)
            and (low > 2 or high)
        ):
            fresh[name] = made(name, low, high)
            left = f"{low} to {high}" if high else f"{low} or more"
            said.append(f"{name} is limited to {left}, as the model's code requires")
    return (_with(shapes, fresh), tuple(said)) if fresh else None


def _guarded(
    axes: list[Axis], sizes: Mapping[str, int], message: str
) -> Iterator[tuple[str, int, int | None]]:
    """Ranges around the example in which guards of the form `expression of one size != number` hold.

    A pooled image leads to `((size - 1) // 2 - 1) // 4 != 1`, for example, because torch.export treats an output of one
    pixel as a special case.
    """
    for text, value in _GUARD.findall(message):
        places = set(_SIZE.findall(text))
        axis = next((a for a in axes if places == {(a.input, str(a.axis))}), None)
        if axis is None or axis.root not in sizes:
            continue
        size = sizes[axis.root]
        formula = _SIZE.sub("size", text)
        tried = range(2, max(4 * size, _TRIED))
        try:
            excluded = [s for s in tried if _value(formula, s * axis.scale + axis.offset) == int(value)]
        except (SyntaxError, ValueError, ZeroDivisionError):
            continue
        if size not in excluded:
            low = max((s + 1 for s in excluded if s < size), default=0)
            yield axis.root, low, min((s - 1 for s in excluded if s > size), default=None)


def _value(formula: str, size: int) -> int:
    """Value of a formula of integers and `size`. Raises ValueError for anything but +, -, * and //."""

    def of(node: ast.AST) -> int:
        if isinstance(node, ast.Expression):
            return of(node.body)
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name) and node.id == "size":
            return size
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -of(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return int(_OPERATORS[type(node.op)](of(node.left), of(node.right)))
        raise ValueError(formula)

    return of(ast.parse(formula.strip(), mode="eval"))


def _with(shapes: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """Copy of `shapes` with other Dims for some dimensions, by name."""

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
