"""The language of patterns: ordinary code over `ops`, whose calls describe nodes in place of computing.

    @pattern
    def tanh_gelu():
        x = value("x")
        cube = any_of(ops.pow(x, 3), ops.mul(ops.mul(x, x), x))
        inner = ops.mul(ops.add(x, ops.mul(cube, 0.044715)), math.sqrt(2 / math.pi))
        return ops.mul(ops.mul(x, 0.5), ops.add(ops.tanh(inner), 1))

`ops.NAME` is the ATen op of that name, whatever its overload; `ops["matmul", "bmm"]` either of two. Arguments that are
not written must have their default; `...` in the place of one allows anything there, and as the last allows all that
follow. A number matches an equal one; the two operands of a commutative op match in either order. `value` and
`constant` capture: the same name used twice means the same tensor, or an equal constant. An expression used twice is
one node. Alternatives are tried in the order in which they are written. A pattern may return several outputs; what
lies inside must be read by nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    pass

# Two operands of these may change places.
COMMUTATIVE = frozenset(
    ("add", "mul", "eq", "ne", "maximum", "minimum", "logical_and", "logical_or", "logical_xor", "bitwise_and",
     "bitwise_or", "__and__", "__or__")
)  # fmt: skip


class Expression:
    """What a node, or an argument of one, is compared with."""


@dataclass(eq=False)
class Value(Expression):
    """Any graph value, captured under a name. condition: of its node. what: the condition in words."""

    name: str
    condition: Callable[[fx.Node], bool] | None = None
    what: str = "a graph value"

    def __str__(self) -> str:
        return self.what


@dataclass(eq=False)
class Constant(Expression):
    """An argument that is no graph value (a number, a dtype, a list of sizes), captured under a name."""

    name: str
    condition: Callable[[Any], bool] | None = None
    what: str = "a constant"

    def __str__(self) -> str:
        return self.what


@dataclass(eq=False)
class Axis(Expression):
    """The number of an axis, counted from either end, of the first tensor that the op reads."""

    index: int

    def __str__(self) -> str:
        return f"axis {self.index}"


@dataclass(eq=False)
class Op(Expression):
    """A node of an op, of one of several names. capture: the name that its node has in a match."""

    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    capture: str = ""
    conditions: list[tuple[Callable[[fx.Node], bool], str]] = field(default_factory=list)
    is_anchor: bool = False

    def named(self, name: str) -> Op:
        """Capture the node of this op."""
        self.capture = name
        return self

    def where(self, condition: Callable[[fx.Node], bool], what: str) -> Op:
        """Let it match only nodes of which the condition holds. what: that condition, for who asks why not."""
        self.conditions.append((condition, what))
        return self

    def anchor(self) -> Op:
        """Start looking here; without it, at the op of the pattern that is rarest in the graph."""
        self.is_anchor = True
        return self

    def __str__(self) -> str:
        return " or ".join(f"'{name}'" for name in self.names)


@dataclass(eq=False)
class AnyOf(Expression):
    """The first of several alternatives that fits."""

    alternatives: tuple[Any, ...]

    def __str__(self) -> str:
        return " or ".join(dict.fromkeys(str(a) for a in self.alternatives))


class _Ops:
    """`ops.mul(x, 0.5)` is an expression; `ops["matmul", "bmm"](x, y)` is of either op."""

    def __getattr__(self, name: str) -> Callable[..., Op]:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, names: str | tuple[str, ...]) -> Callable[..., Op]:
        either = (names,) if isinstance(names, str) else names
        return lambda *args, **kwargs: Op(either, args, kwargs)


ops = _Ops()


def value(
    name: str, condition: Callable[[fx.Node], bool] | None = None, what: str = "a graph value"
) -> Value:
    """Capture any graph value. condition: of its node, `what` in words."""
    return Value(name, condition, what)


def constant(name: str, condition: Callable[[Any], bool] | None = None, what: str = "a constant") -> Constant:
    """Capture an argument that is no graph value."""
    return Constant(name, condition, what)


def number(name: str) -> Constant:
    """Capture a number."""
    return Constant(name, lambda v: isinstance(v, (int, float)) and not isinstance(v, bool), "a number")


def axis(index: int) -> Axis:
    """An axis, counted from either end: axis(-1) is also 3 where the op reads four axes."""
    return Axis(index)


def any_of(*alternatives: Any) -> AnyOf:
    """The first alternative that fits."""
    return AnyOf(alternatives)


def maybe(op: Callable[..., Op], inner: Any, *args: Any, **kwargs: Any) -> AnyOf:
    """op(inner, …), or inner itself where that op is not there."""
    return AnyOf((op(inner, *args, **kwargs), inner))


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of what a node gives; empty where that is no tensor."""
    found = node.meta.get("val")
    return tuple(found.shape) if isinstance(found, torch.Tensor) else ()


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of what a node gives; None where that is no tensor."""
    found = node.meta.get("val")
    return found.dtype if isinstance(found, torch.Tensor) else None
