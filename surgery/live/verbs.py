"""Surgery on a live module: applies, removes, scales, merges and saves passes that act on single layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import nn

from surgery.capture import LoadedModel, LoadOptions, trace
from surgery.capture.reference import with_patches
from surgery.common.errors import CaptureError, LoadError, PassError, TargetError
from surgery.common.plugins import Plugins, make_plugin_manager
from surgery.engine.base import Base
from surgery.engine.change.plans import PlanReport
from surgery.engine.contract.base import Pass
from surgery.engine.formats import CombineOptions
from surgery.engine.probe import InputSet
from surgery.engine.program import Program
from surgery.engine.replay import live_entries, pass_of
from surgery.live.capture import loaded_of, watch
from surgery.live.checkpoint import offer
from surgery.live.checks import refuse_caches, run_live, verify_insertion, verify_merge
from surgery.live.fallback import heads, pretend
from surgery.live.follow import follow
from surgery.live.layer import Layers
from surgery.live.mixed_batch import rows_of
from surgery.live.reference import sourced
from surgery.live.state import ATTRIBUTE, LiveState, sharing, state_of
from surgery.store.diffusers import write_diffusers
from surgery.store.hf import write_hf
from surgery.store.saved import load_saved


def apply_(
    model: nn.Module,
    *passes: Pass,
    inputs: Any = None,
    dynamic: Any = None,
    example: Mapping[str, int] | None = None,
    freeze_base: bool | None = None,
    verify: bool = True,
    data: Sequence[InputSet] = (),
    plugins: Plugins | None = None,
) -> Program:
    """Apply passes that act on single layers to a live module, in place.

    The first call captures the model, from a copy over the same parameters. Roles, ties, refusals and the journal are
    therefore those of `surgery.load(...).apply(...)`. Then each targeted layer gets a rewritten forward, in a subclass
    of its own class, and the new parameters. Everything else stays as it was: the model's forward, generate and caches,
    gradient checkpointing, `isinstance`, attributes.

    Base parameters that the passes let train are replaced by copies, so that `remove_` restores the model bit for bit.
    Create the optimizer after this call.

    If the model cannot be captured, targets by path still work, but roles do not.

    Args:
        model: The module to change.
        passes: Passes to apply, in order.
        inputs: Example inputs, as for `surgery.capture`; a transformers model needs none.
        dynamic: Dynamic dimensions, as for `surgery.capture`.
        example: Sizes of the example inputs of a transformers model, by dimension name.
        freeze_base: True freezes all existing parameters first, False does not; None as for `Program.apply`.
        verify: Compare the outputs on the example inputs before and after with the change that the passes declare.
        data: Inputs for passes that measure activations or gradients: a sequence of (args, kwargs).
        plugins: Plugin manager; by default one with all installed plugins.

    Returns:
        The program of the module.

    Raises:
        TargetError: A target names no site.
        PassError: A pass is refused, does not act within single layers, or changes the outputs by more than it
            declares. The model is unchanged then.
    """
    if not passes and freeze_base is None:
        raise PassError("no pass was given; `surgery passes` lists them")
    state = state_of(model) or _state(model, inputs, dynamic, example or {}, plugins)
    state.switch.free()
    state.refuse(p for p in passes if isinstance(p, Pass))
    follow(state, model)
    program = state.program
    check = verify and not state.uncaptured
    try:
        adapted = program.apply(*passes, freeze_base=freeze_base, verify=check, data=data)
    except TargetError as error:
        raise (_without_roles(error, state) if state.uncaptured else error) from None
    refuse_caches(model, adapted)
    adapted = sharing(adapted, program)
    state.adopt(model, adapted)
    model.__dict__[ATTRIBUTE] = state
    offer(model, state)
    if check:
        try:
            verify_insertion(model, state, program)
        except PassError:
            state.adopt(model, program)
            offer(model, state)
            raise
    return adapted


def remove_(model: nn.Module, *names: str) -> Program:
    """Undo passes in a live module, bit for bit. Other trained parameters keep their values.

    Args:
        model: The live module.
        names: Names of passes, as for `Program.undo`; without names, all passes are undone.

    Returns:
        The program without these passes.

    Raises:
        JournalError: The module has no such pass, or a later pass depends on it.
        PassError: No pass has been applied to the module.
    """
    state = _known(model)
    state.switch.free()
    program = state.program
    if names:
        undone = program
        for name in names:
            undone = undone.undo(name)
        undone = sharing(undone, program)
        if not undone.journal.entries:
            # Buffers that moved in training belong to the passes, so the model gets the base's own.
            undone.changed = {n: t for n, t in undone.changed.items() if isinstance(t, nn.Parameter)}
    else:
        undone = program.undo_all()
    state.adopt(model, undone)
    offer(model, state)
    if not undone.journal.entries:
        del model.__dict__[ATTRIBUTE]
    return undone


def plan_(
    model: nn.Module,
    *passes: Pass,
    inputs: Any = None,
    dynamic: Any = None,
    example: Mapping[str, int] | None = None,
    freeze_base: bool | None = None,
    data: Sequence[InputSet] = (),
    plugins: Plugins | None = None,
) -> PlanReport:
    """Report what `apply_` would do, with every refused site and the reason. The module is not changed.

    Args:
        model: The module.
        passes: Passes to plan, in order.
        inputs: As for `apply_`.
        dynamic: As for `apply_`.
        example: As for `apply_`.
        freeze_base: As for `apply_`.
        data: As for `apply_`.
        plugins: As for `apply_`.

    Raises:
        TargetError: A target names no site.
        PassError: A pass does not act within single layers, or the passes cannot be applied together.
    """
    state = state_of(model) or _state(model, inputs, dynamic, example or {}, plugins)
    state.refuse(passes)
    return state.program.plan(*passes, freeze_base=freeze_base, data=data)


def program_of(model: nn.Module) -> Program:
    """The program of a live module, over the module's own tensors, for saving, merging or exporting.

    For a fully sharded model, the program gets a copy of the current values, and every process has to call this.

    Args:
        model: A module that `apply_` or `load_` changed, or that `Program.live` returned.

    Raises:
        PassError: No pass has been applied to the module.
    """
    state = _known(model)
    state.gather(model)
    return state.program


def weight_(model: nn.Module, weights: Mapping[str, float]) -> Program:
    """Scale adapters of a live module.

    Args:
        model: The live module.
        weights: Name of an adapter, as in `Program.undo`, -> its scale: 1 as trained, 0 off.

    Returns:
        The program of the module.

    Raises:
        JournalError: The module has no such adapter, or a weight is not a finite number.
        PassError: The pass of an adapter supports only 0 and 1.
    """
    state = _known(model)
    state.switch.free()
    state.adopt(model, sharing(state.program.weighted(weights), state.program))
    return state.program


def combine_(
    model: nn.Module,
    weights: Mapping[str, float],
    method: str = "svd",
    *,
    label: str,
    **options: Unpack[CombineOptions],
) -> Program:
    """Combine several adapters of a live module into one.

    Args:
        model: The live module.
        weights: Name of an adapter, as in `Program.undo`, -> its weight in the combination.
        method: Combination method, as for `Program.combine`.
        label: Label of the result.
        options: Further options of `Program.combine`.

    Returns:
        The program of the module.

    Raises:
        PassError: The adapters cannot be combined by this method.
        JournalError: The module has no such adapter.
    """
    state = _known(model)
    state.switch.free()
    before = state.program
    combined = before.combine(weights, method, label=label, **options)
    state.adopt(model, sharing(combined, before))
    return state.program


@contextlib.contextmanager
def using(model: nn.Module, *names: str, weights: Mapping[str, float] | None = None) -> Iterator[nn.Module]:
    """Context manager: only these adapters are switched on inside the block.

    Inside the block the model can be run, trained and saved (with these adapters), but not changed.

    Args:
        model: The live module.
        names: Names of adapters, as in `Program.undo`; without names, all adapters are off.
        weights: Name of an adapter -> its scale inside the block.

    Raises:
        JournalError: The module has no such adapter.
        PassError: No pass has been applied to the module, or an adapter cannot be scaled.
    """
    state = _known(model)
    before = state.program
    inside = sharing(before.only(*names).weighted(weights or {}), before)
    with state.showing(model, "using", inside):
        yield model


@contextlib.contextmanager
def mixed_batch(model: nn.Module, adapters: Sequence[str | Sequence[str] | None]) -> Iterator[nn.Module]:
    """Context manager: each row of a batch uses its own adapters, in one forward.

    If the model repeats rows (for beams, or by moving positions into the batch), the choices are repeated as well.

    Args:
        model: The live module.
        adapters: For each row of the batch the name or names of its adapters, as in `Program.undo`; None for the base.

    Raises:
        PassError: The first axis of an adapted layer's input is not the batch, or the adapters are merged.
        JournalError: The module has no such adapter.

    Example:
        >>> with surgery.mixed_batch(model, ["film", None, ["film", "music"]]):
        ...     model(**inputs)  # three rows
    """
    if isinstance(adapters, str):
        raise PassError(f"mixed_batch needs a choice for each row; give a list, such as [{adapters!r}, None]")
    state = _known(model)
    with state.showing(model, "mixed_batch", state.program, rows_of(model, state, list(adapters))):
        yield model


def merge_(model: nn.Module) -> Program:
    """Fold the adapters of a live module into its weights; see `Program.merge`.

    The base's own weights are kept in memory, so that `remove_(model, "merge")` undoes the merge bit for bit.

    Args:
        model: The live module.

    Returns:
        The program of the module.

    Raises:
        PassError: No adapter can be folded, or the outputs differ by more than the tolerance of a merge.
    """
    state = _known(model)
    state.switch.free()
    before = state.program
    merged = sharing(before.merge(verify=not state.uncaptured), before)
    then = run_live(model, state.example)
    state.adopt(model, merged)
    try:
        verify_merge(model, state, before, then)
    except Exception:
        state.adopt(model, before)
        raise
    return state.program


def save_(
    model: nn.Module,
    path: Any,
    *,
    ref: str | None = None,
    task: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    format: Literal["surgery", "hf", "diffusers"] = "surgery",
    max_shard_size: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a directory that `surgery.load` and `load_` read: journal, inserted tensors and trained tensors.

    For a fully sharded model, every process has to call this; the first one writes.

    Args:
        model: The live module.
        path: Directory to write.
        ref: Reference of the base, as for `surgery.load`. By default the directory that a transformers model was loaded
            from. If there is none, the weights of the base are written too, and loading needs a program of the base.
        task: Name of the transformers task of the reference, as for `surgery.load`.
        model_kwargs: Keyword arguments of the model's constructor, as for `surgery.load`.
        format: "surgery", "hf" for a transformers directory, or "diffusers" for the directory of a part of a pipeline.
            The last two have the adapters folded into the written weights; the live module keeps them.
        max_shard_size: Only for "hf": largest size of a weight file, such as "5GB"; see surgery.store.hf.write_hf.
        overwrite: Replace an existing directory.

    Raises:
        LoadError: The reference is another model.
        SurgeryError: The path exists, or writing fails.
        PassError: No pass has been applied to the module, or the format is unknown.
        ExportError: An adapter cannot be folded, for "hf".
    """
    if format not in ("surgery", "hf", "diffusers"):
        raise PassError(f"save_: there is no format {format!r}; give 'surgery', 'hf' or 'diffusers'")
    state = _known(model)
    if state.gather(model) and torch.distributed.get_rank() != 0:
        return
    if format != "surgery":
        program = state.program
        if live_entries(program.journal):
            program = program.merge(verify=not state.uncaptured)
        if format == "diffusers":
            write_diffusers(program, path, overwrite=overwrite)
            return
        write_hf(program, path, overwrite=overwrite, max_shard_size=max_shard_size)
        return
    program, standalone = sourced(state.program, ref, task, model_kwargs)
    program.save(path, standalone=standalone, overwrite=overwrite)


