"""fuse-attention: replaces eager attention (two matrix products and a softmax) by one op."""

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

# The kernels compute the softmax block by block, so sums run in another order: 1e-7 of the outputs in fp32. In half
# precision they keep the scores in fp32, whereas the eager form rounds each of them by up to an ulp.
BY_BLOCKS = rounded(
    1e-5,
    "the softmax is summed block by block, and half precision is rounded less often",
    {torch.float64: 1e-12, torch.float16: 2e-2, torch.bfloat16: 1e-1},
)


class FuseAttention(PatternPass):
    """Fused attention: softmax(s · q kᵀ + mask) v, in elementary ops, becomes aten.scaled_dot_product_attention.

    Shapes: q (…, L, d), k (…, S, d), v (…, S, e). The pass matches these forms:

    - products: matmul or bmm;
    - scale: a factor or a divisor of the scores, or already applied to q;
    - mask: added (alone, or after a bias), filled in with masked_fill, or absent;
    - softmax: in the dtype of the scores, or in fp32;
    - dropout: absent, or after the softmax; the fused op then applies it in train mode.

    Keys and values that the model repeats for groups of queries are passed to the op without the repetition, so they
    are no longer copied (grouped-query attention, Ainslie et al. 2023, arXiv:2305.13245). An attention does not match
    if the scores are changed in any other way (a soft cap, sinks, mixing of heads), or if the model returns the
    attention weights. PyTorch picks the kernel; FlashAttention (Dao et al. 2022, arXiv:2205.14135) does not store the
    score matrix.

    No tensor is added. The outputs stay the same up to rounding: 1e-5 of their scale in fp32, 1e-12 in fp64, 2e-2 in
    fp16, 1e-1 in bf16. ONNX export writes the attention out in elementary ops again.
    """

    name: ClassVar[str] = "fuse-attention"
    example: ClassVar[str] = (
        "surgery apply hf:google-bert/bert-base-uncased --task text-classification --model-kwarg "
        "attn_implementation=eager --pass fuse-attention -o fused/"
    )
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
    """Build the additive mask, in the dtype of the queries, or None."""
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
    """Sizes as text. Comparing symbolic sizes themselves would fix the dynamic ones."""
    return [str(size) for size in shape_of(node)]


def _fits(match: Match) -> str | None:
    """Return the reason why the fused op would compute something else, or None."""
    q, v, scores, out = match["q"], match["v"], match["scores"], match.outputs[0]
    repeated = "repeated_k" in match
    k = match["k"] if "k" in match else match["k_turned"]
    if len({dtype_of(node) for node in (q, k, v, out)}) > 1:
        return "queries, keys, values and outputs have different dtypes"
    # Matmul broadcasts its batch axes; the op needs the same leading sizes in all of its arguments.
    if not _sizes(scores)[:-2] == _sizes(out)[:-2] == _sizes(q)[:-2]:
        return "a product broadcasts keys or values over more heads or batch rows, which the op does not do"
    if not repeated and not _sizes(k)[:-2] == _sizes(v)[:-2] == _sizes(q)[:-2]:
        return "queries, keys and values have different numbers of heads"
    if repeated and [_sizes(match[n])[:-2] for n in ("repeated_k", "repeated_v")] != [_sizes(q)[:-2]] * 2:
        return "keys or values are repeated along an axis other than the heads"
    if repeated and _sizes(k)[:-2] != _sizes(v)[:-2]:
        return "keys and values have different numbers of groups"
    if _sizes(match["soft"]) != _sizes(scores):
        return "the mask broadcasts the scores to more batch rows or heads"
    for name in _mask_names(match):
        kind = dtype_of(match[name])
        if name != "filled" and (kind is None or not kind.is_floating_point):
            return f"the mask added to the scores is {kind}, not floating-point"
    if math.isinf(match.get("fill", 0)):
        return "masked scores are infinite: rows that are masked entirely are NaN here, and zeros in the op"
    return None


def _attention(keys: Any, values: Any) -> Any:
    """Match eager attention over given patterns of the keys (already transposed) and the values."""
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
    """Match kᵀ."""
    return any_of(ops.transpose(k, axis(-2), axis(-1)), ops.transpose(k, axis(-1), axis(-2)), ops.mT(k))


def _repeated(name: str) -> Any:
    """Match transformers' repeat_kv: (b, groups, s, d) to (b, groups · n, s, d), each group n times."""
    return ops.reshape(ops.expand(ops.unsqueeze(value(name), 2), ...), ...).named(f"repeated_{name}")


@pattern(condition=_fits)
def grouped() -> Any:
    """Match attention whose keys and values are repeated for groups of queries."""
    return _attention(_turned(_repeated("k")), _repeated("v"))


@pattern(condition=_fits)
def eager() -> Any:
    """Match attention with as many key and value heads as query heads."""
    return _attention(any_of(_turned(value("k")), value("k_turned")), value("v"))
