"""Coupling rules of all ops. An op without a rule freezes everything that enters it, and the refusal names the op."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

from torch import fx

from surgery.graph.analysis.dataflow import Rule as DataflowRule
from surgery.graph.analysis.dataflow import rule_of
from surgery.graph.ops import arguments
from surgery.graph.propagate.links import is_broadcast, packet, tensors
from surgery.passes.prune.convolutions import convolution
from surgery.passes.prune.coupling import Coupling
from surgery.passes.prune.data_movement import (
    Given,
    Rule,
    cat,
    cut,
    glu,
    index,
    index_select,
    layout,
    picks,
    pixels,
    stack,
    view,
)
from surgery.passes.prune.labels import Labels, covered, sizes_of, where
from surgery.passes.prune.products import Term, aligned, merge, product, split_letters


def follow(run: Coupling, node: fx.Node) -> Labels | list[Labels]:
    """Return the labels of a node, or of each of its results.

    Raises:
        Unclear: if a size depends on data.
    """
    name, given = packet(node.target), arguments(node)
    if node.target is operator.getitem:
        return _getitem(run, node)
    rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    if rule is not None:
        return rule(run, node, given)
    # The weights that read a unit are removed with it, so f(0) ≠ 0 does no harm, and any pointwise op is allowed.
    if is_broadcast(node.target) or rule_of(node.target) is DataflowRule.NONLINEAR:
        return pointwise(run, node, tensors((node.args, node.kwargs)))
    return run.unknown(node, "no pruning rule for this op")


def pointwise(run: Coupling, node: fx.Node, operands: Sequence[fx.Node]) -> Labels:
    """Handle a pointwise op: the operands' labels are combined with broadcasting."""
    return merge(run, [aligned(run, node, n) for n in operands], sizes_of(node), where(node), defer=True)


def _same(run: Coupling, node: fx.Node, given: Given) -> Labels:
    return list(run.labels.get(node.args[0], ()))  # type: ignore[arg-type]


def _getitem(run: Coupling, node: fx.Node) -> Labels:
    source, index = node.args
    parts = run.parts.get(source)  # type: ignore[arg-type]
    return list(parts[index]) if parts else []  # type: ignore[index]


# -- Ops that act on some dimensions


def _along(argument: str, what: str) -> Rule:
    """Return the rule of an op of one tensor whose results depend on all elements along a dimension."""

    def rule(run: Coupling, node: fx.Node, given: Given) -> Labels | list[Labels]:
        x, dim = node.args[0], given[argument]
        labels = run.labels.get(x, [])  # type: ignore[arg-type]
        for label in labels:
            run.keep_whole(label, {dim % label.dim()}, f"{where(node)} {what}")
        if isinstance(node.meta["val"], (list, tuple)):
            return [list(labels) for _ in node.meta["val"]]
        return list(labels)

    return rule


def _reduce(run: Coupling, node: fx.Node, given: Given) -> Labels | list[Labels]:
    x = node.args[0]
    if "other" in given:  # The elementwise maximum or minimum of two tensors.
        return pointwise(run, node, tensors(node.args))
    rank = len(sizes_of(x))  # type: ignore[arg-type]
    dims = given.get("dim")
    dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {d % rank for d in dims}
    found = []
    for label in run.labels.get(x, ()):  # type: ignore[arg-type]
        # A mean over positions keeps channels apart; a mean over channels combines them.
        left = run.reduced(label, gone, where(node))
        if left is not None:
            kept = (
                left
                if given.get("keepdim")
                else left.reshape([s for d, s in enumerate(left.shape) if d not in gone])
            )
            found.append(kept)
    results = node.meta["val"]
    return [list(found) for _ in results] if isinstance(results, (list, tuple)) else found


def _spatial(run: Coupling, node: fx.Node, given: Given) -> Labels | list[Labels]:
    """Handle pooling and resampling, which act on each channel separately."""
    (digit,) = re.findall(r"(\d)d", packet(node.target))
    count = int(digit)
    rank = len(sizes_of(node.args[0]))  # type: ignore[arg-type]
    entering = run.labels.get(node.args[0], [])  # type: ignore[arg-type]
    labels = run.whole_along(entering, range(rank - count, rank), f"{where(node)} acts along it")
    if isinstance(node.meta["val"], (list, tuple)):
        return [list(labels) for _ in node.meta["val"]]
    return list(labels)


