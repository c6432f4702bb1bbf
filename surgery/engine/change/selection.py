"""Base class of selections, and the parameters they choose from, with roles and depths."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from surgery.common.errors import PassError, nearest
from surgery.engine.contract.base import Pass
from surgery.engine.contract.selection import Selection
from surgery.engine.probe import Probe
from surgery.engine.state import State
from surgery.graph import targets
from surgery.graph.analysis.depth import layers_of
from surgery.graph.sites import Site
from surgery.graph.view import View


@dataclass(frozen=True)
class Candidates:
    """Parameters that a selection can choose from. A tied parameter is listed under the first of its names.

    Attributes:
        program: The program before the selection.
        targeted: Names of the parameters that the target selected.
        probe: Measurements on the program.
    """

    program: State
    targeted: tuple[str, ...]
    probe: Probe

    @cached_property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """Parameter name -> roles of the sites where it is the weight or the bias. Others are not listed."""
        found: dict[str, dict[str, None]] = {}
        for site in self.program.sites:
            for name in (site.weight, site.bias):
                if name is not None and site.role:
                    found.setdefault(self.first(name), {})[site.role] = None
        return {name: tuple(roles) for name, roles in found.items()}

    @cached_property
    def sites(self) -> dict[str, list[Site]]:
        """Parameter name -> sites where it is the weight."""
        found: dict[str, list[Site]] = {}
        for site in self.program.sites:
            if site.weight is not None:
                found.setdefault(self.first(site.weight), []).append(site)
        return found

    def first(self, name: str) -> str:
        """The first of a parameter's names."""
        return self.program.names.get(name, (name,))[0]

    @cached_property
    def everything(self) -> tuple[str, ...]:
        """Every parameter that can train, of the base and of passes that add weights; without adapters."""
        names = self.program.names
        return tuple(n for n in self.program.parameter_names() if n in names and self.can_train(n))

    def can_train(self, name: str) -> bool:
        """True if a parameter has a floating-point dtype, which packed weights do not."""
        return self._tensor(name).is_floating_point()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return tuple(self._tensor(name).shape)

    def _tensor(self, name: str) -> Tensor:
        own = self.program.tensors.get(name)
        return self.program.base.tensors[name] if own is None else own

    @property
    def fresh(self) -> tuple[str, ...]:
        """Parameters missing from the checkpoint, such as a new head."""
        return self.program.base.fresh

    @property
    def _view(self) -> View:
        """The graph to read depths from: the base's, in which nothing is inserted, unless a pass has added weights."""
        program = self.program
        return program.view if program.names.keys() != program.base.names.keys() else program.base.view

    @cached_property
    def depth(self) -> dict[str, int]:
        """Depth by parameter name: 0 before the first block, then the number of the block, `deepest` after the last.

        In a model without repeated blocks, depth counts the weights on the longest path through the model. Parameters
        that the outputs do not depend on are not listed.
        """
        view = self._view
        found = view.depth if view.blocks else layers_of(view.graph, view.calls)
        depth: dict[str, int] = {}
        for name, deep in found.items():
            if name in self.program.names:
                first = self.first(name)
                depth[first] = min(deep, depth.get(first, deep))
        return {n: depth[n] for n in self.everything if n in depth}

    @cached_property
    def deepest(self) -> int:
        """Depth after the last block: that of the head and the final norm."""
        view = self._view
        found = view.depth if view.blocks else layers_of(view.graph, view.calls)
        blocks = sum(len(row) for row in view.blocks)
        return blocks + 1 if blocks else max(found.values(), default=0)

    @cached_property
    def by_depth(self) -> dict[int, list[str]]:
        """Targeted parameters by depth, the deepest first.

        Parameters missing from the checkpoint have to train, so they are included whatever the target is, with the
        depth of the head.
        """
        fresh, targeted = set(self.fresh), set(self.targeted)
        found: dict[int, list[str]] = {}
        for name in self.everything:
            deep = self.deepest if name in fresh else self.depth.get(name)
            if deep is not None and name in fresh | targeted:
                found.setdefault(deep, []).append(name)
        return dict(sorted(found.items(), reverse=True))

    def rates(self, names: Iterable[str], decay: float) -> dict[str, float]:
        """Learning rates of parameters, multiplied by `decay` for every level below the head; empty if decay is 1."""
        deep = {n: d for d, group in self.by_depth.items() for n in group}
        return {n: decay ** (self.deepest - deep[n]) for n in names} if decay != 1 else {}

    def only(self, names: Collection[str]) -> dict[str, bool]:
        """Decision that these parameters train and all others of the base do not; it does not name adapters."""
        return {name: name in names for name in self.everything}

    def named(self, pattern: str) -> tuple[str, ...]:
        """Names of the parameters that a target selects.

        Raises:
            TargetError: The target matches no parameter.
        """
        return select(self.program, pattern)


