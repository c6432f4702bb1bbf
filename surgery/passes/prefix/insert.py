"""Inserts a prefix before keys and values, and columns for it before masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from surgery.graph.marks import set_mark
from surgery.graph.ops import arguments
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.passes.prefix.operands import Operand
from surgery.passes.prefix.places import SDPA, Place
from surgery.passes.prefix.scores import Pad, has_keys

aten = torch.ops.aten
Columns = Callable[[fx.Node, int], fx.Node | None]


def visible(mask: fx.Node, axis: int) -> fx.Node | None:
    """Return no columns: a mask is then extended with its fill value, which leaves the prefix visible."""
    return None


def attend(g: Rewriter, place: Place, keys: fx.Node, values: fx.Node, columns: Columns = visible) -> None:
    """Let an attention see a prefix.

    Args:
        g: rewriter of the graph.
        place: the attention.
        keys: keys of the prefix, (heads, tokens, width).
        values: values of the prefix, (heads, tokens, width).
        columns: function that builds a mask's columns for the prefix, from the mask and its axis of keys; None from
            it means "visible".
    """
    tokens = int(keys.meta["val"].shape[1])
    if place.causal:
        _uncausal(g, place, keys, values, tokens)
        return
    moved: dict[fx.Node, fx.Node] = {}
    for pad in place.pads:
        mask = pad.node
        moved[g.replace_argument(pad.user, pad.where, partial(_pad, g, place, pad, tokens, columns))] = mask
    for operand, prefix in ((place.key, keys), (place.value, values)):
        bare = operand.node
        fresh = g.replace_argument(operand.user, operand.where, partial(lengthen, g, operand, prefix))
        set_mark(fresh, prefix=tokens)
        moved[fresh] = bare
        # In eager attention the scores now have more keys, so the ops behind them get new sizes. The output of the
        # sdpa op keeps its shape.
    if len(place.core) > 1:
        g.propagate_sizes(moved)


def _pad(g: Rewriter, place: Place, pad: Pad, tokens: int, columns: Columns, mask: fx.Node) -> fx.Node:
    # A mask that broadcasts over the keys is expanded first, since the prefix is an exception to it.
    if not has_keys(mask, pad.axis):
        sizes: list[Any] = [-1] * mask.meta["val"].dim()
        sizes[pad.axis] = size(g, place.key.node, place.key.axis)
        return _before(g, g.call(aten.expand.default, mask, sizes), pad, tokens, None)

    def build() -> fx.Node:
        with g.after(mask):
            return _before(g, mask, pad, tokens, columns(mask, pad.axis))

    # Layers that share a mask also share its extension.
    return g.once(f"{mask.name} for {tokens}, {pad.fill} at {pad.axis}", build, stack_of(mask))


def _before(g: Rewriter, mask: fx.Node, pad: Pad, tokens: int, columns: fx.Node | None) -> fx.Node:
    """Insert the columns before those of a mask, by default as many as leave all prefix tokens visible."""
    if columns is None:
        # constant_pad_nd would specialize the batch of an expanded mask, because its fake kernel compares strides.
        one = g.call(aten.full_like.default, g.call(aten.slice.Tensor, mask, pad.axis, 0, 1), pad.fill)
        sizes = [-1] * mask.meta["val"].dim()
        sizes[pad.axis] = tokens
        columns = g.call(aten.expand.default, one, sizes)
    return g.call(aten.cat.default, [columns, mask], pad.axis)


def _uncausal(g: Rewriter, place: Place, keys: fx.Node, values: fx.Node, tokens: int) -> None:
    """Replace is_causal by an explicit mask.

    is_causal aligns the diagonal with the top left of the scores, where the prefix is now.
    """
    (core,), args = place.core, arguments(place.core[0])

    def build(_: fx.Node) -> fx.Node:
        k = lengthen(g, place.key, keys, place.key.node)
        v = lengthen(g, place.value, values, place.value.node)
        device = k.meta["val"].device
        rows = g.call(aten.arange.default, size(g, place.query, -2), device=device)
        columns = g.call(aten.arange.default, size(g, k, -2), device=device)
        last = g.call(aten.add.Tensor, g.call(aten.unsqueeze.default, rows, 1), tokens)
        mask = g.call(aten.le.Tensor, g.call(aten.unsqueeze.default, columns, 0), last)
        rest = {"scale": args["scale"], "enable_gqa": args["enable_gqa"]}
        return g.call(SDPA, place.query, k, v, mask, args["dropout_p"], False, **rest)

    g.replace_output(core, build)


def spread(g: Rewriter, operand: Operand, prefix: fx.Node, like: fx.Node) -> fx.Node:
    """Expand a prefix over the batch and the repeated heads, in the dtype of the keys.

    Args:
        g: rewriter of the graph.
        operand: the keys or values.
        prefix: the prefix, (heads, tokens, width).
        like: the keys, or another value with their batch and heads.

    Returns:
        Node of shape (batch, repeated heads, tokens, width); batch and heads are one axis if those of the keys are.
    """
    heads, tokens, width = prefix.meta["val"].shape
    value = g.call(aten.unsqueeze.default, prefix, 0)
    if operand.repeat > 1:
        axis = 2 if operand.inner else 1
        sizes = [1, heads, operand.repeat] if operand.inner else [1, operand.repeat, heads]
        value = g.call(aten.unsqueeze.default, value, axis)
        value = g.call(aten.expand.default, value, [*sizes, tokens, width])
        value = g.call(aten.reshape.default, value, [1, heads * operand.repeat, tokens, width])
    dtype = like.meta["val"].dtype
    if value.meta["val"].dtype != dtype:
        value = g.call(aten.to.dtype, value, dtype)
    rows = g.call(aten.unflatten.int, like, 0, [-1, heads]) if operand.folded else like
    value = g.call(aten.expand.default, value, [size(g, rows, 0), -1, -1, -1])
    return g.call(aten.reshape.default, value, [-1, tokens, width]) if operand.folded else value


def lengthen(g: Rewriter, operand: Operand, prefix: fx.Node, now: fx.Node) -> fx.Node:
    """Insert the prefix before the keys or values.

    Args:
        g: rewriter of the graph.
        operand: the keys or values.
        prefix: the prefix, (heads, tokens, width).
        now: the keys or values as their op currently reads them.
    """
    before = spread(g, operand, prefix, now)
    if operand.axis == -1:
        before = g.call(aten.transpose.int, before, -1, -2)
    return g.call(aten.cat.default, [before, now], operand.axis)


def size(g: Rewriter, node: fx.Node, axis: int) -> Any:
    """Return a length as a number, or as a graph value if it is dynamic.

    Args:
        g: rewriter of the graph.
        node: node to measure.
        axis: axis of the length.
    """
    length = node.meta["val"].shape[axis]
    return length if isinstance(length, int) else g.call(aten.sym_size.int, node, axis)


def stack_of(node: fx.Node) -> dict[str, Any]:
    """Return the module stack of a node; a constant belongs to the root module."""
    stack = node.meta.get("nn_module_stack")
    return dict(stack) if stack else root_stack(node.graph)


def root_stack(graph: fx.Graph) -> dict[str, Any]:
    """Return the module stack of the root module."""
    for node in graph.nodes:
        outermost = [*node.meta.get("nn_module_stack", {}).items()][:1]
        if outermost and outermost[0][1][0] == "":
            return dict(outermost)
    return {}
