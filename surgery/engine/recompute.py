"""Dequantized weights that are recomputed in the backward pass, so that autograd keeps only their codes.

A linear op saves its weight for the gradient of its input. If `surgery::dequantize` computed that weight, every layer
would stay in memory in floats until the backward pass. QLoRA avoids this by dequantizing twice (Dettmers et al. 2023,
arXiv:2305.14314).
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

# Ops whose result is recomputed in the backward pass. The module that defines such an op adds it here.
REMADE: set[Any] = set()


class _Active(threading.local):
    made: dict[int, tuple[StorageWeakRef, Callable[[], Tensor]]] | None = None


_active = _Active()


@dataclass(frozen=True)
class _Again:
    """Stands for a saved view of a weight: the function that recomputes the weight, and the view's geometry."""

    make: Callable[[], Tensor]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def made_from_codes(weight: Tensor, make: Callable[[], Tensor]) -> None:
    """Register `make` as the function that recomputes a weight; it does nothing outside of `recomputing`."""
    if _active.made is not None:
        storage = weight.untyped_storage()
        # The weak reference keeps the address of the storage from being reused while it is a key here.
        _active.made[storage._cdata] = (StorageWeakRef(storage), make)


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Context manager: weights computed from codes are not saved for the backward pass but recomputed in it."""
    if not torch.is_grad_enabled() or _watched():
        yield
        return
    outer, _active.made = _active.made, {}
    made = _active.made

    def pack(tensor: Tensor) -> Any:
        found = made.get(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None
        if found is None:
            return tensor
        return _Again(found[1], tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(kept: Any) -> Tensor:
        if not isinstance(kept, _Again):
            return kept
        with torch.no_grad():
            return kept.make().as_strided(kept.size, kept.stride, kept.offset)

    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _active.made = outer


def _watched() -> bool:
    """True if other saved-tensor hooks are active, such as gradient checkpointing, which recomputes weights as well."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a forward function in `recomputing`. When it is compiled, the compiler decides what is saved."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with recomputing():
            return forward(*args, **kwargs)

    return run