def _pad(run: Coupling, node: fx.Node, given: Given) -> Labels:
    labels = run.labels.get(node.args[0], [])  # type: ignore[arg-type]
    rank, pads = len(sizes_of(node)), given["pad" if "pad" in given else "padding"]
    return run.whole_along(labels, range(rank - len(pads) // 2, rank), f"{where(node)} pads it")


# -- Norms


def _batch_norm(run: Coupling, node: fx.Node, given: Given) -> Labels:
    """Handle batch norm, which normalizes each channel separately."""
    return _scaled(run, node, list(run.labels.get(node.args[0], ())))  # type: ignore[arg-type]


def _instance_norm(run: Coupling, node: fx.Node, given: Given) -> Labels:
    """Handle instance norm: the positions of a channel are normalized together."""
    return _scaled(run, node, _positions_whole(run, node))


def _group_norm(run: Coupling, node: fx.Node, given: Given) -> Labels:
    """Handle group norm: the same number of channels must remain in each group, or whole groups are removed."""
    groups, labels = given["num_groups"], _positions_whole(run, node)
    for label in labels:
        if covered(label) != {1}:
            run.freeze(label, f"{where(node)} normalizes along it")
        elif groups == 1:
            run.mix(label, where(node))
        else:
            # Channels of a normalization group depend on each other, so the group is removed as a whole.
            split = label.reshape(groups, -1)
            run.couple(split, split[:, :1])
    return _scaled(run, node, labels)


def _positions_whole(run: Coupling, node: fx.Node) -> Labels:
    labels = run.labels.get(node.args[0], ())  # type: ignore[arg-type]
    return run.whole_along(labels, range(2, len(sizes_of(node))), f"{where(node)} normalizes along it")


def _scaled(run: Coupling, node: fx.Node, labels: Labels) -> Labels:
    """Combine the labels of a norm's input with those of its scale, shift and statistics, one value per channel."""
    held = tensors((node.args[1:], node.kwargs))
    operands = [(labels, sizes_of(node)), *(aligned(run, node, n, at=1) for n in held)]
    return merge(run, operands, sizes_of(node), where(node), defer=True)


def _layer_norm(run: Coupling, node: fx.Node, given: Given) -> Labels:
    x, rank = node.args[0], len(sizes_of(node))
    normed = set(range(rank - len(given["normalized_shape"]), rank))
    # A norm over the last dimensions mixes its units, but their scale parameters are still per unit.
    for label in run.labels.get(x, ()):  # type: ignore[arg-type]
        run.reduced(label, normed, where(node))
    held = tensors((node.args[2:], node.kwargs))
    operands = [aligned(run, node, n) for n in tensors([x, *held])]
    return merge(run, operands, sizes_of(node), where(node), defer=True)


# -- Products


def _term(run: Coupling, node: Any, letters: str) -> Term:
    return Term(list(run.labels.get(node, ())), sizes_of(node), letters)


def _linear(run: Coupling, node: fx.Node, given: Given) -> Labels:
    x, rank = _term(run, given["input"], ""), len(sizes_of(given["input"]))
    batch = split_letters(rank - 1)
    x = Term(x.labels, x.sizes, batch + "i")
    found = product(run, [x, _term(run, given["weight"], "oi")], batch + "o", where(node))
    return _plus(run, node, found, given["bias"])


def _plus(run: Coupling, node: fx.Node, found: Labels, bias: Any) -> Labels:
    if bias is None:
        return found
    sizes = sizes_of(node)
    return merge(run, [(found, sizes), aligned(run, node, bias)], sizes, where(node), defer=True)


def _matmul(run: Coupling, node: fx.Node, given: Given) -> Labels:
    names = {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"), "matmul": ("self", "other")}
    left, right = (given[name] for name in names.get(packet(node.target), ("self", "mat2")))
    ranks = len(sizes_of(left)), len(sizes_of(right))
    if min(ranks) < 2:
        return run.unknown(node, "it is a product with a vector")
    batch = split_letters(max(ranks) - 2)
    terms = [
        _term(run, n, batch[len(batch) - rank + 2 :] + last)
        for n, rank, last in ((left, ranks[0], "xk"), (right, ranks[1], "ky"))
    ]
    found = product(run, terms, batch + "xy", where(node))
    return _plus(run, node, found, given["self"] if packet(node.target) in ("addmm", "baddbmm") else None)


def _einsum(run: Coupling, node: fx.Node, given: Given) -> Labels:
    equation = given["equation"].replace(" ", "")
    if "..." in equation or "->" not in equation:
        return run.unknown(node, f"its equation {equation!r} omits letters")
    inputs, output = equation.split("->")
    if any(len(set(letters)) < len(letters) for letters in inputs.split(",")):
        return run.unknown(node, f"its equation {equation!r} takes a diagonal")
    terms = [_term(run, n, letters) for n, letters in zip(given["tensors"], inputs.split(","), strict=True)]
    return product(run, terms, output, where(node))


def _attention(run: Coupling, node: fx.Node, given: Given) -> Labels:
    """Handle scaled_dot_product_attention as two products with a softmax between them."""
    q, k, v = (given[name] for name in ("query", "key", "value"))
    rank = len(sizes_of(q))
    batch = split_letters(rank - 2)
    terms = [_term(run, q, batch + "sd"), _term(run, k, batch + "td"), _term(run, v, batch + "te")]
    if given.get("enable_gqa"):
        for i in (1, 2):
            terms[i] = _repeated(terms[i], terms[0].sizes[-3])
    shape = [*terms[0].sizes[:-1], terms[1].sizes[-2]]
    scores = product(run, terms[:2], batch + "st", where(node))
    mask = given.get("attn_mask")
    if isinstance(mask, fx.Node):
        # A mask broadcasts over batch and heads, so its labels are aligned from the right.
        lead = [1] * (rank - len(sizes_of(mask)))
        labels = [label.reshape([*lead, *label.shape]) for label in run.labels.get(mask, ())]
        scores = merge(run, [(scores, shape), (labels, [*lead, *sizes_of(mask)])], shape, where(node))
    for label in scores:
        run.keep_whole(label, {rank - 1}, f"{where(node)} normalizes along it")
    return product(run, [Term(scores, shape, batch + "st"), terms[2]], batch + "se", where(node))


def _repeated(term: Term, heads: int) -> Term:
    """Repeat each head of the keys or values for its group of query heads (grouped-query attention)."""
    times = heads // term.sizes[-3]
    labels = [one.repeat_interleave(times, -3) if one.shape[-3] > 1 else one for one in term.labels]
    return Term(labels, [*term.sizes[:-3], heads, *term.sizes[-2:]], term.letters)


def _embedding(run: Coupling, node: fx.Node, given: Given) -> Labels:
    rank, found = len(sizes_of(node)), []
    for label in run.labels.get(given["weight"], ()):
        if covered(label) == {0}:
            # Rows are selected by the input ids, so none of them may be removed.
            run.freeze(label, f"{where(node)} looks up its rows")
        else:
            found.append(label.reshape([1] * (rank - 1) + [-1]))
    return found


def _prelu(run: Coupling, node: fx.Node, given: Given) -> Labels:
    slope = aligned(run, node, given["weight"], at=1)
    x = aligned(run, node, given["self"])
    return merge(run, [x, slope], sizes_of(node), where(node), defer=True)


def _shape_only(run: Coupling, node: fx.Node, given: Given) -> Labels:
    """Handle an op that creates a tensor of its input's size: it does not read the values, but their number."""
    for label in run.labels.get(node.args[0], ()):  # type: ignore[arg-type]
        run.freeze(label, f"{where(node)} creates a tensor of its size")
    return []


def _names(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Rule] = {
    **_names(
        "dropout feature_dropout alpha_dropout to _to_copy type_as clone contiguous detach alias", _same
    ),
    **_names(
        "lift_fresh_copy native_dropout zeros_like ones_like full_like empty_like rand_like randn_like", _same
    ),
    **_names("view reshape _unsafe_view view_copy flatten unflatten view_as reshape_as", view),
    **_names(
        "permute transpose t numpy_T mT movedim swapaxes unsqueeze squeeze expand expand_as repeat", layout
    ),
    **_names("repeat_interleave split split_with_sizes chunk narrow flip tensor_split unsafe_split", layout),
    **_names("select unbind", picks("dim")),
    **_names("roll", picks("dims")),
    **_names("slice", cut),
    **_names("index", index),
    **_names("index_select", index_select),
    **_names("cat concat", cat),
    **_names("stack", stack),
    **_names("pixel_shuffle", pixels),
    **_names("softmax _softmax _safe_softmax log_softmax _log_softmax", _along("dim", "normalizes along it")),
    **_names("cumsum cumprod sort topk", _along("dim", "acts along it")),
    **_names("mean sum var std amax amin max min prod any all norm logsumexp argmax argmin", _reduce),
    **_names("var_mean std_mean linalg_vector_norm", _reduce),
    **{
        f"{kind}_pool{n}d{more}": _spatial
        for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp")
        for n in (1, 2, 3)
        for more in ("", "_with_indices")
    },
    **_names("upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d", _spatial),
    **_names("_upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_linear1d", _spatial),
    **_names("constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad2d", _pad),
    **_names("glu", glu),
    **_names("batch_norm", _batch_norm),
    **_names("instance_norm", _instance_norm),
    **_names("group_norm", _group_norm),
    **_names("layer_norm rms_norm", _layer_norm),
    **_names("linear", _linear),
    **_names("matmul bmm mm addmm baddbmm", _matmul),
    **_names("einsum", _einsum),
    **_names("scaled_dot_product_attention", _attention),
    **_names("conv1d conv2d conv3d conv_transpose1d conv_transpose2d", convolution),
    **_names("embedding", _embedding),
    **_names("prelu", _prelu),
    **_names("new_zeros new_ones new_full new_empty", _shape_only),
    **_names("sym_size sym_numel sym_stride _assert_tensor_metadata", lambda run, node, given: []),
}
