"""Path from the scores to the values in eager attention, and the masks and biases that are applied on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.graph.analysis.dataflow import op_name
from surgery.graph.ops import arguments
from surgery.passes.prefix.operands import Unsuited


@dataclass(frozen=True)
class Pad:
    """A mask or bias that must be extended with the keys.

    Attributes:
        user: op that applies it to the scores.
        where: position or name of the argument.
        axis: axis of the keys, from the end.
        fill: value that leaves the prefix visible.
    """

    user: fx.Node
    where: int | str
    axis: int
    fill: float | bool

    @property
    def node(self) -> fx.Node:
        where = self.where
        return self.user.args[where] if isinstance(where, int) else self.user.kwargs[where]  # type: ignore[return-value]


def between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """Return the nodes on all paths from one node to another, both included, in graph order."""
    reached, stack = {first}, [first]
    while stack:
        for user in stack.pop().users:
            if user not in reached and (user is last or user < last):
                reached.add(user)
                stack.append(user)
    found, stack = {last}, [last]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in reached and node not in found:
                found.add(node)
                stack.append(node)
    return sorted(found)


# Fill values that leave scores unchanged.
_NEUTRAL: dict[str, float] = {"add": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0}
_MASKS = {"masked_fill", "where"}
# Ops that act on scores alone, for each key or over all keys.
_ALONE = {
    "softmax", "_softmax", "_safe_softmax", "dropout", "sum", "amax", "max", "min", "exp", "neg", "tanh", "sigmoid",
    "relu", "square", "isnan", "isinf", "eq", "clamp", "clamp_min", "clamp_max", "minimum", "maximum", "nan_to_num",
    "logical_not", "bitwise_not", "to", "_to_copy", "type_as", "contiguous", "clone", "alias", "detach", "unsqueeze",
    "squeeze", "view", "reshape", "_unsafe_view", "view_as", "expand_as", "permute", "transpose", "getitem", "slice",
    "cat",
}  # fmt: skip


def find_pads(chain: list[fx.Node], key_axis: int) -> Iterator[Pad]:
    """Yield the masks and biases of an eager attention.

    Args:
        chain: nodes from the scores to the product with the values.
        key_axis: axis of the keys in the scores, from the end.

    Raises:
        Unsuited: if an op's effect on a prefix is unknown.
    """
    axes: dict[fx.Node, int | None] = {chain[0]: key_axis}
    inside = set(chain)
    if op_name(chain[0].target) == "baddbmm" and has_keys(chain[0].args[0], key_axis):
        yield Pad(chain[0], 0, key_axis, 0.0)
    for node in chain[1:-1]:
        name = op_name(node.target).rstrip("_")
        axis = next((axes[n] for n in node.all_input_nodes if axes.get(n) is not None), None)
        axes[node] = axis = _axis_after(node, name, axis)
        # A linear op over another axis than the keys mixes the heads, separately for each key (talking heads).
        if name == "linear" and axis != -1:
            continue
        side = [
            (i, arg)
            for i, arg in enumerate(node.args)
            if isinstance(arg, fx.Node) and arg not in inside and has_keys(arg, axis)
        ]
        for i, arg in side:
            fill = _fill(node, name, i, inside)
            if fill is None:
                raise Unsuited(
                    f"its scores are combined with {arg.name} in {name}, and no rule gives the value for a prefix"
                )
            assert axis is not None
            yield Pad(node, i, axis, fill)
        if not side and name not in _NEUTRAL and name not in _ALONE | _MASKS:
            raise Unsuited(f"its scores go through {name}, which may depend on the number of keys")


def _fill(node: fx.Node, name: str, index: int, inside: set[fx.Node]) -> float | bool | None:
    if name in _NEUTRAL:
        return _NEUTRAL[name]
    if name == "masked_fill":
        return False if index == 1 else None
    if name == "where":
        if index == 0:
            return node.args[1] in inside
        return 0.0
    if name == "expand_as" and all(op_name(u.target).rstrip("_") == "masked_fill" for u in node.users):
        return False
    return None


def has_keys(value: Any, axis: int | None) -> bool:
    """True if a tensor has an entry for each key, that is, does not broadcast along the axis of the keys."""
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    if axis is None or not isinstance(tensor, torch.Tensor) or tensor.dim() < -axis:
        return False
    return not (isinstance(tensor.shape[axis], int) and tensor.shape[axis] == 1)


def _axis_after(node: fx.Node, name: str, axis: int | None) -> int | None:
    """Return the axis of the keys, from the end, in the result of an op on scores; None if it is reduced."""
    if axis is None:
        return None
    rank = node.meta["val"].dim() if isinstance(node.meta.get("val"), torch.Tensor) else 0
    args = arguments(node)
    if name == "permute":
        return [d % rank for d in args["dims"]].index(axis % rank) - rank
    if name == "transpose":
        i, j = args["dim0"] % rank - rank, args["dim1"] % rank - rank
        return j if axis == i else i if axis == j else axis
    if name in ("sum", "amax", "max", "min") and args.get("dim") is not None:
        dims = args["dim"] if isinstance(args["dim"], (list, tuple)) else [args["dim"]]
        return None if any(d in (axis, axis % (rank + 1)) for d in dims) else axis
    return axis
