"""Selection: which parameters train, in which steps, at which learning rate, and which of their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """Decisions of a selection, by parameter name.

    Attributes:
        trains: True if the parameter trains, False if it is frozen.
        rates: Learning rate relative to the optimizer's.
        windows: Steps [first, last) in which it trains; last is None for an open end.
        unit: Unit of the windows, "step" or "epoch".
        masks: Bool tensor of the values that train, of the parameter's shape or with size 1 along any axis; the
            gradient of all other values is zero.
    """

    trains: Mapping[str, bool] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    windows: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    unit: str = "step"
    masks: Mapping[str, Tensor] = field(default_factory=dict)
