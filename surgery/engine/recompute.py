"""Quantized weights made again in the backward pass: what autograd keeps of them is their codes.

A linear map keeps its weight for the gradient of its input. Of a weight that `surgery::dequantize` made this would hold
every layer in floats until the backward pass, which is what QLoRA is there to avoid (Dettmers et al. 2023,
arXiv:2305.14314, whose kernels dequantize twice too).
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

# Ops whose result is made again in the backward pass; whoever defines such an op adds it.
REMADE: set[Any] = set()


class _Active(threading.local):
    made: dict[int, tuple[StorageWeakRef, Callable[[], Tensor]]] | None = None


_active = _Active()


@dataclass(frozen=True)
class _Again:
    """A view of a weight that is not kept."""

    make: Callable[[], Tensor]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def made_from_codes(weight: Tensor, make: Callable[[], Tensor]) -> None:
    """Say, where a forward pass is being watched, that `make` gives the weight again."""
    if _active.made is not None:
        storage = weight.untyped_storage()
        # The weak reference keeps the number from being given to another storage.
        _active.made[storage._cdata] = (StorageWeakRef(storage), make)


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """In what runs here, weights made from codes are made again for the backward pass rather than kept."""
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
    """Whether somebody else decides what is kept, as gradient checkpointing does (which makes weights again too)."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that runs so; compiled, it keeps what the compiler keeps."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with recomputing():
            return forward(*args, **kwargs)

    return run
