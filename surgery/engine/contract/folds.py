"""What folding an adapter means: changes of base tensors, and choices about quantized ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from surgery.engine.journal import SiteRecord


class Stage(Enum):
    """When a fold is applied to a weight, in this order."""

    WEIGHT = (
        1  # replaces or masks the weight that the op reads; everything else at the site is relative to it
    )
    BRANCH = 2  # adds a branch or scales
    SIZE = 3  # makes the tensor longer; all others were made for its old size


class Fold:
    """A change of one base tensor when an adapter is merged into it.

    Attributes:
        stage: When it is applied, see Stage.
        keeps_zeros: The zeros of the weight stay zeros (the fold scales it, say).
        reads_original: `apply` needs the weight as its op reads it, before other branches were merged.
    """

    stage: ClassVar[Stage] = Stage.BRANCH
    keeps_zeros: ClassVar[bool] = False
    reads_original: ClassVar[bool] = False

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        """The merged tensor: `weight` changed in place, or a new tensor.

        Args:
            weight: The tensor with earlier folds applied, in float32 or float64.
            original: The weight before BRANCH folds, of the same dtype, if `reads_original`; else `weight`.
        """
        raise NotImplementedError


def apply_folds(weight: Tensor, folds: Sequence[Fold], original: Tensor) -> Tensor:
    """Apply folds to one tensor, stage by stage and in the given order within a stage, without gradients.

    Args:
        weight: Tensor of float32 or float64, which is changed in place where a fold allows it.
        folds: Changes by several adapters, in journal order.
        original: The base's own tensor in the dtype of `weight`; not changed.
    """
    with torch.no_grad():
        for stage in Stage:
            now = [fold for fold in folds if fold.stage is stage]
            # Branches are relative to the weight that the op reads, which WEIGHT folds may have replaced.
            if stage is Stage.BRANCH and any(fold.reads_original for fold in now):
                original = weight.clone()
            for fold in now:
                weight = fold.apply(weight, original if fold.reads_original else weight)
    return weight


How = Literal["keep", "requantize", "residual", "auto"]


@dataclass(frozen=True)
class Choice:
    """What becomes of the adapters at one quantized weight.

    how: keep, requantize or residual. errors: of the outputs of the op on the data, over theirs (without its bias), by
    how; there is no error of another kind, and `of` says so. lost: of what the adapters add to the outputs, how much is
    rounded away. unseen: the same of the weight's own values where the data say nothing, as no token picks a row, no
    row goes to an expert or an input is always zero; 0 where there is no such place. rank: of the correction. why: they
    stay.
    """

    path: str
    codes: str
    adapters: tuple[str, ...]
    how: str
    errors: Mapping[str, float] = field(default_factory=dict)
    lost: float = 0.0
    unseen: float = 0.0
    rank: int = 0
    of: str = "outputs"
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        found = {"how": self.how, "errors": dict(self.errors), "lost": self.lost, "unseen": self.unseen}
        return {**found, "of": self.of, "rank": self.rank, "why": self.why}


@dataclass(frozen=True)
class Merged:
    """choices: at each quantized weight under adapters. records, tensors: of the merge's entry in the journal."""

    choices: tuple[Choice, ...] = ()
    records: tuple[SiteRecord, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def gone(self) -> dict[str, int]:
        """Adapter -> at how many sites it is in the codes now."""
        found: dict[str, int] = {}
        for record in self.records:
            if record.decided.get("gone"):
                found[record.decided["entry"]] = found.get(record.decided["entry"], 0) + 1
        return found


class Absorber(Protocol):
    """Puts adapters into the codes of quantized weights; see `passes.quantize.requantize.into_codes`.

    Args:
        program: an `engine.state.State`.
        how: one of How, except "keep".
        budget: the part of what the adapters add to an op's outputs that may be lost.
        ident: id of the merge, which names its tensors.
        data: pairs of (args, kwargs) to measure on.
    """

    def __call__(
        self, program: Any, how: How, budget: float, ident: str, data: Sequence[Any], /
    ) -> Merged: ...


class Combiner(Protocol):
    """Makes one application of a pass from several; see `Program.combine`."""

    def __call__(self, places: Sequence[Any], how: Any, label: str, /) -> tuple[Any, list[dict[str, Tensor]]]:
        """The new pass, and its tensors at each place by their names in the pass.

        Args:
            places: `base.Place` of each site, with the sources there.
            how: The `combination.Combination`.
            label: Name of the result.

        Raises:
            PassError: The sources cannot be combined in this way.
        """
        ...
