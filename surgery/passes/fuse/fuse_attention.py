"""fuse-attention: an attention written out in products and a softmax becomes one op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from surgery.engine.contract.numerics import Numerics, rounded
from surgery.engine.contract.pattern import PatternPass
from surgery.engine.contract.specs import Outcome
from surgery.graph.patterns import (
    Match,
    Pattern,
    any_of,
    axis,
    constant,
    dtype_of,
    maybe,
    number,
    ops,
    pattern,
    shape_of,
    value,
)
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.graph.view import View

aten = torch.ops.aten

# The kernels take the softmax block by block, which sums in another order: 1e-7 of the outputs in fp32. In half
# precision they keep scores in fp32 where the written-out form rounds them: an ulp of each score.
BY_BLOCKS = rounded(
    1e-5,
    "the softmax is summed block by block, and half precision is rounded less often",
    {torch.float64: 1e-12, torch.float16: 2e-2, torch.bfloat16: 1e-1},
)


class FuseAttention(PatternPass):
    """Eager attention becomes aten.scaled_dot_product_attention: softmax(s · q kᵀ + mask) v in one op.

    q (…, L, d), k (…, S, d), v (…, S, e). The products may be matmul or bmm; the scale a factor or a divisor of the
    scores, or in q already; the mask added (once, or as a bias and a mask), filled in, or absent; the softmax in fp32
    or not; dropout there or not, which becomes the op's own in train mode. Keys and values that are repeated for
    groups of queries are handed over as they are (grouped-query attention, Ainslie et al. 2023, arXiv:2305.13245), and
    not copied any more. What is done to the scores between (a soft cap, sinks, a mix of heads), and weights that are
    an output of the model, keep it from matching. The kernels are those of Dao et al. (2022, arXiv:2205.14135); no
    score matrix is stored where they apply. No tensor is added. In ONNX it is written out again.
    """

    name: ClassVar[str] = "fuse-attention"
    on: ClassVar[tuple[str, ...]] = ("attention",)
    role: ClassVar[str] = "attn"
    numerics: ClassVar[Numerics] = BY_BLOCKS

    def patterns(self, view: View) -> Sequence[Pattern]:
        return grouped, eager

    def decide(self, site: Site) -> dict[str, Any]:
        match = self.match(site, site.probe.view)
        return {"scale": _scale(match), "grouped": match.pattern is grouped, "masks": _mask_names(match)}

    def outcome(self, site: Site) -> Outcome:
        grouped = ", grouped queries" if site.decided["grouped"] else ""
        return Outcome(note=f"{', '.join(site.decided['masks']) or 'no mask'}{grouped}")

    def replacement(self, site: Site, match: Match, g: Rewriter) -> fx.Node:
        key = match["k"] if "k" in match else g.model_op(aten.transpose.int, match["k_turned"], -2, -1)
        dropped = match["p"] if match.get("train") else 0.0
        return g.model_op(
            aten.scaled_dot_product_attention.default,
            match["q"], key, match["v"], _mask(match, g), dropped, False,
            scale=_scale(match), enable_gqa=match.pattern is grouped,
        )  # fmt: skip


def _scale(match: Match) -> float:
    return float(match["scale"]) if "scale" in match else 1 / float(match.get("divisor", 1))


def _mask_names(match: Match) -> list[str]:
    return [name for name in ("bias", "mask", "filled") if name in match]


def _mask(match: Match, g: Rewriter) -> fx.Node | None:
    """What is added to the scores, in the dtype of the queries."""
    dtype = dtype_of(match["q"])
    terms = [_cast(match[name], dtype, g) for name in ("bias", "mask") if name in match]
    if "filled" in match:
        zeros = g.model_op(aten.zeros_like.default, match["filled"], dtype=dtype)
        terms.append(g.model_op(aten.masked_fill.Scalar, zeros, match["filled"], match["fill"]))
    if len(terms) == 2:
        return g.model_op(aten.add.Tensor, *terms)
    return terms[0] if terms else None


def _cast(node: fx.Node, dtype: torch.dtype | None, g: Rewriter) -> fx.Node:
    return node if dtype_of(node) is dtype else g.model_op(aten.to.dtype, node, dtype)


def _sizes(node: fx.Node) -> list[str]:
    """Sizes that can be compared without fixing one that is dynamic."""
    return [str(size) for size in shape_of(node)]


def _fits(match: Match) -> str | None:
    q, v, scores, out = match["q"], match["v"], match["scores"], match.outputs[0]
    repeated = "repeated_k" in match
    k = match["k"] if "k" in match else match["k_turned"]
    if len({dtype_of(node) for node in (q, k, v, out)}) > 1:
        return "queries, keys, values and result have different dtypes"
    if not _sizes(scores)[:-2] == _sizes(out)[:-2] == _sizes(q)[:-2]:
        return "the products spread keys or values over more heads or rows than the op takes"
    if not repeated and not _sizes(k)[:-2] == _sizes(v)[:-2] == _sizes(q)[:-2]:
        return "queries, keys and values have different heads"
    if repeated and [_sizes(match[n])[:-2] for n in ("repeated_k", "repeated_v")] != [_sizes(q)[:-2]] * 2:
        return "keys or values are repeated along another axis than the heads"
    if repeated and _sizes(k)[:-2] != _sizes(v)[:-2]:
        return "keys and values have different numbers of groups"
    if _sizes(match["soft"]) != _sizes(scores):
        return "the mask gives the scores more rows or heads"
    for name in _mask_names(match):
        kind = dtype_of(match[name])
        if name != "filled" and (kind is None or not kind.is_floating_point):
            return f"what is added to the scores is {kind}"
    if math.isinf(match.get("fill", 0)):
        return (
            "scores are filled with infinity: rows that are masked entirely are NaN then, and zeros in the op"
        )
    return None


def _attention(keys: Any, values: Any) -> Any:
    q = value("q")
    scores = ops["matmul", "bmm"](q, keys).named("scores")
    scaled = any_of(ops.mul(scores, number("scale")), ops.div(scores, number("divisor")), scores)
    upcast = maybe(ops.to, scaled, ...)
    plus = ops["add", "add_"]
    masked = any_of(
        plus(plus(upcast, value("bias")), value("mask")),
        plus(upcast, value("mask")),
        ops.masked_fill(upcast, value("filled"), number("fill")),
        upcast,
    )
    soft = ops["softmax", "_softmax"](masked, axis(-1), ...).named("soft").anchor()
    cast = any_of(ops.to(soft, ...), ops.type_as(soft, value("like")), soft)
    dropped = any_of(ops.dropout(cast, number("p"), constant("train")), cast)
    return ops["matmul", "bmm"](dropped, values)


def _turned(k: Any) -> Any:
    return any_of(ops.transpose(k, axis(-2), axis(-1)), ops.transpose(k, axis(-1), axis(-2)), ops.mT(k))


def _repeated(name: str) -> Any:
    """repeat_kv: (b, groups, s, d) as (b, groups · n, s, d), each group n times."""
    return ops.reshape(ops.expand(ops.unsqueeze(value(name), 2), ...), ...).named(f"repeated_{name}")


@pattern(condition=_fits)
def grouped() -> Any:
    return _attention(_turned(_repeated("k")), _repeated("v"))


@pattern(condition=_fits)
def eager() -> Any:
    return _attention(any_of(_turned(value("k")), value("k_turned")), value("v"))
