"""Ops that hold a weight, and the normalized view of their calls that site matching works on.

This module only reads a graph. A `WeightOp` declares which arguments of an ATen op (or of a third party's op) are the
activation, the weight and the bias. `read_call` turns a node into a `Call`: the weight is traced back through
transposes, casts and gathers to the parameter that holds it. So `linear`, `addmm`, `t + matmul` and `index + bmm` look
the same to a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.common.errors import PluginError, nearest
from surgery.common.hooks import hookimpl
from surgery.graph.marks import mark_of

aten = torch.ops.aten

LINEAR, CONV, EMBEDDING, EXPERTS, NORM = "linear", "conv", "embedding", "experts", "norm"


@dataclass(frozen=True)
class WeightOp:
    """Declaration of an op that holds a weight. Argument names are those of the op's schema.

    Attributes:
        kind: linear, conv, embedding, experts or norm.
        x: the activation argument.
        weights: the argument(s) that hold the weight, the main one first.
        bias: the bias argument, or None.
        layout: axes of the weight as the op reads it: "oi" (out, in), "io", "vd" (vocabulary, dim), ….
        dequantize: for an op with packed weights, a function from the op's arguments by name to the float weight in
            `layout`. It is written in torch ops, and gets the tensors of `weights` and the op's numbers.
    """

    kind: str
    x: str
    weights: tuple[str, ...] = ("weight",)
    bias: str | None = "bias"
    layout: str = "oi"
    dequantize: Callable[[Mapping[str, Any]], torch.Tensor] | None = None


@dataclass(frozen=True)
class Call:
    """One use of a weight in the graph.

    Attributes:
        node: the op.
        op: declaration of the op.
        kind: kind of this use, such as "linear"; a product with stacked weights is "experts".
        x: node that provides the activation.
        weight: get_attr node of the parameter, or None if the weight is computed.
        layout: axes of the *parameter* as stored, such as "oi" for nn.Linear, "io" for Conv1D, "eoi" for stacked
            experts.
        bias: get_attr node of the bias, or None.
        gather: for experts, the node of expert indices, one per row.
        x_axis: for a product, the axis of x that is summed over: "column" for W @ x, "row" for x @ W.
        computed_from: parameters that a computed weight depends on.
    """

    node: fx.Node
    op: WeightOp
    kind: str
    x: fx.Node
    weight: fx.Node | None
    layout: str
    bias: fx.Node | None = None
    gather: fx.Node | None = None
    x_axis: str = "row"
    computed_from: tuple[str, ...] = ()

    @property
    def module_path(self) -> str:
        return module_path(self.node)


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module whose forward created this node; empty for the root."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


_MATMUL = WeightOp(LINEAR, "self", ("other",), None, "io")

BUILTIN_WEIGHT_OPS: dict[Any, WeightOp] = {
    aten.linear.default: WeightOp(LINEAR, "input"),
    aten.addmm.default: WeightOp(LINEAR, "mat1", ("mat2",), "self", "io"),
    aten.mm.default: WeightOp(LINEAR, "self", ("mat2",), None, "io"),
    aten.matmul.default: _MATMUL,
    aten.bmm.default: WeightOp(EXPERTS, "self", ("mat2",), None, "eio"),
    aten.conv1d.default: WeightOp(CONV, "input"),
    aten.conv1d.padding: WeightOp(CONV, "input"),
    aten.conv2d.default: WeightOp(CONV, "input"),
    aten.conv2d.padding: WeightOp(CONV, "input"),
    aten.conv3d.default: WeightOp(CONV, "input"),
    aten.conv3d.padding: WeightOp(CONV, "input"),
    aten.conv_transpose1d.default: WeightOp(CONV, "input", layout="io"),
    aten.conv_transpose2d.input: WeightOp(CONV, "input", layout="io"),
    aten.embedding.default: WeightOp(EMBEDDING, "indices", bias=None, layout="vd"),
    aten.layer_norm.default: WeightOp(NORM, "input", layout="o"),
    aten.rms_norm.default: WeightOp(NORM, "input", bias=None, layout="o"),
    aten.group_norm.default: WeightOp(NORM, "input", layout="o"),
    aten.batch_norm.default: WeightOp(NORM, "input", layout="o"),
    aten.instance_norm.default: WeightOp(NORM, "input", layout="o"),
}

# Ops that return a weight unchanged, at most cast or copied.
_SAME = {
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.type_as.default,
    aten.to.other,
    aten.lift_fresh_copy.default,
}


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return a node's arguments by schema name, with defaults filled in; by number if the op has no schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {**{str(i): value for i, value in enumerate(node.args)}, **node.kwargs}
    found: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            found[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value if argument.has_default_value() else None
    return found


def operand(call: Call) -> fx.Node:
    """Return the node that the call's op currently reads as its activation."""
    args = arguments(call.node)
    return args[call.op.weights[0] if call.x_axis == "column" else call.op.x]


def parameter_of(node: fx.Node) -> str | None:
    """Return the name of the parameter that this value replaces at a site, or None."""
    return mark_of(node).weight_of


