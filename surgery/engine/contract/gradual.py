"""Gradual passes: tensors of a pass that change as training proceeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# What was decided at a site, its weight as it is now, and the pass's tensors there by their names in the pass.
GradualPlace = tuple[Mapping[str, Any], Tensor, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Gradual:
    """A schedule on which a pass changes its own tensors.

    Attributes:
        window: The steps [first, last) of the training in which they change; last is None for an open end.
        unit: What a step counts, "step" or "epoch".
        value: Function step -> progress. While it stays equal, nothing has to be done.
        apply: Function (step, places) that changes the tensors in place, without gradients. It may be called with any
            step at any time, and again from 0 in a loaded program.
    """

    window: tuple[int, int | None]
    unit: str
    value: Callable[[int], float]
    apply: Callable[[int, Sequence[GradualPlace]], None]
