"""Hidden layers: the ops between the producers of some units and the op that reads them, which keep units apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from surgery.graph.analysis.dataflow import op_name
from surgery.graph.marks import (
    input_before_adapters,
    is_aux,
    is_superseded,
    mark_of,
    output_with_adapters,
)
from surgery.graph.ops import CONV, LINEAR, Call, arguments, is_depthwise, operand

if TYPE_CHECKING:
    from surgery.graph.view import View

# Limit of ops in between. A longer path is a stream, not a hidden layer.
_MOST = 48
_STILL = {"dropout", "dropout_", "to", "_to_copy", "type_as", "clone", "contiguous", "detach", "alias"}
_POOLS = {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)}


class Unfit(Exception):
    """Raised if the units of a hidden layer cannot be kept apart. The message is a clause that gives the reason."""


@dataclass(frozen=True)
class Hidden:
    """A hidden layer.

    Attributes:
        ups: ops that produce the units. A fused one produces two halves (gate and up).
        down: op that reads the units.
        nodes: ops in between, in graph order.
        axes: axis of the units, for each of these nodes and the ups.
        width: number of units.
        why: reason why the layer cannot be widened, or empty.
    """

    ups: tuple[Call, ...]
    down: Call
    nodes: tuple[fx.Node, ...] = ()
    axes: Mapping[fx.Node, int] | None = None
    width: int = 0
    why: str = ""

    def is_fused(self, call: Call) -> bool:
        """True if the op produces gate and up together."""
        return _units(call) == 2 * self.width


def find_hidden(view: View) -> list[Hidden]:
    """Return the hidden layer before each linear or convolution that has one, in graph order."""
    calls = {call.node: call for call in view.calls}
    order = view.flow.order
    found = []
    for down in view.calls:
        if down.kind in (LINEAR, CONV) and down.weight is not None and down.x_axis == "row":
            hidden = _hidden(down, calls, order)
            if hidden is not None:
                found.append(hidden)
    return found


def _hidden(down: Call, calls: Mapping[fx.Node, Call], order: Mapping[fx.Node, int]) -> Hidden | None:
    """Return None if the op reads the model's stream, or units that no other op produces."""
    ups: dict[fx.Node, Call] = {}
    between: set[fx.Node] = set()
    blocked = ""
    stack = [operand(down)]
    while stack:
        node = stack.pop()
        if node in between or node in ups or node.op != "call_function":
            continue
        call = calls.get(node)
        if call is not None and call.kind in (LINEAR, CONV) and not is_depthwise(call):
            ups[node] = call
            continue
        between.add(node)
        # An adapter was built for the present width; the walk continues only to name the layer in the refusal.
        if is_aux(node):
            entry = mark_of(node).entry
            blocked = _made_for(entry)  # More specific than a reason found inside the adapter.
            stack.extend([input_before_adapters(node, whole=True)] if mark_of(node).input else _wrapped(node))
        # A batch norm acts on each unit separately; other norms and weight ops combine units.
        elif call is not None and op_name(node.target) != "batch_norm":
            blocked = blocked or _in_the_way(call)
            stack.append(call.x)
        elif _passes(node):
            stack.extend(n for n in node.all_input_nodes if _is_floating(n))
        else:
            blocked = blocked or f"{op_name(node.target)} lies between, and it does not keep units apart"
        # A hidden layer has one producer, or two (gate and up).
        if len(between) > _MOST or len(ups) > 2:
            return None
    if not ups:
        return None
    made = tuple(sorted(ups.values(), key=lambda call: order[call.node]))
    if blocked:
        return Hidden(made, down, why=blocked)
    nodes = tuple(sorted(between, key=lambda node: order[node]))
    try:
        axes = _axes(made, nodes, down)
        _check_ends(made, nodes, down, axes)
    except Unfit as error:
        return Hidden(made, down, why=str(error))
    return Hidden(made, down, tuple(n for n in nodes if n in axes), axes, _taken(down))


def _made_for(entry: str) -> str:
    return (
        f"it carries {entry!r}, which depends on the number of units; apply expand first, or undo {entry!r}"
    )


