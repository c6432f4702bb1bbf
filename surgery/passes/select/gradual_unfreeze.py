"""gradual-unfreeze: trains the head first, then one more depth at a time."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from surgery.common.errors import PassError
from surgery.engine.change.selection import Candidates, SelectPass
from surgery.engine.contract.selection import Selection


class GradualUnfreeze(SelectPass):
    """Gradual unfreezing: the head trains first, then one more depth at a time (Howard & Ruder 2018, arXiv:1801.06146).

    The head trains from the start. Every `--every` epochs (or steps), the next depth below joins: the last block, the
    one before it, and so on down to the embeddings at depth 0, or to `--down-to`. Depths that have started continue to
    train. With n blocks, depth d starts at every · (n + 1 − d). Depths without targeted parameters are skipped and take
    no time. `--decay` sets discriminative learning rates: depth d trains at decay^(n + 1 − d) times the optimizer's
    rate; ULMFiT uses 1/2.6 ≈ 0.385. Depths are counted as in `layerwise`.

    Call `module.advance(epoch)` in the training loop. Adapters train as before. Applying the pass does not change the
    outputs.
    """

    name: ClassVar[str] = "gradual-unfreeze"
    example: ClassVar[str] = (
        "surgery apply hf:google-bert/bert-base-uncased --task text-classification --pass "
        "gradual-unfreeze --every 1 --unit epoch -o gradual/"
    )
    exclusive: ClassVar[bool] = True
    default_target: ClassVar[str | None] = "all"

    every: int = Field(default=1, gt=0, description="epochs (or steps) until the next depth joins")
    unit: Literal["step", "epoch"] = Field(default="epoch", description="unit of --every")
    down_to: int = Field(default=0, ge=0, description="lowest depth that joins; 0 is the embeddings")
    decay: float = Field(
        default=1.0, gt=0, le=1, description="learning rate of a depth, relative to the depth above it"
    )

    def selection(self, candidates: Candidates) -> Selection:
        by_depth = {d: names for d, names in candidates.by_depth.items() if d >= self.down_to}
        if not by_depth:
            raise PassError(
                f"gradual-unfreeze: no targeted parameter is at depth {self.down_to} or above; lower --down-to "
                f"(the head of this model is at depth {candidates.deepest})"
            )
        windows = {
            name: (index * self.every, None)
            for index, names in enumerate(by_depth.values())
            for name in names
        }
        rates = candidates.rates(windows, self.decay)
        return Selection(candidates.only(set(windows)), rates, windows, self.unit)
