"""Putting a prefix before keys and values, and visible columns before masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from surgery.graph.marks import META
from surgery.graph.ops import arguments
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.passes.prefix.operands import Operand
from surgery.passes.prefix.places import SDPA, Place
from surgery.passes.prefix.scores import Pad, has_keys

aten = torch.ops.aten
Columns = Callable[[fx.Node, int], fx.Node | None]


def visible(mask: fx.Node, axis: int) -> fx.Node | None:
    """No columns of its own: a mask is filled with what lets the prefix be seen."""
    return None


def attend(g: Rewriter, place: Place, keys: fx.Node, values: fx.Node, columns: Columns = visible) -> None:
    """Let the attention see a prefix: keys and values (heads, tokens, width).

    columns: what a mask or bias holds for the prefix, from the operand and its axis of keys; None for "visible".
    """
    tokens = int(keys.meta["val"].shape[1])
    if place.causal:
        _uncausal(g, place, keys, values, tokens)
        return
    moved: dict[fx.Node, fx.Node] = {}
    for pad in place.pads:
        mask = pad.node
        moved[g.feed(pad.user, pad.where, partial(_pad, g, place, pad, tokens, columns))] = mask
    for operand, prefix in ((place.key, keys), (place.value, values)):
        bare = operand.node
        fresh = g.feed(operand.user, operand.where, partial(lengthen, g, operand, prefix))
        fresh.meta[META] = {**fresh.meta[META], "prefix": tokens}
        moved[fresh] = bare
    if len(place.core) > 1:
        g.settle(moved)


def _pad(g: Rewriter, place: Place, pad: Pad, tokens: int, columns: Columns, mask: fx.Node) -> fx.Node:
    if not has_keys(mask, pad.axis):
        sizes: list[Any] = [-1] * mask.meta["val"].dim()
        sizes[pad.axis] = size(g, place.key.node, place.key.axis)
        return _before(g, g.call(aten.expand.default, mask, sizes), pad, tokens, None)

    def build() -> fx.Node:
        with g.after(mask):
            return _before(g, mask, pad, tokens, columns(mask, pad.axis))

    # Layers that share a mask share this too.
    return g.once(f"{mask.name} for {tokens}, {pad.fill} at {pad.axis}", build, stack_of(mask))


def _before(g: Rewriter, mask: fx.Node, pad: Pad, tokens: int, columns: fx.Node | None) -> fx.Node:
    """columns, or as many that leave all visible, before those of a mask."""
    if columns is None:
        # constant_pad_nd would fix the batch of a mask that was expanded: its fake compares strides.
        one = g.call(aten.full_like.default, g.call(aten.slice.Tensor, mask, pad.axis, 0, 1), pad.fill)
        sizes = [-1] * mask.meta["val"].dim()
        sizes[pad.axis] = tokens
        columns = g.call(aten.expand.default, one, sizes)
    return g.call(aten.cat.default, [columns, mask], pad.axis)


def _uncausal(g: Rewriter, place: Place, keys: fx.Node, values: fx.Node, tokens: int) -> None:
    """is_causal counts from the top left, where the prefix stands now: the same mask, written out."""
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

    g.stand_in(core, build)


def spread(g: Rewriter, operand: Operand, prefix: fx.Node, like: fx.Node) -> fx.Node:
    """A prefix (heads, tokens, width) for every row of the batch, as the keys are: repeated, of their dtype.

    like: the keys, or what else has their batch and heads. Returns (batch, repeated heads, tokens, width), with
    batch and heads as one axis where the keys have them so.
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
    """The prefix before the keys (values). now: these, as their op reads them."""
    before = spread(g, operand, prefix, now)
    if operand.axis == -1:
        before = g.call(aten.transpose.int, before, -1, -2)
    return g.call(aten.cat.default, [before, now], operand.axis)


def size(g: Rewriter, node: fx.Node, axis: int) -> Any:
    """A length, as a number or a graph value."""
    length = node.meta["val"].shape[axis]
    return length if isinstance(length, int) else g.call(aten.sym_size.int, node, axis)


def stack_of(node: fx.Node) -> dict[str, Any]:
    """The modules that a node is in; a constant is in the model itself."""
    stack = node.meta.get("nn_module_stack")
    return dict(stack) if stack else root_stack(node.graph)


def root_stack(graph: fx.Graph) -> dict[str, Any]:
    for node in graph.nodes:
        outermost = [*node.meta.get("nn_module_stack", {}).items()][:1]
        if outermost and outermost[0][1][0] == "":
            return dict(outermost)
    return {}
