"""Surgery on a live module: the passes that act on single layers, with the module's own forward left in charge."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from surgery.capture import LoadOptions, trace
from surgery.capture.trace import to_plain
from surgery.common.errors import CaptureError, LoadError, PassError, SurgeryError, TargetError
from surgery.common.plugins import Plugins, make_plugin_manager
from surgery.engine.base import Base
from surgery.engine.change.plans import PlanReport
from surgery.engine.contract.base import Pass, RewritePass
from surgery.engine.contract.observe import observe
from surgery.engine.probe import InputSet
from surgery.engine.program import Program
from surgery.engine.replay import find_sites, live_entries, pass_of
from surgery.live.capture import loaded_of, watch
from surgery.live.fallback import pretend
from surgery.live.layer import Layers
from surgery.live.mixed_batch import rows_of
from surgery.live.reference import sourced
from surgery.live.state import ATTRIBUTE, LiveState, state_of
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
    """Apply passes that act on single layers to a live module, in place; returns its program.

    The model is captured first (once), from a copy over the same parameters, so that roles, ties, refusals and the
    journal are those of `surgery.load(...).apply(...)`. Then each layer gets the rewritten forward, by a subclass of
    its own class, and the new parameters; everything else of the model is as it was: its forward, generate and
    caches, gradient checkpointing, `isinstance`, attributes. Parameters of the base that passes let train are
    replaced by copies, so that `remove_` is bit for bit; make the optimiser afterwards.

    inputs, dynamic: as for `surgery.capture`; a transformers model needs none. example: sizes of its example inputs.
    The others as for `Program.apply`. Where the model cannot be captured, targets by path still work, and roles do
    not. Raises TargetError, PassError; the model is then as it was.
    """
    if not passes and freeze_base is None:
        raise PassError("no pass was given; see `surgery passes`")
    state = state_of(model) or _state(model, inputs, dynamic, example or {}, plugins)
    state.free()
    state.refuse(p for p in passes if isinstance(p, Pass))
    program = state.program
    _refresh(state, model)
    check = verify and not state.uncaptured
    try:
        adapted = program.apply(*passes, freeze_base=freeze_base, verify=check, data=data)
    except TargetError as error:
        raise (_without_roles(error, state) if state.uncaptured else error) from None
    _refuse_caches(model, adapted)
    adapted = _sharing(adapted, program)
    state.adopt(model, adapted)
    model.__dict__[ATTRIBUTE] = state
    if check:
        try:
            _verify(model, state, program)
        except PassError:
            state.adopt(model, program)
            raise
    return adapted


def remove_(model: nn.Module, *names: str) -> Program:
    """Undo passes in a live module (all of them where none is named), bit for bit, and keep what others trained.

    names: as for `Program.undo`. Raises JournalError where there is none, or a later one stands on it.
    """
    state = _known(model)
    state.free()
    program = state.program
    if names:
        undone = program
        for name in names:
            undone = undone.undo(name)
        undone = _sharing(undone, program)
    else:
        undone = program.undo_all()
    state.adopt(model, undone)
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
    """What `apply_` would do, with every refusal; nothing is changed. Options as for `apply_`."""
    state = state_of(model) or _state(model, inputs, dynamic, example or {}, plugins)
    state.refuse(passes)
    return state.program.plan(*passes, freeze_base=freeze_base, data=data)


def program_of(model: nn.Module) -> Program:
    """The program of a module that `apply_` changed, over the module's own tensors: to save, merge, export, undo on.

    Of a model that is fully sharded it has the values as they are now; every process has to call it.
    Raises PassError for any other module.
    """
    state = _known(model)
    _refresh(state, model)
    state.gather(model)
    return state.program


def weight_(model: nn.Module, weights: Mapping[str, float]) -> Program:
    """Scale adapters of a live module: 1 as trained, 0 left out. Names as in `Program.undo`."""
    state = _known(model)
    state.free()
    state.adopt(model, _sharing(state.program.weighted(weights), state.program))
    return state.program


def combine_(
    model: nn.Module, weights: Mapping[str, float], method: str = "svd", *, label: str, **options: Any
) -> Program:
    """One adapter in the place of several of a live module; see `Program.combine` for the rest."""
    state = _known(model)
    state.free()
    before = state.program
    combined = before.combine(weights, method, label=label, **options)
    state.adopt(model, _sharing(combined, before))
    return state.program


@contextlib.contextmanager
def using(model: nn.Module, *names: str, weights: Mapping[str, float] | None = None) -> Iterator[nn.Module]:
    """Only these adapters are in while the block runs; with `weights`, they are scaled. No name: the base.

    In the block the model can be run, trained and saved (with what is in then), and not changed.
    """
    state = _known(model)
    before = state.program
    state.adopt(model, _sharing(before.only(*names).weighted(weights or {}), before))
    try:
        with state.within("using"):
            yield model
    finally:
        state.adopt(model, before)


@contextlib.contextmanager
def mixed_batch(model: nn.Module, adapters: Sequence[str | Sequence[str] | None]) -> Iterator[nn.Module]:
    """Rows of a batch with adapters of their own, in one forward, while the block runs.

    adapters: for each row of the batch the names of what is in there, as in `Program.undo` (None: the base). Where
    the model repeats rows (beams, or positions put into the batch), so are the choices.
    Raises PassError where what enters an adapted layer has no batch axis first.
    """
    if isinstance(adapters, str):
        raise PassError(f"mixed_batch takes a choice for each row; give a list, such as [{adapters!r}, None]")
    state = _known(model)
    with state.within("mixed_batch"), rows_of(model, state, list(adapters)):
        yield model


def merge_(model: nn.Module) -> Program:
    """Fold the adapters into the live module's weights; see `Program.merge`. `remove_(model, "merge")` takes it back,
    bit for bit, from the base's own weights, which are kept until then."""
    state = _known(model)
    state.free()
    before = state.program
    state.adopt(model, _sharing(before.merge(verify=not state.uncaptured), before))
    return state.program


