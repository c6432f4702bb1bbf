"""A second device on a machine that has none: it computes on the CPU, and refuses to mix its tensors with others.

torch keeps the device type `privateuseone` for backends that it does not know. `register` makes one of it, named
`DEVICE`, whose tensors are wrappers around CPU tensors. Values are real, so that everything can run on it: captures,
measurements, optimizers. An op on a wrapper and a CPU tensor of at least one axis raises, as on a GPU; so does a new
tensor on the CPU in a graph that runs on this device.

A process keeps the device once it is registered: run tests that use it in a process of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

DEVICE = "sim"
aten = torch.ops.aten
# These ops copy from one device to another.
_MOVES = {aten._to_copy.default, aten.copy_.default, aten.copy.default, aten._copy_from.default}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_library: list[torch.library.Library] = []


class MixedDevices(RuntimeError):
    """An op got tensors of two devices."""


class SimTensor(torch.Tensor):
    """Tensor of the device: a wrapper around the CPU tensor `held`."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> SimTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(DEVICE, 0),
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SimTensor({self.held})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert a tensor on {DEVICE} to numpy; copy it to the CPU first")
        return self.held.numpy(force=True)

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_index(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_index(index), value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            fresh = SimTensor(self.held.detach().clone()).requires_grad_(self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(fresh, self.requires_grad) if is_parameter(self) else fresh
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


class _Backend(_DummyBackendModule):
    """What torch asks the module of a device for; it draws with the CPU's generator."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def is_initialized(self) -> bool:
        return True


def is_parameter(tensor: torch.Tensor) -> bool:
    """True for a parameter."""
    return isinstance(tensor, torch.nn.Parameter)


def register() -> torch.device:
    """Make the device known to torch, once, and return it."""
    if not _library:
        _setup_privateuseone_for_python_backend(DEVICE, _Backend())
        library = torch.library.Library("_", "IMPL")
        library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
        _library.append(library)
        # Cached here, with the torch.tensor that `with torch.device(…)` has to know.
        _device_constructors()
        torch.tensor = _tensor  # type: ignore[assignment]
    return torch.device(DEVICE, 0)


_real_tensor = torch.tensor


def _tensor(data: Any, **kwargs: Any) -> torch.Tensor:
    """torch.tensor, which cannot make a tensor on a device that is written in Python."""
    device = kwargs.get("device")
    if device is None or torch.device(device).type != DEVICE:
        return _real_tensor(data, **kwargs)
    return _real_tensor(data, **{**kwargs, "device": "cpu"}).to(device)


def _index(index: Any) -> Any:
    """An index without lists, for the same reason."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return _real_tensor(index) if isinstance(index, list) else index


def _run(op: Any, args: Any, kwargs: Any) -> Any:
    """The op on the wrapped tensors."""
    wanted = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [isinstance(tensor, SimTensor) for tensor in tensors]
    if op not in _MOVES:
        alien = [t for t, own in zip(tensors, ours, strict=True) if not own and t.dim() > 0]
        indexed = op in (
            aten.index.Tensor,
            aten.index_put_.default,
            aten.index_put.default,
            aten._index_put_impl_.default,
        )
        if alien and any(ours) and not (indexed and isinstance(args[0], SimTensor)):
            raise MixedDevices(
                f"{op} got tensors on {DEVICE} and on {alien[0].device} ({list(alien[0].shape)}); expected all "
                "tensors to be on the same device"
            )
    here = {id(own): leaf for leaf in tensors if isinstance(leaf, SimTensor) for own in [leaf.held]}
    plain_args, plain_kwargs = pytree.tree_map(_plain, (args, kwargs))
    found = op(*plain_args, **plain_kwargs)
    if op is aten.copy_.default and not isinstance(args[0], SimTensor):
        return args[0]
    there = bool(wanted) and all(device.type != DEVICE for device in wanted)

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        # An op in place returns its argument.
        if id(leaf) in here:
            return here[id(leaf)]
        return leaf if there else SimTensor(leaf)

    return pytree.tree_map(wrap, found)


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, SimTensor):
        return leaf.held
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf
