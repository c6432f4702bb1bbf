"""Capture of an nn.Module as a flat fx graph of ATen ops that keeps the module's parameter names."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from surgery.capture import check as checking
from surgery.capture.bounds import derived, fixed_dimensions, limits, without, without_ends
from surgery.capture.devices import neutral
from surgery.capture.explain import explain
from surgery.capture.flatten import flatten_regions, share_tied
from surgery.capture.fresh import other_sizes
from surgery.capture.recurrences.kernels import replaced
from surgery.capture.recurrent import shape_rules
from surgery.capture.shapes import Axis, argument_names, list_axes, named_sizes
from surgery.capture.types import Captured, LoadedModel
from surgery.common.errors import CaptureError
from surgery.common.progress import stage
from surgery.common.threads import one_at_a_time

# Mark of transformers on a model that has the hooks.
_INSTALLED = "_output_capturing_hooks_installed"


@one_at_a_time
def trace(loaded: LoadedModel, *, training: bool = False, check: bool = True) -> Captured:
    """Capture a module as a flat graph of ATen ops.

    The graph shares the module's parameters and buffers, under their original names. It takes the module's
    inputs and returns the module's outputs, with plain dicts for mapping types such as transformers' ModelOutput.
    It names no device but `devices.HOME`; `devices.placed` is the graph to run on another.
    The module's training flags, requires_grad flags and forward are restored afterwards.

    torch.export may reject one end of a dimension's range as a special case. The range is then narrowed, so read
    the valid bounds from the `dynamic_shapes` of the result.

    Args:
        loaded: the module with its example inputs and dynamic shapes.
        training: capture the train-mode behavior (active dropout and drop-path).
        check: after a capture in eval mode, compare the graph with the eager module on the example inputs and, if
            there are dynamic dimensions, on fresh inputs at other sizes. Skipped if the weights are not in memory.

    Raises:
        CaptureError: the module cannot be captured, a dynamic dimension became static, or the graph disagrees with
            the eager module. The message is one sentence.
    """
    module = loaded.module
    axes = list_axes(loaded)
    mode = " in train mode" if training else ""
    with stage(f"capturing {type(module).__name__}{mode}"), as_found(module):
        _set_mode(module, training)
        if training and loaded.train_ready is not None:
            loaded.train_ready(module)
        names = argument_names(module, loaded.args, loaded.kwargs)
        gm, shapes, notes = _export(loaded, axes, training)
        flatten_regions(gm)
        share_tied(gm, module)
        gm.meta["surgery_inputs"] = tuple(names)
        captured = Captured(gm, loaded.args, dict(loaded.kwargs), shapes, training, notes)
        axes = list_axes(captured)
        checking.refuse_static(captured, axes)
        if check and not training and checking.in_memory(module):
            with plain_outputs(module):
                checking.compare(module, captured)
                if axes:
                    checking.compare(module, captured, other_sizes(captured))
        neutral(gm)
    return captured


def _export(
    loaded: LoadedModel, axes: list[Axis], training: bool
) -> tuple[fx.GraphModule, Any, tuple[str, ...]]:
    """Export the module, narrowing the dynamic shapes until torch.export accepts them.

    Returns:
        The graph, the dynamic shapes it is valid for, and a note for each dimension that had to be fixed.
    """
    module = loaded.module
    subject = f"{type(module).__name__}{' in train mode' if training else ''}"
    shapes = _by_name(loaded)
    notes: tuple[str, ...] = loaded.notes
    narrowed: frozenset[str] = frozenset()
    sizes, deferred = named_sizes(loaded), False
    # Each round removes a dimension or shrinks a range, so the loop ends: either the export succeeds or nothing is
    # left to narrow.
    while True:
        try:
            with (
                _quiet(),
                loaded.patches(),
                replaced(module),
                plain_outputs(module, loaded.args, loaded.kwargs),
            ):
                program = _run_export(loaded, shapes, deferred)
                gm = program.module(check_guards=False)
            break
        except CaptureError:
            raise
        except Exception as error:
            fixed = fixed_dimensions(str(error), axes) if shapes else {}
            narrower: Any
            if fixed and fixed.keys() <= loaded.may_fix:
                narrower = without(shapes, fixed)
                notes += tuple(_note(name, size) for name, size in fixed.items())
            else:
                narrower = without_ends(shapes, axes, str(error)) if shapes else None
                if narrower is None and shapes:
                    found = derived(shapes, axes, sizes, str(error))
                    narrower, names = found or (None, frozenset[str]())
                    narrowed |= names
            if narrower is None and "onstraints violated" in str(error) and not (fixed or deferred):
                # torch cannot prove a relation between sizes, such as a crop that lies within its table. It becomes an
                # assertion at run time.
                deferred = True
                continue
            if narrower is None:
                raise CaptureError(f"cannot capture {subject}: {explain(error)}") from error
            narrow = replace(loaded, dynamic_shapes=narrower)
            shapes, axes, sizes = narrower, list_axes(narrow), named_sizes(narrow)
    if not isinstance(gm, fx.GraphModule):
        raise CaptureError(f"cannot capture {subject}: torch.export returned no graph")
    return gm, shapes, notes + limits(axes, narrowed)


def _note(name: str, size: int) -> str:
    how, other = ("unrolling a scan", "length")
    if name.endswith("batch"):
        how, other = "a loop over the batch", "batch size"
    return (
        f"{name} is fixed at {size}, because the model's code fixes it (for example by {how}); "
        f"capture the model again for inputs of another {other}: --example {name}=N"
    )


def _run_export(loaded: LoadedModel, shapes: Any, deferred: bool) -> torch.export.ExportedProgram:
    with torch.enable_grad(), shape_rules():
        return torch.export.export(
            loaded.module,
            tuple(loaded.args),
            dict(loaded.kwargs),
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=deferred,
        )


def _set_mode(module: nn.Module, training: bool) -> None:
    """Set the training mode of the module. Raises CaptureError if an exported program has no train mode."""
    try:
        module.train(training)
    except NotImplementedError:
        # The module of a .pt2 file cannot switch mode: it keeps the mode it was exported in.
        if training:
            raise CaptureError(
                f"{type(module).__name__} is an exported program, which has no train mode; "
                "capture the original module instead"
            ) from None


def _by_name(loaded: LoadedModel) -> Any:
    """Dynamic shapes with an entry for every input, the form that torch.export requires."""
    spec = loaded.dynamic_shapes
    if not isinstance(spec, Mapping):
        names = argument_names(loaded.module, loaded.args, loaded.kwargs)
        return None if spec is None else dict(zip(names, spec, strict=True))
    names = argument_names(loaded.module, loaded.args, loaded.kwargs)
    return {name: spec.get(name) for name in names}


@contextlib.contextmanager
def plain_outputs(
    module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Override the module's `forward` inside the block so that it returns plain dicts.

    The override is an instance attribute, because a wrapper module would add a prefix to every parameter name.

    Args:
        module: the module to override.
        args: positional example inputs.
        kwargs: keyword example inputs. If given, the signature of forward lists only the given inputs, because
            torch.export bundles everything that `**kwargs` collects into one input.
    """
    original = module.forward
    shadowed = module.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        return to_plain(original(*args, **kwargs))

    signature = inspect.signature(original)
    if kwargs is not None:
        shown = argument_names(module, args, kwargs)
        starred = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
        # Inputs collected by `*args` have invented names, so the original signature has to stay.
        if not (starred and args):
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            signature = inspect.Signature([inspect.Parameter(name, kind) for name in shown])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    module.forward = forward
    try:
        yield
    finally:
        if shadowed is None:
            del module.forward
        else:
            module.forward = shadowed


