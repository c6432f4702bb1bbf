"""Capture: an nn.Module becomes a flat fx graph over ATen ops that keeps the module's own names."""

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
from surgery.capture.bounds import fixed_dimensions, without, without_ends
from surgery.capture.explain import explain
from surgery.capture.flatten import flatten_regions, share_tied
from surgery.capture.shapes import Axis, argument_names, list_axes, other_sizes
from surgery.capture.types import Captured, LoadedModel
from surgery.common.errors import CaptureError


def trace(loaded: LoadedModel, *, training: bool = False, check: bool = True) -> Captured:
    """Capture a module as a flat graph of ATen ops.

    The graph's parameters and buffers are the module's own objects under their own names. It takes the
    module's inputs and returns what the module returns, with plain dicts for mapping types such as
    transformers' ModelOutput. The module is left as found: training flags, requires_grad, forward.

    Where torch.export would make one end of a range a case of its own, that end is given up: the bounds of the
    result's `dynamic_shapes` are what holds.

    training: capture what the module does in train mode (dropout drops, drop-path too).
    check: after a capture in eval mode, compare with eager on the example inputs and, where there are dynamic
        dimensions, on fresh inputs at other sizes of all of them. Skipped where weights are not in memory.

    Raises CaptureError, in one sentence, where the module cannot be captured, or a dimension that was to be
    dynamic became static, or the capture disagrees with eager.
    """
    module = loaded.module
    axes = list_axes(loaded)
    with _as_found(module):
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
    return captured


def _export(
    loaded: LoadedModel, axes: list[Axis], training: bool
) -> tuple[fx.GraphModule, Any, tuple[str, ...]]:
    """The exported graph, the dynamic shapes that it holds for, and notes on dimensions that were fixed."""
    module = loaded.module
    what = f"{type(module).__name__}{' in train mode' if training else ''}"
    shapes = _by_name(loaded)
    notes: tuple[str, ...] = ()
    while True:
        try:
            with _quiet(), loaded.patches(), plain_outputs(module, loaded.args, loaded.kwargs):
                program = _run_export(loaded, shapes)
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
            if narrower is None:
                raise CaptureError(f"cannot capture {what}: {explain(error)}") from error
            shapes, axes = narrower, list_axes(replace(loaded, dynamic_shapes=narrower))
    if not isinstance(gm, fx.GraphModule):
        raise CaptureError(f"cannot capture {what}: torch.export returned no graph")
    return gm, shapes, notes


def _note(name: str, size: int) -> str:
    return (
        f"{name} is fixed at {size}, because the model's code fixes it (a scan that is unrolled, say); "
        f"inputs of another length need a capture of their own: --example {name}=N"
    )


def _run_export(loaded: LoadedModel, shapes: Any) -> torch.export.ExportedProgram:
    with torch.enable_grad():
        return torch.export.export(
            loaded.module, tuple(loaded.args), dict(loaded.kwargs), dynamic_shapes=shapes, strict=False
        )


def _set_mode(module: nn.Module, training: bool) -> None:
    try:
        module.train(training)
    except NotImplementedError:
        # The program of a .pt2 file keeps the mode that it was saved in.
        if training:
            raise CaptureError(
                f"{type(module).__name__} is an exported program, which has no train mode; "
                "capture the module that it was made from"
            ) from None


def _by_name(loaded: LoadedModel) -> Any:
    """The dynamic shapes with an entry for every input, as torch.export wants them."""
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
    """Let the module return plain dicts while the block runs, through its own `forward`.

    The override is an instance attribute: a wrapping module would prefix every name. With `kwargs`, forward
    shows only the inputs that are given, because torch.export bundles what a `**kwargs` would take.
    """
    original = module.forward
    shadowed = module.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        return to_plain(original(*args, **kwargs))

    signature = inspect.signature(original)
    if kwargs is not None:
        shown = argument_names(module, args, kwargs)
        starred = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
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
    """`value` with every mapping a dict, at any depth; entries that are None are left out of mapping types
    other than dict, as ModelOutput does itself."""
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(to_plain(item) for item in value)
    return value


@contextlib.contextmanager
def _as_found(module: nn.Module) -> Iterator[None]:
    """Restore training and requires_grad flags, and plain tensor attributes that tracing left behind."""
    training = [(child, child.training) for child in module.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    attributes = [(child, dict(child.__dict__)) for child in module.modules()]
    try:
        yield
    finally:
        for child, flag in training:
            child.training = flag
        for parameter, needs in grads:
            if parameter.requires_grad != needs:
                parameter.requires_grad_(needs)
        for child, found in attributes:
            for key, value in list(child.__dict__.items()):
                if not isinstance(value, torch.Tensor) or value is found.get(key):
                    continue
                # A fake tensor cached by the trace would break the next eager call.
                if key in found:
                    child.__dict__[key] = found[key]
                else:
                    del child.__dict__[key]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Failures are told as CaptureError; what torch logs on the way is noise."""
    names = ("torch.export", "torch._export", "torch.fx.experimental.symbolic_shapes", "torch._dynamo")
    levels = [(logger, logger.level) for logger in map(logging.getLogger, names)]
    # torch prints the whole graph on a data-dependent branch.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger, _ in levels:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in levels:
                logger.setLevel(level)
