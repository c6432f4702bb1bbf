"""Rows of a fused projection's weight, assigned to q, k and v.

An index tensor (row numbers, at the example's sizes) is propagated from the projection's output through the ops
that only move data. At any other op the propagation ends. That op leads to one of the attention's operands, and
the numbers that reach it are the rows of that part. Interleaved layouts (bloom, gpt_neox, falcon's groups) need
no rules of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from surgery.graph.analysis.attention import Attention
from surgery.graph.analysis.dataflow import Dataflow, Rule, op_name, rule_of
from surgery.graph.analysis.recurrence import Recurrence
from surgery.graph.ops import CONV, NORM, arguments, is_depthwise

Rows = dict[str, tuple[int, ...]]

# Ops that keep the elements and their order: only the output's shape is needed.
_RESHAPES = {
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as"),
    *("reshape_as", "contiguous", "clone", "alias", "detach", "to", "_to_copy", "type_as", "dropout"),
    *("dropout_", "lift_fresh_copy"),
}
# Pointwise ops: they change values, but not the row that a value came from.
_POINTWISE = {"clamp", "clamp_", "mul", "mul_", "div", "div_", "add", "add_", "neg", "batch_norm"}
# Ops that move or repeat elements: they are run on the index tensor.
_MOVES = {
    *("permute", "transpose", "t", "numpy_T", "movedim", "swapaxes", "select", "slice", "split", "chunk"),
    *("split_with_sizes", "tensor_split", "unbind", "narrow", "index", "index_select", "getitem", "flip"),
    *("expand", "expand_as", "unfold", "mT", "unsafe_split", "unsafe_chunk", "repeat_interleave"),
}


def find_parts(
    flow: Dataflow, op: fx.Node, attentions: Sequence[Attention | Recurrence], *, mixed: bool = False
) -> Rows | None:
    """Map each part of a fused projection to its rows of the weight.

    Args:
        flow: dataflow of the graph.
        op: the fused projection.
        attentions: attentions or recurrences that it feeds.
        mixed: follow the rows through depthwise convolutions, nonlinearities and concatenations of features too, which
            recurrences have before the operands are separated.

    Returns:
        Rows by part name, or None if parts overlap, do not cover all rows or cannot be determined.
    """
    shape = _sizes(op.meta.get("val"))
    if not shape:
        return None
    axis = 1 if flow.calls[op].kind == CONV else len(shape) - 1
    rows = shape[axis]
    index = torch.arange(rows).reshape([-1 if a == axis else 1 for a in range(len(shape))]).expand(shape)
    ways = _ways(flow, op, attentions)
    seen: dict[str, torch.Tensor] = {}
    try:
        for source, user, numbers in _ends(op, index, mixed):
            # An op on the way to two operands (before the split) cannot be assigned to one part.
            found = _distinct(numbers)
            found = found[found >= 0]
            letters = _leads_to(attentions, ways, source, user) if len(found) else set()
            if len(letters) > 1:
                return None
            for letter in letters:
                seen.setdefault(letter, torch.zeros(rows, dtype=torch.bool))[found] = True
    except _Unknown:
        return None
    # Every row must belong to exactly one part: a pass edits parts independently.
    if not seen or not bool((torch.stack(list(seen.values())).sum(0) == 1).all()):
        return None
    return {letter: tuple(seen[letter].nonzero().flatten().tolist()) for letter in "qkv" if letter in seen}


class _Unknown(Exception):
    """Raised for a size or an index that the graph alone does not determine."""


def _ways(
    flow: Dataflow, op: fx.Node, attentions: Sequence[Attention | Recurrence]
) -> dict[str, set[fx.Node]]:
    """Map each operand of the attentions to the nodes between it and the projection."""
    start = flow.order[op]
    ways: dict[str, set[fx.Node]] = {}
    for attention in attentions:
        for letter, operand in attention.operands.items():
            way, stack = ways.setdefault(letter, set()), [operand]
            while stack:
                node = stack.pop()
                # Nodes before the projection cannot depend on it. Without this stop, every layer would walk
                # the rotary tables.
                if node in way or flow.order[node] <= start or rule_of(node.target) is Rule.PRODUCT:
                    continue
                call = flow.calls.get(node)
                if call is not None and call.kind != NORM and not is_depthwise(call):
                    continue
                way.add(node)
                stack.extend([call.x] if call is not None else node._input_nodes)
                # A key cache is filled in place (`k[..., :n] = x`): the written value also leads to the operand.
                stack.extend(flow.writers.get(node, ()))
    return ways


def _leads_to(
    attentions: Sequence[Attention | Recurrence],
    ways: dict[str, set[fx.Node]],
    source: fx.Node,
    user: fx.Node,
) -> set[str]:
    direct = {
        letter
        for attention in attentions
        if user in attention.core
        for letter, operand in attention.operands.items()
        if operand is source
    }
    return direct or {letter for letter, way in ways.items() if user in way}


def _ends(op: fx.Node, index: torch.Tensor, mixed: bool) -> Iterator[tuple[fx.Node, fx.Node, torch.Tensor]]:
    """Yield (node, user, row numbers) where data from the projection enters an op that does more than move it."""
    stack: list[tuple[fx.Node, Any]] = [(op, index)]
    while stack:
        node, numbers = stack.pop()
        for user in node.users:
            name = op_name(user.target) if user.op == "call_function" else ""
            if mixed and isinstance(numbers, torch.Tensor):
                found = _mixed(user, node, name, numbers)
                if found is not None:
                    stack.append((user, found))
                    continue
            if not user.args or user.args[0] is not node or not _passes(user, name):
                if isinstance(numbers, torch.Tensor) and _reads(user, node):
                    yield node, user, numbers
                continue
            stack.append((user, _moved(user, name, numbers)))


def _mixed(user: fx.Node, node: fx.Node, name: str, numbers: torch.Tensor) -> torch.Tensor | None:
    """Row numbers behind a concatenation, a nonlinearity or a depthwise convolution; None for other ops.

    Values that do not come from the projection have the number -1.
    """
    shape = _sizes(user.meta.get("val"))
    if shape is None:
        return None
    if rule_of(user.target) is Rule.NONLINEAR and tuple(numbers.shape) == shape:
        return numbers
    if name == "cat":
        axis = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim", 0)
        pieces = []
        for other in user.args[0]:  # type: ignore[union-attr]
            sizes = _sizes(other.meta.get("val"))  # type: ignore[union-attr]
            if sizes is None:
                return None
            pieces.append(numbers if other is node else torch.full(sizes, -1))
        return torch.cat(pieces, axis)  # type: ignore[arg-type]
    if name in ("conv1d", "convolution") and user.args[0] is node and _is_depthwise(user, numbers, shape):
        # Channels stay apart, and all positions of a channel have one number.
        return numbers[..., :1].expand(shape)
    return None


def _is_depthwise(user: fx.Node, numbers: torch.Tensor, shape: tuple[int, ...]) -> bool:
    groups = arguments(user).get("groups", 1)
    return numbers.dim() == 3 and groups == numbers.shape[1] == shape[1]


def _reads(user: fx.Node, node: fx.Node) -> bool:
    """True if an op reads the node's values, not only its shape or dtype."""
    rule = rule_of(user.target)
    if rule is Rule.NOTHING or (rule is Rule.FIRST and user.args[0] is not node):
        return False
    # A recurrence returns its last state too.
    return isinstance(user.meta.get("val"), (torch.Tensor, tuple, list))


