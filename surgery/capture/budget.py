"""A limit on the size of a model that is being built, so that a small file cannot ask for a huge one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from surgery.common.errors import LoadError

MARGIN = 200_000_000  # bytes: new heads, position tables and masks, which no file holds
FACTOR = 20  # of the files: two-bit codes become fp32
_MOST_TENSORS = 200_000


@contextmanager
def limited(files: int, where: str) -> Iterator[None]:
    """Limit what modules that are created in the block may hold.

    A parameter counts when it is registered, before its memory is written to.

    Args:
        files: Bytes of the files that hold the weights.
        where: Reference or file that asks for the model, for the message.

    Raises:
        LoadError: The parameters and buffers exceed `FACTOR` times the files and `MARGIN`.
    """
    allowed = FACTOR * files + MARGIN
    sizes: dict[tuple[int, str], int] = {}
    total, thread = 0, threading.get_ident()

    def count(module: nn.Module, name: str, tensor: Any) -> None:
        nonlocal total
        if tensor is None or threading.get_ident() != thread:
            return
        key, size = (id(module), name), tensor.numel() * tensor.element_size()
        total += size - sizes.get(key, 0)
        sizes[key] = size
        if total > allowed or len(sizes) > _MOST_TENSORS:
            raise LoadError(
                f"{where} asks for a model of over {total / 1e6:,.0f} MB in {len(sizes)} tensors, and its files hold "
                f"{files / 1e6:,.1f} MB; check the sizes in its configuration"
            )

    handles = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
