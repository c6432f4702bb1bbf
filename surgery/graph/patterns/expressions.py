"""Pattern language: ordinary code over `ops`, whose calls describe nodes instead of computing.

    @pattern
    def tanh_gelu():
        x = value("x")
        cube = any_of(ops.pow(x, 3), ops.mul(ops.mul(x, x), x))
        inner = ops.mul(ops.add(x, ops.mul(cube, 0.044715)), math.sqrt(2 / math.pi))
        return ops.mul(ops.mul(x, 0.5), ops.add(ops.tanh(inner), 1))

`ops.NAME` is the ATen op of that name with any overload; `ops["matmul", "bmm"]` is either of two ops. Omitted arguments
must have their default. `...` allows any value for an argument; as the last argument it allows any further ones. A
number matches an equal number. The two operands of a commutative op match in either order. `value` and `constant`
capture: the same name used twice means the same tensor, or an equal constant. An expression used twice is one node.
Alternatives are tried in the order in which they are written. A pattern may return several outputs. The other nodes of
a match must have no readers outside of the match.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    pass

# Ops whose two operands may be swapped.
COMMUTATIVE = frozenset(
    ("add", "mul", "eq", "ne", "maximum", "minimum", "logical_and", "logical_or", "logical_xor", "bitwise_and",
     "bitwise_or", "__and__", "__or__")
)  # fmt: skip


class Expression:
    """Base class of the expressions that a node, or an argument of a node, is compared with."""


@dataclass(eq=False)
class Value(Expression):
    """Any graph value, captured under a name. condition: check of its node. what: the condition in words."""

    name: str
    condition: Callable[[fx.Node], bool] | None = None
    what: str = "a graph value"

    def __str__(self) -> str:
        return self.what


@dataclass(eq=False)
class Constant(Expression):
    """An argument that is not a graph value (a number, a dtype, a list of sizes), captured under a name."""

    name: str
    condition: Callable[[Any], bool] | None = None
    what: str = "a constant"

    def __str__(self) -> str:
        return self.what


@dataclass(eq=False)
class Axis(Expression):
    """An axis number of the first tensor that the op reads, counted from either end."""

    index: int

    def __str__(self) -> str:
        return f"axis {self.index}"


@dataclass(eq=False)
class Op(Expression):
    """A node of an op with one of several names. capture: name of this node in a match."""

    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    capture: str = ""
    conditions: list[tuple[Callable[[fx.Node], bool], str]] = field(default_factory=list)
    is_anchor: bool = False

    def named(self, name: str) -> Op:
        """Capture the node of this op under a name."""
        self.capture = name
        return self

    def where(self, condition: Callable[[fx.Node], bool], what: str) -> Op:
        """Restrict the op to nodes for which the condition holds. what: the condition in words, for near misses."""
        self.conditions.append((condition, what))
        return self

    def anchor(self) -> Op:
        """Start the search at this op. By default it starts at the op of the pattern that is rarest in the graph."""
        self.is_anchor = True
        return self

    def __str__(self) -> str:
        return " or ".join(f"'{name}'" for name in self.names)


@dataclass(eq=False)
class AnyOf(Expression):
    """The first of several alternatives that matches."""

    alternatives: tuple[Any, ...]

    def __str__(self) -> str:
        return " or ".join(dict.fromkeys(str(a) for a in self.alternatives))


class _Ops:
    """Namespace of op expressions: `ops.mul(x, 0.5)`, or `ops["matmul", "bmm"](x, y)` for either op."""

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
    """Capture any graph value.

    Args:
        name: name of the value in a match.
        condition: check of the value's node.
        what: the condition in words, for near misses.
    """
    return Value(name, condition, what)


def constant(name: str, condition: Callable[[Any], bool] | None = None, what: str = "a constant") -> Constant:
    """Capture an argument that is not a graph value.

    Args:
        name: name of the argument in a match.
        condition: check of the argument.
        what: the condition in words, for near misses.
    """
    return Constant(name, condition, what)


def number(name: str) -> Constant:
    """Capture a number."""
    return Constant(name, lambda v: isinstance(v, (int, float)) and not isinstance(v, bool), "a number")


def axis(index: int) -> Axis:
    """Match an axis, counted from either end: axis(-1) also matches 3 if the op reads four axes."""
    return Axis(index)


def any_of(*alternatives: Any) -> AnyOf:
    """Match the first alternative that fits."""
    return AnyOf(alternatives)


def maybe(op: Callable[..., Op], inner: Any, *args: Any, **kwargs: Any) -> AnyOf:
    """Match op(inner, …), or inner alone if the op is absent."""
    return AnyOf((op(inner, *args, **kwargs), inner))


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Return the shape of a node's value; empty if it is not a tensor."""
    found = node.meta.get("val")
    return tuple(found.shape) if isinstance(found, torch.Tensor) else ()


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """Return the dtype of a node's value; None if it is not a tensor."""
    found = node.meta.get("val")
    return found.dtype if isinstance(found, torch.Tensor) else None
