"""Gradual passes: tensors of a pass that change as training proceeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# One site: its decisions, its current weight, and the tensors of the pass there by their names in the pass.
GradualPlace = tuple[Mapping[str, Any], Tensor, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Gradual:
    """A schedule on which a pass changes its own tensors.

    Attributes:
        window: Training steps [first, last) in which they change; last is None for an open end.
        unit: Unit of a step, "step" or "epoch".
        value: Function step -> progress. `apply` is called only when the progress has changed.
        apply: Function (step, places) that changes the tensors in place, without gradients. Steps can come in any
            order: a loaded program starts again from step 0.
    """

    window: tuple[int, int | None]
    unit: str
    value: Callable[[int], float]
    apply: Callable[[int, Sequence[GradualPlace]], None]