def load_(model: nn.Module, path: Any, *, inputs: Any = None, plugins: Plugins | None = None) -> Program:
    """Apply the passes of a saved directory to a live module of the same base.

    The directory can have been written by `save_` or by `Program.save`. The module's own weights are used as the base;
    base tensors that the directory contains (a new head, for example) are copied into the module.

    Args:
        model: The module to change.
        path: The saved directory.
        inputs: Example inputs, as for `apply_`.
        plugins: Plugin manager; by default one with all installed plugins.

    Returns:
        The program of the module.

    Raises:
        JournalError: The directory is damaged, or was saved for another base.
        PassError: Passes have been applied to the module already, or a pass does not act within single layers.
    """
    if state_of(model) is not None:
        raise PassError(
            "passes have been applied to this module already; undo them with surgery.remove_ first"
        )
    state = _state(model, inputs, None, {}, plugins)
    there = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    try:
        program = load_saved(Path(path), base=state.program, trust=False, plugins=state.program.base.plugins)
        state.refuse(pass_of(e, program.base.plugins) for e in live_entries(program.journal))
        state = LiveState(Program(program.base), state.seen, state.layers, state.uncaptured, state.example)
        program.own()
        state.adopt(model, program)
    except BaseException:
        # Tensors of another base may have been copied into the module before the mismatch was found.
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                tensor.copy_(there[name])
        raise
    model.__dict__[ATTRIBUTE] = state
    offer(model, state)
    return program


