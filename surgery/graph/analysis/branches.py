"""Residual branches: subgraphs that read the model's residual stream and whose result is added back to it."""

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

# Ops that leave every value at its position, and ops that move values although they look pointwise.
_STILL = {"to", "_to_copy", "type_as", "dropout", "dropout_", "contiguous", "clone", "detach", "alias"}
_MOVING = {"pad", "constant_pad_nd", "flip", "cat", "stack"}

Axes = tuple[int, ...] | None


@dataclass(frozen=True)
class Branch:
    """A subgraph that reads the residual stream and whose result is added back to it.

    Attributes:
        add: op that takes the branch's result.
        skip: the other operand of `add` (of `join`, if that is another op): the identity, or the projection
            shortcut of a ResNet.
        end: result of the branch, an operand of `add`, after dropout, layer scale and post-norm.
        start: stream value that the branch reads. It equals `skip` if the shortcut is the identity, except for
            casts and for parallel branches (the second one is added to the sum with the first).
        ops: weight ops of the branch in graph order, norms included.
        last: weight op nearest to `end` that is not a norm. Among several, experts come first, then the op whose
            role marks it as the last.
        kind: "attention", "cross-attention", "feed-forward", "conv" or "other".
        inner: input of the first projections, after a pre-norm. A parallel adapter reads it.
        join: op whose result is the stream again. It differs from `add` if parallel branches are summed before
            they are added to the stream.
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
    """Find the residual branches that have a weight op besides norms, in the order of their adds.

    A residual inside a branch is part of that branch, unless there is a chain of them: MobileBERT's layers and
    SwinIR's groups of blocks have a skip of their own. Then the inner branches are listed, and the outer one has
    the kind "other".

    Args:
        graph: graph to search.
        calls: weight ops of the graph.
        flow: dataflow of these calls.
        roles: roles of these calls.
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
    """Builds branches from residuals."""

    def __init__(self, stream: Stream, roles: Roles) -> None:
        self.stream, self.role = stream, roles.role
        self.cross = {attention.core[-1]: attention.cross for attention in roles.attentions}

    def branches(self, residual: Residual) -> list[Branch]:
        """Return the branches of a residual.

        There are several if the branch is a sum of parallel terms and one of them is an attention. Without an
        attention, a sum is one branch: a shared expert is not a branch of its own.
        """
        start, stream = residual.start, self.stream
        # The weights of the inner branches are listed with these, not a second time with the outer branch.
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
            # Exactly two values: some terms are attentions and some are not (GPT-J, PaLM, Falcon).
            attend = {part.kind in (ATTENTION, CROSS_ATTENTION) for part in parts}
            if len(parts) == len(terms) and len(attend) == 2:
                return parts
        whole = self._branch(residual, residual.join, residual.end, residual.nodes)
        return [whole] if whole is not None else []

    def _terms(self, add: fx.Node, end: fx.Node, nodes: Sequence[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
        """Return the terms of a sum of streams, each with the add that reads it (parallel branches)."""
        total: fx.Node | None = end
        while total is not None and not is_add(total):
            total = moved_from(total)
        # A sum that is a residual add itself continues an inner stream; its operands are not parallel branches.
        if total is None or total not in nodes or self.stream.root.get(total) is not total:
            return [(add, end)]
        terms = [n for n in total.args[:2] if isinstance(n, fx.Node) and n in self.stream.values]
        if len(terms) < 2:
            return [(add, end)]
        return [pair for term in terms for pair in self._terms(total, term, nodes)]

    def _branch(
        self, residual: Residual, add: fx.Node, end: fx.Node, nodes: Sequence[fx.Node], kind: str = ""
    ) -> Branch | None:
        """Build a branch from its nodes (in descending graph order), or return None if it has no projection."""
        ops = [self.stream.calls[n] for n in reversed(nodes) if n in self.stream.calls]
        last = self._last(end, set(nodes))
        if last is None:
            return None
        start = residual.start
        axes = self._axes(start, nodes)
        # Keys and values of a cross-attention do not read the start, so the first op in graph order may be wrong.
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
        """Map every value that depends on the start to the positions of the start's axes in it, in graph order."""
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
        # Segformer mixes positions inside a feed-forward, and Mamba's mixer has such a convolution as well:
        # a depthwise convolution between two linear ops does not make a branch convolutional.
        within = maps[0].kind != CONV != maps[-1].kind and all(is_depthwise(c) for c in spatial)
        if spatial and not within:
            return CONV
        if any(c.kind != CONV for c in maps):
            return FEED_FORWARD if self.role.get(last) == "mlp.down" else OTHER
        return FEED_FORWARD if len(maps) > 1 and is_nonlinear(self.stream, nodes) else OTHER

    def _inner(self, start: fx.Node, first: Call, axes: Mapping[fx.Node, Axes]) -> fx.Node:
        """Return the last value before the first projection on which the whole branch depends.

        It has the axes and positions of the stream, so a result computed from it can be added to the branch's end.
        """
        order = self.stream.order
        last_use: dict[fx.Node, int] = {}
        for node in axes:
            last_use.update(dict.fromkeys(self.stream.inputs[node], order[node]))
        inner, live = start, {start}
        for node in axes:
            if order[node] >= order[first.node]:
                break
            # A value that is the only live one dominates the rest of the branch: everything later depends on it.
            live = {n for n in live if last_use.get(n, 0) > order[node]} | {node}
            if len(live) == 1 and axes[node] == axes[start] and shape_of(node) == shape_of(start):
                inner = node
        return inner

    def _mixes_positions(self, ops: Sequence[Call], first: Call, axes: Mapping[fx.Node, Axes]) -> bool:
        """True if the first projection does not act on the features that the norm before it normalized (MLP-Mixer)."""
        norm = next((c for c in ops if c.kind == NORM and c.node in axes), None)
        if norm is None or first.kind == CONV or op_name(norm.node.target) not in ("layer_norm", "rms_norm"):
            return False
        normed, mixed = axes.get(norm.node), axes.get(first.x)
        return normed is not None and mixed is not None and normed[-1] != mixed[-1]


def _axes(node: fx.Node, operands: Sequence[fx.Node], axes: Mapping[fx.Node, Axes]) -> Axes:
    """Return the positions of the start's axes in a value, or None if values moved along an axis."""
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