def save_(
    model: nn.Module,
    path: Any,
    *,
    ref: str | None = None,
    task: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    format: Literal["surgery", "hf"] = "surgery",
    max_shard_size: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a directory that `surgery.load` and `load_` read: the journal, what was inserted, what was trained.

    format: "hf" writes a transformers directory in its place, with adapters folded into the weights of what is written
    (the live model keeps them), in files of up to max_shard_size; see surgery.store.hf.write_hf.

    ref, task, model_kwargs: what gives the same base again, as for `surgery.load`; a transformers model's own
    directory by default. Without any, the weights of the base are written too, and loading needs the base.
    Of a fully sharded model every process has to call it; the first writes.
    Raises LoadError where the reference is another model.
    """
    if format not in ("surgery", "hf"):
        raise PassError(f"save_: there is no format {format!r}; it is 'surgery' or 'hf'")
    state = _known(model)
    _refresh(state, model)
    if state.gather(model) and torch.distributed.get_rank() != 0:
        return
    if format == "hf":
        program = state.program
        if live_entries(program.journal):
            program = program.merge(verify=not state.uncaptured)
        write_hf(program, path, overwrite=overwrite, max_shard_size=max_shard_size)
        return
    sourced(state.program, ref, task, model_kwargs).save(path, overwrite=overwrite)


def load_(model: nn.Module, path: Any, *, inputs: Any = None, plugins: Plugins | None = None) -> Program:
    """Let a live module be what a saved directory says, which was written of either form of the same base.

    The module's own weights are the base's; what the directory stores of the base (a new head) is copied into them.
    Raises JournalError where the base is another, PassError for what single layers cannot hold.
    """
    if state_of(model) is not None:
        raise PassError("this module carries surgery already; take that off with surgery.remove_ first")
    state = _state(model, inputs, None, {}, plugins)
    if state.uncaptured:
        raise CaptureError(
            f"the model cannot be captured, so {path} cannot be held against it; {state.uncaptured}"
        )
    there = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    try:
        program = load_saved(Path(path), base=state.program, trust=False, plugins=state.program.base.plugins)
        state.refuse(pass_of(e, program.base.plugins) for e in live_entries(program.journal))
        state = LiveState(Program(program.base), state.seen, state.layers)
        program.own()
        state.adopt(model, program)
    except SurgeryError:
        with torch.no_grad():  # what the directory stores of another base may have been copied by then
            for name, tensor in model.state_dict(keep_vars=True).items():
                tensor.copy_(there[name])
        raise
    model.__dict__[ATTRIBUTE] = state
    return program


def _known(model: nn.Module) -> LiveState:
    state = state_of(model)
    if state is None:
        raise PassError(
            f"this {type(model).__name__} carries no surgery; apply a pass with surgery.apply_ first"
        )
    return state


def _state(
    model: nn.Module,
    inputs: Any,
    dynamic: Any,
    example: Mapping[str, int],
    plugins: Plugins | None,
) -> LiveState:
    plugins = plugins or make_plugin_manager()
    layers = Layers(plugins.weight_ops)
    try:
        loaded = loaded_of(model, inputs, dynamic, example)
        captured, seen, why = trace(loaded), watch(loaded), ""
    except (CaptureError, LoadError) as error:
        loaded, captured, seen = pretend(model)
        why = str(error)
    base = Base(loaded, captured, plugins, "", LoadOptions(example=dict(example)))
    return LiveState(Program(base), seen, layers, why)


def _sharing(program: Program, before: Program) -> Program:
    """The program with the tensors that the live module holds already, in the place of copies of them."""
    program.own()
    tensors = {name: before.tensors.get(name, tensor) for name, tensor in program.tensors.items()}
    changed = {}
    for name, tensor in program.changed.items():
        held = before.changed.get(name)
        if held is None:
            changed[name] = tensor
            continue
        if not torch.equal(held, tensor):  # put back to what it was before a pass that is undone
            with torch.no_grad():
                held.copy_(tensor)
        changed[name] = held
    return Program(
        program.base, program.journal, tensors, changed, program._graph, program.reports, program.clock
    )


def _refresh(state: LiveState, model: nn.Module) -> None:
    """Let the program read the buffers that the model has now: moving a model to a device makes new ones."""
    tensors = state.program.base.tensors
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in tensors:
            tensors[name] = buffer


def _verify(model: nn.Module, state: LiveState, before: Program) -> None:
    """Run the live module on the example inputs, as it was and as it is."""
    loaded = state.program.base.loaded
    fresh = [e for e in state.program.journal if e not in before.journal.entries and e.kind == "rewrite"]
    if not fresh:
        return
    now, program = _run(model, loaded), state.program
    # Without them, and yet with what is frozen: torch computes a weight norm otherwise where it needs no gradient.
    state.adopt(model, _sharing(program.without(*(e.id for e in fresh)), program))
    then = _run(model, loaded)
    state.adopt(model, program)
    seen = observe(then, now)
    declared = (pass_of(e, program.base.plugins).contract.on(program.precision) for e in fresh)
    if any(seen.within(numerics) for numerics in declared):
        return
    raise PassError(
        f"{fresh[-1].id}: in place, the outputs moved by {seen.difference:.1e} of their scale on the example inputs, "
        f"which none of {', '.join(e.id for e in fresh)} declares; the model is as it was"
    )


def _run(model: nn.Module, loaded: Any) -> Any:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            outputs = to_plain(model(*loaded.args, **loaded.kwargs))
            # A cache is an object of the model's own, of the same keys and values that gave the outputs.
            return (
                {k: v for k, v in outputs.items() if k != "past_key_values"}
                if isinstance(outputs, dict)
                else outputs
            )
    finally:
        for module, training in modes:
            module.training = training


def _refuse_caches(model: nn.Module, program: Program) -> None:
    generates = getattr(model, "can_generate", None)
    if generates is None or not generates():
        return
    for entry in program.journal:
        pass_ = pass_of(entry, program.base.plugins) if entry.kind == "rewrite" else None
        if isinstance(pass_, RewritePass):
            for site in find_sites(entry, program.base.sites.by_key):
                if pass_.mixes_positions(site):
                    raise PassError(
                        f"{entry.id} at {site.path}: it reads earlier positions, which a layer does not see when the "
                        f"model generates with a cache; capture the model for it, or use another pass"
                    )


def _without_roles(error: TargetError, state: LiveState) -> TargetError:
    return TargetError(
        f"{error} (the model cannot be captured, so it has no roles, only paths; {state.uncaptured})"
    )
