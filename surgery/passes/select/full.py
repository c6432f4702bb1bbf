"""Full: everything trains, or everything that a target names."""

from __future__ import annotations

from typing import ClassVar

from surgery.engine.change.selection import Candidates, SelectPass
from surgery.engine.contract.selection import Selection


class Full(SelectPass):
    """Full fine-tuning: every parameter of the base trains, at the optimiser's rate, at every step.

    With a target, what it names trains and the rest is left as it was: `--pass freeze --pass full --target "norm"`.
    That a selection says so keeps an adapter in the same program from freezing the base. It sets aside masks, rates
    and windows that earlier selections gave, as a later selection always does. Outputs do not change.
    """

    name: ClassVar[str] = "full"
    default_target: ClassVar[str | None] = "all"

    def selection(self, candidates: Candidates) -> Selection:
        return Selection({name: True for name in candidates.targeted if candidates.can_train(name)})
