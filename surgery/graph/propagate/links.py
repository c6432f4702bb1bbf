"""Classifies ops, and finds the dimensions of their operands that must have equal sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from surgery.graph.propagate.arguments import Draft
from surgery.graph.propagate.run import Run
from surgery.graph.propagate.sizes import same

Place = tuple[fx.Node, int]
# An end beyond any length, which means "to the end".
_LAST = 1 << 62

# Broadcasting ops that torch does not tag as pointwise.
_BROADCAST = frozenset([
    "where", "masked_fill", "masked_fill_", "copy", "copy_", "expand_as", "floor_divide", "floor_divide_",
    "isin", "fmod", "true_divide", "square", "__and__", "__or__", "__xor__", "__iand__", "__ior__",
    "__ixor__",
])  # fmt: skip
# Index of the size argument of each op that creates a tensor.
FACTORIES = {"zeros": 0, "ones": 0, "full": 0, "empty": 0, "rand": 0, "randn": 0} | {
    f"new_{kind}": 1 for kind in ("zeros", "ones", "full", "empty")
}


def packet(target: Any) -> str:
    """Return the op's name: "view" for aten.view.default, a dotted name for ops of other libraries."""
    if not isinstance(target, torch._ops.OpOverload):
        return f"python.{getattr(target, '__name__', target)}"
    library, _, name = target._schema.name.partition("::")
    return name if library == "aten" else f"{library}.{name}"


def is_broadcast(target: Any) -> bool:
    """True if the op broadcasts its tensor operands against each other."""
    if packet(target) in _BROADCAST:
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def is_tensor(value: Any) -> bool:
    """True if a value is a node that holds a tensor."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def tensors(args: Any) -> list[fx.Node]:
    """Return the tensor operands in order, including those in lists."""
    found: list[fx.Node] = []
    fx.node.map_arg(args, lambda n: found.append(n) if is_tensor(n) else None)
    return found


def rank(node: fx.Node) -> int:
    """Return the number of dimensions of a node's tensor."""
    return int(node.meta["val"].dim())


def is_open(end: Any) -> bool:
    """True if the end of a slice is counted from the end of the tensor."""
    return end is None or (isinstance(end, int) and (end < 0 or end >= _LAST))


def links(run: Run, name: str, draft: Draft) -> list[list[Place]]:
    """Return groups of operand dimensions that must have one size, or 1 if the op broadcasts.

    Args:
        run: the propagation.
        name: name of the op, as `packet` returns it.
        draft: arguments of the op.
    """
    args = draft.args
    if is_broadcast(draft.target):
        return broadcast(tensors((args, draft.kwargs)))
    if name == "scaled_dot_product_attention":
        q, k, v = args[:3]
        mask = draft.get(3, "attn_mask")
        masks = [mask] if is_tensor(mask) else []
        queries = [(q, -2), *((m, -2) for m in masks if rank(m) > 1)]
        return [queries, [(k, -2), (v, -2), *((m, -1) for m in masks)], *broadcast([q, k, v, *masks], 2)]
    if name == "linear":
        return [[(args[0], -1), (args[1], -1)]]
    if name in ("matmul", "bmm", "mm"):
        a, b = args[:2]
        inner = [(a, -1), (b, -2 if rank(b) > 1 else -1)]
        return [inner, *(broadcast([a, b], 2) if name != "mm" else [])]
    if name in ("addmm", "baddbmm"):
        bias, a, b = args[:3]
        groups = [[(a, -1), (b, -2)], *broadcast([a, b], 2)]
        for dim, place in ((-1, (b, -1)), (-2, (a, -2)), (-3, (a, -3))):
            if rank(bias) >= -dim and rank(place[0]) >= -dim:
                groups.append([(bias, dim), place])
        return groups
    if name in ("cat", "concat", "stack"):
        return _joined(name, draft)
    if name == "index":
        indices = [i for i in args[1] if is_tensor(i)]
        through = [_through(run, args[0], dim, i) for dim, i in enumerate(args[1]) if is_tensor(i)]
        return [*broadcast(indices), *(group for groups in through for group in groups)]
    if name == "gather":
        x, dim, index = args[:3]
        alike = [[(x, d), (index, d)] for d in range(rank(x)) if d != dim % rank(x)]
        return [g for g in alike if _were_equal(run, g)] + _through(run, x, dim % rank(x), index)
    if name == "index_select":
        return _through(run, args[0], args[1] % rank(args[0]), args[2])
    if name == "embedding":
        return _through(run, args[0], 0, args[1])
    if name == "einsum":
        return _letters(args[0], args[1])
    if name in ("batch_norm", "group_norm", "instance_norm"):
        return [[(args[0], 1), *((w, 0) for w in tensors(args[1:]))]]
    return []


def broadcast(operands: list[fx.Node], skip: int = 0) -> list[list[Place]]:
    """Group the dimensions of operands that broadcast, counted from the end, without the last `skip` ones."""
    most = max((rank(n) for n in operands), default=0)
    return [[(n, -d) for n in operands if rank(n) >= d] for d in range(1 + skip, most + 1)]


def _joined(name: str, draft: Draft) -> list[list[Place]]:
    operands = [n for n in draft.args[0] if is_tensor(n)]
    ranks = {rank(n) for n in operands}
    if len(ranks) != 1:
        return []
    count = ranks.pop()
    along = None if name == "stack" else draft.get(1, "dim", 0) % count
    return [[(n, d) for n in operands] for d in range(count) if d != along]


def _through(run: Run, x: fx.Node, dim: int, index: fx.Node) -> list[list[Place]]:
    """Link an index to the dimension that it indexes, if they had equal lengths: positions in a table."""
    if index.meta["val"].dtype in (torch.bool, torch.uint8):
        # A boolean mask has the length of its dimension by definition, but its result does not.
        return []
    groups = [[(x, dim), (index, d)] for d in range(rank(index))]
    return [group for group in groups if _were_equal(run, group)]


def _were_equal(run: Run, places: list[Place]) -> bool:
    (a, i), (b, j) = places
    return same(run.before(a).shape[i], run.before(b).shape[j])


def _letters(equation: str, operands: Iterable[fx.Node]) -> list[list[Place]]:
    if "..." in equation:
        return []
    places: dict[str, list[Place]] = {}
    terms = equation.replace(" ", "").split("->")[0].split(",")
    for term, operand in zip(terms, operands, strict=True):
        for dim, letter in enumerate(term):
            places.setdefault(letter, []).append((operand, dim))
    return list(places.values())
