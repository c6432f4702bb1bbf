"""fuse-gelu: replaces a GELU written out in elementary ops by one op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from surgery.engine.contract.numerics import Numerics, rounded
from surgery.engine.contract.pattern import PatternPass
from surgery.engine.contract.specs import Outcome
from surgery.graph.patterns import Match, Pattern, any_of, ops, pattern, value
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.graph.view import View

aten = torch.ops.aten

# The polynomial rounds a few times, each by half an ulp: 1e-7 in fp32, 4e-3 in bf16. Models write √(2/π) with eight
# digits; in fp64 that is the larger part of the difference.
ROUNDS_LESS = rounded(
    1e-5,
    "one op rounds once; the written-out form rounds at each step",
    {torch.float64: 1e-7, torch.float16: 1e-2, torch.bfloat16: 5e-2},
)


class FuseGelu(PatternPass):
    """Fused GELU: ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))) or ½ x (1 + erf(x / √2)), written out, becomes aten.gelu.

    Both forms are those of Hendrycks & Gimpel (2016, arXiv:1606.08415). The factors may come in any order, and the cube
    may be a power or products: GPT-2, BLOOM and BERT's early code each write the function in their own way. No tensor
    is added. Train mode computes the same. The outputs stay the same up to rounding: 1e-5 of their scale in fp32, 1e-7
    in fp64, 1e-2 in fp16, 5e-2 in bf16. In ONNX the op is Gelu.
    """

    name: ClassVar[str] = "fuse-gelu"
    example: ClassVar[str] = "surgery apply hf:openai-community/gpt2 --pass fuse-gelu -o fused/"
    on: ClassVar[tuple[str, ...]] = ("gelu",)
    role: ClassVar[str] = "gelu"
    numerics: ClassVar[Numerics] = ROUNDS_LESS

    def patterns(self, view: View) -> Sequence[Pattern]:
        return tanh_gelu, erf_gelu

    def decide(self, site: Site) -> dict[str, Any]:
        return {"approximate": self.match(site, site.probe.view).pattern.name.removesuffix("_gelu")}

    def outcome(self, site: Site) -> Outcome:
        return Outcome(note=f"{site.decided['approximate']} form")

    def replacement(self, site: Site, match: Match, g: Rewriter) -> fx.Node:
        form = "tanh" if match.pattern is tanh_gelu else "none"
        return g.model_op(aten.gelu.default, match["x"], approximate=form)


def _half_times(x: Any, rest: Any) -> Any:
    """Match ½ · x · rest, in any order of multiplication."""
    return any_of(
        ops.mul(any_of(ops.mul(x, 0.5), ops.div(x, 2)), rest),
        ops.mul(ops.mul(x, rest), 0.5),
        ops.mul(x, ops.mul(rest, 0.5)),
    )


@pattern
def tanh_gelu() -> Any:
    """Match the tanh approximation."""
    x, root, small = value("x"), math.sqrt(2 / math.pi), 0.044715
    square = any_of(ops.mul(x, x), ops.pow(x, 2))
    cube = any_of(ops.pow(x, 3), ops.mul(square, x))
    scaled = any_of(ops.mul(cube, small), ops.mul(ops.mul(ops.mul(x, small), x), x))
    sum_first = ops.mul(ops.add(x, scaled), root)
    polynomial = any_of(ops.mul(square, small), ops.mul(ops.mul(x, small), x))
    factor_first = any_of(
        ops.mul(ops.mul(x, root), ops.add(polynomial, 1)), ops.mul(ops.mul(x, ops.add(polynomial, 1)), root)
    )
    tanh = ops.tanh(any_of(sum_first, factor_first)).anchor()
    return _half_times(x, ops.add(tanh, 1))


@pattern
def erf_gelu() -> Any:
    """Match the exact form."""
    x = value("x")
    erf = ops.erf(any_of(ops.div(x, math.sqrt(2)), ops.mul(x, math.sqrt(0.5)))).anchor()
    return _half_times(x, ops.add(erf, 1))
