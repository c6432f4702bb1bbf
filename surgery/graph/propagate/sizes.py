"""Integer and symbolic sizes: equality, and how a view maps its input dimensions to its output dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import Max, Min

Size = int | torch.SymInt


class Unclear(Exception):
    """Raised for a size that has more than one reading; the text names the readings."""


def expr(size: Size) -> sympy.Expr:
    """Return a size as a sum of products, a form in which equal sizes are equal expressions."""
    if isinstance(size, torch.SymInt):
        return _settle(_expand(size.node.expr), size)
    return sympy.Integer(size)


@lru_cache(maxsize=4096)
def _expand(found: sympy.Expr) -> sympy.Expr:
    return sympy.expand(found)


def _settle(found: sympy.Expr, size: torch.SymInt) -> sympy.Expr:
    """Replace each Max or Min by the operand that it equals on the example.

    A table of positions is not exceeded by any valid input, so the choice holds beyond the example.
    """
    bounds = found.atoms(Max, Min)
    if not bounds:
        return found
    env = size.node.shape_env
    values = getattr(env, "backed_var_to_val", None) or env.var_to_val
    if not found.free_symbols <= values.keys():
        return found  # A data-dependent symbol has no value on the example.
    parts = {
        b: (max if isinstance(b, Max) else min)(b.args, key=lambda a: int(a.xreplace(values))) for b in bounds
    }
    return sympy.expand(found.xreplace(parts))


def same(a: Size, b: Size) -> bool:
    """True if two sizes are equal for all values of their symbols; adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(expr(a) == expr(b))


def hint(size: Size) -> int:
    """Return the size for the example inputs.

    Raises:
        Unclear: if the size depends on data.
    """
    if not isinstance(size, torch.SymInt):
        return size
    if on_data(size):
        raise Unclear(f"the size {size} depends on data")
    return int(size.node.hint)


def is_one(size: Size) -> bool:
    """True if a size is 1 for all values of its symbols."""
    return size == 1 if isinstance(size, int) else bool(expr(size) == 1)


def on_data(value: Any) -> bool:
    """True if a size is data-dependent: no value is known for it before the graph runs."""
    return isinstance(value, torch.SymInt) and not value.node.has_hint()