def to_plain(value: Any) -> Any:
    """Convert every mapping in a nested value to a plain dict.

    A ModelOutput omits its None entries itself, so they do not appear in the dict.
    """
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(to_plain(item) for item in value)
    return value


@contextlib.contextmanager
def as_found(module: nn.Module) -> Iterator[None]:
    """Restore, after the block, what running or tracing a module leaves on it.

    These are the training and requires_grad flags, tensors stored as plain attributes, and forward hooks: transformers
    installs some in the first forward, which cannot be pickled.
    """
    training = [(child, child.training) for child in module.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    attributes = [(child, dict(child.__dict__)) for child in module.modules()]
    hooks = [(child, dict(child._forward_hooks)) for child in module.modules()]
    try:
        yield
    finally:
        for child, flag in training:
            child.training = flag
        for parameter, needs in grads:
            if parameter.requires_grad != needs:
                parameter.requires_grad_(needs)
        for child, known in hooks:
            for number in [number for number in child._forward_hooks if number not in known]:
                del child._forward_hooks[number]
        for child, found in attributes:
            if _INSTALLED not in found:
                child.__dict__.pop(_INSTALLED, None)
            for key, value in list(child.__dict__.items()):
                if not isinstance(value, torch.Tensor) or value is found.get(key):
                    continue
                # A fake tensor that the trace cached on the module would break the next eager call.
                if key in found:
                    child.__dict__[key] = found[key]
                else:
                    del child.__dict__[key]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's logs and warnings; a failure is reported as a CaptureError instead."""
    names = ("torch.export", "torch._export", "torch.fx.experimental.symbolic_shapes", "torch._dynamo")
    levels = [(logger, logger.level) for logger in map(logging.getLogger, names)]
    # torch prints the whole graph to stderr when control flow depends on data.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger, _ in levels:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in levels:
                logger.setLevel(level)
