"""What a selection decides about parameters: which train, when, how fast, and which of their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """What a selection decides, by parameter name.

    trains: whether it trains. rates: its learning rate over that of the optimiser. windows: from which step on,
    and up to which (exclusive, None: for good), it trains. unit: what a step is, "step" or "epoch". masks: which
    of its values train (bool, of its shape or with 1 for sizes along which it is the same); the gradient of the
    others is zero.
    """

    trains: Mapping[str, bool] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    windows: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    unit: str = "step"
    masks: Mapping[str, Tensor] = field(default_factory=dict)
