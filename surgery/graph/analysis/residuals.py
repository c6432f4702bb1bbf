"""Residual adds and the stream of values that they add to.

The *stream* holds the values that depend on the inputs through a weight op. Masks, rotary tables and position
biases are not part of it. Two values are *the same stream* if only casts, views, dropout, scaling by a number and
residual adds lie between them. An add is residual if one operand (the skip) is a stream from which the other is
computed. In a convolutional network the skip may also be a linear map of that stream, such as a strided 1×1
convolution with its norm, if the other operand is nonlinear.

Every walk goes back in descending graph order to the nearest value that it looks for, and visits only the nodes
in between. So the walks from all residual adds together are linear in the size of the graph.
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
from surgery.graph.marks import is_aux, mark_of
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

# Rules of nonlinear ops: a shortcut must not pass through one.
_BENDING = frozenset((Rule.NONLINEAR, Rule.SOFTMAX, Rule.PRODUCT))
_LONGEST_SHORTCUT = 32
_SAME = {
    *("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "unsqueeze", "squeeze"),
    *("permute", "transpose", "t", "contiguous", "clone", "lift_fresh_copy", "detach", "detach_", "alias"),
    *("to", "_to_copy", "type_as", "dropout", "dropout_"),
}
_SCALING = {"mul", "mul_", "div", "div_"}


class Stream:
    """A graph prepared for walks along its stream.

    Attributes:
        calls: weight ops by node.
        order: position of each node in the graph.
        inputs: operands of every op, and the ops that wrote into these operands in place.
        values: nodes of the stream.
        origins: further nodes that a stream may start from: inputs and constants (query tokens, a class token).
        root: first value of the same stream, for each value. Filled in by `find_residuals`.
    """

    def __init__(self, graph: fx.Graph, calls: Iterable[Call], flow: Dataflow) -> None:
        self.graph, self.order = graph, flow.order
        self.origins = flow.constant | {node for node in graph.nodes if node.op == "placeholder"}
        self.calls = {call.node: call for call in calls}
        self.inputs = operands(graph)
        self.values = stream_values(graph, self.calls, self.inputs)
        self.root: dict[fx.Node, fx.Node] = {}

    def is_projection(self, node: fx.Node) -> bool:
        """True if a node is a weight op of the stream that mixes features."""
        call = self.calls.get(node)
        if call is None or node not in self.values:
            return False
        return call.kind in (LINEAR, CONV, EXPERTS) and not is_depthwise(call)

    def behind(
        self, end: fx.Node, stop: Callable[[fx.Node], bool], floor: int = 0
    ) -> tuple[fx.Node | None, list[fx.Node]]:
        """Collect the ops that `end` depends on, in descending graph order, until `stop` accepts one.

        Args:
            end: node to start from; it is visited first.
            stop: predicate that ends the walk.
            floor: position in the graph; nodes before it are not visited.

        Returns:
            The accepted node (None if there is none at or after `floor`), and the nodes visited before it.
        """
        # Popping the latest node first visits every node after all its readers, so each is visited once.
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
        """Return the nodes that depend on `start`, or that only such nodes read. `nodes` is in descending order."""
        kept = {start}
        for node in reversed(nodes):
            if not kept.isdisjoint(self.inputs[node]):
                kept.add(node)
        for node in nodes:
            if node not in kept and node.users and all(user in kept for user in node.users):
                kept.add(node)
        return [node for node in nodes if node in kept]


def operands(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Map every op and input to the nodes that it reads, and to the ops that wrote into these in place before it."""
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
            # A later reader of a tensor that was written in place depends on the writing op, not on the tensor alone.
            if _writes(node.target):
                _note_write(node, written)
    return found


def stream_values(
    graph: fx.Graph, calls: Mapping[fx.Node, Call], inputs: Mapping[fx.Node, Sequence[fx.Node]]
) -> set[fx.Node]:
    """Return the nodes that depend on the inputs through a weight op.

    Args:
        graph: graph to search.
        calls: weight ops by node.
        inputs: result of `operands` for the graph.
    """
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
    """Record an in-place write: later readers of the tensor, or of its base, read the written values."""
    target, steps = node.args[0] if node.args else None, 0
    while isinstance(target, fx.Node) and steps < 8:
        written[target] = node
        if target.op != "call_function" or rule_of(target.target) is not Rule.FIRST or not target.args:
            return
        target, steps = target.args[0], steps + 1


