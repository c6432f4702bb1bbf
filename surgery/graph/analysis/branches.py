"""Residual branches: what a model computes from its stream of values and adds back to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from surgery.graph.analysis.dataflow import Dataflow, Rule, op_name, rule_of
from surgery.graph.analysis.residuals import (
    Residual,
    Stream,
    find_residuals,
    is_add,
    is_depthwise,
    is_nonlinear,
    is_pointwise,
    is_value,
    moved_from,
    shape_of,
)
from surgery.graph.analysis.roles import Roles
from surgery.graph.ops import CONV, EXPERTS, NORM, Call, arguments

ATTENTION, CROSS_ATTENTION, FEED_FORWARD, OTHER = "attention", "cross-attention", "feed-forward", "other"

# Ops by name that leave every value at its place, and pointwise-looking ones that do not.
_STILL = {"to", "_to_copy", "type_as", "dropout", "dropout_", "contiguous", "clone", "detach", "alias"}
_MOVING = {"pad", "constant_pad_nd", "flip", "cat", "stack"}

Axes = tuple[int, ...] | None


@dataclass(frozen=True)
class Branch:
    """A residual branch: what is computed from the stream and added back to it.

    add: the op that takes the branch's result in. skip: the stream that it is added to, the other operand of
    `add` (of `join`, where that is another op): the identity, or the projection shortcut of a ResNet. end: the
    branch's result, an operand of `add`, after dropout, layer scale, post-norm. start: the stream value that
    the branch reads; the same as skip where the shortcut is the identity, but for casts and for parallel
    branches (the second one is added to the sum with the first).
    join: the op whose result is the stream again. It is `add`, but where parallel branches are summed before
    they are added to the stream.
    ops: its weight ops in graph order, norms included. last: the weight op, not a norm, nearest to `end`;
    where several are, the experts, or the one whose role says that it is the last.
    kind: "attention", "cross-attention", "feed-forward", "conv" or "other".
    inner: the value that enters its first projections, which a parallel adapter reads: after a pre-norm.
    """

    add: fx.Node
    skip: fx.Node
    end: fx.Node
    start: fx.Node
    ops: tuple[fx.Node, ...]
    last: fx.Node
    kind: str
    inner: fx.Node
    join: fx.Node


def find_branches(graph: fx.Graph, calls: Sequence[Call], flow: Dataflow, roles: Roles) -> list[Branch]:
    """The residual branches that have a weight op besides norms, in the order of their adds.

    A residual within a branch is part of it, unless there is a chain of them (MobileBERT's layers and SwinIR's
    groups of blocks have a skip of their own): then the inner ones are listed, and the outer one as "other".
    """
    stream = Stream(graph, calls, flow)
    residuals = find_residuals(stream)
    reader = _Reader(stream, roles)
    return [branch for residual in residuals if _is_listed(residual) for branch in reader.branches(residual)]


def _is_listed(residual: Residual) -> bool:
    above = residual.parent
    while above is not None:
        if not above.has_chain:
            return False
        above = above.parent
    return residual.weighted


class _Reader:
    """Makes branches of residuals."""

    def __init__(self, stream: Stream, roles: Roles) -> None:
        self.stream, self.role = stream, roles.role
        self.cross = {attention.core[-1]: attention.cross for attention in roles.attentions}

    def branches(self, residual: Residual) -> list[Branch]:
        """One, or several in parallel if attention is among them: a shared expert is no branch of its own."""
        start, stream = residual.start, self.stream
        if residual.has_chain:
            inner = {node for child in residual.children if child.weighted for node in child.nodes}
            nodes = [node for node in residual.nodes if node not in inner]
            whole = self._branch(residual, residual.join, residual.end, nodes, OTHER)
            return [whole] if whole is not None else []
        terms = self._terms(residual.join, residual.end, residual.nodes)
        if len(terms) > 1:
            found = []
            for add, term in terms:
                _, passed = stream.behind(term, lambda n: n is start, stream.order[start])
                found.append(self._branch(residual, add, term, stream.enclosed(start, passed)))
            parts = [part for part in found if part is not None]
            attend = {part.kind in (ATTENTION, CROSS_ATTENTION) for part in parts}
            if len(parts) == len(terms) and len(attend) == 2:
                return parts
        whole = self._branch(residual, residual.join, residual.end, residual.nodes)
        return [whole] if whole is not None else []

    def _terms(self, add: fx.Node, end: fx.Node, nodes: Sequence[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
        """The terms of a sum of streams, each with the add that takes it in: parallel branches."""
        total: fx.Node | None = end
        while total is not None and not is_add(total):
            total = moved_from(total)
        if total is None or total not in nodes or self.stream.root.get(total) is not total:
            return [(add, end)]
        terms = [n for n in total.args[:2] if isinstance(n, fx.Node) and n in self.stream.values]
        if len(terms) < 2:
            return [(add, end)]
        return [pair for term in terms for pair in self._terms(total, term, nodes)]

    def _branch(
        self, residual: Residual, add: fx.Node, end: fx.Node, nodes: Sequence[fx.Node], kind: str = ""
    ) -> Branch | None:
        """The branch that these nodes are, in descending order; None without a projection."""
        ops = [self.stream.calls[n] for n in reversed(nodes) if n in self.stream.calls]
        last = self._last(end, set(nodes))
        if last is None:
            return None
        start = residual.start
        axes = self._axes(start, nodes)
        reads_start = (c for c in ops if c.kind != NORM and c.node in axes)
        first = next(reads_start, self.stream.calls[last])
        kind = kind or self._kind(ops, last, nodes)
        if kind == FEED_FORWARD and self._mixes_positions(ops, first, axes):
            kind = OTHER
        inner = self._inner(start, first, axes)
        return Branch(
            add, residual.skip, end, start, tuple(c.node for c in ops), last, kind, inner, residual.join
        )

    def _axes(self, start: fx.Node, nodes: Sequence[fx.Node]) -> dict[fx.Node, Axes]:
        """By value of the branch that rests on its start, in graph order: where the start's axes are in it."""
        axes: dict[fx.Node, Axes] = {start: tuple(range(len(shape_of(start))))}
        for node in reversed(nodes):
            operands = [n for n in self.stream.inputs[node] if n in axes]
            if operands and is_value(node):
                axes[node] = _axes(node, operands, axes)
        return axes

    def _last(self, end: fx.Node, nodes: set[fx.Node]) -> fx.Node | None:
        stack, seen = [end], set[fx.Node]()
        found: list[fx.Node] = []
        while stack:
            node = stack.pop()
            if node in seen or node not in nodes or node not in self.stream.values:
                continue
            seen.add(node)
            call = self.stream.calls.get(node)
            if call is not None and call.kind != NORM:
                found.append(node)
            else:
                stack.extend(self.stream.inputs[node])
        return max(found, key=self._finality, default=None)

    def _finality(self, node: fx.Node) -> tuple[bool, bool, int]:
        closes = self.role.get(node) in ("attn.out", "mlp.down")
        return self.stream.calls[node].kind == EXPERTS, closes, self.stream.order[node]

    def _kind(self, ops: Sequence[Call], last: fx.Node, nodes: Iterable[fx.Node]) -> str:
        cross = [self.cross[n] for n in nodes if n in self.cross]
        if cross:
            return CROSS_ATTENTION if all(cross) else ATTENTION
        maps = [c for c in ops if c.kind != NORM and c.node in self.stream.values]
        spatial = [c for c in maps if c.kind == CONV and not is_pointwise(c)]
        # Segformer moves positions within a feed-forward; Mamba's mixer has such a convolution too.
        within = maps[0].kind != CONV != maps[-1].kind and all(is_depthwise(c) for c in spatial)
        if spatial and not within:
            return CONV
        if any(c.kind != CONV for c in maps):
            return FEED_FORWARD if self.role.get(last) == "mlp.down" else OTHER
        return FEED_FORWARD if len(maps) > 1 and is_nonlinear(self.stream, nodes) else OTHER

    def _inner(self, start: fx.Node, first: Call, axes: Mapping[fx.Node, Axes]) -> fx.Node:
        """The last value before the first projection that all of the branch is computed from.

        It has the stream's axes and positions, so what is computed from it can be added to the branch's end.
        """
        order = self.stream.order
        last_use: dict[fx.Node, int] = {}
        for node in axes:
            last_use.update(dict.fromkeys(self.stream.inputs[node], order[node]))
        inner, live = start, {start}
        for node in axes:
            if order[node] >= order[first.node]:
                break
            live = {n for n in live if last_use.get(n, 0) > order[node]} | {node}
            if len(live) == 1 and axes[node] == axes[start] and shape_of(node) == shape_of(start):
                inner = node
        return inner

    def _mixes_positions(self, ops: Sequence[Call], first: Call, axes: Mapping[fx.Node, Axes]) -> bool:
        """Whether the features of the first projection are not those of the norm before it (MLP-Mixer)."""
        norm = next((c for c in ops if c.kind == NORM and c.node in axes), None)
        if norm is None or first.kind == CONV or op_name(norm.node.target) not in ("layer_norm", "rms_norm"):
            return False
        normed, mixed = axes.get(norm.node), axes.get(first.x)
        return normed is not None and mixed is not None and normed[-1] != mixed[-1]


def _axes(node: fx.Node, operands: Sequence[fx.Node], axes: Mapping[fx.Node, Axes]) -> Axes:
    """Where the axes of a branch's start are in a value; None where positions moved along an axis."""
    name, args = op_name(node.target), arguments(node)
    before = axes[operands[0]]
    if name in ("permute", "transpose") and before is not None:
        if name == "permute":
            return tuple(before[d] for d in args["dims"])
        swapped = list(before)
        i, j = args["dim0"], args["dim1"]
        swapped[i], swapped[j] = swapped[j], swapped[i]
        return tuple(swapped)
    if name in _MOVING or (rule_of(node.target) is Rule.FIRST and name not in _STILL):
        return None
    alike = [axes[n] for n in operands if shape_of(n) == shape_of(node)]
    return alike[0] if alike and all(a == alike[0] for a in alike) else None
