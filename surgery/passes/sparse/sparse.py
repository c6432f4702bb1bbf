"""Weights with zeros, in patterns, chosen at once or along a schedule while they train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, fx

from surgery.common.errors import PassError
from surgery.engine.contract.base import RewritePass
from surgery.engine.contract.effect import WEIGHT, Effect
from surgery.engine.contract.folds import Fold, Stage
from surgery.engine.contract.gradual import Gradual, GradualPlace
from surgery.engine.contract.numerics import Numerics, changes
from surgery.engine.contract.ramp import Begin, End, Every, Unit, check_ramp, gradual, progress
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.graph.marks import mark_of
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, LINEAR
from surgery.graph.rewrite.current import adapted_by, replaced_op, weight_given_by, weight_reader
from surgery.graph.rewrite.refusals import computed_weight, not_floating
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.quantize import dequantize
from surgery.passes.sparse import Layout, Pattern, choose, count
from surgery.passes.sparse.inputs import norms, output_error
from surgery.passes.sparse.masks import Scope, above

aten = torch.ops.aten


class Sparse(RewritePass):
    """Sparse weights: W becomes W ⊙ M, where M, one bool for each value, is zero at the least important ones.

    `--criterion magnitude`: |w|. `wanda`: |w|·‖x‖, with the norm of the input that it is multiplied with over the data
    (Sun et al. 2023, arXiv:2306.11695), compared within each output. `--pattern unstructured`: single values, to
    `--sparsity` of each weight, of each row, or of all that the target names together (`--scope`). `n:m`, such as 2:4:
    of m inputs side by side n stay, which GPUs run faster (Mishra et al. 2021, arXiv:2104.08378). `RxC`, such as 4x4:
    R outputs by C inputs stay or go together, by their mean. `--threshold t` in place of a sparsity keeps what is above
    t: with 0, the support that training under a penalty has left (surgery.penalties: L1, group lasso, and their
    proximal steps, which reach zero exactly).

    M is stored and does not train. What it leaves out is exactly zero for the op and has no gradient, whatever the
    optimiser does; W itself keeps its values there, and undo gives them back. `--schedule cubic` lets the
    sparsity grow while W trains: s + (i − s)(1 − (t − begin)/(end − begin))³ from `--initial` i, with M chosen anew
    every `--every` steps, by the magnitude that the weights have then (Zhu & Gupta 2017, arXiv:1710.01878). Call
    `module.advance(step)`; from `--end` on M stays as it is. Zeros never come back by loading or starting over: M
    changes only where the schedule asks for more of them than there are.

    Merge: zeros in W. Adapters stand on W ⊙ M; one whose fold would fill the zeros stays beside. Outputs change by
    design; the plan says by how much each weight does, and with wanda each linear map's outputs on the data.
    """

    name: ClassVar[str] = "sparse"
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EMBEDDING, EXPERTS)
    numerics: ClassVar[Numerics] = changes("values of weights are set to zero")

    sparsity: float | None = Field(
        None, gt=0, lt=1, description="share of values that are zero (default 0.5; n:m says it itself)"
    )
    pattern: str = Field(
        "unstructured",
        description="unstructured; n:m, such as 2:4; or a block of outputs x inputs, such as 4x4",
    )
    criterion: Literal["magnitude", "wanda"] = Field(
        "magnitude",
        description="what the least important is: by magnitude, or times its input's norm on the data",
    )
    scope: Scope | None = Field(
        None,
        description="what shares a sparsity: each weight, row (of an output), or global: all together (default: "
        "weight, with wanda row)",
    )
    threshold: float | None = Field(
        None, ge=0, description="in place of a sparsity: magnitudes up to this go (of a block, its mean)"
    )
    schedule: Literal["cubic"] | None = Field(
        None, description="let the sparsity grow while the weights train"
    )
    initial: float = Field(0.0, ge=0, lt=1, description="with a schedule: the sparsity that it begins at")
    begin: Begin = 0
    end: End = None
    every: Every = 1
    unit: Unit = "step"

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, text: str) -> str:
        try:
            Pattern.parse(text)
        except ValueError as error:
            raise PassError(f"pass {cls.name!r}: --pattern {error}") from None
        return text

    @model_validator(mode="after")
    def _together(self) -> Sparse:
        pattern, name = self._pattern, f"pass {self.name!r}"
        if pattern.group is not None and self.sparsity is not None:
            raise PassError(f"{name}: {self.pattern} says how much is zero; leave out --sparsity")
        if pattern.group is not None and self.scope is not None:
            raise PassError(f"{name}: {self.pattern} is chosen within each group; leave out --scope")
        if pattern.block != (1, 1) and self.scope == "row":
            raise PassError(f"{name}: a block has several outputs; use --scope weight or global")
        if self.threshold is not None:
            given = ("sparsity", "scope", "schedule")
            also = next((f"--{n}" for n in given if getattr(self, n) is not None), None)
            also = also or ("--criterion wanda" if self.criterion == "wanda" else None)
            if also or pattern.group is not None:
                what = also or f"--pattern {self.pattern}"
                raise PassError(f"{name}: --threshold alone says what stays; leave out {what}")
        check_ramp(self, "cubic", "initial")
        if self.schedule is None:
            return self
        if self.initial >= self._final:
            raise PassError(
                f"{name}: --initial {self.initial:g} is not below the sparsity of {self._final:g}"
            )
        if self.criterion == "wanda":
            raise PassError(
                f"{name}: a schedule chooses by the magnitudes that weights have while they train; leave out wanda"
            )
        return self

    @property
    def _pattern(self) -> Pattern:
        return Pattern.parse(self.pattern)

    @property
    def _final(self) -> float:
        own = self._pattern.sparsity
        return own if own is not None else 0.5 if self.sparsity is None else self.sparsity

    @property
    def _scope(self) -> Scope:
        by_row = self.criterion == "wanda" and self._pattern == Pattern()
        return self.scope or ("row" if by_row else "weight")

    # -- what is refused

    @property
    def effect(self) -> Effect:
        return replace(WEIGHT, makes_zeros=True)

    def check(self, site: Site) -> str | None:
        return self._hindered(site) or self._fruitless(site)

    def _hindered(self, site: Site) -> str | None:
        """Why nothing can be chosen here at all."""
        refused = (
            computed_weight(site)
            or not_floating(site, "make it sparse before it is quantized")
            or replaced_op(site, "undo that first, or leave the site out")
        )
        if refused:
            return refused
        _, current = weight_reader(site.calls[0])
        if current.target is dequantize._opoverload:
            entry = mark_of(current).entry
            return (
                f"{entry!r} has quantized it already; undo that, make it sparse, and quantize what is merged"
            )
        given = weight_given_by(site)
        if given and self.schedule is not None:
            return f"{given!r} has put another weight there, which no schedule reads; put the schedule before that"
        adapter = next((a for a in map(adapted_by, site.calls) if a), None)
        if adapter:
            return f"it carries {adapter!r}, made for the whole weight; make it sparse first, and adapt then"
        if site.kind == CONV and site.layout == "io" and site.groups > 1:
            return "a transposed convolution with groups has no rows of its own; target its neighbours"
        if self.criterion == "wanda" and site.kind == EMBEDDING:
            return "a table is looked up, and nothing enters a product; use --criterion magnitude"
        if why := self._misfit(site):
            return why
        if not site.probe.in_memory:
            return "its weight is not in memory, and its values have to be compared; load the weights first"
        stored = site.probe.stored(site)
        if not bool(torch.isfinite(stored).all()):
            return "its weight holds values that are infinite or no numbers; mend the model first"
        if not bool(stored.any()):
            return "all its values are zero, so that there is nothing to choose by; leave it out"
        return None

    def _misfit(self, site: Site) -> str | None:
        """Why its sizes do not take the pattern."""
        pattern, sizes = self._pattern, Layout.of(site).sizes
        if pattern.group is not None and sizes[3] % pattern.group[1]:
            return (
                f"an output has {sizes[3]} inputs, which groups of {pattern.group[1]} do not divide; use another "
                f"n:m, or --pattern unstructured"
            )
        rows, columns = pattern.block
        if sizes[1] % rows or sizes[3] % columns:
            return (
                f"it has {sizes[1]} outputs by {sizes[3]} inputs, which blocks of {self.pattern} do not divide; use "
                f"another block, or --pattern unstructured"
            )
        return None

    def _fruitless(self, site: Site) -> str | None:
        """Why a choice here comes to nothing."""
        if self.criterion == "wanda":
            entering = norms(site)
            if not bool(torch.isfinite(entering).all()):
                return (
                    "what enters it on the data holds values that are infinite or no numbers; mend the data"
                )
            if not bool(entering.any()):
                return "nothing but zeros enters it on the data; give data that reaches it"
        if self.threshold is not None:
            mask = self._found(site)
            if not bool(mask.any()):
                return f"none of its values is above --threshold {self.threshold:g}; lower that"
            if bool(mask.all()):
                return f"all its values are above --threshold {self.threshold:g}; train with a penalty, or raise that"
        elif self._scope != "global" and not sum(count([Layout.of(site).sizes], *self._asked(self._final))):
            return f"a sparsity of {self._final:g} takes none of its {site.parameters:,} values; ask for more"
        return None

    # -- what is chosen

    def _asked(self, sparsity: float) -> tuple[Pattern, float, Scope]:
        return self._pattern, sparsity, self._scope

    def _scores(self, site: Site) -> Tensor:
        scores = Layout.of(site).laid(site.probe.stored(site)).abs()
        scores = scores if scores.dtype == torch.float64 else scores.float()
        return scores * norms(site).to(scores.device) if self.criterion == "wanda" else scores

    def _found(self, site: Site) -> Tensor:
        """The mask at insertion, laid out; made once for a site, or for all of them."""
        if self._scope == "global":
            return site.probe.once((self, "masks"), lambda: self._together_with(site))[site.key]
        return site.probe.once((self, site.key), lambda: self._chosen([site])[0])

    def _chosen(self, sites: Sequence[Site]) -> list[Tensor]:
        if self.threshold is not None:
            return [above(self._scores(site), self._pattern, self.threshold) for site in sites]
        return choose([self._scores(site) for site in sites], *self._asked(self._sparsity_at(0)))

    def _together_with(self, site: Site) -> dict[Any, Tensor]:
        """The masks of all sites that the target names and that can have one."""
        program = site.probe.program
        sites = [replace(s, measured=site.probe) for s in self.find(program.view) if s.kind in self.on]
        hindrance = program.base.hindrance
        sites = [s for s in sites if not (self._hindered(s) or (hindrance and hindrance(s)))]
        return dict(zip((s.key for s in sites), self._chosen(sites), strict=True))

    def decide(self, site: Site) -> dict[str, Any]:
        layout, mask = Layout.of(site), self._found(site)
        weight = layout.laid(site.probe.stored(site))
        wide = weight if weight.dtype == torch.float64 else weight.float()
        moved = wide.masked_fill(mask, 0)
        error = torch.linalg.vector_norm(moved) / torch.linalg.vector_norm(wide)
        decided = {
            **layout.to_json(),
            "sparsity": round(1 - float(mask.double().mean()), 6),
            "error": round(float(error), 6),
        }
        if self.criterion == "wanda" and site.kind == LINEAR:
            decided["output_error"] = round(output_error(site, wide, moved), 6)
        return decided

    def outcome(self, site: Site) -> Outcome:
        decided = site.decided
        said = f"{decided['sparsity']:.1%} zeros; the weight moves by {decided['error']:.2%}"
        if "output_error" in decided:
            said += f", its outputs on the data by {decided['output_error']:.2%}"
        if self.schedule is not None:
            said += f"; {self._final:.1%} at {self.unit} {self.end}"
        return Outcome(note=said)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        def fill(mask: Tensor) -> None:
            mask.copy_(Layout.of(site).stored(self._found(site), site.shape))
            if self._scope != "global":
                site.probe.forget((self, site.key))

        return {"mask": TensorSpec(site.shape, fill, trainable=False, dtype=torch.bool)}

    # -- while it trains

    @property
    def gradual(self) -> Gradual | None:
        return gradual(self, self._sparsity_at, self._tighten)

    def _sparsity_at(self, step: int) -> float:
        if self.schedule is None:
            return self._final
        if step < self.begin:
            return 0.0
        return self._final + (self.initial - self._final) * (1 - progress(self, step)) ** 3

    def _tighten(self, step: int, places: Sequence[GradualPlace]) -> None:
        layouts = [Layout.from_json(dict(decided)) for decided, _, _ in places]
        masks = [own["mask"] for _, _, own in places]
        asked = self._asked(self._sparsity_at(step))
        wanted = count([layout.sizes for layout in layouts], *asked)
        there = [int((~mask).sum()) for mask in masks]
        there = [sum(there)] if self._scope == "global" else there
        if not any(more > now for more, now in zip(wanted, there, strict=True)):
            return
        scores = [lay.laid(weight).abs() for lay, (_, weight, _) in zip(layouts, places, strict=True)]
        for layout, mask, chosen in zip(layouts, masks, choose(scores, *asked), strict=True):
            mask.copy_(layout.stored(chosen, tuple(mask.shape)))

    # -- in the graph, and folded

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        g.swap_weight(lambda weight: g.call(aten.where.ScalarOther, g["mask"], weight, 0))
        return None

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> dict[str, Fold]:
        return {"weight": Masked(tensors["mask"])}


@dataclass(frozen=True)
class Masked(Fold):
    """Merge: zeros where the mask has none, before adapters are folded."""

    stage: ClassVar[Stage] = Stage.WEIGHT
    keeps_zeros: ClassVar[bool] = True

    mask: Tensor

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        return weight.masked_fill_(~self.mask.to(weight.device), 0)
