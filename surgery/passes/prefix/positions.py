"""Sources of positions in an attention, so that a prefix can take positions 0 … P − 1 before the real tokens.

Three sources are found in the dataflow:
- rotary angles: integers, as many as the sequence is long, that are converted to floats on the way to the values
  that q and k are multiplied with;
- a table of absolute positions, whose rows are added to the input of the attention's block;
- a table of relative positions, whose rows are added to the scores. Real tokens keep their rows, and the prefix gets
  those of keys at −P … −1.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import fx

from surgery.graph.analysis.attention import Attention
from surgery.graph.analysis.dataflow import op_name
from surgery.graph.fake import MetaCache
from surgery.graph.marks import mark_of
from surgery.graph.ops import EMBEDDING, arguments, operand
from surgery.graph.propagate.sizes import is_size, same
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.view import View
from surgery.passes.prefix.insert import Columns, size, stack_of
from surgery.passes.prefix.places import Place, earlier
from surgery.passes.prefix.scores import between

aten = torch.ops.aten
# An op, and the value that holds its positions.
Use = tuple[fx.Node, fx.Node]


def has_source(view: View, place: Place) -> bool:
    """True if a source of positions is found for the attention (a cross-attention needs none)."""
    attention = place.attention
    return attention.cross or bool(uses(view, attention)) or relative(view, place) is not None


def uses(view: View, attention: Attention) -> list[Use]:
    """Return the ops that convert integer positions of the sequence to angles or to rows of a table."""
    if attention.cross:
        return []
    return list(dict.fromkeys([*_rotary(view, attention), *_absolute(view, attention)]))


def shift(g: Rewriter, attention: Attention, tokens: int) -> None:
    """Count real tokens from `tokens` on, once for all attentions that share a source.

    Args:
        g: rewriter of the graph.
        attention: the attention.
        tokens: number of prefix tokens.
    """
    for user, counted in uses(g.view, attention):
        key = f"positions of {user.name}"
        if mark_of(counted).once == key:
            continue

        def build(now: fx.Node, key: str = key, user: fx.Node = user) -> fx.Node:
            return g.once(key, partial(g.call, aten.add.Tensor, now, tokens), stack_of(user))

        g.replace_argument(user, counted, build)


def tables(view: View, attention: Attention) -> Iterator[tuple[int, Any]]:
    """Yield for each table of positions its number of rows, and the number of positions that are looked up."""
    for user, index in uses(view, attention):
        name, table = op_name(user.target), user.args[0]
        if name in ("embedding", "index_select", "gather", "index") and isinstance(table, fx.Node):
            axis = arguments(user).get("dim", 0) if name in ("gather", "index_select") else 0
            rows = table.meta["val"].shape[axis]
            if isinstance(rows, int):
                yield rows, index.meta["val"].shape[1 if name == "gather" else -1]


# -- Rotary angles


def _rotary(view: View, attention: Attention) -> Iterator[Use]:
    for letter, makers in (("q", attention.q), ("k", attention.k)):
        operand = attention.operands[letter]
        for maker in makers:
            length = maker.meta["val"].shape[-2]
            inner = set(between(maker, operand))
            for side in {n: None for node in inner - {maker} for n in node.all_input_nodes if n not in inner}:
                if side.op == "call_function":
                    yield from _counted(view, side, length)


def _counted(view: View, side: fx.Node, length: Any) -> Iterator[Use]:
    """Yield the ops at which positions become floats, behind a value that q or k is multiplied with."""
    if not isinstance(side.meta.get("val"), torch.Tensor) or _is_whole(side):
        return
    if any(n in view.flow.calls for n in view.flow.of(side)):
        return  # A weight computes it, so it is a gate or the like.
    seen, stack = {side}, [side]
    while stack:
        node = stack.pop()
        for value in node.all_input_nodes:
            if _is_whole(value):
                if _counts(value, length):
                    yield node, value
            elif value not in seen and value.op == "call_function" and not is_size(value.meta.get("val")):
                seen.add(value)
                stack.append(value)


def _is_whole(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32)


def _counts(node: fx.Node, length: Any) -> bool:
    """True if integers count the sequence: as many as it is long, from an arange or an input."""
    if not any(same(size, length) for size in node.meta["val"].shape):
        return False
    seen, stack = {node}, [node]
    while stack:
        node = stack.pop()
        if node.op == "placeholder" or op_name(node.target) in ("arange", "cumsum"):
            return True
        for below in node.all_input_nodes:
            if below not in seen and isinstance(below.meta.get("val"), torch.Tensor):
                seen.add(below)
                stack.append(below)
    return False


# -- Table of absolute positions


def _absolute(view: View, attention: Attention) -> Iterator[Use]:
    """Yield the position embeddings behind the queries; the stream that a cross-attention reads is not searched."""
    crossing = {a.core[-1]: a.operands["q"] for a in view.attentions if a.cross}
    start = attention.operands["q"]
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        call = view.flow.calls.get(node)
        if call is not None and call.kind == EMBEDDING and view.roles.role.get(node) == "embed.position":
            yield node, operand(call)
            continue
        below = [crossing[node]] if node in crossing else node.all_input_nodes
        for n in below:
            if n not in seen:
                seen.add(n)
                stack.append(n)


# -- Table of relative positions


def relative(view: View, place: Place) -> tuple[fx.Node, fx.Node] | None:
    """Return the bias of the scores that depends on relative positions, and the arange of its keys, or None."""
    for table in place.attention.bias:
        call = view.flow.calls.get(table)
        if call is None or call.kind != EMBEDDING or table not in view.flow.constant:
            continue
        for counted in _aranges(table):
            bias = _last_alike(view, place, table, counted)
            if bias is not None:
                return bias, counted
    return None


def _aranges(node: fx.Node) -> list[fx.Node]:
    return [n for n in _behind(node) if op_name(n.target) == "arange"]


def _behind(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that a value is computed from, in graph order."""
    seen, stack = {node}, [node]
    while stack:
        for below in stack.pop().all_input_nodes:
            if (
                below not in seen
                and below.op == "call_function"
                and isinstance(below.meta.get("val"), torch.Tensor)
            ):
                seen.add(below)
                stack.append(below)
    return sorted(seen)