def _wrapped(node: fx.Node) -> list[fx.Node]:
    """Return the value that an adapter's output wraps; nothing for values inside the adapter's branch."""
    inner = mark_of(node).wraps
    return [n for n in node.graph.nodes if n.name == inner]


def _in_the_way(call: Call) -> str:
    if is_depthwise(call):
        return "a depthwise convolution lies between; target a layer without one"
    return f"{op_name(call.node.target)} lies between, and it combines all units"


def _passes(node: fx.Node) -> bool:
    name = op_name(node.target)
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return pointwise or name in _RULES


def _is_floating(node: fx.Node) -> bool:
    values = node.meta.get("val")
    values = values if isinstance(values, (list, tuple)) else [values]
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in values)


def _units(call: Call) -> int:
    """Return the number of units that an op produces."""
    assert call.weight is not None
    return int(call.weight.meta["val"].shape[call.layout.index("o")])


def _taken(down: Call) -> int:
    assert down.weight is not None
    return int(down.weight.meta["val"].shape[down.layout.index("i")])


# -- Axis of the units


def _axes(ups: Sequence[Call], nodes: Sequence[fx.Node], down: Call) -> dict[fx.Node, int]:
    axes = {call.node: 1 if call.kind == CONV else _rank(call.node) - 1 for call in ups}
    for node in nodes:
        read = [n for n in node.all_input_nodes if n in axes]
        if read:
            axes[node] = _RULES.get(op_name(node.target), _pointwise)(node, axes)
    end = operand(down)
    if end not in axes or axes[end] != (1 if down.kind == CONV else _rank(end) - 1):
        raise Unfit("its input does not have the units along one axis")
    return axes


def _rank(node: fx.Node) -> int:
    return int(_value(node).dim())


def _value(node: fx.Node) -> Any:
    value = node.meta["val"]
    return value[0] if isinstance(value, (list, tuple)) else value


def _pointwise(node: fx.Node, axes: Mapping[fx.Node, int]) -> int:
    """Return the axis of the units after a pointwise op; its other operands must be equal for all units."""
    found: set[int] = set()
    for n in node.all_input_nodes:
        if not isinstance(n.meta.get("val"), Tensor):
            continue
        if n in axes:
            found.add(axes[n] + _rank(node) - _rank(n))
    axis = found.pop()
    if found:
        raise Unfit(f"{op_name(node.target)} combines units along two axes")
    for n in node.all_input_nodes:
        value = n.meta.get("val")
        if n not in axes and isinstance(value, Tensor):
            place = axis - (_rank(node) - value.dim())
            if (
                place >= 0
                and value.dim()
                and not (isinstance(value.shape[place], int) and value.shape[place] == 1)
            ):
                raise Unfit(f"{op_name(node.target)} combines each unit with another value ({n.name})")
    return axis


def _first(node: fx.Node, axes: Mapping[fx.Node, int]) -> tuple[fx.Node, int]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source, axes[source]


def _batch_norm(node: fx.Node, axes: Mapping[fx.Node, int]) -> int:
    if _first(node, axes)[1] != 1:
        raise Unfit("batch_norm lies between, along another axis")
    return 1


def _pool(node: fx.Node, axes: Mapping[fx.Node, int]) -> int:
    source, axis = _first(node, axes)
    spatial = int(op_name(node.target)[-2])
    if axis != _rank(source) - spatial - 1:
        raise Unfit(f"{op_name(node.target)} acts along the units")
    return axis


def _pad(node: fx.Node, axes: Mapping[fx.Node, int]) -> int:
    source, axis = _first(node, axes)
    if len(arguments(node)["pad"]) // 2 >= _rank(source) - axis:
        raise Unfit("a padding acts along the units")
    return axis


def _reshape(node: fx.Node, axes: Mapping[fx.Node, int]) -> int:
    source, axis = _first(node, axes)
    # The axis of units must survive alone: as the last axis, or as the only one left after global pooling.
    before, after = source.meta["val"].shape, node.meta["val"].shape
    if axis == len(before) - 1 and isinstance(after[-1], int) and after[-1] == before[-1]:
        return len(after) - 1
    lone = len(after) == 2 and axis == 1 and all(isinstance(s, int) and s == 1 for s in before[2:])
    if lone and after[1] == before[1]:
        return 1
    raise Unfit(f"{op_name(node.target)} mixes units with positions")


