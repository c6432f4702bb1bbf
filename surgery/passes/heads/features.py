"""Features that an added head reads: the input of an existing head, an output of the model, or pooled tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from surgery.common.errors import PassError
from surgery.graph.marks import input_before_adapters, mark_of, output_with_adapters
from surgery.graph.ops import Call, operand
from surgery.graph.outputs import named_outputs, same_size
from surgery.graph.sites import Site

if TYPE_CHECKING:
    from surgery.graph.rewrite.rewriter import Rewriter
    from surgery.graph.view import View

aten = torch.ops.aten
_FEATURES = ("last_hidden_state", "pooler_output", "hidden_states")  # transformers' names


@dataclass(frozen=True)
class Features:
    """Features of a model that a head can read.

    Attributes:
        node: The value to pool, as captured, before adapters.
        site: The weight site that identifies the features in the journal: the existing head, or the last weight site
            on the way to `node`.
        source: "" for the input of an existing head, else the name of an output.
    """

    node: fx.Node
    site: Site
    source: str


def head_sites(view: View, added: bool = True) -> list[Site]:
    """Return the sites whose op computes an output of the model, in graph order.

    A site whose output is named as features (the pooler of a bare BERT) is not a head.

    Args:
        view: The program's graph.
        added: Include heads that a pass added.
    """
    features: set[fx.Node] = set()
    scores: set[fx.Node] = set()
    for name, node in named_outputs(view.graph).items():
        made = features if name.partition(".")[0] in _FEATURES else scores
        made.update(view.flow.projections(node))
    found = []
    for site in view.sites:
        nodes = {call.node for call in site.calls}
        bare = bool(nodes & features) and not nodes & scores
        if site.role == "head" and not bare and (added or not _added(site.calls[0].node)):
            found.append(site)
    return found


def _added(node: fx.Node) -> bool:
    """True if a pass added the value as an output."""
    return mark_of(node).output is not None


def scores_of(call: Call) -> tuple[fx.Node, fx.Node | None]:
    """Return the current output of a head's op and the separate bias tensor that is added to it, or None.

    BART, for example, adds `final_logits_bias` right after the layer. The output then includes that bias.
    """
    # The bias may reach the addition through casts, which do not change what it is.
    value = output_with_adapters(call.node, whole=True)
    users = list(value.users)
    if len(users) == 1 and users[0].target is aten.add.Tensor and users[0].args[0] is value:
        bias = users[0].args[1]
        while isinstance(bias, fx.Node) and bias.target in (
            aten.to.dtype,
            aten.to.dtype_layout,
            aten.to.device,
        ):
            bias = bias.args[0]
        if isinstance(bias, fx.Node) and bias.op == "get_attr" and not users[0].kwargs:
            return output_with_adapters(users[0], whole=True), bias
    return value, None


def find_features(view: View, pool: str | None) -> list[Features]:
    """Return the features that an added head can read: the input of each head, or an output if there is no head.

    Raises:
        PassError: The model returns no features, or returns only token features and no pool is given.
    """
    heads = head_sites(view, added=False)
    if heads:
        return [Features(input_before_adapters(operand(site.calls[-1])), site, "") for site in heads]
    own = {name: node for name, node in named_outputs(view.graph).items() if not _added(node)}
    floats = {name: node for name, node in own.items() if _is_features(name, node)}
    flat = next((name for name, node in floats.items() if _rank(node) == 2), None)
    spread = next((name for name, node in floats.items() if _rank(node) > 2), None)
    # Without a pool, a pooled output is used if there is one; with a pool, token features.
    name = (flat or spread) if pool is None else (spread or flat)
    if name is None:
        raise PassError(
            "pass 'head': the model returns no features (a floating-point output with two or more axes that is not a "
            "score); let it return its hidden states"
        )
    if pool is None and flat is None:
        raise PassError(
            f"pass 'head': output {name!r} has {_rank(floats[name])} axes; reduce it to one feature vector with --pool "
            f"cls, mean or last, or use --pool none for scores at each position"
        )
    return [Features(floats[name], _nearest(view, floats[name]), name)]


def _nearest(view: View, node: fx.Node) -> Site:
    """Return the last weight site on the way to a value."""
    calls = {call.node for call in view.calls}
    stack, seen = [node], set()
    while stack:
        # Nodes compare by their position in the graph, so the latest ancestor is visited first.
        behind = max(stack)
        stack.remove(behind)
        if behind in calls:
            return view.site_of(behind)
        for below in behind.all_input_nodes:
            if below not in seen:
                seen.add(below)
                stack.append(below)
    raise PassError(
        "pass 'head': no weight affects the model's features; let it return features that depend on one"
    )


def features_of(graph: fx.Graph, site: Site, source: str) -> fx.Node:
    """Find the same features in any graph of the model, such as its train graph.

    Args:
        graph: The graph to search.
        site: `Features.site`, resolved in this graph.
        source: `Features.source`.
    """
    return named_outputs(graph)[source] if source else input_before_adapters(operand(site.calls[-1]))


def unpooled(node: fx.Node) -> fx.Node:
    """Return the token features (batch × length × width) that pooled features were computed from.

    They are the last floating-point ancestor with three axes whose middle axis is the length of an input. Features
    that do not have two axes are returned as they are.

    Raises:
        PassError: There is no such ancestor.
    """
    if _rank(node) != 2:
        return node
    lengths = [
        n.meta["val"].shape[1]
        for n in node.graph.nodes
        if n.op == "placeholder" and _rank(n) == 2 and not _is_float(n)
    ]
    stack, seen = [node], {node}
    while stack:
        behind = max(stack)
        stack.remove(behind)
        tokens = _rank(behind) == 3 and _is_float(behind) and behind.op == "call_function"
        if tokens and (not lengths or any(same_size(behind.meta["val"].shape[1], n) for n in lengths)):
            return behind
        for below in behind.all_input_nodes:
            if below not in seen and below.op == "call_function":
                seen.add(below)
                stack.append(below)
    raise PassError("the model's features are not computed from tokens; leave out --pool")


def mask_of(node: fx.Node) -> fx.Node | None:
    """Return the attention mask of token features, or None.

    It is an input with "mask" in its name, of integers or bools, and of shape (batch, length).
    """
    lengths = node.meta["val"].shape[:2]
    masks = [n for n in node.graph.nodes if n.op == "placeholder" and "mask" in n.name]
    for found in masks:
        shape = found.meta["val"].shape if _rank(found) == 2 and not _is_float(found) else ()
        if len(shape) == 2 and all(same_size(a, b) for a, b in zip(shape, lengths, strict=True)):
            return found
    return None


def pooled(g: Rewriter, node: fx.Node, pool: str) -> fx.Node:
    """Insert ops that reduce features to one vector for each example.

    Args:
        g: The rewriter.
        node: Token features (batch × length × width), or an image (batch × channels × height × width).
        pool: "cls" for the first token; "mean" or "last" of the tokens that the mask does not hide. An image is always
            averaged.
    """
    if _rank(node) == 4:  # an image
        return g.model_op(aten.mean.dim, node, [2, 3])
    if pool == "cls":
        return g.model_op(aten.select.int, node, 1, 0)
    mask = mask_of(node)
    if mask is None:
        return (
            g.model_op(aten.mean.dim, node, [1])
            if pool == "mean"
            else g.model_op(aten.select.int, node, 1, -1)
        )
    there = g.model_op(aten.ne.Scalar, mask, 0)
    if pool == "mean":
        there = g.model_op(aten.unsqueeze.default, there, -1)
        # masked_fill instead of a product, because padded positions may hold inf or NaN.
        padded = g.model_op(aten.logical_not.default, there)
        total = g.model_op(aten.sum.dim_IntList, g.model_op(aten.masked_fill.Scalar, node, padded, 0.0), [1])
        count = g.model_op(
            aten.sum.dim_IntList, g.model_op(aten.to.dtype, there, node.meta["val"].dtype), [1]
        )
        return g.model_op(aten.div.Tensor, total, g.model_op(aten.clamp_min.default, count, 1))
    # The cumulative count of visible tokens first reaches its maximum at the last visible token.
    running = g.model_op(aten.cumsum.default, g.model_op(aten.to.dtype, there, torch.int64), 1)
    last = g.model_op(aten.argmax.default, running, 1)
    index = g.model_op(aten.reshape.default, last, [-1, 1, 1])
    spread = g.model_op(aten.expand.default, index, [-1, 1, int(node.meta["val"].shape[-1])])
    return g.model_op(aten.squeeze.dim, g.model_op(aten.gather.default, node, 1, spread), 1)


def refuse_pool(node: fx.Node, pool: str | None) -> str | None:
    """Return the reason why a value cannot be pooled in this way, or None."""
    rank = _rank(node)
    if pool in (None, "none"):
        return None
    if rank == 4 and pool != "mean":
        return f"its features are images, and --pool {pool} is for tokens; use --pool mean"
    if rank not in (3, 4):
        return f"its features have {rank} axes, so there is nothing to pool; leave out --pool"
    return None


def _rank(node: Any) -> int:
    """Return the number of axes, or -1 if the value is not a tensor."""
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    return val.dim() if isinstance(val, torch.Tensor) else -1


def _is_features(name: str, node: fx.Node) -> bool:
    """True if an output can be read as features: floating-point, of fixed width, and not named as scores or loss."""
    if not _is_float(node) or _rank(node) < 2 or "logits" in name or "loss" in name:
        return False
    shape = node.meta["val"].shape
    return isinstance(shape[1] if len(shape) == 4 else shape[-1], int)


def _is_float(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.is_floating_point()
