"""Quantization-aware training: weights rounded in every forward, trained as if they were not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from surgery.pass_base import MergeOp, Numerics, changes
from surgery.quantizing import fake_quantize
from surgery.quantizing.checks import hindrance
from surgery.quantizing.formats import FormatPass
from surgery.quantizing.layout import Layout
from surgery.rewriter import Rewriter
from surgery.sites import Site
from surgery.weight_ops import CONV, EMBEDDING, EXPERTS, LINEAR


class FakeQuant(FormatPass):
    """Quantization-aware training: W is rounded to codes and back in every forward; its gradient passes straight on.

    The formats are those of `quantize`, and rounded alike; scales follow the weights as they train. The
    straight-through estimator is that of Bengio et al. 2013 (arXiv:1308.3432), used so by Jacob et al. 2018
    (arXiv:1712.05877); ternary is what BitNet b1.58 trains with. With `int8-dynamic` what enters the op is
    rounded as well.

    The base's own weights train, in their dtype. `convert` then puts the codes themselves in their place: the outputs
    stay the same to the bit. Merging makes the weights the rounded ones, as floats. ONNX has no straight-through
    rounding: convert or merge before an export. Adapters stand on the rounded weight.
    """

    name: ClassVar[str] = "fake-quant"
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EMBEDDING, EXPERTS)
    numerics: ClassVar[Numerics] = changes("weights are rounded to few bits")
    freezes: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True
    unwritten: ClassVar[Mapping[Any, str]] = {
        fake_quantize._opoverload: "weights rounded as in training have no op in ONNX; apply --pass convert, or merge"
    }

    def check(self, site: Site) -> str | None:
        return hindrance(site, self.layout(site), self.dynamic)

    @property
    def detaches(self) -> str:
        return "rounding has no slope: its gradient is taken to be that of the weight"

    def keeps(self, site: Site) -> str | None:
        if self.dynamic:
            return "what enters is rounded at run time, which no weight holds; convert it"
        return None

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        self.round_input(g)
        own = _arguments(self.layout(site))
        g.swap_weight(lambda weight: g.call(fake_quantize._opoverload, weight, *own))
        return None

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> Mapping[str, MergeOp]:
        return {"weight": _Round(self.layout(site))}


@dataclass(frozen=True)
class _Round:
    layout: Layout
    inner: ClassVar[bool] = True

    def apply_(self, weight: Tensor) -> None:
        weight.copy_(fake_quantize(weight, *_arguments(self.layout)))


def _arguments(layout: Layout) -> tuple[str, int, bool, list[int], int]:
    return layout.format, layout.block, layout.asymmetric, list(layout.order), layout.rows
