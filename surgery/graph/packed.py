"""Traces a third party's `WeightOp.dequantize` into ops, so that a packed weight can be computed as floats.

The same ops run eagerly and in a graph. So a value measured when a pass is applied equals, bit for bit, the value that
the graph computes later.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from surgery.common.errors import PassError
from surgery.graph.ops import Call, arguments

aten = torch.ops.aten

# Calls an op: on tensors, or in a graph on nodes.
Apply = Callable[..., Any]


def eagerly(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an op on tensors: the eager counterpart of inserting a node."""
    return op(*args, **kwargs)


def eagerly_on(device: torch.device) -> Apply:
    """`eagerly` for traced ops, which create their tensors on this device instead of the one that they name."""

    def call(op: Any, *args: Any, **kwargs: Any) -> Any:
        return op(*args, **{name: device if isinstance(v, torch.device) else v for name, v in kwargs.items()})

    return call


@dataclass(frozen=True)
class Unpacking:
    """Traced ops of one `dequantize`.

    Attributes:
        graph: the traced ops.
        names: tensor arguments of the op that the trace reads.
        constants: tensors that `dequantize` holds itself (a codebook).
        val: fake tensor of the resulting weight.
    """

    graph: fx.Graph
    names: tuple[str, ...]
    constants: tuple[Tensor, ...]
    val: Any

    def run(
        self, call: Apply, tensors: Mapping[str, Any], constants: Sequence[Any], dtype: torch.dtype
    ) -> Any:
        """Compute the weight, from tensors or in a graph from nodes.

        Args:
            call: calls an op, see `Apply`.
            tensors: value of each argument in `names`.
            constants: value of each tensor in `self.constants`.
            dtype: dtype of the weight.
        """
        given, own = iter(self.names), iter(constants)
        values: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = tensors[next(given)]
            elif node.op == "get_attr":
                values[node] = next(own)
            elif node.op == "output":
                weight = values[node.args[0]]
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = call(node.target, *args, **kwargs)
        return weight if self.val.dtype == dtype else call(aten.to.dtype, weight, dtype)


def unpacking(call: Call) -> Unpacking:
    """Trace the `dequantize` of a call's op into ops.

    Raises:
        PassError: if it cannot be traced.
    """
    assert call.op.dequantize is not None
    given = arguments(call.node)
    frozen = []
    for name, value in given.items():
        if name in (call.op.x, call.op.bias):
            continue
        if not isinstance(value, fx.Node):
            frozen.append((name, _frozen(value)))
        elif name in call.op.weights:
            val = value.meta["val"]
            frozen.append((name, (Tensor, tuple(val.shape), val.dtype, val.device)))
    try:
        return _traced(call.op.dequantize, tuple(frozen))
    except Exception as error:  # The code is a plugin's and can raise anything.
        reason = str(error).strip().splitlines()[:1]
        raise PassError(
            f"the dequantize of {call.node.target} cannot be traced into ops ({type(error).__name__}"
            f"{': ' if reason else ''}{''.join(reason)})"
        ) from error


@functools.lru_cache(maxsize=256)  # Few distinct shapes cover the many sites of a model.
def _traced(dequantize: Callable[..., Tensor], given: tuple[tuple[str, Any], ...]) -> Unpacking:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = {name: how[1:] for name, how in given if how[0] is Tensor}
    plain = {name: how[1] for name, how in given if how[0] is not Tensor}
    with mode:
        fakes = [torch.empty(size, dtype=dtype, device=device) for size, dtype, device in tensors.values()]

    def run(*values: Tensor) -> Tensor:
        return dequantize({**plain, **dict(zip(tensors, values, strict=True))})

    with torch.no_grad():
        traced = make_fx(run)(*fakes)
        weight = run(*fakes)
    constants = tuple(getattr(traced, str(n.target)) for n in traced.graph.nodes if n.op == "get_attr")
    if not isinstance(weight, Tensor) or not all(isinstance(value, Tensor) for value in constants):
        raise TypeError("it returns no tensor, or has control flow")
    return Unpacking(traced.graph, tuple(tensors), constants, weight)


def _frozen(value: Any) -> Any:
    """Return a hashable key of a number or list that keeps the type apart (1 is not True)."""
    value = tuple(value) if isinstance(value, list) else value
    return (type(value), value)
