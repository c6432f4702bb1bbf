"""Moves a base to another device, or converts it to another dtype. Both give a new base; the old one stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.capture import Captured, LoadedModel, LoadOptions, trace
from surgery.capture.devices import on_device
from surgery.capture.loaders import OF_A_LIBRARY
from surgery.common.errors import PassError
from surgery.engine.base import Base
from surgery.graph.compiled import compiled
from surgery.graph.graphs import copy_graph


def moved(base: Base, device: torch.device, known: Mapping[str, Tensor] | None = None) -> Base:
    """The base on another device. Its graphs are those of the old base: they name no device.

    Args:
        base: The base; it is not changed.
        device: The device.
        known: Tensors that are there already, by name, whose memory the new base shares.

    Raises:
        PassError: The weights are not in memory.
    """
    _check_values(base)
    # One tensor for each of the old ones: tied weights stay tied.
    memo: dict[int, Any] = {}
    for name, tensor in base.tensors.items():
        if id(tensor) not in memo:
            memo[id(tensor)] = _moved(tensor, device, (known or {}).get(name), name in base.released)
    fresh = _with_module(base, _copied(base.loaded, memo, device))
    fresh.captured = _captured(base.captured, memo, device)
    fresh._train = None if base._train is None else _captured(base._train, memo, device)
    return fresh


def converted(base: Base, dtype: torch.dtype) -> Base:
    """The base in another floating-point dtype, captured again: a graph can contain casts to the old one.

    Buffers of a transformers model that its checkpoints do not contain keep their dtype, as when it is loaded in that
    dtype: rotary frequencies, for example, are computed in float32.

    Args:
        base: The base; it is not changed.
        dtype: The dtype.

    Raises:
        PassError: The weights are not in memory, or some were released.
        CaptureError: The model cannot be captured in that dtype.
    """
    _check_values(base)
    if base.released:
        raise PassError(
            f"{min(base.released)} was released from memory; load the model in this dtype instead"
        )
    kept = base.non_persistent if base.loaded.config is not None else frozenset()
    memo: dict[int, Any] = {}
    for name, tensor in base.tensors.items():
        wanted = tensor.is_floating_point() and name not in kept
        value = tensor.detach().to(dtype) if wanted else tensor.detach()
        made = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        memo.setdefault(id(tensor), made)
    loaded = _copied(base.loaded, memo, base.device)
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (loaded.args, dict(loaded.kwargs))
    )
    fresh = _with_module(base, replace(loaded, args=args, kwargs=kwargs))
    fresh.captured = trace(fresh.loaded)
    if base.ref.startswith(OF_A_LIBRARY):
        # So that a saved directory loads its base in this dtype.
        given = {name: value for name, value in base.options.model_kwargs.items() if name != "torch_dtype"}
        kwargs = {**given, "dtype": str(dtype).removeprefix("torch.")}
        fresh.options = LoadOptions(base.options.task, kwargs, base.options.trust, base.options.example)
    return fresh


def _check_values(base: Base) -> None:
    if not base.in_memory:
        raise PassError("the weights are not in memory; load them first")


def _with_module(base: Base, loaded: LoadedModel) -> Base:
    """A base like another one on a copy of its module."""
    return Base(
        loaded,
        base.captured,
        base.plugins,
        base.ref,
        base.options,
        consumed=base.consumed,
        released=set(base.released),
        notes=base.notes,
        hindrance=base.hindrance,
        heads=base.heads,
    )


def _moved(tensor: Tensor, device: torch.device, there: Tensor | None, released: bool) -> Tensor:
    """A tensor on a device; `there`, if it is given, over the same memory."""
    if released:
        # One value stands for all of a released weight.
        value = torch.full((), torch.nan, dtype=tensor.dtype, device=device).expand(tensor.shape)
    else:
        value = tensor.detach().to(device) if there is None else there.detach()
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _copied(loaded: LoadedModel, memo: dict[int, Any], device: torch.device) -> LoadedModel:
    """The model on copies of its modules with other tensors, and its example inputs on a device."""
    module, whole = copy.deepcopy((loaded.module, loaded.whole), dict(memo))
    args, kwargs = on_device((tuple(loaded.args), dict(loaded.kwargs)), device)
    return replace(loaded, module=module, whole=whole, args=args, kwargs=kwargs)


def _captured(captured: Captured, memo: Mapping[int, Any], device: torch.device) -> Captured:
    """A capture over other tensors."""
    gm = captured.graph_module
    held: dict[str, Any] = {}
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            value = attrgetter(str(node.target))(gm)
            # A constant that only this graph has is in no base.
            moving = memo.get(id(value), value)
            held[str(node.target)] = moving.to(device) if isinstance(moving, Tensor) else moving
    fresh = compiled(held, copy_graph(gm.graph), type(gm).__name__)
    fresh.meta = dict(gm.meta)
    for spec in ("_in_spec", "_out_spec"):
        if hasattr(gm, spec):
            setattr(fresh, spec, getattr(gm, spec))
    args, kwargs = on_device((tuple(captured.args), dict(captured.kwargs)), device)
    return replace(captured, graph_module=fresh, args=args, kwargs=kwargs)
