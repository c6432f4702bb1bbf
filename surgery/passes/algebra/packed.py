"""Packed weights as floats: what a third party's `WeightOp.dequantize` computes, traced into ops.

The same ops run eagerly and in a graph, so that what a pass measures of the weight when it is applied is, to the bit,
what its graph computes with later.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from surgery.errors import PassError
from surgery.weight_ops import EXPERTS, Call, arguments

if TYPE_CHECKING:
    from surgery.rewriter import Rewriter
    from surgery.sites import Site

aten = torch.ops.aten
Apply = Callable[..., Any]  # of an op: to tensors, or in a graph to nodes


def eagerly(op: Any, *args: Any, **kwargs: Any) -> Any:
    return op(*args, **kwargs)


@dataclass(frozen=True)
class Unpacking:
    """The ops of one `dequantize`.

    names: arguments of the op that it reads, tensors all. constants: tensors of its own (a codebook). val: the fake
    weight that it makes.
    """

    graph: fx.Graph
    names: tuple[str, ...]
    constants: tuple[Tensor, ...]
    val: Any

    def run(
        self, call: Apply, tensors: Mapping[str, Any], constants: Sequence[Any], dtype: torch.dtype
    ) -> Any:
        """The weight in a dtype, from values for the names and the constants: of tensors, or of nodes."""
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
    """How the weight of a packed op becomes floats. Raises PassError where its `dequantize` cannot be traced."""
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
    except Exception as error:  # a plugin's own code can raise anything
        reason = str(error).strip().splitlines()[:1]
        raise PassError(
            f"the dequantize of {call.node.target} cannot be traced into ops ({type(error).__name__}"
            f"{': ' if reason else ''}{''.join(reason)})"
        ) from error


@functools.lru_cache(maxsize=256)  # a model has few shapes, and many sites
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
        raise TypeError("it gives no tensor, or has control flow of its own")
    return Unpacking(traced.graph, tuple(tensors), constants, weight)


def _frozen(value: Any) -> Any:
    """A number or a list of them, hashed with its type (1 is not True)."""
    value = tuple(value) if isinstance(value, list) else value
    return (type(value), value)


def refusal(site: Site) -> str | None:
    """Why a pass cannot compute with a packed weight as floats, or None."""
    if site.kind == EXPERTS:
        return f"its weight is packed for {site.op}, and of stacked experts nothing is unpacked"
    try:
        made = unpacking(site.calls[0]).val
    except PassError as error:
        return f"its weight is packed, and {error}"
    if tuple(made.shape) != site.float_shape or not made.dtype.is_floating_point:
        return (
            f"its weight is packed, and the dequantize of {site.op} gives {made.dtype} of shape {list(made.shape)} "
            f"where the op computes with {list(site.float_shape)}"
        )
    return None


def constants(site: Site) -> tuple[Tensor, ...]:
    """What `unpacked` reads of a packed site's weight that is no argument of the op: tensors of the pass."""
    return unpacking(site.calls[0]).constants if site.packed else ()


def unpacked(site: Site, g: Rewriter) -> fx.Node:
    """The packed weight of the site as floats, computed in the graph; the pass has its `constants` by their numbers."""
    assert g.call_ is not None
    found = unpacking(g.call_)
    args = arguments(g.call_.node)
    own = [g[f"constant_{number}"] for number in range(len(found.constants))]
    return found.run(g.call, args, own, site.float_dtype)


def as_tensor(site: Site, value_of: Callable[[fx.Node], Tensor]) -> Tensor:
    """The packed weight of the site as floats, of the values of what its op reads."""
    call = site.calls[0]
    found, args = unpacking(call), arguments(call.node)
    tensors = {name: value_of(args[name]).detach() for name in found.names}
    device = next(iter(tensors.values())).device
    own = [constant.to(device) for constant in found.constants]
    with torch.no_grad():
        return found.run(eagerly, tensors, own, site.float_dtype)
