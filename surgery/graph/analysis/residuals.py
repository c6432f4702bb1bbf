"""The stream of a model, and where it is added to.

The *stream* is what rests on the inputs through a weight op, so masks, rotary tables and position biases are
no part of it. Two of its values are *the same stream* when only casts, views, dropout, scaling by a number
and residual adds lie between them. An add is residual where one operand (the skip) is a stream that the other
is computed from. In a convolutional network the skip may also be a linear map of that stream, such as a
strided 1×1 convolution with its norm, if the other operand is not one.

Every walk goes back in descending graph order to the nearest value that it looks for, so it sees what lies
between and nothing else: walks from every residual add are together linear in the size of the graph.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from surgery.graph.analysis.dataflow import Dataflow, Rule, op_name, rule_of
from surgery.graph.marks import META, is_aux
from surgery.graph.ops import (
    CONV,
    EMBEDDING,
    EXPERTS,
    LINEAR,
    NORM,
    Call,
    is_depthwise,
    weight_shape,
)

_BENDING = frozenset((Rule.NONLINEAR, Rule.SOFTMAX, Rule.PRODUCT))
_LONGEST_SHORTCUT = 32
_SAME = {
    *("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "unsqueeze", "squeeze"),
    *("permute", "transpose", "t", "contiguous", "clone", "lift_fresh_copy", "detach", "detach_", "alias"),
    *("to", "_to_copy", "type_as", "dropout", "dropout_"),
}
_SCALING = {"mul", "mul_", "div", "div_"}


class Stream:
    """A graph as the walks need it.

    calls: weight ops by node. order: position in the graph. inputs: the operands of every op, and the ops that
    wrote into them in place. values: the nodes of the stream. origins: from what else a stream may start:
    inputs, and what rests on none (query tokens, a class token). root: by value, the first of the same stream;
    filled in by `find_residuals`.
    """

    def __init__(self, graph: fx.Graph, calls: Iterable[Call], flow: Dataflow) -> None:
        self.graph, self.order = graph, flow.order
        self.origins = flow.constant | {node for node in graph.nodes if node.op == "placeholder"}
        self.calls = {call.node: call for call in calls}
        self.inputs = operands(graph)
        self.values = stream_values(graph, self.calls, self.inputs)
        self.root: dict[fx.Node, fx.Node] = {}

    def is_projection(self, node: fx.Node) -> bool:
        """Whether a node is a weight op of the stream that mixes features."""
        call = self.calls.get(node)
        if call is None or node not in self.values:
            return False
        return call.kind in (LINEAR, CONV, EXPERTS) and not is_depthwise(call)

    def behind(
        self, end: fx.Node, stop: Callable[[fx.Node], bool], floor: int = 0
    ) -> tuple[fx.Node | None, list[fx.Node]]:
        """The ops that `end` rests on, itself first, in descending order down to the first that `stop` accepts.

        Returns that one, None where there is none at or after position `floor`, and those before it.
        """
        heap, seen = [(-self.order[end], end)], {end}
        passed: list[fx.Node] = []
        while heap:
            position, node = heapq.heappop(heap)
            if -position < floor:
                break
            if stop(node):
                return node, passed
            passed.append(node)
            for operand in self.inputs[node]:
                if operand in self.inputs and operand not in seen:
                    seen.add(operand)
                    heapq.heappush(heap, (-self.order[operand], operand))
        return None, passed

    def enclosed(self, start: fx.Node, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """Of nodes in descending order: those that rest on `start`, and what only they read."""
        kept = {start}
        for node in reversed(nodes):
            if not kept.isdisjoint(self.inputs[node]):
                kept.add(node)
        for node in nodes:
            if node not in kept and node.users and all(user in kept for user in node.users):
                kept.add(node)
        return [node for node in nodes if node in kept]


def operands(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """By op and input: the nodes that it reads, and the ops that wrote into these in place before it."""
    found: dict[fx.Node, list[fx.Node]] = {}
    written: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            found[node] = []
        elif node.op in ("call_function", "output"):
            found[node] = node.all_input_nodes
            if written:
                writers = (written[n] for n in found[node] if n in written)
                found[node] = list(dict.fromkeys([*found[node], *writers]))
            if _writes(node.target):
                _note_write(node, written)
    return found


def stream_values(
    graph: fx.Graph, calls: Mapping[fx.Node, Call], inputs: Mapping[fx.Node, Sequence[fx.Node]]
) -> set[fx.Node]:
    """The nodes that rest on the inputs through a weight op."""
    given: set[fx.Node] = set()
    values: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            given.add(node)
        elif is_value(node):
            call = calls.get(node)
            if not given.isdisjoint(inputs[node]):
                given.add(node)
            if not values.isdisjoint(inputs[node]) or (
                call is not None and not given.isdisjoint((call.x, node))
            ):
                values.add(node)
    return values


@lru_cache(maxsize=4096)
def _writes(target: Any) -> bool:
    return bool(getattr(getattr(target, "_schema", None), "is_mutable", False))


def _note_write(node: fx.Node, written: dict[fx.Node, fx.Node]) -> None:
    """Who reads the tensor, or what it is a view of, from now on reads what was written."""
    target, steps = node.args[0] if node.args else None, 0
    while isinstance(target, fx.Node) and steps < 8:
        written[target] = node
        if target.op != "call_function" or rule_of(target.target) is not Rule.FIRST or not target.args:
            return
        target, steps = target.args[0], steps + 1


def is_value(node: fx.Node) -> bool:
    if node.op != "call_function" or rule_of(node.target) is Rule.NOTHING:
        return False
    return isinstance(node.meta.get("val"), (torch.Tensor, list, tuple))


def is_add(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node.target) in ("add", "add_")


def gated_by(node: fx.Node) -> fx.Node | None:
    """The value that an op lets through in part, where it is the gate of a block that was put in."""
    place = node.meta.get(META, {}).get("gate")
    return node.args[place] if place is not None else None


def moved_from(node: fx.Node) -> fx.Node | None:
    """The operand whose values an op gives moved, cast, dropped out or scaled by a number; None if it has none."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    gated = gated_by(node)
    if gated is not None:
        return gated
    name = op_name(node.target)
    scales = name in _SCALING and len(node.args) > 1 and not isinstance(node.args[1], fx.Node)
    return node.args[0] if scales or name in _SAME else None


