"""Selection: which parameters train, in which steps, at which learning rate, and which of their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from surgery.engine.journal import Entry


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


def in_words(said: Selection | Entry, tensors: Mapping[str, Tensor]) -> str:
    """One-line summary of a selection, or of a journal entry.

    Args:
        said: The selection or entry.
        tensors: Inserted tensors by name, in which the masks of an entry are found.
    """
    training = sum(said.trains.values())
    stopping = len(said.trains) - training
    if training:
        rest = f", {stopping} {'does' if stopping == 1 else 'do'} not" if stopping else ""
        parts = [_counted(training, "train") + rest]
    else:
        parts = [_counted(stopping, "stop") + " training" if stopping else "nothing is selected"]
    windows = sorted(set(said.windows.values()), key=lambda w: (w[0], w[1] is None, w[1] or 0))
    if len(windows) > 1 or (windows and windows[0] != (0, None)):
        last = max(end for window in windows for end in window if end is not None)
        ends = "one after another" if any(end is not None for _, end in windows) else "each kept on"
        parts.append(f"{len(windows)} windows over {last} {said.unit}s, {ends}")
    rates = set(said.rates.values())
    if rates - {1.0}:
        parts.append(f"rates {min(rates):.3g} to {max(rates):.3g}")
    masks = [tensors[m] if isinstance(m, str) else m for m in said.masks.values()]
    if masks:
        shares = [float(mask.float().mean()) for mask in masks]
        parts.append(f"{len(masks)} of them in part, {min(shares):.0%} to {max(shares):.0%} of their values")
    return "; ".join(parts)


def _counted(number: int, verb: str) -> str:
    return f"{number} parameter {verb}s" if number == 1 else f"{number} parameters {verb}"
