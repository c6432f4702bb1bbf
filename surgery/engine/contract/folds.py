"""Folds: changes of base tensors when an adapter is merged, and the choices that are made for quantized weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from surgery.engine.journal import SiteRecord


class Stage(Enum):
    """Order in which the folds of a weight are applied.

    WEIGHT folds replace or mask the weight that the op reads; everything else at the site is relative to that. BRANCH
    folds add a branch or scale. SIZE folds make the tensor longer; the others were made for its old size.
    """

    WEIGHT = 1
    BRANCH = 2
    SIZE = 3


class Fold:
    """A change of one base tensor when an adapter is merged into it.

    Attributes:
        stage: Stage in which it is applied.
        keeps_zeros: Zeros of the weight stay zeros, for example because the fold only scales it.
        reads_original: `apply` needs the weight that the op reads, without the branches that are merged earlier.
    """

    stage: ClassVar[Stage] = Stage.BRANCH
    keeps_zeros: ClassVar[bool] = False
    reads_original: ClassVar[bool] = False

    def apply(self, weight: Tensor, original: Tensor) -> Tensor:
        """Apply the change, in place or into a new tensor.

        Args:
            weight: The tensor with earlier folds applied, in float32 or float64.
            original: If `reads_original`, the weight before BRANCH folds, of the same dtype; else `weight`.

        Returns:
            The changed tensor.
        """
        raise NotImplementedError


def apply_folds(weight: Tensor, folds: Sequence[Fold], original: Tensor) -> Tensor:
    """Apply folds to one tensor without gradients, stage by stage and in the given order within a stage.

    Args:
        weight: Tensor of float32 or float64. Folds may change it in place.
        folds: Changes by several adapters, in journal order.
        original: The base's own tensor in the dtype of `weight`; not changed.

    Returns:
        The merged tensor.
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
    """Treatment of the adapters at one quantized weight when a program is merged.

    Attributes:
        path: Path of the site.
        codes: Id of the entry that quantized the weight.
        adapters: Ids of the adapters on it.
        how: "keep", "requantize" or "residual".
        errors: Relative error of the op's outputs on the data, without its bias, for each treatment that was measured.
        lost: Part of the adapters' contribution to the outputs that is rounded away.
        unseen: The same, of the values of the weight, for parts that the data do not use: rows that no token picks,
            experts that get no token, inputs that are always zero. 0 if there is no such part.
        rank: Rank of the correction.
        of: Quantity that `errors` refers to.
        why: Reason why the adapters stay, for "keep".
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
        """The choice as JSON-able data, without path and ids."""
        found = {"how": self.how, "errors": dict(self.errors), "lost": self.lost, "unseen": self.unseen}
        return {**found, "of": self.of, "rank": self.rank, "why": self.why}


@dataclass(frozen=True)
class Merged:
    """Result of merging adapters into quantized codes.

    Attributes:
        choices: One choice for each quantized weight with adapters.
        records: Site records of the merge's journal entry.
        tensors: Tensors of that entry, by name.
    """

    choices: tuple[Choice, ...] = ()
    records: tuple[SiteRecord, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def gone(self) -> dict[str, int]:
        """Id of an adapter -> number of sites where it has been merged into the codes."""
        found: dict[str, int] = {}
        for record in self.records:
            if record.decided.get("gone"):
                found[record.decided["entry"]] = found.get(record.decided["entry"], 0) + 1
        return found


class Absorber(Protocol):
    """Merges adapters into the codes of quantized weights; see `passes.quantize.requantize.into_codes`.

    Args:
        program: The program, an `engine.state.State`.
        how: One of How, except "keep".
        budget: Part of the adapters' contribution to an op's outputs that may be lost.
        ident: Id of the merge, used in the names of its tensors.
        data: Inputs to measure on, a sequence of (args, kwargs).
    """

    def __call__(
        self, program: Any, how: How, budget: float, ident: str, data: Sequence[Any], /
    ) -> Merged: ...


class Combiner(Protocol):
    """Combines several applications of a pass into one; see `Program.combine`."""

    def __call__(self, places: Sequence[Any], how: Any, label: str, /) -> tuple[Any, list[dict[str, Tensor]]]:
        """Combine the sources at every place.

        Args:
            places: `base.Place` of each site, with the sources there.
            how: The `combination.Combination`.
            label: Label of the result.

        Returns:
            The new pass, and its tensors at each place by their names in the pass.

        Raises:
            PassError: The sources cannot be combined in this way.
        """
        ...