def is_size(value: Any) -> bool:
    """True for an int or SymInt, but not for a bool."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def describe(value: Any) -> Any:
    """Return a key that is equal for equal values: shapes and strides of tensors, expressions of numbers."""
    if isinstance(value, torch.Tensor):
        strides = tuple(map(expr, value.stride())) if value.layout == torch.strided else ()
        return tuple(map(expr, value.shape)), strides, value.dtype, value.device
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return type(value).__name__, value.node.expr
    if isinstance(value, (tuple, list)):
        return tuple(map(describe, value))
    return type(value).__name__, value


@dataclass(frozen=True)
class Dim:
    """Size of a dimension before and after the edit."""

    old: Size
    new: Size

    @property
    def moved(self) -> bool:
        return not same(self.old, self.new)


@dataclass
class Products:
    """Factors of merged dimensions, so that a later view can split them again.

    A merged dimension is identified by its sizes before and after: (17·batch → 20·batch) was (batch, 17 → 20).
    """

    known: dict[tuple[sympy.Expr, sympy.Expr], list[tuple[Dim, ...]]] = field(default_factory=dict)

    def add(self, factors: Sequence[Dim]) -> None:
        old, new = (prod(size) for size in zip(*((d.old, d.new) for d in factors), strict=True))
        readings = self.known.setdefault((expr(old), expr(new)), [])
        if not any(_alike(factors, reading) for reading in readings):
            readings.append(tuple(factors))

    def __contains__(self, dim: Dim) -> bool:
        return (expr(dim.old), expr(dim.new)) in self.known

    def factors(self, dim: Dim) -> tuple[Dim, ...]:
        readings = self.known.get((expr(dim.old), expr(dim.new)), []) if dim.moved else []
        # Two merges may give the same product (6→8·4 and 4·6→8), and then a split is ambiguous.
        if len(readings) > 1:
            raise Unclear(f"the product {dim.old}→{dim.new} can be {' or '.join(map(_many, readings))}")
        return readings[0] if readings else (dim,)


def _alike(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    return len(a) == len(b) and all(
        same(x.old, y.old) and same(x.new, y.new) for x, y in zip(a, b, strict=True)
    )


def regroup(source: Sequence[Dim], target: Sequence[Size], products: Products) -> list[Dim]:
    """Return the dimensions of a view's output, before and after the edit.

    Args:
        source: dimensions of the view's input.
        target: shape of the view's output before the edit.
        products: factors of dimensions that were merged before; merges by this view are added.

    Raises:
        Unclear: if a changed length is split, or mixed with other dimensions.
    """
    dims = [Dim(size, size) for size in target]
    if not any(d.moved for d in source):
        return dims
    for sources, targets in _groups(source, target):
        if not any(d.moved for d in sources):
            continue
        if len(sources) == len(targets) == 1:
            dims[targets[0]] = sources[0]
            continue
        # Split merged dimensions into their factors first: a view that undoes a merge must find them again.
        parts = [factor for d in sources for factor in products.factors(d)]
        for i, places in _holders(parts, [target[i] for i in targets]).items():
            dims[targets[i]] = _merge(target[targets[i]], places)
            products.add(places)
    return dims


def _holders(parts: Sequence[Dim], target: Sequence[Size]) -> dict[int, list[Dim]]:
    """Map each output dimension that holds a changed one to its factors, in order.

    Output dimension j holds part k if every stride of k is a stride of j: j begins at or before the innermost
    stride of k, and ends at or after its outermost one.
    """
    held: dict[int, list[Dim]] = {}
    for k, part in enumerate(parts):
        if not part.moved:
            continue
        # `inner` and `below` are strides, in elements, of the part and of the output dimension.
        inner = _product(d.old for d in parts[k + 1 :])
        for j, size in enumerate(target):
            below = _product(target[j + 1 :])
            right, left = _quotient(inner, below), _quotient(below * expr(size), inner * expr(part.old))
            if left is not None and right is not None:
                break
        else:
            raise Unclear(f"it splits {_many(parts)} into {_sizes(target)}")
        if j in held:
            raise Unclear(f"it mixes {_many(parts)} into {size}")
        env = next(
            (s.node.shape_env for s in (size, part.old, part.new) if isinstance(s, torch.SymInt)), None
        )
        outer, within = (_as_size(q, env) for q in (left, right))
        held[j] = [Dim(q, q) for q in (outer,) if q != 1] + [part] + [Dim(q, q) for q in (within,) if q != 1]
    return held


def _merge(old: Size, factors: Sequence[Dim]) -> Dim:
    return Dim(old, prod(d.new for d in factors))


def _product(sizes: Iterable[Size]) -> sympy.Expr:
    return sympy.expand(prod((expr(s) for s in sizes), start=sympy.Integer(1)))


def _quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    """Return a / b if that is whole for all values of the symbols, else None."""
    # The quotient of symbolic sizes is whole only if the denominator cancels as a polynomial.
    found = sympy.cancel(a / b)
    _, below = found.as_numer_denom()
    return sympy.expand(found) if below == 1 else None


def _as_size(found: sympy.Expr, env: Any) -> Size:
    return int(found) if found.is_Integer else env.create_symintnode(found, hint=None)


def one_to_one(source: Sequence[Size], target: Sequence[Size], dim: int) -> int | None:
    """Return the input dimension that becomes this output dimension of a view unchanged, or None.

    Args:
        source: shape of the view's input.
        target: shape of the view's output.
        dim: dimension of the output.
    """
    for sources, targets in _groups([Dim(s, s) for s in source], target, indices=True):
        if list(targets) == [dim] and len(sources) == 1:
            return int(sources[0])
    return None


def _groups(
    source: Sequence[Dim], target: Sequence[Size], indices: bool = False
) -> list[tuple[list, list[int]]]:
    """Pair neighbouring input and output dimensions whose products are equal; dimensions of length 1 are ignored."""
    left = [i for i, d in enumerate(source) if not is_one(d.old)]
    right = [i for i, size in enumerate(target) if not is_one(size)]
    found: list[tuple[list, list[int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        begin, start = i, j
        a, b = source[left[i]].old, target[right[j]]
        i, j = i + 1, j + 1
        # Grow the smaller side until both products are equal; for symbols the example's sizes decide which is smaller.
        while not same(a, b):
            if hint(a) <= hint(b) and i < len(left):
                a, i = a * source[left[i]].old, i + 1
            elif j < len(right):
                b, j = b * target[right[j]], j + 1
            elif i < len(left):
                a, i = a * source[left[i]].old, i + 1
            else:
                raise Unclear(
                    f"{_sizes([d.old for d in source])} and {_sizes(target)} have no common factors"
                )
        members = left[begin:i]
        found.append((members if indices else [source[m] for m in members], right[start:j]))
    return found


def _sizes(sizes: Sequence[Size]) -> str:
    return f"({', '.join(map(str, sizes))})"


def _many(dims: Sequence[Dim]) -> str:
    return "·".join(f"{d.old}→{d.new}" if d.moved else str(d.old) for d in dims)
