"""Narrowing of dynamic dimensions that torch.export rejects: an end of the range, or the whole dimension."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from surgery.capture.ranges import made
from surgery.capture.shapes import UNBOUNDED, Axis

# A guard that excludes one size: `L['ids'].size()[1] != 64` or `((-1) + L['ids'].size()[1]) != 1`. torch.export adds
# it because it treats a slice of the full table, and a slice of one element, as special cases.
_EXCLUDED = re.compile(r"(?:\(\((-?\d+)\) \+ )?L\['(\w+)'\]\.size\(\)\[(\d+)\]\)? != (\d+)")
# A fix suggested by torch.export: `seq = Dim('seq', min=3, max=64)`.
_ADVICE = re.compile(r"^\s*(\w+) = Dim\('\w+', min=(\d+)", re.MULTILINE)
# Largest lower bound to accept from such a suggestion: a higher one excludes more than an end of the range.
_SMALL = 4
# The whole of a suggested fix: `h = Dim('h', min=11, max=64)`, `h = 2*_h` or `h = 384*_h - 144`.
_RANGE = re.compile(r"^\s*(\w+) = Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?", re.MULTILINE)
_MULTIPLE = re.compile(r"^\s*(\w+) = (\d+)\*(\w+)(?: ([+-]) (\d+))?\s*$", re.MULTILINE)
_GUARD = re.compile(r"satisfy the generated guard (.+?)\.?\s*$", re.MULTILINE)
_NOT_EQUAL = re.compile(r"!= \d+\.?\s*$")
_TRIED = 4096  # sizes at which guards are evaluated
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS = {"min": min, "max": max, "Min": min, "Max": max}
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
        name = getattr(spec if root is None else root, "__name__", "")
        return None if name in names or (root is not None and name.lstrip("_") in names) else spec

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
    roots = {
        (axis.input, axis.axis): axis for axis in axes if (axis.scale, axis.offset, axis.step) == (1, 0, 1)
    }
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
        {n: made(n, low or None, high if high < UNBOUNDED else None) for n, (low, high) in cut.items()},
    )


@dataclass(frozen=True)
class _Root:
    """A dimension as torch knows it: `_h` for the dimension `h` of multiples of 8.

    Attributes:
        name: its name.
        low, high: its bounds.
        size: its size in the example.
    """

    name: str
    low: int
    high: int
    size: int


def derived(
    shapes: Mapping[str, Any], axes: list[Axis], sizes: Mapping[str, int], message: str
) -> tuple[dict[str, Any], frozenset[str]] | None:
    """Give dimensions the range that torch.export derives from the model's code, within their own.

    Args:
        shapes: dynamic shapes by input name.
        axes: the dynamic axes in `shapes`.
        sizes: size of each dimension in the example inputs.
        message: error message of torch.export.

    Returns:
        The shapes with these ranges, and the names of the dimensions. None if the message suggests no range that is
        narrower, or one that excludes the example.
    """
    roots = _roots(axes, sizes)
    ranges: dict[str, tuple[int, int | None]] = {
        name: (int(low or 0), int(high) if high else None) for name, low, high in _RANGE.findall(message)
    }
    for name, low, high in _guarded(axes, sizes, message):
        known = ranges.get(name, (0, None))
        ranges[name] = max(known[0], low), min(known[1] or UNBOUNDED, high) if high else known[1]
    fresh: dict[str, Any] = {}
    for name, step, other, sign, number in _MULTIPLE.findall(message):
        factor, shift = int(step), int(number or 0) * (-1 if sign == "-" else 1)
        root = roots.get(name)
        if root is not None and (root.size - shift) % factor == 0:
            low, high = ranges.get(other, (0, None))
            low = max(low, -(-(root.low - shift) // factor), 1)
            top = min(high or UNBOUNDED, (root.high - shift) // factor)
            multiple = factor * made(other, low, top if root.high < UNBOUNDED or high else None)
            fresh[name] = multiple + shift if shift else multiple
    for name, (low, high) in ranges.items():
        root = roots.get(name)
        if root is None or name in fresh:
            continue
        low, top = max(low, root.low), min(high or UNBOUNDED, root.high)
        narrower = low > max(root.low, 2) or top < root.high
        # A range of one size is a fixed dimension, which is not this function's to decide.
        if narrower and low <= root.size <= top and low < top:
            fresh[name] = made(name, low, top if top < UNBOUNDED else None)
    return (_with(shapes, fresh), frozenset(name.lstrip("_") for name in fresh)) if fresh else None


def limits(axes: list[Axis], names: Collection[str]) -> tuple[str, ...]:
    """A sentence for each of the named dimensions, which says its range."""
    ranges = {axis.root: axis.range for axis in axes if axis.root in names}
    return tuple(
        f"{name} is limited to {text}, as the model's code requires" for name, text in ranges.items()
    )


def _roots(axes: list[Axis], sizes: Mapping[str, int]) -> dict[str, _Root]:
    """The dimensions that torch may narrow, by torch's name."""
    found = {}
    for axis in axes:
        if (axis.scale, axis.offset) != (1, 0) or axis.root not in sizes:
            continue
        low, high, size = axis.low, axis.high, sizes[axis.root]
        name = axis.torch_name
        if axis.step > 1:
            low, size = -(-(low - axis.shift) // axis.step), (size - axis.shift) // axis.step
            high = UNBOUNDED if high >= UNBOUNDED else (high - axis.shift) // axis.step
        found[name] = _Root(name, low, high, size)
    return found


def _guarded(
    axes: list[Axis], sizes: Mapping[str, int], message: str
) -> Iterator[tuple[str, int, int | None]]:
    """Ranges around the example in which guards on one size hold.

    A pooled image leads to `((size - 1) // 2 - 1) // 4 != 1`, for example, because torch.export treats an output of one
    pixel as a special case. A crop from a table of 96 positions leads to `48 + size + (-size) // 2 <= 96`.
    """
    suggested = {name for name, *_ in (*_RANGE.findall(message), *_MULTIPLE.findall(message))}
    for text in _GUARD.findall(message):
        places = set(_SIZE.findall(text))
        axis = next((a for a in axes if places == {(a.input, str(a.axis))}), None)
        if axis is None or axis.root not in sizes:
            continue
        root = _roots([axis], sizes).get(axis.torch_name)
        # A comparison that torch could solve is in its suggestion.
        if root is None or (axis.torch_name in suggested and not _NOT_EQUAL.search(text)):
            continue
        guard = _SIZE.sub("size", text)
        scale, offset = (axis.step, axis.shift) if axis.step > 1 else (axis.scale, axis.offset)

        def holds(size: int, guard: str = guard, scale: int = scale, offset: int = offset) -> bool:
            try:
                return bool(_value(guard, size * scale + offset))
            except ZeroDivisionError:
                return False

        try:
            if not holds(root.size):
                continue
            low, high = root.size, root.size
            most = max(4 * root.size, _TRIED)
            while low > 2 and holds(low - 1):
                low -= 1
            while high < most and holds(high + 1):
                high += 1
        except (SyntaxError, ValueError):
            continue
        yield root.name, low if low > 2 else 0, high if high < most else None


def _value(formula: str, size: int) -> int:
    """Value of a formula of integers and `size`: sums, products, quotients, comparisons, `and`, min and max.

    Raises:
        ValueError: it contains anything else.
    """

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
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
            return int(all(of(each) for each in node.values))
        if isinstance(node, ast.Compare) and all(type(op) in _COMPARISONS for op in node.ops):
            values = [of(each) for each in (node.left, *node.comparators)]
            pairs = zip(values, node.ops, values[1:], strict=False)
            return int(all(_COMPARISONS[type(op)](left, right) for left, op, right in pairs))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
            return int(_FUNCTIONS[node.func.id](of(each) for each in node.args))
        raise ValueError(formula)

    return of(_parsed(formula.strip()))


@lru_cache(64)
def _parsed(formula: str) -> ast.Expression:
    return ast.parse(formula, mode="eval")


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
