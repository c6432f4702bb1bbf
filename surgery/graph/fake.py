"""Fake results (shapes and dtypes) of inserted nodes, each computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


class MetaCache:
    """Cache of fake results by op, shapes, dtypes and constants: a pass inserts the same few ops hundreds of times."""

    def __init__(self, graph: fx.Graph) -> None:
        self.mode = next(
            (n.meta["val"].fake_mode for n in graph.nodes if isinstance(n.meta.get("val"), FakeTensor)), None
        ) or FakeTensorMode(allow_non_fake_inputs=True)
        self._results: dict[Any, Any] = {}
        self._alike: dict[Any, int] = {}
        self._numbers: dict[int, tuple[int, Any]] = {}

    def tensor(self, like: torch.Tensor) -> FakeTensor:
        """Return a fake tensor with the shape and dtype of a tensor, on the device that all graphs are written for."""
        key = ("tensor", tuple(like.shape), like.dtype)
        if key not in self._results:
            with self.mode:
                self._results[key] = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        return self._results[key]

    def call(self, op: Any, args: Any, kwargs: Any) -> Any:
        """Return the fake result of an op, computed once for equal arguments.

        Args:
            op: op to call.
            args: positional arguments; nodes stand for their `val`.
            kwargs: keyword arguments, likewise.
        """
        key = (op, self._key(args), *((name, self._key(value)) for name, value in kwargs.items()))
        if key not in self._results:
            values = fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
            # Some C++ kernels reject symbolic sizes or specialize them; the Python dispatcher avoids both.
            with self.mode, enable_python_dispatcher(), torch.no_grad():
                self._results[key] = op(*values[0], **values[1])
        return self._results[key]

    def graph(self, key: tuple[Any, Any], make: Callable[[], fx.Graph], keep: bool) -> fx.Graph:
        """Return a traced graph, made once for a function and equal arguments.

        Args:
            key: function and arguments; nodes stand for their `val`.
            make: traces it.
            keep: False makes it again at every call.
        """
        if not keep:
            return make()
        known = ("graph", key[0], self._key(key[1]))
        if known not in self._results:
            self._results[known] = make()
        found: fx.Graph = self._results[known]
        return found

    def _key(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return "n", self._number(value.meta["val"])
        if isinstance(value, (tuple, list)):
            return tuple(self._key(item) for item in value)
        return type(value).__name__, value

    def _number(self, val: Any) -> int:
        """Return a number that is equal for equal results. Each is examined once: symbols are slow to compare."""
        known = self._numbers.get(id(val))
        if known is None:
            number = self._alike.setdefault(_freeze(val), len(self._alike))
            # The reference keeps the value alive, so that its id is not reused.
            known = self._numbers[id(val)] = (number, val)
        return known[0]


def _freeze(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ("t", tuple(_freeze(s) for s in value.shape), value.dtype)
    if isinstance(value, torch.SymInt):
        return ("s", value.node.expr)
    if isinstance(value, (tuple, list)):
        return tuple(_freeze(item) for item in value)
    if isinstance(value, Mapping):
        return tuple((key, _freeze(item)) for key, item in value.items())
    return (type(value).__name__, value)
