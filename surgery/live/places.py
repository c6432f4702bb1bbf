"""Places of inserted tensors in a live model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self
from weakref import WeakKeyDictionary

from torch import Tensor, nn

# Conversion -> id of a buffer -> the buffer, and its converted form. `model.to` gives all layers one function, which
# lives as long as the call.
_converted: WeakKeyDictionary[Any, dict[int, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def is_shard(tensor: Any) -> bool:
    """True if a tensor is a shard of one that is distributed over processes."""
    return hasattr(tensor, "full_tensor")


def local_name(path: str, full: str) -> str:
    """Path of an inserted tensor within a layer.

    It is the part of its name after the layer's path. If the tensor is named after another module (of a tied weight),
    it is "shared." with the whole name.

    Args:
        path: Path of the layer.
        full: Name of the tensor in the program.
    """
    if not path:
        return full
    return (
        full.removeprefix(f"{path}.") if full.startswith(f"{path}.") else f"shared.{full.replace('.', '_')}"
    )


class Inserted(nn.Module):
    """Container of the tensors that a pass added to a layer. The layer reads them; it is not called itself."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert all tensors, as `to` and `half` do. A buffer that several layers share stays one buffer."""
        return super()._apply(_once_per_buffer(fn), recurse)

    def forward(self, *args: Any) -> Any:
        """Raise RuntimeError; this module is never called."""
        raise RuntimeError("these are tensors of the layer that holds them")


def _once_per_buffer(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A conversion that returns the same result for the same buffer; `nn.Module` converts parameters in place."""
    known = _converted.setdefault(fn, {})

    def convert(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            return fn(tensor)
        if id(tensor) not in known:
            known[id(tensor)] = tensor, fn(tensor)
        return known[id(tensor)][1]

    return convert


def remove(model: nn.Module, name: str) -> None:
    """Remove an inserted tensor from the model, and containers that are empty then."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    module._parameters.pop(leaf, None)
    module._buffers.pop(leaf, None)
    while isinstance(module, Inserted) and not (module._parameters or module._buffers or module._modules):
        path, _, leaf = path.rpartition(".")
        module = model.get_submodule(path)
        module._modules.pop(leaf, None)