def _last_alike(view: View, place: Place, table: fx.Node, counted: fx.Node) -> fx.Node | None:
    """Return the last value between table and scores that is still valid for fewer keys, so before the mask.

    The arange is replaced by one of three elements. A value is valid as long as only its last axis changes with it.
    The result is None if the arange does not count the keys alone.
    """
    mode = MetaCache(view.graph).mode
    arange = arguments(counted)
    if "step" in arange and arange["step"] != 1:
        return None
    with mode:
        few = torch.arange(3, dtype=counted.meta["val"].dtype)
    known: dict[fx.Node, Any] = {counted: few}
    wanted = {n for pad in place.pads for n in [pad.node, *_behind(pad.node)]}
    for node in _behind(table):
        if not _evaluate(mode, node, known):
            return None
    found, node = None, table
    while True:
        shape, old = known[node].shape, node.meta["val"].shape
        moved = [i - len(old) for i, (a, b) in enumerate(zip(old, shape, strict=False)) if not same(a, b)]
        if len(shape) == len(old) and moved == [-1]:
            found = node
        elif len(moved) != 1:
            return found
        following = [u for u in node.users if u in wanted and u in view.flow.constant]
        if len(following) != 1 or not _evaluate(mode, following[0], known):
            return found
        node = following[0]


def _evaluate(mode: Any, node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    """Run a node on changed values; a node that depends on none keeps its own value. False if it fails."""
    if node in known or known.keys().isdisjoint(node.all_input_nodes):
        return True
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known.get(n, n.meta.get("val")))
    try:
        with mode, torch.no_grad():
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:
        return False
    return True


def columns(g: Rewriter, place: Place, tokens: int) -> Columns:
    """Return a function that builds a mask's columns for the prefix, for `surgery.passes.prefix.insert.attend`.

    Args:
        g: rewriter of the graph.
        place: the attention.
        tokens: number of prefix tokens.
    """
    source, after = relative(g.view, place), earlier(g, place)

    def build(mask: fx.Node, axis: int) -> fx.Node | None:
        # A mask without relative positions needs no columns of its own: the prefix is visible.
        if source is None or axis != -1 or source[0] not in [mask, *_behind(mask)]:
            return None
        make = partial(_before_first, g, *source, tokens, after)
        before = g.once(f"{source[0].name} of the prefix", make, stack_of(mask))
        sizes = [size(g, mask, i) for i in range(mask.meta["val"].dim() - 1)]
        return g.call(aten.expand.default, before, [*sizes, tokens])

    return build


def _before_first(g: Rewriter, bias: fx.Node, counted: fx.Node, tokens: int, after: int) -> fx.Node:
    """Compute the bias for as many keys before position −after."""
    given = {key: value for key, value in counted.kwargs.items() if key in ("dtype", "device")}
    made = {counted: g.call(aten.arange.start, -tokens - after, -after, **given)}
    for node in _behind(bias):
        if node not in made and not made.keys().isdisjoint(node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: made.get(n, n))
            made[node] = g.call(node.target, *args, **kwargs)
    return made[bias]
