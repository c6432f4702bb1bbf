"""Quantization-aware training: weights rounded in every forward, trained as if they were not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

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
    """Quantization-aware training: W is rounded to codes and back in every forward; its gradient passes straight on.

    The formats are those of `quantize`, and rounded alike; scales follow the weights as they train. The
    straight-through estimator is that of Bengio et al. 2013 (arXiv:1308.3432), used so by Jacob et al. 2018
    (arXiv:1712.05877); ternary is what BitNet b1.58 trains with. With `int8-dynamic` what enters the op is
    rounded as well.

    `--schedule linear` rounds by and by: the op reads W + s (Q(W) − W), and the share s grows from 0 at step `--begin`
    to 1 at `--end`, every `--every` steps; what enters an op is not rounded by and by. Call `module.advance(step)`, as
    `surgery train` does. s is stored, and never falls.

    The base's own weights train, in their dtype. `convert` then puts the codes themselves in their place: the outputs
    stay the same to the bit. Merging makes the weights the rounded ones, as floats (in the middle of a schedule, as far
    as it has moved them). ONNX has no straight-through rounding: convert or merge before an export. Adapters stand on
    the rounded weight.
    """

    name: ClassVar[str] = "fake-quant"
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EMBEDDING, EXPERTS)
    numerics: ClassVar[Numerics] = changes("weights are rounded to few bits")

    schedule: Literal["linear"] | None = Field(None, description="round by and by while the weights train")
    begin: Begin = 0
    end: End = None
    every: Every = 1
    unit: Unit = "step"

    @model_validator(mode="after")
    def _ramp(self) -> FakeQuant:
        check_ramp(self, "linear")
        if self.schedule is not None and self.dynamic:
            raise PassError(
                f"pass {self.name!r}: what enters an op is rounded or not, and int8-dynamic rounds it; use "
                f"--format int8 with a schedule"
            )
        return self

    def check(self, site: Site) -> str | None:
        return hindrance(site, self.layout(site), self.dynamic)

    @property
    def effect(self) -> Effect:
        return replace(WEIGHT, rounding=self.rounding)

    @property
    def expectations(self) -> Expectations:
        return Expectations(
            detached="rounding has no slope: its gradient is taken to be that of the weight",
            no_onnx={
                fake_quantize._opoverload: "weights rounded as in training have no op in ONNX; apply --pass convert, "
                "or merge"
            },
        )

    def why_not_merged(self, site: Site) -> str | None:
        if self.dynamic:
            return "what enters is rounded at run time, which no weight holds; convert it"
        return None

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        self.round_input(g)
        own = _arguments(self.layout(site))

        def rounded(weight: fx.Node) -> fx.Node:
            share = () if self.schedule is None else (g["share"],)
            return g.call(fake_quantize._opoverload, weight, *own, *share)

        g.swap_weight(rounded)
        return None

    # -- while it trains

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
            note=f"{self._share(0):.0%} of the way to its codes; all of it at {self.unit} {self.end}"
        )

    @property
    def gradual(self) -> Gradual | None:
        return gradual(self, self._share, self._move)

    def _share(self, step: int) -> float:
        return 1.0 if self.schedule is None else progress(self, step)

    def _move(self, step: int, places: Sequence[GradualPlace]) -> None:
        for _, _, own in places:
            own["share"].clamp_(min=self._share(step))

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> Mapping[str, Fold]:
        return {"weight": _Round(self.layout(site), tensors.get("share"))}


@dataclass(frozen=True)
class _Round(Fold):
    layout: Layout
    share: Tensor | None
    stage: ClassVar[Stage] = Stage.WEIGHT

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        share = None if self.share is None else self.share.to(weight.device)
        return weight.copy_(fake_quantize(weight, *_arguments(self.layout), share))


def _arguments(layout: Layout) -> tuple[str, int, bool, list[int], int]:
    return layout.format, layout.block, layout.asymmetric, list(layout.order), layout.rows
