"""Which parameters train when, and how fast: what selections decided, for modules and optimisers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from torch import nn

from surgery.errors import PassError
from surgery.journal import Journal

if TYPE_CHECKING:
    from surgery.program import Program

Window = tuple[int, int | None]


@dataclass(frozen=True)
class Schedule:
    """windows: parameter name -> the steps [first, last) in which it trains; absent: always. rates: its learning
    rate over the optimiser's. unit: what a step is, "step" or "epoch"."""

    windows: Mapping[str, Window] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    unit: str = "step"

    @staticmethod
    def of(journal: Journal) -> Schedule:
        """What the journal's selections say; of one parameter the last one counts."""
        windows: dict[str, Window] = {}
        rates: dict[str, float] = {}
        units: dict[str, str] = {}
        for entry in journal:
            for name in entry.trains:
                windows.pop(name, None)
                rates.pop(name, None)
            windows.update(entry.windows)
            rates.update(entry.rates)
            if entry.windows:
                units[entry.unit] = entry.id
        if len(units) > 1:
            raise PassError(
                f"{' and '.join(map(repr, units.values()))} count in {' and '.join(units)}; use one unit in both"
            )
        return Schedule(windows, rates, next(iter(units), "step"))

    def trains(self, names: tuple[str, ...], step: int) -> bool:
        """Whether a parameter, by any of its names, may train at a step."""
        for name in names:
            first, last = self.windows.get(name, (0, None))
            if step < first or (last is not None and step >= last):
                return False
        return True

    def rate(self, names: tuple[str, ...]) -> float:
        return next((self.rates[name] for name in names if name in self.rates), 1.0)

    @property
    def changes(self) -> tuple[int, ...]:
        """The steps at which something starts or stops to train, 0 left out."""
        ends = {end for window in self.windows.values() for end in window if end}
        return tuple(sorted(ends))


class ParameterGroup(TypedDict, total=False):
    """A group for a torch optimiser; `names` and `window` are for people, optimisers ignore them."""

    params: list[nn.Parameter]
    lr: float
    weight_decay: float
    names: list[str]
    window: Window


def parameter_groups(
    program: Program, lr: float, *, weight_decay: float = 0.0, step: int | None = None
) -> list[ParameterGroup]:
    """The parameters of `program.module()` that train, in groups of one learning rate and one window.

    lr: of a parameter with rate 1. weight_decay: of weight matrices; norms, biases and parameters under a gradient
    mask get none, since decay would move what the mask holds. step: only what trains at that step; None: all that
    ever does (call `module.advance(step)`, and what does not train yet has no gradient and is passed over).
    """
    module = program.module()
    tensors: dict[str, Any] = dict(module.named_parameters(remove_duplicate=True))
    masked = {n for entry in program.journal for n in entry.masks}
    groups: dict[tuple[float, float, Window], ParameterGroup] = {}
    schedule = program.schedule
    for name, parameter in tensors.items():
        if not program.trains(name, step):
            continue
        names = program.names.get(name, (name,))
        decays = parameter.dim() > 1 and masked.isdisjoint(names)
        window = next((schedule.windows[n] for n in names if n in schedule.windows), (0, None))
        key = (schedule.rate(names), weight_decay if decays else 0.0, window)
        group = groups.setdefault(
            key, {"params": [], "lr": lr * key[0], "weight_decay": key[1], "names": [], "window": window}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise PassError(
            "nothing trains in this program; select something (full, layerwise, …) or add an adapter"
        )
    return list(groups.values())