def is_value(node: fx.Node) -> bool:
    """True if a node computes a tensor, or several, from other values."""
    if node.op != "call_function" or rule_of(node.target) is Rule.NOTHING:
        return False
    return isinstance(node.meta.get("val"), (torch.Tensor, list, tuple))


def is_add(node: fx.Node) -> bool:
    """True if a node is an addition."""
    return node.op == "call_function" and op_name(node.target) in ("add", "add_")


def gated_by(node: fx.Node) -> fx.Node | None:
    """Return the value that an op lets through in part if it is the gate of an inserted block, else None."""
    place = mark_of(node).gate
    return node.args[place] if place is not None else None


def moved_from(node: fx.Node) -> fx.Node | None:
    """Return the operand that an op only moves, casts, drops out or scales by a number; None if there is none."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    gated = gated_by(node)
    if gated is not None:
        return gated
    name = op_name(node.target)
    scales = name in _SCALING and len(node.args) > 1 and not isinstance(node.args[1], fx.Node)
    return node.args[0] if scales or name in _SAME else None


def is_pointwise(call: Call) -> bool:
    """True for a convolution whose kernel covers one position."""
    return call.kind == CONV and all(length == 1 for length in weight_shape(call)[2:])


def shape_of(node: fx.Node) -> tuple[str, ...]:
    """Return a node's sizes as text, because comparing symbolic sizes would add guards."""
    value = node.meta.get("val")
    return tuple(str(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


@dataclass(eq=False)
class Residual:
    """A residual add.

    Attributes:
        join: the add.
        skip: operand that is the stream.
        end: operand that is added to the stream.
        start: stream value that `end` is computed from.
        nodes: nodes between start and end, in descending graph order.
        weighted: True if one of them is a weight op other than a norm.
        parent: residual in whose branch this one lies.
        children: residuals inside this one's branch.
        before: residual whose sum the start is computed from.
        between: nodes from that sum to the start, in descending graph order.
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
        """True if its branch contains branches one after another."""
        inner = [child for child in self.children if child.weighted]
        return any(child.before in inner for child in inner)


def find_residuals(stream: Stream) -> list[Residual]:
    """Find all residual adds in graph order, including those of branches without weights."""
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
            # Inner residuals close first, so the first residual that holds another is its parent.
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
    # An adapter's add is not residual: the sum is the same stream as the value that the adapter wraps.
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
        # An identity skip: the branch must start from a value of the same stream, at or before the skip.
        root = stream.root[skip]
        # Both operands are the same stream already (x + dropout(x)): there is no branch between them.
        if stream.root[end] is root:
            stream.root[add] = root
            return None
        start, nodes = stream.behind(end, _no_later(stream, skip), stream.order[root])
        if start is not None and (skip in stream.values or not _is_added(stream, start, add)):
            stream.root[add] = root
            return _between(stream, add, skip, end, start, nodes)
    # Only then is a projection shortcut tried: an identity skip is the more certain reading.
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
    """True if a value is also added to the stream elsewhere: it is a bias that layers share, not a stream."""
    return any(
        user is not add and is_add(user) and not stream.values.isdisjoint(user.all_input_nodes)
        for user in node.users
    )


def _no_later(stream: Stream, skip: fx.Node) -> Callable[[fx.Node], bool]:
    """Return a predicate for values of the skip's stream that are not later than the skip.

    A later value would lie inside a skip over several blocks.
    """
    root, latest = stream.root[skip], stream.order[skip]
    return lambda node: stream.root.get(node) is root and stream.order[node] <= latest


def _shortcut(stream: Stream, node: fx.Node) -> list[fx.Node]:
    """Return a value and the values that it is a linear map of, nearest first, through one projection at most."""
    chain, projections = [node], 0
    while len(chain) < _LONGEST_SHORTCUT:
        call = stream.calls.get(node)
        if call is not None:
            # A shortcut has one projection at most; with two it would be a branch itself.
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
    """True if the nodes contain weights and a nonlinearity, unlike low-rank updates and sums of convolutions."""
    nodes = [n for n in nodes if n in stream.values]
    bends = any(n not in stream.calls and rule_of(n.target) in _BENDING for n in nodes)
    return bends and any(stream.is_projection(n) for n in nodes)
