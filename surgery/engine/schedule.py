"""Which parameters train when, and how fast: what selections decided, for modules and optimisers; and what passes do
to tensors of their own as training goes on."""

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
    """The step that a program's training has come to; programs that train together share it."""

    step: int = 0


@dataclass(frozen=True)
class Schedule:
    """windows: parameter name -> the steps [first, last) in which it trains; absent: always; also the name of a tensor
    that a pass changes in them (see RewritePass.pacing). rates: its learning
    rate over the optimiser's. masks: the tensor that says which of its values train; absent: all. unit: what a
    step is, "step" or "epoch"."""

    windows: Mapping[str, Window] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    masks: Mapping[str, str] = field(default_factory=dict)
    unit: str = "step"

    @staticmethod
    def of(entries: Iterable[Entry]) -> Schedule:
        """What the entries of a journal say; of one parameter the last one that names it counts, for all of this.

        Raises PassError where two that are in force count in different units.
        """
        windows: dict[str, Window] = {}
        rates: dict[str, float] = {}
        masks: dict[str, str] = {}
        counts: dict[str, Entry] = {}  # by parameter: who made its window
        for entry in entries:
            if entry.weight == 0:
                continue
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
        """Whether a parameter, by any of its names, may train at a step."""
        first, last = self.window(names)
        return first <= step and (last is None or step < last)

    def window(self, names: tuple[str, ...]) -> Window:
        return next((self.windows[name] for name in names if name in self.windows), (0, None))

    def rate(self, names: tuple[str, ...]) -> float:
        return next((self.rates[name] for name in names if name in self.rates), 1.0)

    @property
    def changes(self) -> tuple[int, ...]:
        """The steps at which something starts or stops to train, 0 left out."""
        ends = {end for window in self.windows.values() for end in window if end}
        return tuple(sorted(ends))