def _turn(node: fx.Node, axes: Mapping[fx.Node, int]) -> int:
    source, axis = _first(node, axes)
    rank, args = _rank(source), arguments(node)
    if op_name(node.target) == "permute":
        return [d % rank for d in args["dims"]].index(axis)
    pair = [args["dim0"] % rank, args["dim1"] % rank]
    return pair[1 - pair.index(axis)] if axis in pair else axis


def _halve(node: fx.Node, axes: Mapping[fx.Node, int]) -> int:
    """Return the axis of the units after a split into two halves: gate and up of a fused op."""
    source, axis = _first(node, axes)
    args, total = arguments(node), _value(source).shape[axis]
    dim = args["dim"] % _rank(source)
    name = op_name(node.target)
    if name == "slice":
        start, end = args["start"] or 0, args["end"]
        if dim != axis:
            return axis
        if (
            args["step"] != 1
            or 2 * start not in (0, total)
            or not (end is None or 2 * end == total or end >= total)
        ):
            raise Unfit("a slice splits its units, but not into halves")
        return axis
    if dim != axis:
        raise Unfit(f"{name} splits another axis than its units")
    sizes = [int(v.shape[axis]) for v in node.meta["val"]] if name != "glu" else [1, 1]
    if len(sizes) != 2 or sizes[0] != sizes[1]:
        raise Unfit(f"{name} splits its units, but not into halves")
    return axis


_RULES = {
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten"), _reshape),
    **dict.fromkeys(("transpose", "permute"), _turn),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "glu", "slice"), _halve),
    **dict.fromkeys(_STILL | {"getitem"}, lambda node, axes: _first(node, axes)[1]),
    "batch_norm": _batch_norm,
    "constant_pad_nd": _pad,
}


def _check_ends(
    ups: Sequence[Call], nodes: Sequence[fx.Node], down: Call, axes: Mapping[fx.Node, int]
) -> None:
    # Every reader of the units must be part of the layer, since it would receive more of them.
    inside = {*nodes, down.node}
    for node in (*(call.node for call in ups), *(n for n in nodes if n in axes)):
        adapters = [n for n in (node, *node.users) if is_aux(n)]
        if adapters:
            raise Unfit(_made_for(mark_of(adapters[0]).entry))
        for user in node.users:
            if user not in inside and not _reads_other_size(user, axes[node]) and not is_superseded(user):
                raise Unfit(f"another op reads its units too ({user.name})")
    outer = output_with_adapters(down.node, whole=True)
    if outer is not down.node:
        entry = mark_of(outer).entry
        raise Unfit(f"the op that reads its units carries {entry!r}; apply expand first, or undo {entry!r}")
    width = _taken(down)
    for call in (*ups, down):
        groups = arguments(call.node).get("groups", 1) if call.kind == CONV else 1
        if groups != 1:
            raise Unfit(
                f"a convolution of {groups} groups produces or reads its units, so their number cannot change"
            )
        if call.op.dequantize is not None:
            raise Unfit("its weights are packed; widen before quantizing")
    for call in ups:
        if call.weight is None:
            raise Unfit(f"one of its weights is computed from {', '.join(call.computed_from)}")
        if call.x_axis != "row" or (call.kind == CONV and call.layout == "io"):
            raise Unfit(f"{op_name(call.node.target)} produces its units in a layout that cannot be widened")
        given = arguments(call.node).get(call.op.bias) if call.op.bias else None
        if given is not None and call.bias is None:
            raise Unfit("a bias of its units is computed")
        fused = any(
            op_name(n.target) in ("chunk", "split", "split_with_sizes", "glu", "slice") for n in nodes
        )
        if _units(call) != (2 * width if fused and len(ups) == 1 else width):
            raise Unfit(f"{_units(call)} units are produced, but {width} are read")


def _reads_other_size(node: fx.Node, axis: int) -> bool:
    return op_name(node.target) == "sym_size" and arguments(node).get("dim") != axis
