"""Gradual unfreezing: the head trains first, then one depth more each time."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from surgery.common.errors import PassError
from surgery.engine.change.selection import Candidates, SelectPass
from surgery.engine.contract.selection import Selection


class GradualUnfreeze(SelectPass):
    """Gradual unfreezing (ULMFiT, Howard & Ruder 2018, arXiv:1801.06146).

    The head trains from the start, and every `--every` epochs (or steps) the next depth below joins it: the last
    block, the one before it, down to the embeddings at depth 0, or to `--down-to`. What has begun to train goes on.
    With n blocks, depth d begins at every · (n + 1 − d); depths that the target does not name are passed over, and
    no time goes to them. `--decay` gives discriminative rates: depth d trains at
    decay^(n + 1 − d) of the optimiser's; ULMFiT's own is 1/2.6, that is 0.385. Depths as in `layerwise`; call
    `module.advance(epoch)`. Adapters train as before. Outputs do not change.
    """

    name: ClassVar[str] = "gradual-unfreeze"
    exclusive: ClassVar[bool] = True
    default_target: ClassVar[str | None] = "all"

    every: int = Field(1, gt=0, description="how many epochs (or steps) until the next depth joins")
    unit: Literal["step", "epoch"] = Field("epoch", description="what --every counts")
    down_to: int = Field(0, ge=0, description="the lowest depth that joins at last; 0 is the embeddings")
    decay: float = Field(
        1.0, gt=0, le=1, description="learning rate of a depth over that of the one above it"
    )

    def selection(self, candidates: Candidates) -> Selection:
        by_depth = {d: names for d, names in candidates.by_depth.items() if d >= self.down_to}
        if not by_depth:
            raise PassError(
                f"gradual-unfreeze: nothing that the target names is at depth {self.down_to} or above; the head of "
                f"this model is at depth {candidates.deepest}"
            )
        windows = {
            name: (index * self.every, None)
            for index, names in enumerate(by_depth.values())
            for name in names
        }
        rates = candidates.rates(windows, self.decay)
        return Selection(candidates.only(set(windows)), rates, windows, self.unit)
