"""Schedules: the training window, learning rate and gradient mask of each parameter, and the current step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from surgery.common.errors import PassError
from surgery.engine.journal import Entry

if TYPE_CHECKING:
    pass

Window = tuple[int, int | None]


@dataclass
class Clock:
    """Current training step, shared by programs that train together."""

    step: int = 0


@dataclass(frozen=True)
class Schedule:
    """Training windows, learning rates and masks of parameters, by parameter name.

    Attributes:
        windows: Steps [first, last) in which a parameter trains; always, if it is not listed. Also lists tensors that a
            pass changes in these steps (see RewritePass.gradual).
        rates: Learning rate relative to the optimizer's; 1 if not listed.
        masks: Name of the tensor with the mask of the values that train; all, if not listed.
        unit: Unit of the windows, "step" or "epoch".
    """

    windows: Mapping[str, Window] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    masks: Mapping[str, str] = field(default_factory=dict)
    unit: str = "step"

    @staticmethod
    def of(entries: Iterable[Entry]) -> Schedule:
        """The schedule that journal entries define. The last entry that names a parameter wins.

        Raises:
            PassError: Two windows in force count in different units.
        """
        windows: dict[str, Window] = {}
        rates: dict[str, float] = {}
        masks: dict[str, str] = {}
        counts: dict[str, Entry] = {}  # parameter name -> the entry that defined its window
        for entry in entries:
            if entry.weight == 0:
                continue
            # A later entry that names a parameter replaces its window, rate and mask, even by the defaults.
            for kept in (windows, rates, masks, counts):
                for name in entry.trains:
                    kept.pop(name, None)
            windows.update(entry.windows)
            rates.update(entry.rates)
            masks.update(entry.masks)
            counts.update(dict.fromkeys(entry.windows, entry))
        units = {entry.unit: entry.id for entry in counts.values()}
        if len(units) > 1:
            raise PassError(
                f"{' and '.join(map(repr, units.values()))} count in {' and '.join(units)}; use one --unit in both"
            )
        return Schedule(windows, rates, masks, next(iter(units), "step"))

    def trains(self, names: tuple[str, ...], step: int) -> bool:
        """True if a parameter may train at a step.

        Args:
            names: All names of the parameter.
            step: Number of the step, in `unit`.
        """
        first, last = self.window(names)
        return first <= step and (last is None or step < last)

    def window(self, names: tuple[str, ...]) -> Window:
        """Training window of a parameter with these names; (0, None) means always."""
        return next((self.windows[name] for name in names if name in self.windows), (0, None))

    def rate(self, names: tuple[str, ...]) -> float:
        """Learning rate of a parameter with these names, relative to the optimizer's."""
        return next((self.rates[name] for name in names if name in self.rates), 1.0)

    @property
    def changes(self) -> tuple[int, ...]:
        """Steps after 0 at which a window begins or ends."""
        ends = {end for window in self.windows.values() for end in window if end}
        return tuple(sorted(ends))
