"""What folding an adapter means: changes of base tensors, and choices about quantized ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from surgery.engine.journal import SiteRecord


class MergeOp(Protocol):
    """How one pass changes a base tensor for good, in place, on a tensor of at least fp32.

    One that folds what `g.swap_weight` put in the weight's place sets `inner = True`: these come first.
    """

    def apply_(self, weight: Tensor) -> None: ...


class MergeFrom(Protocol):
    """The same where the weight as its op reads it is needed too, from which earlier merges may have moved on.

    original: the base's own, with what is `inner` folded in.
    """

    def apply_from(self, weight: Tensor, original: Tensor) -> None: ...


class MergeLonger(Protocol):
    """One that gives the tensor another length: made after all others, which take it as it was."""

    def longer(self, weight: Tensor) -> Tensor: ...


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
