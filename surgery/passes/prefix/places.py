"""All attentions as places for a prefix: core, keys, values and masks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from surgery.graph.analysis.attention import Attention, product_operands
from surgery.graph.analysis.dataflow import op_name
from surgery.graph.marks import adapters_around, mark_of
from surgery.graph.ops import arguments
from surgery.graph.propagate.sizes import same
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import SiteKey
from surgery.graph.view import View
from surgery.passes.prefix.operands import Operand, Unsuited, features, read_operand
from surgery.passes.prefix.scores import Pad, between, find_pads

SDPA = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Place:
    """One attention that can take a prefix.

    Attributes:
        attention: the attention.
        core: the attention op, or the product of scores and the product with the values.
        query: the queries.
        key: the keys.
        value: the values.
        pads: masks and biases to extend.
        causal: True if the op applies a causal mask itself.
        chain: nodes from one product to the other.
    """

    attention: Attention
    core: tuple[fx.Node, ...]
    query: fx.Node
    key: Operand
    value: Operand
    pads: tuple[Pad, ...] = ()
    causal: bool = False
    chain: tuple[fx.Node, ...] = field(default=(), repr=False)

    @property
    def output(self) -> fx.Node:
        return self.attention.core[-1]

    @property
    def scale(self) -> float | None:
        return arguments(self.core[0]).get("scale")


def attentions_by_site(view: View) -> dict[SiteKey, list[Attention]]:
    """Map each site to the attentions whose keys it produces (or values or queries, if no weight produces these)."""
    found: dict[SiteKey, list[Attention]] = {}
    for attention in view.attentions:
        for node in (*attention.k, *attention.v, *attention.q):
            try:
                site = view.site_of(node)
            except KeyError:
                continue
            found.setdefault(site.key, []).append(attention)
            break
    return found


def read_place(view: View, attention: Attention) -> Place:
    """Read an attention in its current state, including earlier prefixes.

    Raises:
        Unsuited: if it cannot take a prefix.
    """
    if len(attention.core) == 1:
        return _of_op(view, attention)
    if len(attention.core) == 2:
        raise Unsuited("its scores pass through no softmax that could include a prefix")
    return _of_products(view, attention)


def _of_op(view: View, attention: Attention) -> Place:
    core = _acting(attention.core[0])
    if core.target is not SDPA:
        raise Unsuited(
            f"it is computed by {op_name(core.target)}, whose masks are code; load the model with sdpa or eager "
            "attention"
        )
    args = arguments(core)
    key, value = (read_operand(view, attention, letter, core, i, -2) for i, letter in ((1, "k"), (2, "v")))
    pads: tuple[Pad, ...] = ()
    mask = args["attn_mask"]
    if isinstance(mask, fx.Node):
        where: int | str = 3 if len(core.args) > 3 else "attn_mask"
        pads = (Pad(core, where, -1, _visible(mask)),)
    place = Place(attention, (core,), args["query"], key, value, pads, bool(args["is_causal"]))
    _check(view, place)
    return place


def _visible(mask: fx.Node) -> float | bool:
    return True if mask.meta["val"].dtype == torch.bool else 0.0


def _acting(core: fx.Node) -> fx.Node:
    """Return the attention op, or the op with which an earlier prefix has replaced it."""
    return next((n for n in reversed(adapters_around(core, whole=True)) if n.target is core.target), core)


def _of_products(view: View, attention: Attention) -> Place:
    product, last = attention.core[0], attention.core[-1]
    if op_name(product.target) == "einsum" or op_name(last.target) == "einsum":
        raise Unsuited("it is written as einsum, whose axes have no fixed order")
    offset = 1 if op_name(product.target) == "baddbmm" else 0
    left, right = product_operands(product) or (None, None)
    k_right = right is attention.operands["k"]
    query = left if k_right else right
    assert isinstance(query, fx.Node)
    # The axis of the keys, in the scores and in the keys as the product reads them.
    key_axis = -1 if k_right else -2
    key = read_operand(view, attention, "k", product, offset + int(k_right), key_axis)
    v_offset = 1 if op_name(last.target) == "baddbmm" else 0
    weights, _ = product_operands(last) or (None, None)
    chain = between(product, last)
    v_right = weights in chain
    value = read_operand(view, attention, "v", last, v_offset + int(v_right), -2 if v_right else -1)
    pads = tuple(find_pads(chain, key_axis))
    place = Place(attention, (product, last), query, key, value, pads, chain=tuple(chain))
    _check(view, place)
    return place


def _check(view: View, place: Place) -> None:
    key, value = place.key, place.value
    sizes = key.node.meta["val"].shape, value.node.meta["val"].shape
    if not same(sizes[0][key.axis], sizes[1][value.axis]):
        raise Unsuited("its keys and values have different lengths")
    known = features(view, place.attention, "k")
    length = sizes[0][key.axis]
    # With one fixed key, a mask of one column may apply to that key or broadcast over all keys.
    if len(place.core) > 1 and isinstance(length, int) and length == 1:
        raise Unsuited("it has a single key, and its mask may apply to that key or to all keys")
    over_channels = isinstance(length, int) and known is not None and key.heads * length == known[0]
    if over_channels and key.heads * key.width != known[0]:  # type: ignore[index]
        raise Unsuited("it attends over features, not over positions, so a prefix of tokens does not apply")


def earlier(g: Rewriter, place: Place) -> int:
    """Return the number of tokens that earlier prefixes inserted before the keys."""
    node, found = place.key.node, 0
    while mark_of(node).feeds is not None:
        found += int(mark_of(node).prefix)
        node = g.view.node(str(mark_of(node).feeds))
    return found
