"""fake-quant: quantization-aware training; weights are rounded in every forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx

from surgery.common.errors import PassError
from surgery.engine.contract.effect import WEIGHT, Effect
from surgery.engine.contract.expectations import Expectations
from surgery.engine.contract.folds import Fold, Stage
from surgery.engine.contract.gradual import Gradual, GradualPlace
from surgery.engine.contract.numerics import Numerics, changes
from surgery.engine.contract.ramp import Begin, End, Every, Unit, check_ramp, gradual, progress
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, LINEAR
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.quantize import fake_quantize
from surgery.passes.quantize.checks import hindrance
from surgery.passes.quantize.format_pass import FormatPass
from surgery.passes.quantize.matrix import Layout


class FakeQuant(FormatPass):
    """Quantization-aware training: the op reads Q(W), W rounded to codes and back, in every forward pass.

    The gradient passes through the rounding unchanged (straight-through estimator, Bengio et al. 2013,
    arXiv:1308.3432; used in this way by Jacob et al. 2018, arXiv:1712.05877). The base's own weights train, in their
    dtype. The formats and the rounding are those of `quantize`; scales are computed from the current weights. With
    `ternary` this is the training of BitNet b1.58. With `int8-dynamic` the input of the op is rounded too. Adapters
    attach to the rounded weight. The outputs change by design.

    `--schedule linear` rounds gradually: the op reads W + s (Q(W) − W), and the share s grows from 0 at step `--begin`
    to 1 at step `--end`, once every `--every` steps. Call `module.advance(step)`, as `surgery train` does. The share is
    stored and never decreases. A schedule cannot be combined with `int8-dynamic`, because the rounding of inputs is not
    gradual.

    After training, `convert` replaces the weights by their codes, and the outputs stay the same to the bit. Merge: W
    becomes Q(W), stored in floating point (during a schedule W + s (Q(W) − W)). ONNX has no op for this rounding, so
    convert or merge before an export.
    """

    name: ClassVar[str] = "fake-quant"
    example: ClassVar[str] = (
        "surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass fake-quant --target all-linear --format "
        "int4 -o rounding/"
    )
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EMBEDDING, EXPERTS)
    numerics: ClassVar[Numerics] = changes("weights are rounded to few bits")

    schedule: Literal["linear"] | None = Field(default=None, description="round gradually during training")
    begin: Begin = 0
    end: End = None
    every: Every = 1
    unit: Unit = "step"

    @model_validator(mode="after")
    def _ramp(self) -> FakeQuant:
        check_ramp(self, "linear")
        if self.schedule is not None and self.dynamic:
            raise PassError(
                f"pass {self.name!r}: a schedule cannot round inputs gradually, and int8-dynamic rounds them; use "
                f"--format int8 with a schedule"
            )
        return self

    def check(self, site: Site) -> str | None:
        return hindrance(site, self.layout(site), self.dynamic)

    def decide(self, site: Site) -> dict[str, Any]:
        return {"paired": True} if super().layout(site).paired else {}

    def layout(self, site: Site) -> Layout:
        # Weights of version 0.1 were trained with all 8 bits, and its journals do not have the decision.
        return replace(super().layout(site), paired=site.decided.get("paired", False))

    @property
    def effect(self) -> Effect:
        return replace(WEIGHT, rounding=self.rounding)

    @property
    def expectations(self) -> Expectations:
        return Expectations(
            detached="rounding has a zero gradient; the straight-through estimator passes gradients on unchanged",
            no_onnx={
                fake_quantize._opoverload: "rounding of weights in training has no ONNX op; apply --pass convert, "
                "or merge"
            },
        )

    def why_not_merged(self, site: Site) -> str | None:
        if self.dynamic:
            return "its input is rounded at run time, which a weight cannot express; apply --pass convert instead"
        return None

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        self.round_input(g)
        layout = self.layout(site)
        own = _arguments(layout)

        def rounded(weight: fx.Node) -> fx.Node:
            share = None if self.schedule is None else g["share"]
            # Trailing defaults are omitted, as in graphs of earlier versions.
            last = (share, True) if layout.paired else () if share is None else (share,)
            return g.call(fake_quantize._opoverload, weight, *own, *last)

        g.swap_weight(rounded)
        return None

    # -- schedule

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        if self.schedule is None:
            return {}
        return {
            "share": TensorSpec(
                (), lambda share: share.fill_(self._share(0)), trainable=False, dtype=torch.float32
            )
        }

    def outcome(self, site: Site) -> Outcome:
        if self.schedule is None:
            return Outcome()
        return Outcome(
            note=f"{self._share(0):.0%} of the way to its codes, and 100% at {self.unit} {self.end}"
        )

    @property
    def gradual(self) -> Gradual | None:
        return gradual(self, self._share, self._move)

    def _share(self, step: int) -> float:
        """Share of the rounding at a step, from 0 to 1."""
        return 1.0 if self.schedule is None else progress(self, step)

    def _move(self, step: int, places: Sequence[GradualPlace]) -> None:
        # A checkpoint may hold a larger share than the step asks for; it never decreases.
        for _, _, own in places:
            own["share"].clamp_(min=self._share(step))

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> Mapping[str, Fold]:
        return {"weight": _Round(self.layout(site), tensors.get("share"))}


@dataclass(frozen=True)
class _Round(Fold):
    """Merge: W becomes W + share · (Q(W) − W); share None stands for 1."""

    layout: Layout
    share: Tensor | None
    stage: ClassVar[Stage] = Stage.WEIGHT

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        share = None if self.share is None else self.share.to(weight.device)
        return weight.copy_(fake_quantize(weight, *_arguments(self.layout), share, self.layout.paired))


def _arguments(layout: Layout) -> tuple[str, int, bool, list[int], int]:
    """Return the arguments of `surgery::fake_quantize` between the weight and the share."""
    return layout.format, layout.block, layout.asymmetric, list(layout.order), layout.rows
