"""Program: a captured model, its weights by their original names, and the journal of what was done to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery import combining, merging, pipeline, replay
from surgery.base import Base
from surgery.capture import Captured
from surgery.capture.shapes import limited
from surgery.combination import Combination, Majority
from surgery.errors import PassError
from surgery.journal import Journal
from surgery.module import ProgramModule
from surgery.pass_base import Pass
from surgery.plans import PassReport, PlanReport
from surgery.probe import InputSet
from surgery.releasing import check_present, release
from surgery.requantizing import How
from surgery.reverting import reverted
from surgery.schedule import Clock, ParameterGroup, Schedule, parameter_groups, trained_values
from surgery.sites import Site, SiteIndex, live_nodes
from surgery.undoing import check_undoable, undo
from surgery.values import folded_entries, folded_of, held_by, state_of
from surgery.view import View


class Program:
    """An immutable program; every method that changes something returns a new one.

    All share the base's storage. `without`, `weighted`, `only` and `merge` are views of the same adapters, trained
    together; `apply` and `undo` give programs that train apart.

    tensors: what passes inserted, by name. changed: base tensors of which this program holds its own copy
    (they train, or were trained). reports: what the last `apply` did, pass by pass. clock: the step that its
    module has been advanced to, shared by its views.
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
        self._graph = graph
        self._train_graph: fx.Graph | None = None
        self._module: ProgramModule | None = None
        self._runner: tuple[int, fx.GraphModule] | None = None
        self._said: tuple[Journal, Schedule, dict[str, str | None]] | None = None

    def __repr__(self) -> str:
        total, trainable = self.count_parameters()
        applied = ", ".join(e.id for e in self.journal) or "nothing applied"
        name = type(self.base.loaded.module).__name__
        return f"<Program of {name}: {total:,} parameters, {trainable:,} trainable; {applied}>"

    # -- seeing

    @property
    def graph(self) -> fx.Graph:
        """The eval graph. Do not edit it: apply a pass."""
        if self._graph is None:
            self._graph = replay.build_graph(self.base, self.journal, self.tensors, self.base.captured)
        return self._graph

    @cached_property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Parameter name -> all names of that tensor, itself included: of the base, and of structural passes."""
        return replay.weight_names(self.base, self.journal, self.tensors)

    @cached_property
    def view(self) -> View:
        """The analysis of the eval graph: sites, attentions, residual branches, blocks, depth."""
        # While nothing structural was added, roles are the base's.
        others = len(self.names) > len(self.base.names) or replay.is_regrouped(self.base, self.journal)
        known = None if others else (self.base.roles, self.base.parts)
        return View(self.graph, self.names, self.base.plugins.weight_ops, known=known)

    @property
    def sites(self) -> SiteIndex:
        """Every use of a weight that a pass can target, with its role."""
        return self.view.sites

    @cached_property
    def captured(self) -> Captured:
        """The base's eval capture, with the bounds of dynamic dimensions that passes have lowered."""
        limits: dict[str, int] = {}
        for entry in replay.live_entries(self.journal):
            for name, high in entry.limits.items():
                limits[name] = min(high, limits.get(name, high))
        return limited(self.base.captured, limits) if limits else self.base.captured

    @property
    def example_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.captured.args, dict(self.captured.kwargs)

    def parameter_names(self) -> list[str]:
        """Every parameter once, by its first name, base first."""
        seen: dict[int, str] = {}
        for name, tensor in {**self.base.tensors, **self.tensors}.items():
            if isinstance(tensor, nn.Parameter):
                seen.setdefault(id(tensor), name)
        return list(seen.values())

    def trains(self, name: str, step: int | None = None) -> bool:
        """Whether a parameter trains, at a step of its schedule or (None) ever."""
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
        """When each parameter trains, how fast, and which of its values: what selections have decided."""
        return self._reading()[1]

    @property
    def put_back(self) -> dict[str, str | None]:
        """What only passes that are left out made train, and the tensor that holds what it was before them."""
        return self._reading()[2]

    def _reading(self) -> tuple[Journal, Schedule, dict[str, str | None]]:
        if self._said is None or self._said[0] is not self.journal:
            out = [e for e in self.journal if e.weight == 0]
            back = reverted(out, self.journal, self.base.names)
            self._said = (self.journal, Schedule.of(self.journal), back)
        return self._said

    def parameter_groups(
        self, lr: float = 1e-3, *, weight_decay: float = 0.0, step: int | None = None
    ) -> list[ParameterGroup]:
        """Groups for any torch optimiser; see surgery.schedule.parameter_groups."""
        return parameter_groups(self, lr, weight_decay=weight_decay, step=step)

    def parameter_sizes(self) -> dict[str, int]:
        """Numbers of values by parameter name; a tied one counts once, a folded adapter not at all, nor a weight
        of the base in whose place a pass put another."""
        tensors = {**self.base.tensors, **self.tensors}
        if any(
            getattr(replay.pass_of(e, self.base.plugins), "lengthens", False)
            for e in folded_entries(self.journal)
        ):
            tensors.update(self.folded())
        base, now = _read(self.base.captured.graph), _read(self.graph)
        sizes = {}
        for name in self.parameter_names():
            names = self.base.names.get(name, (name,))
            gone = name not in self.base.tensors or not base.isdisjoint(names)
            if not (gone and now.isdisjoint(names)):
                sizes[name] = tensors[name].numel()
        return sizes

    def count_parameters(self) -> tuple[int, int]:
        """(all, trainable) numbers of parameters, counted as `parameter_sizes` does; of one under a mask, what it lets
        train."""
        sizes, masks = self.parameter_sizes(), self.schedule.masks
        held = {n: self.tensors[masks[n]] for n in sizes if n in masks}
        trained = (trained_values(size, held.get(n)) for n, size in sizes.items() if self.trains(n))
        return sum(sizes.values()), sum(trained)

    def plan(
        self, *passes: Pass, freeze_base: bool | None = None, data: Sequence[InputSet] = ()
    ) -> PlanReport:
        """What `apply` would do, with every refusal; nothing is changed."""
        return pipeline.plan(self, passes, freeze_base, data)

    # -- changing

    def apply(
        self,
        *passes: Pass,
        freeze_base: bool | None = None,
        verify: bool = True,
        data: Sequence[InputSet] = (),
    ) -> Program:
        """The program with the passes applied in order (that which they themselves require, else as given).

        data: sets of (args, kwargs) for passes that measure something; the example inputs where there is none.

        freeze_base: whether what is there now stops training first; None freezes it where a pass adds
        parameters and neither the passes nor the journal select what trains. verify: run the example inputs
        before and after, and hold each pass to the numerics that it declares.
        Raises TargetError, PassError.
        """
        return pipeline.apply(self, passes, freeze_base, verify, data)

    def merge(
        self,
        *,
        in_place: bool = False,
        verify: bool = True,
        quantized: How = "keep",
        budget: float = 0.1,
        data: Sequence[InputSet] = (),
    ) -> Program:
        """The program with its adapters folded into the base weights: original names, original nodes.

        It is a journal entry: the base weights stay as they are and the folded ones are made when they are
        asked for. What no weight can hold but has a plainer form is put into that, computed now. in_place folds into
        the base's own storage (half the memory, but this cannot be undone in memory, and every program on this base
        sees it). Raises PassError where nothing can be folded.

        quantized: what becomes of adapters on quantized weights. `keep`: their branches stay. `requantize`: new codes
        of the weight with the adapters in it. `residual`: codes and a low-rank correction, of what new codes round away
        or of the adapters beside the old ones. `auto`: the first of requantize, a correction smaller than the adapters,
        and keep that loses at most `budget` of what the adapters add to the op's outputs on the data (the example
        inputs by default): of a linear map, a convolution, the rows of a table as often as they are read, each expert
        by what is sent to it. What the data never use is held to the same budget by the weight's values. The journal
        says it site by site.
        """
        return merging.merge(self, in_place, verify, quantized, budget, data)

    @property
    def merge_tolerance(self) -> float:
        """How far a merge may move the outputs, over their scale: that of the coarsest dtype of the base."""
        return merging.MERGE_TOLERANCE.get(self.precision, 5e-2)

    @property
    def precision(self) -> torch.dtype:
        """The coarsest floating-point dtype of the base's weights."""
        dtypes = {t.dtype for t in self.base.tensors.values() if t.is_floating_point()}
        return max(dtypes, key=lambda d: merging.MERGE_TOLERANCE.get(d, 5e-2), default=torch.float32)

    def without(self, *names: str) -> Program:
        """The same program with adapters left out (their tensors are kept, and shared)."""
        return self.weighted(dict.fromkeys(names, 0.0))

    def weighted(self, weights: Mapping[str, float]) -> Program:
        """The same program with adapters scaled: 1 as trained, 0 left out. Names as in `undo`."""
        journal = self.journal.weighted(weights)
        for entry in journal:
            if entry.kind == "rewrite" and entry.weight not in (0.0, 1.0):
                pass_ = replay.pass_of(entry, self.base.plugins)
                if not getattr(pass_, "can_weigh", False):
                    raise PassError(
                        f"{entry.id}: {entry.pass_name} can be left out (0) or in (1), not scaled"
                    )
        return Program(self.base, journal, self.tensors, self.changed, clock=self.clock)

    def only(self, *names: str) -> Program:
        """The program with just these adapters in."""
        keep = {e.id for name in names for e in self.journal.find(name)}
        adapters = [e.id for e in self.journal if e.kind == "rewrite"]
        return self.weighted({name: float(name in keep) for name in adapters})

    def combine(
        self,
        weights: Mapping[str, float],
        method: str = "svd",
        *,
        label: str,
        rank: int | None = None,
        density: float | None = None,
        majority: Majority = "total",
        seed: int = 0,
        keep: bool = False,
    ) -> Program:
        """The program with one adapter in the place of several of its kind.

        weights: of each, by its name as in `undo`; what `weighted` said of them does not count. method and what
        follows: see surgery.combination.Combination. label: the name of the result. keep: the sources stay, left out.
        The journal says how far the outputs are from those of the weighted sum, which `cat` has to give.
        Raises PassError for adapters that cannot be combined so, naming the place.
        """
        how = Combination(method, rank, density, majority, seed)
        return combining.combine(self, weights, how, label, keep)

    def undo(self, name: str) -> Program:
        """The program as if a pass had not been applied; what else was trained is kept.

        name: an id ("lora:film"), a label ("film") or a pass name ("lora": every application of it).
        Raises JournalError where there is none, or a later entry stands on it.
        """
        return undo(self, name)

    def undo_all(self) -> Program:
        """The base, bit for bit."""
        check_undoable(self, "undo")
        return Program(self.base)

    def release(self) -> int:
        """Give back the memory of base weights that nothing of this program reads (quantized ones, say), in bytes.

        Every program on this base loses them: nothing that stands in their place can be undone any more in memory. A
        saved directory still undoes it, once loaded. Weights that no file holds stay. Raises PassError where there is
        nothing in memory.
        """
        return release(self)

    # -- running

    def module(self) -> ProgramModule:
        """A trainable nn.Module in eval mode; call `.train()` for the graph of train mode.

        Base parameters that train are copied first, so that neither the caller's model nor any other program
        on this base sees the training; `without` and its like, which are the same program, do.
        """
        if self._module is None:
            self.own()
            self._module = self._make_module()
            self._module.advance(self.clock.step)
        return self._module

    def _make_module(self) -> ProgramModule:
        title = type(self.base.loaded.module).__name__
        if self.base.released:
            check_present(self, "the program", _read(self.graph))
        state = self.state()
        schedule = self.schedule
        own = {id(tensor) for tensor in held_by(self).values()}
        trains = [n for n, tensor in state.items() if id(tensor) in own and self.trains(n)]
        masks = {name: self.tensors[mask] for name, mask in schedule.masks.items()}
        paced = replay.paced(self.base, self.journal)
        return ProgramModule(
            state,
            self.base.non_persistent,
            self._graph_of,
            title,
            trains,
            masks,
            schedule,
            self.clock,
            paced,
            self,
        )

    def state(self) -> dict[str, Tensor]:
        """Every parameter and buffer as this program has it, by every name; tied ones are one object."""
        return state_of(self)

    def folded(self) -> dict[str, Tensor]:
        """Base weights that a merge changes, made anew from the base and the adapters."""
        return folded_of(self)

    def own(self) -> None:
        """Give this program its own copy of every base tensor that training can change."""
        if self.base.in_memory:
            for name in self.parameter_sizes():
                if name in self.base.tensors and name not in self.changed and self.trains(name):
                    self.changed[name] = nn.Parameter(self.base.tensors[name].detach().clone())
            for name, tensor in self.base.tensors.items():
                if not isinstance(tensor, nn.Parameter) and name not in self.changed:
                    self.changed[name] = tensor.clone()

    def copies(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inserted and changed tensors, copied: what a derived program trains, this one does not see."""

        def copied(tensor: Tensor) -> Tensor:
            fresh = tensor.detach().clone()
            return nn.Parameter(fresh) if isinstance(tensor, nn.Parameter) else fresh

        return (
            {name: copied(tensor) for name, tensor in self.tensors.items()},
            {name: copied(tensor) for name, tensor in self.changed.items()},
        )

    def _graph_of(self, training: bool) -> tuple[fx.Graph, fx.GraphModule]:
        if not training:
            return self.graph, self.base.captured.graph_module
        return self.train_graph, self.base.train_capture().graph_module

    @property
    def train_graph(self) -> fx.Graph:
        """The graph of train mode. Raises CaptureError where the model cannot be captured in it."""
        captured = self.base.train_capture()
        if self._train_graph is None:
            self._train_graph = replay.build_graph(self.base, self.journal, self.tensors, captured)
        return self._train_graph

    @property
    def graph_module(self) -> fx.GraphModule:
        """The compiled eval graph with this program's tensors, for running rather than training."""
        if self._module is not None:
            return self._module.graph_module(training=False)
        if self._runner is None or self._runner[0] != len(self.changed):
            self._runner = (len(self.changed), self._make_module().graph_module(training=False))
        return self._runner[1]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs in eval mode without gradients; of the example inputs where none are given."""
        if not args and not kwargs:
            args, kwargs = self.example_inputs
        with torch.no_grad():
            return self.graph_module(*args, **kwargs)

    # -- keeping

    def save(self, path: Any, *, standalone: bool = False, overwrite: bool = False) -> None:
        """Write a directory that `surgery.load` reads; see surgery.saved.save."""
        from surgery.saved import save

        save(self, path, standalone=standalone, overwrite=overwrite)

    def live(self) -> nn.Module:
        """The base's own class and forward with this program's passes in place; see surgery.in_place.live."""
        from surgery.in_place.live import live

        return live(self)

    def export_generation(self, path: Any, **options: Any) -> Any:
        """Write a language model for generation; see surgery.export.generation.export_generation."""
        from surgery.export.generation import export_generation

        return export_generation(self, path, **options)

    def export_adaptable(self, path: Any, **options: Any) -> Any:
        """Write one ONNX model and a file for each LoRA; see surgery.export.adaptable.export_adaptable."""
        from surgery.export.adaptable import export_adaptable

        return export_adaptable(self, path, **options)

    def export(self, path: Any, **options: Any) -> Any:
        """Write ONNX with parity checked and provenance kept; see surgery.export.program.export_program."""
        from surgery.export.program import export_program

        return export_program(self, path, **options)


def _read(graph: fx.Graph) -> set[str]:
    """Names of the tensors on which an output of the graph depends."""
    return {str(node.target) for node in live_nodes(graph) if node.op == "get_attr"}


__all__ = ["Program", "Site"]
