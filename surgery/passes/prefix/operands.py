"""Keys and values of an attention, in the form in which the attention op reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.graph.analysis.attention import Attention
from surgery.graph.analysis.dataflow import op_name
from surgery.graph.marks import mark_of
from surgery.graph.ops import arguments
from surgery.graph.propagate.sizes import same
from surgery.graph.view import View


class Unsuited(Exception):
    """Raised if an attention cannot take a prefix; the message gives the reason."""


@dataclass(frozen=True)
class Operand:
    """Keys or values as the attention op reads them.

    Attributes:
        user: op that reads them.
        where: position of the argument.
        axis: axis of the sequence, -2 or -1.
        heads: number of heads that the model computes.
        width: features of each head.
        repeat: number of times that each head is repeated for the queries.
        inner: True if the repeats of a head are adjacent (h0 h0 h1 h1).
        folded: True if batch and heads are one axis.
        source: the keys or values before they are repeated.
        turned: True if the features come before the sequence in `source`.
    """

    user: fx.Node
    where: int
    axis: int
    heads: int
    width: int
    repeat: int = 1
    inner: bool = True
    folded: bool = False
    source: fx.Node | None = None
    turned: bool = False

    @property
    def node(self) -> fx.Node:
        return self.user.args[self.where]  # type: ignore[return-value]


def read_operand(
    view: View, attention: Attention, letter: str, user: fx.Node, where: int, axis: int
) -> Operand:
    """Read the keys or values of an attention.

    Args:
        view: the program.
        attention: the attention.
        letter: "k" or "v".
        user: op that reads the operand.
        where: position of the argument.
        axis: axis of the sequence, -2 or -1.

    Raises:
        Unsuited: if their shape does not allow a prefix.
    """
    node = user.args[where]
    assert isinstance(node, fx.Node)
    shape = node.meta["val"].shape
    width = shape[-1 if axis == -2 else -2]
    if not isinstance(width, int):
        raise Unsuited("the width of its heads is dynamic, so it attends over features")
    if len(shape) == 3:
        heads = _folded_heads(view, attention, letter, shape[0], width)
        return Operand(user, where, axis, heads, width, folded=True, source=node, turned=axis == -1)
    if len(shape) != 4 or not isinstance(shape[1], int):
        raise Unsuited(f"its keys have the shape {_shape(shape)}, not batch × heads × sequence × width")
    heads, repeat, inner, source, turns = _repetition(node, shape[1])
    return Operand(
        user, where, axis, heads, width, repeat, inner, source=source, turned=(axis == -1) != turns
    )


def _shape(shape: Any) -> str:
    return "×".join(map(str, shape))


def features(view: View, attention: Attention, letter: str) -> tuple[int, fx.Node] | None:
    """Return the number of features that a projection gives the keys (or values), and the projection.

    None if there are several projections.

    Args:
        view: the program.
        attention: the attention.
        letter: "k" or "v".
    """
    makers = attention.k if letter == "k" else attention.v
    if len(makers) != 1:
        return None
    rows = view.roles.parts.get(makers[0], {}).get(letter)
    if rows is not None:
        return len(rows), makers[0]
    fused = sum(makers[0] in nodes for nodes in (attention.q, attention.k, attention.v))
    return (view.site_of(makers[0]).out_features, makers[0]) if fused == 1 else None


def _folded_heads(view: View, attention: Attention, letter: str, folded: Any, width: int) -> int:
    """Return the number of heads of keys with shape (batch · heads, sequence, width).

    Raises:
        Unsuited: if it cannot be determined.
    """
    known = features(view, attention, letter)
    if known is not None and known[0] % width == 0:
        heads = known[0] // width
        sizes = known[1].meta["val"].shape[:-1]
        if any(same(folded, heads * size) for size in sizes):
            return heads
    # Fall back to the view that split the heads, before they were folded into the batch.
    node = attention.operands[letter]
    for _ in range(8):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dim() != 4 or not isinstance(value.shape[1], int):
            continue
        if same(folded, value.shape[0] * value.shape[1]) and width in value.shape[2:]:
            return int(value.shape[1])
    raise Unsuited(f"its keys have the shape {folded}×…×{width}, from which the heads cannot be determined")


_KEEPS = {"reshape", "view", "_unsafe_view", "clone", "contiguous", "transpose", "to", "slice"}


def _repetition(node: fx.Node, heads: int) -> tuple[int, int, bool, fx.Node, bool]:
    """Return the repetition of heads for grouped queries.

    Returns:
        Heads before the repetition, number of repeats, True if repeats are adjacent, the value before the repetition,
        and True if it was transposed since.
    """
    current, turned = node, False
    # Skip an earlier prefix before the keys.
    while mark_of(current).feeds is not None:
        current = next(n for n in current.all_input_nodes if n.name == mark_of(current).feeds)
    whole = (heads, 1, True, current, False)
    for _ in range(8):
        if current.op != "call_function" or not current.args or not isinstance(current.args[0], fx.Node):
            return whole
        name, below = op_name(current.target), current.args[0]
        if name == "expand":
            found = _expanded(current, below, heads)
            return (*found, turned) if found else whole
        if name == "repeat_interleave" and arguments(current).get("dim") == 1:
            times, before = arguments(current).get("repeats"), below.meta["val"].shape[1]
            return (before, times, True, below, turned) if isinstance(times, int) else whole
        if name not in _KEEPS:
            return whole
        # Transposing twice restores the order, hence the exclusive or.
        turned ^= name == "transpose"
        current = below
    return whole


def _expanded(node: fx.Node, below: fx.Node, heads: int) -> tuple[int, int, bool, fx.Node] | None:
    old, new = below.meta["val"].shape, node.meta["val"].shape
    grown = [i for i, (a, b) in enumerate(zip(old, new, strict=False)) if not same(a, b)]
    if len(old) != len(new) or len(grown) != 1 or old[grown[0]] != 1:
        return None
    source = below
    while source.meta["val"].dim() > 4 and op_name(source.target) in (*_KEEPS, "unsqueeze"):
        source = source.args[0]  # type: ignore[assignment]
    if len(new) == 5 and grown[0] in (1, 2):
        kept, times = (new[1], new[2]) if grown[0] == 2 else (new[2], new[1])
        if isinstance(kept, int) and isinstance(times, int) and kept * times == heads:
            return kept, times, grown[0] == 2, source
    if len(new) == 4 and grown[0] == 1 and new[1] == heads:
        return 1, heads, True, source
    return None