def _stored(value: fx.Node) -> fx.Node | None:
    """Return the get_attr node of the parameter that a value is or replaces, or None."""
    name = parameter_of(value)
    if name is not None:
        return _own_node(value.graph, name)
    return value if value.op == "get_attr" else None


def _own_node(graph: fx.Graph, name: str) -> fx.Node:
    """Return the node at which the model itself reads a parameter, as opposed to a replacement made by a pass."""
    nodes = (n for n in graph.nodes if n.op == "get_attr" and n.target == name)
    return next(n for n in nodes if parameter_of(n) is None)


def rank_of(node: fx.Node) -> int:
    """Return the number of dimensions of a node's tensor, or -1."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else -1


@dataclass(frozen=True)
class _Source:
    """Origin of an operand: parameter node, stored axis of each operand axis, gather indices."""

    node: fx.Node
    axes: tuple[int, ...]
    gather: fx.Node | None


def _trace_weight(operand: fx.Node, is_weight: Callable[[fx.Node], bool]) -> _Source | None:
    """Trace an operand back to the parameter that it is a view of; None if the operand is computed."""
    node, gather = operand, None
    axes = list(range(max(rank_of(operand), 0)))
    while True:
        # A pass may have put a computed value here (a scaled weight); the site is still that of the parameter.
        stands_for = parameter_of(node)
        if stands_for is not None:
            node = _own_node(node.graph, stands_for)
        if node.op == "get_attr" and is_weight(node):
            break
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        args, target = arguments(node), node.target
        below, rank = node.args[0], rank_of(node)
        if target in _SAME:
            pass
        elif target in (aten.t.default, aten.numpy_T.default):
            if rank == 2:
                axes = [1 - a for a in axes]
                # `axes[k]` is the stored axis that became axis k of the operand.
        elif target is aten.transpose.int:
            i, j = args["dim0"] % rank, args["dim1"] % rank
            axes = [j if a == i else i if a == j else a for a in axes]
        elif target is aten.permute.default:
            order = [d % rank for d in args["dims"]]
            axes = [order[a] for a in axes]
        elif target is aten.unsqueeze.default and (whole := _before_squeeze(node)) is not None:
            node = whole
            continue
            # Experts: the weights of the selected experts are gathered from the stacked parameter.
        elif target is aten.index.Tensor and len(args["indices"]) == 1 and gather is None:
            index = args["indices"][0]
            if not isinstance(index, fx.Node) or rank_of(index) != 1:
                return None
            gather = index
        elif target is aten.index_select.default and args["dim"] == 0 and gather is None:
            gather = args["index"]
        else:
            return None
        node = below
    return _Source(node, tuple(axes), gather)


def _before_squeeze(node: fx.Node) -> fx.Node | None:
    """Return the input of a squeeze that this unsqueeze undoes, looking through casts (Mamba's depthwise kernel)."""
    rank, below = rank_of(node), node.args[0]
    while isinstance(below, fx.Node) and below.target in _SAME:
        below = below.args[0]
    if not isinstance(below, fx.Node) or below.target is not aten.squeeze.dim:
        return None
    whole = below.args[0]
    if not isinstance(whole, fx.Node) or rank_of(whole) != rank:
        return None
    return whole if (arguments(below)["dim"] - arguments(node)["dim"]) % rank == 0 else None


def _computed_from(operand: fx.Node, is_weight: Callable[[fx.Node], bool]) -> tuple[str, ...]:
    """Return the parameters that an operand is computed from without any activation; empty if there are none."""
    found: dict[str, None] = {}
    stack, seen = [operand], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        # The limit keeps a long chain of computed values from being searched at every node.
        if node.op == "placeholder" or len(seen) > 64:
            return ()
        if node.op == "get_attr" and is_weight(node):
            found[str(node.target)] = None
        stack.extend(node.all_input_nodes)
    return tuple(found)


def read_call(
    node: fx.Node, ops: Mapping[Any, WeightOp], is_weight: Callable[[fx.Node], bool]
) -> Call | None:
    """Read a node as a use of a weight.

    Args:
        node: node to read.
        ops: declarations by op.
        is_weight: predicate for get_attr nodes of parameters.

    Returns:
        The call, or None if the node uses no weight (a product of two activations, for example).
    """
    op = ops.get(node.target)
    if op is None:
        return None
    args = arguments(node)
    x, operand = args.get(op.x), args.get(op.weights[0])
    if not isinstance(x, fx.Node) or not isinstance(operand, fx.Node):
        return None
    source = _trace_weight(operand, is_weight)
    column = False
    if source is None and op.kind in (LINEAR, EXPERTS) and op.layout.endswith("io"):
        # W @ x: the weight is the left operand.
        swapped = _trace_weight(x, is_weight)
        if swapped is not None and swapped.node is not operand and op.bias is None:
            source, x, column = swapped, operand, True
    if source is None:
        # A product with a computed operand may be any product of activations, so only dedicated ops are accepted.
        made_of = _computed_from(operand, is_weight)
        if not made_of or op.kind == EXPERTS or _is_product(node):
            return None
        return Call(node, op, op.kind, x, None, op.layout, computed_from=made_of)
    return _resolve(node, op, x, source, column, args)


def _is_product(node: fx.Node) -> bool:
    return node.target in (aten.matmul.default, aten.mm.default, aten.bmm.default)


def _resolve(
    node: fx.Node, op: WeightOp, x: fx.Node, source: _Source, column: bool, args: Mapping[str, Any]
) -> Call | None:
    bias = args.get(op.bias) if op.bias else None
    bias = _stored(bias) if isinstance(bias, fx.Node) else None
    kind, letters = op.kind, op.layout
    rank = rank_of(source.node)
    if op.dequantize is not None:
        return Call(node, op, kind, x, source.node, letters, bias, source.gather)
    if kind in (LINEAR, EXPERTS) and _is_product(node):
        if (rank == 3 and source.gather is not None) or rank == 3:
            kind, letters = EXPERTS, "eoi" if column else "eio"
        elif rank == 2 and source.gather is None and (not column or rank_of(x) > 1):
            kind, letters = LINEAR, "oi" if column else "io"
        else:
            return None
        if len(letters) != len(source.axes):
            return None
    if kind in (LINEAR, EXPERTS):
        stored = [""] * rank
        for axis, letter in zip(source.axes, letters, strict=False):
            stored[axis] = letter
        layout = "".join(stored)
        if len(layout) != rank:
            return None
    else:
        # A permuted conv or embedding weight has no layout letters, so it counts as computed.
        if source.axes != tuple(range(len(source.axes))):
            return Call(node, op, kind, x, None, letters, computed_from=(str(source.node.target),))
        layout = letters
    return Call(node, op, kind, x, source.node, layout, bias, source.gather, "column" if column else "row")


def find_calls(
    nodes: Sequence[fx.Node], ops: Mapping[Any, WeightOp], is_weight: Callable[[fx.Node], bool]
) -> list[Call]:
    """Return every use of a weight, in graph order.

    Args:
        nodes: nodes to read.
        ops: declarations by op.
        is_weight: predicate for get_attr nodes of parameters.
    """
    calls = (read_call(node, ops, is_weight) for node in nodes if node.op == "call_function")
    return [call for call in calls if call is not None]


def is_depthwise(call: Call) -> bool:
    """True for a convolution that does not mix channels. Its weight may be computed."""
    groups, size = arguments(call.node).get("groups", 1), weight_shape(call)
    return call.kind == CONV and isinstance(groups, int) and groups > 1 and bool(size) and size[1] == 1


def weight_shape(call: Call) -> list[int]:
    """Return the shape of the weight as the op reads it; empty if unknown."""
    operand = arguments(call.node).get(call.op.weights[0])
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    return list(value.shape) if isinstance(value, torch.Tensor) else []


def per_axis(value: int | Sequence[int], axes: int) -> list[int]:
    """Return a convolution argument (stride, padding, …) for each axis; a single number applies to all axes."""
    found = [value] if isinstance(value, int) else list(value)
    return found * axes if len(found) == 1 else found


# Letters of the axes of a weight, by kind; "experts" has an axis of experts besides.
_AXES = {LINEAR: "oi", CONV: "oi", EMBEDDING: "vd", EXPERTS: "eoi", NORM: "o"}


def check_weight_ops(given: Any) -> None:
    """Raise PluginError if a declaration does not fit its op: it would never match, or fail in the first program."""
    if not isinstance(given, Mapping):
        raise PluginError(
            f"it returns {type(given).__name__} from surgery_weight_ops; return a dict, op → WeightOp"
        )
    for op, declared in given.items():
        if not isinstance(declared, WeightOp):
            raise PluginError(f"for {op} it returns {type(declared).__name__}; return a WeightOp")
        if not isinstance(op, torch._ops.OpOverload):
            raise PluginError(f"{op} is no overload of an op, so no node has it; declare {op}.default, say")
        if declared.kind not in _AXES:
            raise PluginError(f"{op} has the kind {declared.kind!r}; use one of {', '.join(_AXES)}")
        if sorted(declared.layout) != sorted(_AXES[declared.kind]):
            raise PluginError(
                f"{op} has the layout {declared.layout!r}; for {declared.kind} use the letters "
                f"{', '.join(_AXES[declared.kind])} once each"
            )
        known = [argument.name for argument in op._schema.arguments]
        named = (declared.x, *declared.weights, *([declared.bias] if declared.bias else []))
        for name in named:
            # The default bias is left out by an op that has none.
            if name not in known and not (name == declared.bias == "bias"):
                hint = nearest(str(name), known) or f"; it has {', '.join(known)}"
                raise PluginError(f"{op} has no argument {name!r}{hint}")
        if not declared.weights or (declared.dequantize is not None and not callable(declared.dequantize)):
            raise PluginError(f"{op} needs the names of its weights, and a function as dequantize")


CHECKS_OF_HOOKS = {"surgery_weight_ops": check_weight_ops}


@hookimpl
def surgery_weight_ops() -> dict[Any, WeightOp]:
    """Return the ATen ops that hold a weight."""
    return BUILTIN_WEIGHT_OPS