def _passes(user: fx.Node, name: str) -> bool:
    if name in _POINTWISE:
        # The other operand must be a parameter or a number, and the shape unchanged: clipping, a bias of its
        # own, LeViT's norm. With an activation as operand the parts have already been separated.
        others = [n for n in user._input_nodes if n is not user.args[0]]
        first, value = _sizes(user.args[0].meta.get("val")), _sizes(user.meta.get("val"))  # type: ignore[union-attr]
        return first == value and all(n.op == "get_attr" for n in others)
    return name in _RESHAPES or name in _MOVES


def _moved(node: fx.Node, name: str, numbers: Any) -> Any:
    if name in _RESHAPES or name in _POINTWISE:
        shape = _sizes(node.meta.get("val"))
        if shape is None:
            raise _Unknown
        return numbers if tuple(numbers.shape) == shape else numbers.reshape(shape)
    rest = [_concrete(a) for a in node.args[1:]]
    kwargs = {key: _concrete(a) for key, a in node.kwargs.items()}
    target: Any = node.target
    try:
        return target(numbers, *rest, **kwargs)
    except (RuntimeError, TypeError, IndexError) as error:
        raise _Unknown from error


def _concrete(value: Any) -> Any:
    """Replace the nodes in an argument by their values at the example's sizes.

    Raises:
        _Unknown: if a value cannot be determined.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(_concrete(item) for item in value)
    if not isinstance(value, fx.Node):
        return value
    known = value.meta.get("val")
    if isinstance(known, (torch.SymInt, int)):
        return _hint(known)
    while op_name(value.target) in ("lift_fresh_copy", "detach", "detach_", "to") and value.args:
        value = value.args[0]
    if value.op == "get_attr":
        module = value.graph.owning_module
        for name in str(value.target).split("."):
            module = getattr(module, name, None)
        if isinstance(module, torch.Tensor) and type(module) in (torch.Tensor, torch.nn.Parameter):
            return module
    if isinstance(known, torch.Tensor) and value.target is torch.ops.aten.expand_as.default:
        return known
    raise _Unknown


def _sizes(value: Any) -> tuple[int, ...] | None:
    """Return a tensor's sizes, dynamic ones as in the example; None if one is unknown."""
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return tuple(_hint(size) for size in value.shape)
    except _Unknown:
        return None


def _hint(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    if not size.node.has_hint():
        raise _Unknown
    return int(size.node.hint)


def _distinct(numbers: torch.Tensor) -> torch.Tensor:
    """Return the numbers without the repeats that expanded axes (stride 0) cause."""
    for axis, stride in enumerate(numbers.stride()):
        if stride == 0 and numbers.shape[axis] > 1:
            numbers = numbers.narrow(axis, 0, 1)
    return numbers.reshape(-1)