def roles_of(program: State) -> dict[str, str]:
    """Parameter name -> role of the site where it is the weight or the bias."""
    return {n: site.role for site in program.sites for n in (site.weight, site.bias) if n is not None}


def select(program: State, pattern: str) -> tuple[str, ...]:
    """Names of the program's parameters that a target selects; raises TargetError if it matches none."""
    names = tuple(program.parameter_names())
    aliases = program.names
    cross = {n for site in program.sites if site.cross for n in (site.weight, site.bias) if n is not None}
    return targets.select_parameters(names, roles_of(program), pattern, lambda n: aliases.get(n, (n,)), cross)


def checked(program: State, who: str, selection: Selection) -> Selection:
    """Validate a selection and list its parameters under their first names.

    Args:
        program: The program.
        who: Name of the pass, for the messages.
        selection: The selection.

    Raises:
        PassError: It names an unknown parameter, or its decisions contradict each other.
    """
    names = set(program.parameter_names())

    def first(name: str) -> str:
        found = program.names.get(name, (name,))[0]
        if found not in names:
            raise PassError(
                f"{who} selects {name!r}, which is not a parameter of the program{nearest(name, names)}"
            )
        return found

    if selection.unit not in ("step", "epoch"):
        raise PassError(f"{who}: the unit of the schedule is {selection.unit!r}; use 'step' or 'epoch'")
    trains = {first(n): bool(t) for n, t in selection.trains.items()}
    rates = {first(n): float(rate) for n, rate in selection.rates.items()}
    windows = {first(n): window for n, window in selection.windows.items()}
    masks = {first(n): mask for n, mask in selection.masks.items()}
    for name in (*rates, *windows, *masks):
        if not trains.get(name):
            raise PassError(
                f"{who} gives {name} a rate, window or mask but does not let it train; let it train, or leave these out"
            )
    for name, rate in rates.items():
        if not (rate > 0 and math.isfinite(rate)):
            raise PassError(f"{who} gives {name} the rate {rate}; give a positive finite number")
    for name, (begin, end) in windows.items():
        if begin < 0 or (end is not None and end <= begin):
            raise PassError(
                f"{who} gives {name} the window {begin} to {end}, which contains no step; give a later end"
            )
    for name, mask in masks.items():
        _check_mask(program, who, name, mask)
    return Selection(trains, rates, windows, selection.unit, masks)


def _check_mask(program: State, who: str, name: str, mask: Tensor) -> None:
    """Raise PassError if a mask has the wrong dtype or shape, or is False everywhere."""
    own = program.tensors.get(name)
    shape = (program.base.tensors[name] if own is None else own).shape
    fits = mask.dim() == len(shape) and all(m in (1, s) for m, s in zip(mask.shape, shape, strict=True))
    if mask.dtype != torch.bool or not fits:
        raise PassError(
            f"{who}: the mask of {name} is {mask.dtype} {tuple(mask.shape)}; it has to be torch.bool, of the shape "
            f"{tuple(shape)} or with size 1 along any axis"
        )
    if not mask.any():
        raise PassError(f"{who}: the mask of {name} is False everywhere; freeze the parameter instead")


class SelectPass(Pass):
    """A pass that decides which parameters train, when, and at which learning rate. It does not change the graph.

    The last selection that names a parameter wins.

    Attributes:
        exclusive: True if the pass names every parameter of the base, so that no other parameter of it trains.
    """

    exclusive: ClassVar[bool] = False
    default_target: ClassVar[str | None] = None

    def select(self, parameters: tuple[str, ...]) -> dict[str, bool]:
        """Decide which of the targeted parameters train.

        Args:
            parameters: Names of the parameters that the target selected.

        Returns:
            Parameter name -> True if it trains, False if it is frozen.
        """
        raise NotImplementedError

    def selection(self, candidates: Candidates) -> Selection:
        """The complete decision; override it in a pass that needs more than names.

        Args:
            candidates: The program's parameters, with roles and depths.
        """
        return Selection(self.select(candidates.targeted))
