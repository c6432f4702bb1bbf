"""Program: a captured model, its weights by their original names, and the journal of what was done to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import nn

from surgery.engine.change.apply import apply, plan
from surgery.engine.change.combine import combine
from surgery.engine.change.merge import merge
from surgery.engine.change.plans import PlanReport
from surgery.engine.change.release import release
from surgery.engine.change.undo import check_undoable, undo
from surgery.engine.contract.base import Pass
from surgery.engine.contract.combination import Combination, Majority
from surgery.engine.contract.folds import How
from surgery.engine.probe import InputSet
from surgery.engine.state import State


class Program(State):
    """An immutable program; every method that changes something returns a new one.

    All programs on one base share its storage. `without`, `weighted`, `only` and `merge` are views of the same
    adapters and train together; `apply` and `undo` give programs that train apart.
    """

    # -- changing

    def plan(
        self, *passes: Pass, freeze_base: bool | None = None, data: Sequence[InputSet] = ()
    ) -> PlanReport:
        """What `apply` would do, with every refusal; nothing is changed."""
        return plan(self, passes, freeze_base, data)

    def apply(
        self,
        *passes: Pass,
        freeze_base: bool | None = None,
        verify: bool = True,
        data: Sequence[InputSet] = (),
    ) -> Self:
        """The program with the passes applied in order (that which they themselves require, else as given).

        data: sets of (args, kwargs) for passes that measure something; the example inputs where there is none.

        freeze_base: whether what is there now stops training first; None freezes it where a pass adds
        parameters and neither the passes nor the journal select what trains. verify: run the example inputs
        before and after, and hold each pass to the numerics that it declares.
        Raises TargetError, PassError.
        """
        return apply(self, passes, freeze_base, verify, data)

    def merge(
        self,
        *,
        in_place: bool = False,
        verify: bool = True,
        quantized: How = "keep",
        budget: float = 0.1,
        data: Sequence[InputSet] = (),
    ) -> Self:
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
        return merge(self, in_place, verify, quantized, budget, data)

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
    ) -> Self:
        """The program with one adapter in the place of several of its kind.

        weights: of each, by its name as in `undo`; what `weighted` said of them does not count. method and what
        follows: see surgery.engine.contract.combination.Combination. label: the name of the result. keep: the sources stay, left out.
        The journal says how far the outputs are from those of the weighted sum, which `cat` has to give.
        Raises PassError for adapters that cannot be combined so, naming the place.
        """
        how = Combination(method, rank, density, majority, seed)
        return combine(self, weights, how, label, keep)

    def undo(self, name: str) -> Self:
        """The program as if a pass had not been applied; what else was trained is kept.

        name: an id ("lora:film"), a label ("film") or a pass name ("lora": every application of it).
        Raises JournalError where there is none, or a later entry stands on it.
        """
        return undo(self, name)

    def undo_all(self) -> Self:
        """The base, bit for bit."""
        check_undoable(self, "undo")
        return type(self)(self.base)

    def release(self) -> int:
        """Give back the memory of base weights that nothing of this program reads (quantized ones, say), in bytes.

        Every program on this base loses them: nothing that stands in their place can be undone any more in memory. A
        saved directory still undoes it, once loaded. Weights that no file holds stay. Raises PassError where there is
        nothing in memory.
        """
        return release(self)

    # -- writing

    def write(self, path: Any, format: str, **options: Any) -> Any:
        """Write the program in a format by its name, as the plugins of its base know it (`surgery_writers`).

        Raises:
            PluginError: no plugin writes this format; the message lists those that exist.
        """
        return self.base.plugins.writer(format)(self, path, **options)

    def save(self, path: Any, *, standalone: bool = False, overwrite: bool = False) -> None:
        """Write a directory that `surgery.load` reads; see surgery.store.saved.save."""
        self.write(path, "surgery", standalone=standalone, overwrite=overwrite)

    def live(self) -> nn.Module:
        """The base's own class and forward with this program's passes in place; see surgery.live.model.live."""
        return self.base.plugins.hook.surgery_live(program=self)

    def export(self, path: Any, **options: Any) -> Any:
        """Write ONNX with parity checked and provenance kept; see surgery.export.program.export_program."""
        return self.write(path, "onnx", **options)

    def export_adaptable(self, path: Any, **options: Any) -> Any:
        """Write one ONNX model and a file for each LoRA; see surgery.export.adaptable.export_adaptable."""
        return self.write(path, "onnx-adapters", **options)

    def export_generation(self, path: Any, **options: Any) -> Any:
        """Write a language model for generation; see surgery.export.generation.export_generation."""
        return self.write(path, "onnx-generate", **options)


__all__ = ["Program"]
