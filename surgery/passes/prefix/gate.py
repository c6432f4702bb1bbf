"""Gated prefix: has its own softmax, and is scaled by a gate and added to the attention's output (LLaMA-Adapter)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from surgery.graph.analysis.dataflow import op_name
from surgery.graph.ops import arguments
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.passes.prefix.insert import spread
from surgery.passes.prefix.operands import Unsuited
from surgery.passes.prefix.places import SDPA, Place

aten = torch.ops.aten

_ADDED = {"add", "sub", "masked_fill", "where"}
_KEPT = {
    "mul", "div", "tanh", "softmax", "dropout", "to", "contiguous", "clone", "type_as", "alias", "detach",
}  # fmt: skip


def query_heads(place: Place) -> int:
    """Return the number of query heads; each has a gate."""
    shape = place.query.meta["val"].shape
    return int(shape[1]) if len(shape) == 4 else place.key.heads


def check(place: Place) -> None:
    """Check that the scores can be computed for the prefix alone.

    Raises:
        Unsuited: if they cannot.
    """
    if len(place.core) == 1:
        return
    if place.key.axis == -2:
        raise Unsuited(
            "its scores have keys before queries, which a gated prefix does not support; leave out --gate"
        )
    for node in _copied(place):
        name = op_name(node.target).rstrip("_")
        if (name not in _KEPT and not _open(node, name)) or node.args[0] not in place.chain:
            raise Unsuited(
                f"its scores go through {name}, which a gated prefix does not support; leave out --gate"
            )


def _copied(place: Place) -> list[fx.Node]:
    """Return the ops from the scores to the values without masks and biases, which do not apply to a prefix."""
    masked = {pad.user for pad in place.pads}
    return [n for n in place.chain[1:-1] if n not in masked and op_name(n.target).rstrip("_") not in _ADDED]


def _open(node: fx.Node, name: str) -> bool:
    """True if a view takes the number of keys from its input (-1)."""
    sizes: Any = node.args[1] if name in ("view", "reshape") else None
    return sizes is not None and sizes[-1] == -1


def attend(g: Rewriter, place: Place, keys: fx.Node, values: fx.Node, gate: fx.Node) -> None:
    """Add the gated prefix to the attention: out + weight · tanh(gate) · softmax(q P_kᵀ) P_v, for each head.

    Args:
        g: rewriter of the graph.
        place: the attention.
        keys: keys P_k of the prefix, (heads, tokens, width).
        values: values P_v of the prefix, (heads, tokens, width).
        gate: gate of each query head.
    """

    def build(out: fx.Node) -> fx.Node:
        query = place.query
        k, v = (
            spread(g, operand, prefix, query if operand.folded else operand.node)
            for operand, prefix in ((place.key, keys), (place.value, values))
        )
        seen = _of_op(g, place, query, k, v) if len(place.core) == 1 else _of_products(g, place, query, k, v)
        weight = g.call(aten.tanh.default, gate)
        # The gate has one value per query head, so it is spread over batch and heads like the keys.
        if place.key.folded:
            weight = spread(g, place.key, weight, query)
        elif weight.meta["val"].dtype != seen.meta["val"].dtype:
            weight = g.call(aten.to.dtype, weight, seen.meta["val"].dtype)
        return g.call(aten.add.Tensor, out, g.call(aten.mul.Tensor, seen, weight), alpha=g.weight)

    g.wrap(place.output, build)


def _of_op(g: Rewriter, place: Place, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    args = arguments(place.core[0])
    rest = {"scale": args["scale"], "enable_gqa": args["enable_gqa"]}
    return g.call(SDPA, q, k, v, None, args["dropout_p"], False, **rest)


def _of_products(g: Rewriter, place: Place, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """Run the ops from the scores to the result for the prefix, without masks and biases."""
    first = place.chain[0]
    scores = g.call(aten.matmul.default, q, g.call(aten.transpose.int, k, -1, -2))
    if op_name(first.target) == "baddbmm":
        # baddbmm scales the product by alpha; its added bias does not apply to the prefix.
        scores = g.call(aten.mul.Tensor, scores, first.kwargs.get("alpha", 1))
    for node in _copied(place):
        scores = g.call(_plain(node.target), scores, *node.args[1:], **node.kwargs)
    return g.call(aten.matmul.default, scores, v)


def _plain(target: Any) -> Any:
    """Return the functional variant of an in-place op."""
    name = target._schema.name.removeprefix("aten::")
    return getattr(getattr(aten, name[:-1]), target._overloadname) if name.endswith("_") else target