def is_pointwise(call: Call) -> bool:
    """A convolution that keeps positions apart."""
    return call.kind == CONV and all(length == 1 for length in weight_shape(call)[2:])


def shape_of(node: fx.Node) -> tuple[str, ...]:
    """Sizes as text: comparing symbols would guard on them."""
    value = node.meta.get("val")
    return tuple(str(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


@dataclass(eq=False)
class Residual:
    """A residual add.

    join: the add. skip, end: its operands, the stream and what is added to it. start: the stream value that
    `end` is computed from. nodes: those between, in descending order. weighted: one is a weight op, not a norm.
    parent: the residual in whose branch this one lies; children: those in its branch.
    before: the residual whose sum the start is computed from, through the nodes `between`, in descending order.
    """

    join: fx.Node
    skip: fx.Node
    end: fx.Node
    start: fx.Node
    nodes: list[fx.Node]
    weighted: bool
    parent: Residual | None = None
    children: list[Residual] = field(default_factory=list)
    before: Residual | None = None
    between: list[fx.Node] = field(default_factory=list)

    @property
    def has_chain(self) -> bool:
        """Whether there are branches one after another within its branch."""
        inner = [child for child in self.children if child.weighted]
        return any(child.before in inner for child in inner)


def find_residuals(stream: Stream) -> list[Residual]:
    """All residual adds in graph order, also those of branches without weights."""
    found: dict[fx.Node, Residual] = {}
    for node in stream.graph.nodes:
        if node not in stream.values and node not in stream.origins:
            continue
        below = moved_from(node)
        stream.root[node] = stream.root.get(below, node) if below is not None else node
        if is_add(node):
            residual = _residual(stream, node)
            if residual is not None:
                found[node] = residual
    for residual in found.values():
        for node in residual.nodes:
            inner = found.get(node)
            # Inner residuals close first, so the first to hold one is its parent.
            if inner is not None and inner.parent is None:
                inner.parent = residual
                residual.children.append(inner)
        join, residual.between = stream.behind(residual.start, found.__contains__)
        residual.before = found[join] if join is not None else None
    return list(found.values())


def _residual(stream: Stream, add: fx.Node) -> Residual | None:
    left, right = add.args[0], add.args[1]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    if is_aux(add):
        base = right if is_aux(left) else left
        stream.root[add] = stream.root.get(base, add)
        return None
    pairs = [
        (skip, end)
        for skip, end in ((left, right), (right, left))
        if end in stream.values
        and (skip in stream.values or (skip in stream.origins and shape_of(skip) == shape_of(end)))
    ]
    for skip, end in pairs:
        root = stream.root[skip]
        if stream.root[end] is root:
            stream.root[add] = root
            return None
        start, nodes = stream.behind(end, _no_later(stream, skip), stream.order[root])
        if start is not None and (skip in stream.values or not _is_added(stream, start, add)):
            stream.root[add] = root
            return _between(stream, add, skip, end, start, nodes)
    for skip, end in pairs:
        shortcut = _shortcut(stream, skip)
        start, nodes = stream.behind(end, set(shortcut).__contains__, stream.order[shortcut[-1]])
        if start is not None and start is not skip and is_nonlinear(stream, nodes):
            return _between(stream, add, skip, end, start, nodes)
    return None


def _between(
    stream: Stream, join: fx.Node, skip: fx.Node, end: fx.Node, start: fx.Node, passed: Sequence[fx.Node]
) -> Residual:
    nodes = stream.enclosed(start, passed)
    calls = [stream.calls[n] for n in nodes if n in stream.calls and n in stream.values]
    return Residual(join, skip, end, start, nodes, any(call.kind != NORM for call in calls))


def _is_added(stream: Stream, node: fx.Node, add: fx.Node) -> bool:
    """Whether a value is added to the stream elsewhere too: a bias that layers share, no stream of its own."""
    return any(
        user is not add and is_add(user) and not stream.values.isdisjoint(user.all_input_nodes)
        for user in node.users
    )


def _no_later(stream: Stream, skip: fx.Node) -> Callable[[fx.Node], bool]:
    """Accepts what is the same stream as the skip and not younger: that would be within a skip over blocks."""
    root, latest = stream.root[skip], stream.order[skip]
    return lambda node: stream.root.get(node) is root and stream.order[node] <= latest


def _shortcut(stream: Stream, node: fx.Node) -> list[fx.Node]:
    """What a value is a linear map of, with one projection at the most: itself, then ever farther."""
    chain, projections = [node], 0
    while len(chain) < _LONGEST_SHORTCUT:
        call = stream.calls.get(node)
        if call is not None:
            projections += stream.is_projection(node)
            below = [call.x] if call.kind != EMBEDDING and projections < 2 else []
        elif rule_of(node.target) in _BENDING:
            below = []
        else:
            below = [n for n in stream.inputs[node] if n in stream.values]
        if len(below) != 1 or below[0] not in stream.values:
            break
        node = below[0]
        chain.append(node)
    return chain


def is_nonlinear(stream: Stream, nodes: Iterable[fx.Node]) -> bool:
    """Whether there are weights and a nonlinearity, as low-rank updates and sums of convolutions have not."""
    nodes = [n for n in nodes if n in stream.values]
    bends = any(n not in stream.calls and rule_of(n.target) in _BENDING for n in nodes)
    return bends and any(stream.is_projection(n) for n in nodes)
