"""Which parameters train when, and how fast: what selections decided, for modules and optimisers; and what passes do
to tensors of their own as training goes on."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from surgery.errors import PassError
from surgery.journal import Entry, SiteRecord

if TYPE_CHECKING:
    from surgery.pass_base import RewritePass
    from surgery.program import Program

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


@dataclass
class Paced:
    """An entry whose tensors change as training goes on. done: what of `due` they were last changed for."""

    pass_: RewritePass
    sites: tuple[SiteRecord, ...]
    done: float | None = None

    def advance(self, module: nn.Module, step: int) -> None:
        """Let the pass change its tensors in a module for a step."""
        due = self.pass_.due(step)
        if due == self.done:
            return

        def get(name: str) -> Tensor:
            return operator.attrgetter(name)(module).detach()

        places = [
            (record.decided, get(record.key.owner), {n: get(full) for n, full in record.tensors.items()})
            for record in self.sites
        ]
        with torch.no_grad():
            self.pass_.pace(step, places)
        self.done = due


def trained_values(size: int, mask: Tensor | None) -> int:
    """How many values of a parameter of that size train under a mask (see Selection.masks)."""
    return size if mask is None else int(mask.sum()) * (size // mask.numel())


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
    """The parameters of `program.module()` that train, in groups of one learning rate, decay and window.

    Give them to one optimiser, and call `module.advance(step)` before each step: what does not train then has no
    gradient, and optimisers pass over what has none, momentum and all. A learning-rate scheduler scales each
    group from its own rate.

    lr: of a parameter with rate 1. weight_decay: of weight matrices; norms, biases and parameters under a gradient
    mask get none. A mask makes gradients zero, and an optimiser that moves a value by its gradient's history
    alone (SGD, Adam, AdamW and their kin) then leaves it bit for bit; decay moves it without a gradient, so with
    `module.parameters()` in place of these groups, give the optimiser no decay. step: only what trains at that
    step; None: all that ever does.
    """
    module = program.module()
    schedule = program.schedule
    groups: dict[tuple[float, float, Window], ParameterGroup] = {}
    tensors: dict[str, Any] = dict(module.named_parameters())
    read = program.parameter_sizes().keys()
    for name, parameter in tensors.items():
        names = program.names.get(name, (name,))
        if not program.trains(name, step) or read.isdisjoint(names):
            continue
        decays = parameter.dim() > 1 and schedule.masks.keys().isdisjoint(names)
        key = (schedule.rate(names), weight_decay if decays else 0.0, schedule.window(names))
        group = groups.setdefault(
            key, {"params": [], "lr": lr * key[0], "weight_decay": key[1], "names": [], "window": key[2]}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        when = "" if step is None else f" at {schedule.unit} {step}"
        raise PassError(
            f"nothing trains in this program{when}; select something (full, layerwise, …) or add an adapter"
        )
    return list(groups.values())
