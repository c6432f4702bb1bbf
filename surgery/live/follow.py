"""Follows changes that were made to a live model directly: another dtype or device, replaced tensors or modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.capture import LoadedModel
from surgery.capture.hf import configs
from surgery.common.errors import PassError
from surgery.engine.base import Base
from surgery.engine.module import get
from surgery.live.capture import mirror
from surgery.live.places import is_shard
from surgery.live.state import LiveState

# Old (dtype, device) of floating-point tensors -> new.
Moves = dict[tuple[torch.dtype, torch.device], tuple[torch.dtype, torch.device]]


def follow(state: LiveState, model: nn.Module) -> None:
    """Take over what was changed in a live model since its program was adopted.

    `model.half()` or `model.to(...)` converts parameters in place and replaces buffers; `resize_token_embeddings`
    replaces modules. The base follows: its originals are converted as well, and the model is captured again.

    Args:
        state: The state of the model.
        model: The live module.

    Raises:
        PassError: A module with an adapter was replaced, or a tensor of the base is gone.
    """
    if state.switch.open:
        return
    program = state.adopted
    base = program.base
    for place, full in state.at.items():
        there = _there(model, place)
        if there is not program.tensors[full] and not is_shard(there):
            program.tensors[full] = there
    moves: Moves = {}
    resized: set[str] = set()
    for name, was in state.put.items():
        now = _there(model, name)
        if is_shard(now):
            continue
        owner = name.rpartition(".")[0]
        # The shape is that of the time when the tensor was put there: resizing can replace the data alone.
        if now.shape != state.shapes[name] and isinstance(now, nn.Parameter):
            resized.add(owner)
            continue
        if now is not was:
            _replaced(state, name, now, was)
        original = base.tensors[name]
        if original.is_floating_point() and _kind(original) != _kind(now):
            moves[_kind(original)] = _kind(now)
    if moves or resized:
        _rebase(state, model, moves, resized)


def _there(model: nn.Module, name: str) -> Tensor:
    """A tensor of the live model. Raises PassError if it is gone."""
    try:
        return get(model, name)
    except AttributeError:
        raise PassError(
            f"{name} is no longer in the model: the module was replaced after passes had been applied; undo the "
            f"passes first (surgery.remove_), replace it, and apply them again"
        ) from None


def _replaced(state: LiveState, name: str, now: Tensor, was: Tensor) -> None:
    """Take over another tensor object under the name of a base tensor."""
    program = state.adopted
    changed = {key for key, tensor in program.changed.items() if tensor is was}
    for key in changed:
        program.changed[key] = now
    original = program.base.tensors[name]
    if original is was or (not isinstance(now, nn.Parameter) and name not in program.changed):
        _set(program.base, name, now)
    state.put[name] = now


def _rebase(state: LiveState, model: nn.Module, moves: Moves, resized: set[str]) -> None:
    """Convert what the model does not hold, and capture the base again."""
    program = state.adopted
    base = program.base
    module = base.loaded.module
    adapted = {place.rpartition(".")[0] for place in state.at}
    for owner in resized:
        if any(path == owner or path.startswith(f"{owner}.") for path in adapted):
            raise PassError(
                f"{owner} was replaced by a module of another size, but passes act on it; undo them first "
                f"(surgery.remove_), resize the model, and apply them again"
            )
        parent, _, leaf = owner.rpartition(".")
        module.get_submodule(parent)._modules[leaf] = mirror(model.get_submodule(owner))
        for name in [n for n in program.changed if n.rpartition(".")[0] == owner]:
            program.changed[name] = get(model, name)
    for name, tensor in base.tensors.items():
        if name.rpartition(".")[0] not in resized:
            _convert(tensor, moves, lambda value, name=name: _set(base, name, value))
    for tensors in (program.tensors, program.changed):
        for name, tensor in tensors.items():
            _convert(tensor, moves, lambda value, name=name, to=tensors: to.update({name: value}))
    if resized and hasattr(module, "config"):
        for config in (module.config, base.loaded.config):
            for own, theirs in zip(configs(config), configs(model.config), strict=True):
                if hasattr(theirs, "vocab_size"):
                    own.vocab_size = theirs.vocab_size
    loaded = _moved_inputs(base.loaded, moves)
    if state.example is not None:
        same = state.example.module is module
        state.example = loaded if same and not state.uncaptured else _moved_inputs(state.example, moves)
    for seen in state.seen.values():
        seen.dtype = next((new[0] for old, new in moves.items() if old[0] == seen.dtype), seen.dtype)
    unsourced = loaded.unsourced | {n for n in module.state_dict() if n.rpartition(".")[0] in resized}
    base.again(replace(loaded, unsourced=frozenset(unsourced)))
    program.forget()
    state.adopt(model, program)


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def _convert(tensor: Tensor, moves: Moves, keep: Any) -> None:
    """Convert a floating-point tensor as the model was: a parameter in place, a buffer by `keep(value)`."""
    to = moves.get(_kind(tensor)) if tensor.is_floating_point() else None
    device = next((new[1] for old, new in moves.items() if old[1] == tensor.device), tensor.device)
    dtype, device = to or (tensor.dtype, device)
    if (dtype, device) == _kind(tensor):
        return
    value = tensor.detach().to(device, dtype)
    if isinstance(tensor, nn.Parameter):
        tensor.data = value
    else:
        keep(value)


def _set(base: Base, name: str, value: Tensor) -> None:
    """Replace a tensor of the base under one name."""
    owner, _, leaf = name.rpartition(".")
    try:
        module = base.loaded.module.get_submodule(owner)
    except AttributeError:
        return  # a constant of the graph, which is captured again
    held: Mapping[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    if leaf in held:
        held[leaf] = value  # type: ignore[index]
    base.tensors[name] = value


def _moved_inputs(loaded: LoadedModel, moves: Moves) -> LoadedModel:
    """The model with example inputs of the new dtype, on the new device."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        device = next((new[1] for old, new in moves.items() if old[1] == leaf.device), leaf.device)
        dtype = leaf.dtype
        if leaf.is_floating_point():
            dtype = next((new[0] for old, new in moves.items() if old[0] == dtype), dtype)
        return leaf.to(device, dtype)

    args, kwargs = pytree.tree_map(move, (tuple(loaded.args), dict(loaded.kwargs)))
    return replace(loaded, args=args, kwargs=kwargs)
