"""fuse-rmsnorm: replaces an RMSNorm written out in elementary ops by one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from surgery.engine.contract.numerics import Numerics, rounded
from surgery.engine.contract.pattern import PatternPass
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

# In fp32 and fp64 the squares are summed in another order. In half precision the written-out form rounds once more,
# before it multiplies by the weight: an ulp (8e-3 in bf16) at each norm, which later layers amplify.
ROUNDS_ONCE = rounded(
    1e-5,
    "the mean of squares is summed in another order, and half precision is rounded once, after the weight",
    {torch.float64: 1e-12, torch.float16: 2e-2, torch.bfloat16: 1e-1},
)


class FuseRmsnorm(PatternPass):
    """Fused RMSNorm: y = w ⊙ x / √(mean(x²) + ε) over the last axis, written out, becomes aten.rms_norm.

    RMSNorm is from Zhang & Sennrich (2019, arXiv:1910.07467). The pass matches the forms that models use:

    - squares: a power or a product, of the input or of its cast to fp32;
    - root: rsqrt, a division by sqrt, or a power;
    - weight: after a cast back (Llama), without one (T5), as 1 + w (Gemma), or absent.

    A cast after the norm is kept. No tensor is added: the op reads the model's own weight, which becomes a site of role
    `norm`. Train mode computes the same. The outputs stay the same up to rounding: 1e-5 of their scale in fp32, 1e-12
    in fp64, 2e-2 in fp16, 1e-1 in bf16. In ONNX the op is RMSNormalization, for which the export uses opset 23 unless
    another opset is asked for.
    """

    name: ClassVar[str] = "fuse-rmsnorm"
    example: ClassVar[str] = "surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass fuse-rmsnorm -o fused/"
    on: ClassVar[tuple[str, ...]] = ("rmsnorm",)
    role: ClassVar[str] = "norm"
    numerics: ClassVar[Numerics] = ROUNDS_ONCE

    def patterns(self, view: View) -> Sequence[Pattern]:
        return weighted, bare

    def decide(self, site: Site) -> dict[str, Any]:
        match = self.match(site, site.probe.view)
        return {"eps": match["eps"], "weighted": "weight" in match}

    def replacement(self, site: Site, match: Match, g: Rewriter) -> fx.Node:
        x = match["x"]
        return g.model_op(aten.rms_norm.default, x, [shape_of(x)[-1]], match.get("weight"), match["eps"])


def _normalised() -> Any:
    """Match x / √(mean(x²) + ε), of x or its cast."""
    x = value("x")
    cast = maybe(ops.to, x, ...)
    own = any_of(cast, x)
    square = any_of(ops.pow(cast, 2), ops.mul(cast, cast), ops.square(cast))
    mean = ops.mean(square, [axis(-1)], True)
    shifted = ops.add(mean, number("eps"))
    root = ops.sqrt(shifted)
    reciprocal = ops.reciprocal(root)
    inverse = any_of(ops.rsqrt(shifted), ops.pow(shifted, -0.5), reciprocal, ops.mul(reciprocal, 1))
    return any_of(ops.mul(own, inverse), ops.div(own, root))


def _fits(match: Match) -> str | None:
    """Return the reason why the fused op would compute something else, or None."""
    x, weight, out = match["x"], match.get("weight"), match.outputs[0]
    width = shape_of(x)[-1]
    if not isinstance(width, int):
        return "the normalized axis has no fixed length"
    if weight is not None and shape_of(weight) != (width,):
        return f"the weight does not have the shape ({width},) of the normalized axis"
    dtypes = {dtype_of(node) for node in (x, weight, out) if node is not None}
    return (
        None
        if len(dtypes) == 1
        else f"input, weight and output have different dtypes: {', '.join(sorted(map(str, dtypes)))}"
    )


@pattern(condition=_fits)
def weighted() -> Any:
    """Match a norm with a weight."""
    cast = constant("dtype", lambda kind: isinstance(kind, torch.dtype), "a dtype")
    inner = _normalised()
    return ops.mul(any_of(ops.to(inner, cast), ops.type_as(inner, value("like")), inner), value("weight"))


@pattern(condition=_fits)
def bare() -> Any:
    """Match a norm without a weight."""
    return _normalised()