def _known(model: nn.Module) -> LiveState:
    """The state of a live module, as the module is now. Raises PassError if no pass has been applied to it."""
    state = state_of(model)
    if state is None:
        raise PassError(
            f"no pass has been applied to this {type(model).__name__}; apply one with surgery.apply_ first"
        )
    follow(state, model)
    return state


def _state(
    model: nn.Module,
    inputs: Any,
    dynamic: Any,
    example: Mapping[str, int],
    plugins: Plugins | None,
) -> LiveState:
    """A new state for a model: captured as a whole if possible, else layer by layer."""
    plugins = plugins or make_plugin_manager()
    layers = Layers(plugins.weight_ops)
    example_model: LoadedModel | None = None
    try:
        loaded = example_model = with_patches(loaded_of(model, inputs, dynamic, example), plugins)
        captured, seen, why = trace(loaded), watch(loaded), ""
    except (CaptureError, LoadError) as error:
        loaded, captured, seen = pretend(model)
        why = str(error)
    base = Base(loaded, captured, plugins, "", LoadOptions(example=dict(example)))
    if why:
        base.heads = heads(model, example_model)
    return LiveState(Program(base), seen, layers, why, example_model)


def _without_roles(error: TargetError, state: LiveState) -> TargetError:
    """The error with a note that the model has no roles, since it could not be captured."""
    return TargetError(
        f"{error} (the model cannot be captured, so it has no roles, only paths; {state.uncaptured})"
    )
