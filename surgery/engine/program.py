"""Program: a captured model, its weights under their original names, and the journal of applied passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self, Unpack

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
from surgery.engine.formats import (
    AdaptableOptions,
    AdaptableResult,
    GenerationOptions,
    GenerationResult,
    OnnxOptions,
    OnnxResult,
    StrPath,
)
from surgery.engine.probe import InputSet
from surgery.engine.state import State
from surgery.engine.summary import summary


class Program(State):
    """A captured model with the passes applied to it. Programs are immutable: methods return a new program.

    All programs on one base share its storage. Programs from `without`, `weighted`, `only` and `merge` share the
    adapters of this program and train with it. Programs from `apply`, `combine` and `undo` have copies of them and
    train independently.

    Example:
        >>> program = surgery.load("hf:path/to/model").apply(surgery.Lora(target="attn.*", rank=8))
        >>> module = program.module()  # train it with any loop
        >>> program.merge().export("model.onnx")
    """

    def _repr_html_(self) -> str:
        return summary(self).html()

    # -- changing

    def plan(
        self, *passes: Pass, freeze_base: bool | None = None, data: Sequence[InputSet] = ()
    ) -> PlanReport:
        """Report what `apply` would do, with every refused site and the reason. Nothing is changed.

        Args:
            passes: Passes to plan, in order.
            freeze_base: As for `apply`.
            data: As for `apply`.

        Raises:
            TargetError: A target names no site.
            PassError: The passes cannot be applied together, or an argument is not a pass.
        """
        return plan(self, passes, freeze_base, data)

    def apply(
        self,
        *passes: Pass,
        freeze_base: bool | None = None,
        verify: bool = True,
        data: Sequence[InputSet] = (),
    ) -> Self:
        """The program with passes applied.

        The passes are applied in the given order, except where they declare another one: passes that create layers come
        before adapters, for example.

        On a merged program, they start from the merged weights: these are the weights of a new base, and the merge can
        no longer be undone in the result.

        Args:
            passes: Passes to apply.
            freeze_base: True freezes all existing parameters first, False does not. None freezes them if a pass adds
                an adapter and neither the passes nor the journal select parameters to train.
            verify: Run the example inputs before and after each pass, and raise PassError if the outputs differ by
                more than the pass declares.
            data: Inputs for passes that measure activations or gradients: a sequence of (args, kwargs). Without data,
                these passes use the example inputs.

        Raises:
            TargetError: A target names no site.
            PassError: A pass is refused at every site, changes the outputs by more than it declares, or cannot be
                combined with the passes that are applied.
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
        """The program with its adapters folded into the base weights; its graph has the original names and nodes.

        The merge is a journal entry, so `undo("merge")` removes it: the base weights are kept, and the merged weights
        are computed when they are read. An adapter that cannot be folded but has a simpler form is converted to that
        form (see `RewritePass.simplify`). Other adapters that cannot be folded stay; the journal entry lists them with
        the reason.

        Adapters on quantized weights are handled as `quantized` says:

        - "keep": their branches stay.
        - "requantize": the weight with the adapters in it is quantized again.
        - "residual": quantized codes plus a low-rank correction. The correction is the rounding error of new codes, or
          the adapters on top of the old codes, whichever leaves the smaller error.
        - "auto": the first of requantize, a correction smaller than the adapters, and keep whose error is within
          `budget`. The error is measured on the outputs of the op; rows of a table count as often as they are read, and
          an expert by the tokens routed to it. Parts of a weight that the data never use (a row that is never read) are
          compared by their values instead, against the same budget.

        Args:
            in_place: Fold into the base's own storage. It needs half the memory, but cannot be undone in memory, and
                changes every program on this base.
            verify: Run the example inputs before and after, and raise PassError if the outputs differ by more than
                `merge_tolerance`.
            quantized: Treatment of adapters on quantized weights.
            budget: Largest part of the adapters' contribution to the outputs of an op that may be lost. It limits
                "auto", and determines the rank of a correction.
            data: Inputs to measure that error on: a sequence of (args, kwargs). The example inputs by default.

        Raises:
            PassError: No adapter can be folded, or the outputs differ by more than the tolerance.
            JournalError: An adapter cannot be folded in place.
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
        """The program with several adapters of one kind combined into one.

        The journal entry of the result states how far its outputs are from those of the weighted sum of the adapters.

        Args:
            weights: Name of an adapter, as in `undo`, -> its weight in the combination. Weights set by `weighted` are
                ignored.
            method: Combination method, by PEFT's names: "cat" is the exact weighted sum, "svd" its best approximation
                of rank `rank`; for the others see surgery.engine.contract.combination.Combination.
            label: Label of the result.
            rank: Rank of the result, for the svd methods; the largest rank of the sources by default.
            density: Fraction of values that the ties, dare and magnitude_prune methods keep.
            majority: Rule that the ties methods elect a sign by: "total" value or "frequency".
            seed: Seed of the values that the dare methods drop.
            keep: Keep the sources in the program, switched off.

        Raises:
            PassError: The adapters cannot be combined by this method; the message names the place.
            JournalError: The program has no such adapter.
        """
        how = Combination(method, rank, density, majority, seed)
        return combine(self, weights, how, label, keep)

    def undo(self, name: str) -> Self:
        """The program without a pass. Other trained parameters keep their values.

        Args:
            name: An id ("lora:film"), a label ("film") or a pass name ("lora": every application of it).

        Raises:
            JournalError: The program has no such pass, a later pass depends on it, or the base was merged in place or
                released from memory.
        """
        return undo(self, name)

    def undo_all(self) -> Self:
        """The base without any pass, bit for bit as it was captured.

        Raises:
            JournalError: The base was merged in place or released from memory.
        """
        check_undoable(self, "undo")
        return type(self)(self.base)

    def release(self) -> int:
        """Free base weights that this program no longer reads, such as weights that have been quantized.

        Every program on this base loses these weights, so a pass that replaced them can no longer be undone in memory.
        It can still be undone after the program has been saved and loaded. Weights that are in no file are not freed.

        Returns:
            Number of freed bytes.

        Raises:
            PassError: The base's weights are not in memory, or were merged in place.
        """
        return release(self)

    # -- writing

    def write(self, path: StrPath, format: str, **options: Any) -> Any:
        """Write the program in a named format; plugins register formats with the hook `surgery_writers`.

        Args:
            path: File or directory to write.
            format: Name of the format, such as "surgery", "hf" or "onnx".
            options: Options of the format. They are not checked by type checkers, since plugins define formats; `save`,
                `export`, `export_adaptable` and `export_generation` are.

        Returns:
            The result of the format's writer.

        Raises:
            PluginError: No plugin writes this format; the message lists those that exist.
        """
        return self.base.plugins.writer(format)(self, path, **options)

    def save(self, path: StrPath, *, standalone: bool = False, overwrite: bool = False) -> None:
        """Write a directory that `surgery.load` reads; see surgery.store.saved.save.

        Args:
            path: Directory to write.
            standalone: Include the base as a transformers directory, so that loading does not need the original.
            overwrite: Replace an existing directory.

        Raises:
            SurgeryError: The path exists, writing fails, or the program cannot be saved.
        """
        self.write(path, "surgery", standalone=standalone, overwrite=overwrite)

    def live(self) -> nn.Module:
        """A module of the base's own class with this program's passes in its layers; see surgery.live.model.live.

        The module keeps its own forward, generate and attributes, and shares this program's tensors.

        Raises:
            PassError: A pass does not act within single layers, or the weights are not in memory.
        """
        return self.base.plugins.first("surgery_live", program=self)

    def export(self, path: StrPath, **options: Unpack[OnnxOptions]) -> OnnxResult:
        """Write an ONNX model and compare onnxruntime with the program; see surgery.export.program.export_program.

        Args:
            path: File to write.
            options: Options of `export_program`, see surgery.engine.formats.OnnxOptions.

        Returns:
            The ExportReport.

        Raises:
            ExportError: The export or the comparison fails.
            MissingExtraError: The onnx extra is not installed.
        """
        return self.write(path, "onnx", **options)

    def export_adaptable(self, path: StrPath, **options: Unpack[AdaptableOptions]) -> AdaptableResult:
        """Write one ONNX model and a file for each LoRA adapter; see surgery.export.adaptable.export_adaptable."""
        return self.write(path, "onnx-adapters", **options)

    def export_generation(self, path: StrPath, **options: Unpack[GenerationOptions]) -> GenerationResult:
        """Write an ONNX language model for generation with a cache; see surgery.export.generation.export_generation."""
        return self.write(path, "onnx-generate", **options)


__all__ = ["Program"]
