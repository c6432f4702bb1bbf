"""A program as data: base, journal and tensors, and what they say. `state.State` adds values and running."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from surgery.capture import Captured
from surgery.capture.shapes import limited
from surgery.common.errors import JournalError, PassError
from surgery.engine import replay
from surgery.engine.base import Base
from surgery.engine.change.plans import PassReport
from surgery.engine.contract.base import RewritePass
from surgery.engine.contract.numerics import MERGE_TOLERANCE
from surgery.engine.journal import Journal
from surgery.engine.module import ProgramModule
from surgery.engine.restore import reverted
from surgery.engine.schedule import Clock, Schedule
from surgery.graph.sites import SiteIndex
from surgery.graph.view import View


class ProgramData:
    """A program as data, with what can be read from it. `State` adds values and running, `Program` the verbs.

    Attributes:
        base: The captured model, which no pass changes.
        journal: The applied passes, in order.
        tensors: Inserted tensors, by name.
        changed: Own copies of base tensors that train or were trained, by name.
        reports: Results of the last `apply`, one for each pass.
        clock: Step that the program's module has been advanced to, shared with the programs that are views of it.
        labels: Names of the classes of an output, by the output's name; from the configuration or from training data.
    """

    def __init__(
        self,
        base: Base,
        journal: Journal | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        changed: dict[str, Tensor] | None = None,
        graph: fx.Graph | None = None,
        reports: tuple[PassReport, ...] = (),
        clock: Clock | None = None,
    ) -> None:
        self.base = base
        self.journal = journal or Journal()
        self.tensors: dict[str, Tensor] = dict(tensors or {})
        self.changed: dict[str, Tensor] = changed if isinstance(changed, dict) else {}
        self.reports = reports
        self.clock = clock or Clock()
        self.labels: dict[str, tuple[str, ...]] = dict(base.labels)
        self._graph = graph
        self._train_graph: fx.Graph | None = None
        self._module: ProgramModule | None = None
        self._runner: tuple[int, fx.GraphModule] | None = None
        self._said: tuple[Journal, Schedule, dict[str, str | None]] | None = None

    def derive(
        self,
        journal: Journal | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        changed: dict[str, Tensor] | None = None,
        graph: fx.Graph | None = None,
        reports: tuple[PassReport, ...] = (),
        clock: Clock | None = None,
    ) -> Self:
        """A program of the same class on the same base.

        Args:
            journal: Its journal; this program's by default.
            tensors: Its inserted tensors, by name; this program's by default.
            changed: Its own copies of base tensors; by default the dictionary is shared with this program.
            graph: Its eval graph, if it has been built already.
            reports: Results of the passes applied to it.
            clock: Its training step; by default it counts its own steps from 0.
        """
        made = type(self)(
            self.base,
            self.journal if journal is None else journal,
            self.tensors if tensors is None else tensors,
            self.changed if changed is None else changed,
            graph,
            reports,
            clock,
        )
        made.labels = dict(self.labels)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """The data without what is derived from them: graphs hold functions that cannot be pickled."""
        return {
            "base": self.base, "journal": self.journal, "tensors": self.tensors, "changed": self.changed,
            "clock": self.clock, "labels": self.labels, "reports": (),
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A program on the same base with copies of all tensors, which trains independently of this one."""
        tensors = {name: copy.deepcopy(tensor, memo) for name, tensor in self.tensors.items()}
        changed = {name: copy.deepcopy(tensor, memo) for name, tensor in self.changed.items()}
        return self.derive(
            None, tensors, changed, self._graph, self.reports, clock=copy.deepcopy(self.clock, memo)
        )

    def forget(self) -> None:
        """Drop what is derived from base and journal, after the base has changed."""
        for name in ("names", "view", "captured"):
            self.__dict__.pop(name, None)
        self._graph = self._train_graph = self._module = self._runner = self._said = None

    # -- reading

    @property
    def graph(self) -> fx.Graph:
        """The eval graph. Do not edit it; apply a pass instead."""
        if self._graph is None:
            self._graph = replay.build_graph(self.base, self.journal, self.tensors, self.base.captured)
        return self._graph

    @cached_property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Parameter name -> all names of that tensor, for the base and for passes that add weights."""
        return replay.weight_names(self.base, self.journal, self.tensors)

    @cached_property
    def view(self) -> View:
        """The analysis of the eval graph: sites, attentions, residual branches, blocks, depth."""
        # Roles of the base stay valid until a pass adds weights or replaces ops, and are not derived again.
        others = len(self.names) > len(self.base.names) or replay.is_regrouped(self.base, self.journal)
        known = None if others else (self.base.roles, self.base.parts, self.base.cross)
        return View(self.graph, self.names, self.base.plugins.weight_ops, known=known)

    @property
    def sites(self) -> SiteIndex:
        """All uses of a weight in the eval graph, with their roles."""
        return self.view.sites

    @cached_property
    def captured(self) -> Captured:
        """The base's eval capture, with the upper bounds of dynamic dimensions that passes have lowered."""
        limits: dict[str, int] = {}
        for entry in replay.live_entries(self.journal):
            for name, high in entry.limits.items():
                limits[name] = min(high, limits.get(name, high))
        return limited(self.base.captured, limits) if limits else self.base.captured

    @property
    def example_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Example inputs of the model, as (args, kwargs)."""
        return self.captured.args, dict(self.captured.kwargs)

    def parameter_names(self) -> list[str]:
        """First name of every parameter: those of the base, then inserted ones. A tied parameter is listed once."""
        seen: dict[int, str] = {}
        for name, tensor in {**self.base.tensors, **self.tensors}.items():
            if isinstance(tensor, nn.Parameter):
                seen.setdefault(id(tensor), name)
        return list(seen.values())

    def trains(self, name: str, step: int | None = None) -> bool:
        """True if a parameter trains.

        Args:
            name: Name of the parameter.
            step: Training step, in the unit of the schedule; None: at any step.
        """
        own = self.tensors.get(name)
        tensor = self.base.tensors.get(name) if own is None else own
        if tensor is not None and not (tensor.is_floating_point() or tensor.is_complex()):
            return False
        names = self.names.get(name, (name,))
        if names[0] in self.put_back or (step is not None and not self.schedule.trains(names, step)):
            return False
        return self.journal.trains(names, isinstance(tensor, nn.Parameter))

    @property
    def schedule(self) -> Schedule:
        """Training window, learning rate and gradient mask of each parameter, as selections have decided."""
        return self._reading()[1]

    @property
    def dormant(self) -> bool:
        """True if passes were applied and all of them are switched off, so that the program is its base again."""
        acting = [e for e in self.journal if e.kind != "merge" and not e.auto]
        return bool(acting) and all(e.weight == 0 for e in acting)

    @property
    def put_back(self) -> dict[str, str | None]:
        """Parameters that only entries of weight 0 let train, so that they have their earlier values again.

        Parameter name -> name of the tensor with the earlier value; None for the base's value.
        """
        return self._reading()[2]

    def _reading(self) -> tuple[Journal, Schedule, dict[str, str | None]]:
        if self._said is None or self._said[0] is not self.journal:
            out = [e for e in self.journal if e.weight == 0]
            back = reverted(out, self.journal, self.base.names)
            self._said = (self.journal, Schedule.of(self.journal), back)
        return self._said

    @property
    def device(self) -> torch.device:
        """The device that the program is on: that of its base's weights. Graph and journal do not depend on it."""
        return self.base.device

    # -- precision

    @property
    def merge_tolerance(self) -> float:
        """Largest change of the outputs that a merge may cause, relative to their scale; it depends on `precision`."""
        return MERGE_TOLERANCE.get(self.precision, 5e-2)

    @property
    def precision(self) -> torch.dtype:
        """The coarsest floating-point dtype of the base's weights."""
        dtypes = {t.dtype for t in self.base.tensors.values() if t.is_floating_point()}
        return max(dtypes, key=lambda d: MERGE_TOLERANCE.get(d, 5e-2), default=torch.float32)

    # -- views of the same adapters

    def without(self, *names: str) -> Self:
        """The program with adapters switched off. Their tensors are kept and shared with this program.

        Args:
            names: Names of adapters, as in `undo`.

        Raises:
            JournalError: The program has no such adapter.
        """
        return self.weighted(dict.fromkeys(names, 0.0))

    def weighted(self, weights: Mapping[str, float]) -> Self:
        """The program with adapters scaled; it shares this program's tensors.

        Args:
            weights: Name of an adapter, as in `undo`, -> its scale: 1 as trained, 0 off.

        Raises:
            JournalError: The program has no such adapter, or a weight is not a finite number.
            PassError: The pass of an adapter supports only 0 and 1.
        """
        journal = self.journal.weighted(weights)
        for entry in journal:
            if entry.kind == "rewrite" and entry.weight not in (0.0, 1.0):
                pass_ = replay.pass_of(entry, self.base.plugins)
                if not (isinstance(pass_, RewritePass) and pass_.effect.scalable):
                    raise PassError(
                        f"{entry.id}: {entry.pass_name} cannot be scaled; give it the weight 0 (off) or 1 (on)"
                    )
        return self.derive(journal, clock=self.clock)

    def only(self, *names: str) -> Self:
        """The program with only these adapters switched on; without names, none.

        Args:
            names: Names of adapters, as in `undo`.

        Raises:
            JournalError: The program has no such adapter.
        """
        keep = {e.id for name in names for e in self.journal.find(name)}
        adapters = [e.id for e in self.journal if e.kind == "rewrite"]
        return self.weighted({name: float(name in keep) for name in adapters})


def check_present(program: ProgramData, what: str, read: Collection[str] | None = None) -> None:
    """Raise JournalError if base weights that are needed have been released from memory.

    Args:
        program: The program.
        what: The operation that needs them, for the message.
        read: Names of the weights that are needed; None: all of the base.
    """
    gone = program.base.released if read is None else program.base.released.intersection(read)
    if gone:
        raise JournalError(f"{what}: {min(gone)} was released from memory; load the saved directory again")
