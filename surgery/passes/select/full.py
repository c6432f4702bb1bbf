"""full: trains every parameter, or every targeted one."""

from __future__ import annotations

from typing import ClassVar

from surgery.engine.change.selection import Candidates, SelectPass
from surgery.engine.contract.selection import Selection


class Full(SelectPass):
    """Full fine-tuning: every parameter of the base trains, at the optimizer's learning rate, at every step.

    With a target, the targeted parameters train and the others stay as they were: `--pass freeze --pass full --target
    "norm"`. A program with a selection such as this one is not frozen by adapters. The pass replaces the masks, rates
    and windows that earlier selections gave to these parameters, as every later selection does. Applying the pass does
    not change the outputs.
    """

    name: ClassVar[str] = "full"
    example: ClassVar[str] = (
        "surgery apply hf:google-bert/bert-base-uncased --task text-classification --pass full "
        '--target "mlp.*" -o some/'
    )
    default_target: ClassVar[str | None] = "all"

    def selection(self, candidates: Candidates) -> Selection:
        return Selection({name: True for name in candidates.targeted if candidates.can_train(name)})
