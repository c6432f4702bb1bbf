"""Freeze: parameters that a target names do not train."""

from __future__ import annotations

from typing import ClassVar

from surgery.engine.change.selection import SelectPass


class Freeze(SelectPass):
    """Freeze parameters: they keep `requires_grad=False` and no optimiser sees them.

    The target selects parameters by path (of the parameter or of a module above it) or by the role of the
    site that they belong to, biases included; `--target "!head"` freezes everything but the head. Adapters that
    are in the program by then are targeted too. Running statistics of a batch norm are no parameters, and still
    follow the data in train mode. Outputs do not change. A later selection wins over an earlier one.
    """

    name: ClassVar[str] = "freeze"
    default_target: ClassVar[str | None] = "all"

    def select(self, parameters: tuple[str, ...]) -> dict[str, bool]:
        return dict.fromkeys(parameters, False)
