"""sparse: sets the least important values of weights to zero, at once or gradually during training."""

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
from surgery.graph.rewrite.current import adapted_by, no_weight_to_replace, weight_given_by, weight_reader
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.quantize import dequantize
from surgery.passes.sparse import Layout, Pattern, choose, count
from surgery.passes.sparse.inputs import norms, output_error
from surgery.passes.sparse.masks import Scope, above

aten = torch.ops.aten


class Sparse(RewritePass):
    """Sparse weights: W becomes W ⊙ M, where the mask M is zero at the least important values.

    `--criterion` sets the importance of a value. `magnitude` is |w|. `wanda` is |w|·‖x‖, where ‖x‖ is the norm of the
    input that w multiplies, over the data (Sun et al. 2023, arXiv:2306.11695); it is compared within each output.

    `--pattern` sets the structure of the zeros:

    - `unstructured`: single values, to `--sparsity` of each weight, of each row, or of all targeted weights together
      (`--scope`).
    - `n:m`, such as 2:4: n of every m consecutive inputs are kept, which GPUs can run faster (Mishra et al. 2021,
      arXiv:2104.08378).
    - `RxC`, such as 4x4: blocks of R outputs by C inputs are kept or removed as a whole, by their mean importance.

    `--threshold t` keeps the values (or blocks) of importance above t, instead of a given share. With t = 0 these are
    the values that training under a penalty has not set to zero (`surgery.penalties`: L1, group lasso, and their
    proximal steps, which reach zero exactly).

    M has one bool for each value. It is stored, and does not train. Masked values are exactly zero for the op and get
    no gradient, whatever the optimizer does. W itself keeps its values, and undo restores them. Adapters attach to
    W ⊙ M. The outputs change by design; the plan shows the error of each weight, and with wanda also the error of each
    linear layer's outputs on the data.

    `--schedule cubic` increases the sparsity while W trains, from i (`--initial`) to s (the final sparsity):
    s + (i − s)(1 − (t − begin)/(end − begin))³ at step t. Every `--every` steps, M is chosen again by the current
    magnitudes (Zhu & Gupta 2017, arXiv:1710.01878). Call `module.advance(step)` in the training loop. After `--end`, M
    stays as it is. Loading a program, or counting steps from 0 again, never removes zeros: M changes only when the
    schedule asks for more zeros than it has.

    Merge: masked values of W become zero. An adapter whose merge would fill these zeros stays a separate branch.
    """

    name: ClassVar[str] = "sparse"
    example: ClassVar[str] = (
        'surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass sparse --target "mlp.*" --sparsity 0.5 -o sparse/'
    )
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EMBEDDING, EXPERTS)
    numerics: ClassVar[Numerics] = changes("values of weights are set to zero")

    sparsity: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of values that become zero (default 0.5; n:m sets it itself)",
    )
    pattern: str = Field(
        default="unstructured",
        description="unstructured; n:m, such as 2:4; or blocks of outputs x inputs, such as 4x4",
    )
    criterion: Literal["magnitude", "wanda"] = Field(
        default="magnitude",
        description="importance of a value: its magnitude, or (wanda) that times the norm of its input on the data",
    )
    scope: Scope | None = Field(
        default=None,
        description="values that are compared: of each weight, of each row (output), or of all targeted weights "
        "(global); default: weight, with wanda row",
    )
    threshold: float | None = Field(
        default=None,
        ge=0,
        description="instead of a sparsity: values up to this magnitude become zero (blocks: by their mean)",
    )
    schedule: Literal["cubic"] | None = Field(
        default=None, description="increase the sparsity during training"
    )
    initial: float = Field(default=0.0, ge=0, lt=1, description="with a schedule: sparsity at its beginning")
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
            raise PassError(f"{name}: {self.pattern} sets the sparsity itself; leave out --sparsity")
        if pattern.group is not None and self.scope is not None:
            raise PassError(f"{name}: {self.pattern} compares the values of each group; leave out --scope")
        if pattern.block != (1, 1) and self.scope == "row":
            raise PassError(f"{name}: a block spans several outputs; use --scope weight or global")
        if self.threshold is not None:
            given = ("sparsity", "scope", "schedule")
            also = next((f"--{n}" for n in given if getattr(self, n) is not None), None)
            also = also or ("--criterion wanda" if self.criterion == "wanda" else None)
            if also or pattern.group is not None:
                what = also or f"--pattern {self.pattern}"
                raise PassError(f"{name}: --threshold alone decides what is kept; leave out {what}")
        check_ramp(self, "cubic", "initial")
        if self.schedule is None:
            return self
        if self.initial >= self._final:
            raise PassError(
                f"{name}: --initial {self.initial:g} is not below the sparsity of {self._final:g}; lower it"
            )
        if self.criterion == "wanda":
            raise PassError(
                f"{name}: a schedule compares the current magnitudes of weights; leave out --criterion wanda"
            )
        return self

    @property
    def _pattern(self) -> Pattern:
        return Pattern.parse(self.pattern)

    @property
    def _final(self) -> float:
        """Sparsity at the end of a schedule, or from the start without one."""
        own = self._pattern.sparsity
        return own if own is not None else 0.5 if self.sparsity is None else self.sparsity

    @property
    def _scope(self) -> Scope:
        by_row = self.criterion == "wanda" and self._pattern == Pattern()
        return self.scope or ("row" if by_row else "weight")

    # -- refusals

    @property
    def effect(self) -> Effect:
        return replace(WEIGHT, makes_zeros=True)

    def check(self, site: Site) -> str | None:
        return self._hindered(site) or self._fruitless(site)

    def _hindered(self, site: Site) -> str | None:
        """Return the reason why no mask can be chosen here, whatever the data are, or None."""
        refused = no_weight_to_replace(
            site, "make it sparse before quantizing it", "undo that first, or leave the site out"
        )
        if refused:
            return refused
        _, current = weight_reader(site.calls[0])
        if current.target is dequantize._opoverload:
            entry = mark_of(current).entry
            return f"{entry!r} has quantized it already; undo that, make it sparse, and quantize it again"
        given = weight_given_by(site)
        if given and self.schedule is not None:
            return f"{given!r} has replaced its weight, which a schedule cannot read; apply the schedule before that"
        adapter = next((a for a in map(adapted_by, site.calls) if a), None)
        if adapter:
            return f"it carries {adapter!r}, made for the dense weight; make it sparse first, and adapt afterwards"
        if site.kind == CONV and site.layout == "io" and site.groups > 1:
            return "it is a transposed convolution with groups, whose outputs are not rows of a matrix; leave it out"
        if self.criterion == "wanda" and site.kind == EMBEDDING:
            return "an embedding multiplies no input; use --criterion magnitude"
        if why := self._misfit(site):
            return why
        if not site.probe.in_memory:
            return "its weight is not in memory, and its values are compared; load the weights first"
        stored = site.probe.stored(site)
        if not bool(torch.isfinite(stored).all()):
            return "its weight contains inf or NaN; fix the model first"
        if not bool(stored.any()):
            return "all its values are zero, so none is less important; leave it out"
        return None

    def _misfit(self, site: Site) -> str | None:
        """Return the reason why the pattern does not fit the sizes of the weight, or None."""
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
        """Return the reason why the data or the options leave nothing to choose here, or None."""
        if self.criterion == "wanda":
            entering = norms(site)
            if not bool(torch.isfinite(entering).all()):
                return "its input on the data contains inf or NaN; clean the data"
            if not bool(entering.any()):
                return "its input is zero on all of the data; give data that reaches it"
        if self.threshold is not None:
            mask = self._found(site)
            if not bool(mask.any()):
                return f"none of its values is above --threshold {self.threshold:g}; lower it"
            if bool(mask.all()):
                return f"all its values are above --threshold {self.threshold:g}; train with a penalty, or raise it"
        elif self._scope != "global" and not sum(count([Layout.of(site).sizes], *self._asked(self._final))):
            return f"a sparsity of {self._final:g} removes none of its {site.parameters:,} values; raise --sparsity"
        return None

    # -- choice of values

    def _asked(self, sparsity: float) -> tuple[Pattern, float, Scope]:
        """Return the arguments of `count` and `choose` for a sparsity."""
        return self._pattern, sparsity, self._scope

    def _scores(self, site: Site) -> Tensor:
        """Return the importance of every value, in the order of `Layout`."""
        scores = Layout.of(site).laid(site.probe.stored(site)).abs()
        scores = scores if scores.dtype == torch.float64 else scores.float()
        return scores * norms(site).to(scores.device) if self.criterion == "wanda" else scores

    def _found(self, site: Site) -> Tensor:
        """Return the mask at insertion, in the order of `Layout`; it is computed once."""
        if self._scope == "global":
            return site.probe.once((self, "masks"), lambda: self._together_with(site))[site.key]
        return site.probe.once((self, site.key), lambda: self._chosen([site])[0])

    def _chosen(self, sites: Sequence[Site]) -> list[Tensor]:
        """Return the masks of sites that are compared with each other."""
        if self.threshold is not None:
            return [above(self._scores(site), self._pattern, self.threshold) for site in sites]
        return choose([self._scores(site) for site in sites], *self._asked(self._sparsity_at(0)))

    def _together_with(self, site: Site) -> dict[Any, Tensor]:
        """Return the masks of all targeted sites that are not refused."""
        program = site.probe.program
        sites = [replace(s, measured=site.probe) for s in self.find(program.view) if s.kind in self.on]
        # Sites that would be refused must not take part in a comparison of all weights.
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
        said = f"{decided['sparsity']:.1%} zeros; the weight changes by {decided['error']:.2%}"
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

    # -- schedule

    @property
    def gradual(self) -> Gradual | None:
        return gradual(self, self._sparsity_at, self._tighten)

    def _sparsity_at(self, step: int) -> float:
        """Sparsity that the schedule asks for at a step."""
        if self.schedule is None:
            return self._final
        if step < self.begin:
            return 0.0
        return self._final + (self.initial - self._final) * (1 - progress(self, step)) ** 3

    def _tighten(self, step: int, places: Sequence[GradualPlace]) -> None:
        """Choose the masks again, if the schedule asks for more zeros than there are."""
        layouts = [Layout.from_json(dict(decided)) for decided, _, _ in places]
        masks = [own["mask"] for _, _, own in places]
        asked = self._asked(self._sparsity_at(step))
        wanted = count([layout.sizes for layout in layouts], *asked)
        there = [int((~mask).sum()) for mask in masks]
        # With scope global, only the total counts: zeros may move from one weight to another.
        there = [sum(there)] if self._scope == "global" else there
        if not any(more > now for more, now in zip(wanted, there, strict=True)):
            return
        scores = [lay.laid(weight).abs() for lay, (_, weight, _) in zip(layouts, places, strict=True)]
        for layout, mask, chosen in zip(layouts, masks, choose(scores, *asked), strict=True):
            mask.copy_(layout.stored(chosen, tuple(mask.shape)))

    # -- graph and merge

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node | None:
        g.swap_weight(lambda weight: g.call(aten.where.ScalarOther, g["mask"], weight, 0))
        return None

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> dict[str, Fold]:
        return {"weight": Masked(tensors["mask"])}


@dataclass(frozen=True)
class Masked(Fold):
    """Merge: set masked values to zero, before adapters are merged.

    Attributes:
        mask: Mask of the weight's shape; False for values that become zero.
    """

    stage: ClassVar[Stage] = Stage.WEIGHT
    keeps_zeros: ClassVar[bool] = True

    mask: Tensor

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        return weight.masked_fill_(~self.mask.to(weight.device), 0)
