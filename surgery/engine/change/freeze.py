"""Freeze: stops the training of the parameters that a target names."""

from __future__ import annotations

from typing import ClassVar

from surgery.engine.change.selection import SelectPass


class Freeze(SelectPass):
    """Freeze parameters: they get `requires_grad=False`, and no optimizer updates them.

    The target selects parameters by path (of the parameter or of a module above it) or by the role of the site that
    they belong to, biases included. For example, `--target "!head"` freezes everything except the head. Adapters that
    are in the program already are selected as well. Running statistics of a batch norm are not parameters, so they are
    still updated in train mode. Outputs do not change. A later selection wins over an earlier one.
    """

    name: ClassVar[str] = "freeze"
    example: ClassVar[str] = (
        "surgery apply hf:google-bert/bert-base-uncased --task text-classification --pass freeze "
        '--target "embed.*" -o frozen/'
    )
    default_target: ClassVar[str | None] = "all"

    def select(self, parameters: tuple[str, ...]) -> dict[str, bool]:
        """False for every targeted parameter."""
        return dict.fromkeys(parameters, False)
