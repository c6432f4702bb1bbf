"""Updates a graph after pruning: inserts smaller tensors, and updates the sizes in arguments that depend on them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from surgery.common.errors import PassError
from surgery.graph.graphs import live_nodes
from surgery.graph.propagate.arguments import Draft
from surgery.graph.propagate.links import packet
from surgery.graph.propagate.sizes import Unclear, hint
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.passes.prune.coupling import Coupling
from surgery.passes.prune.labels import Labels, kept_along, sizes_of, where

aten = torch.ops.aten

# Index of the size argument.
_SIZES = {"view": 1, "reshape": 1, "_unsafe_view": 1, "view_copy": 1, "expand": 1}
_SPLITS = ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split")


def sizes_after(labels: Labels, sizes: list[int], keep: Tensor) -> list[int]:
    """Return the sizes of a value after keeping only some atoms.

    Args:
        labels: labels of the value.
        sizes: sizes of the value before.
        keep: True for atoms that are kept.
    """
    found = list(sizes)
    for label in labels:
        for d, size in enumerate(label.shape):
            if size > 1:
                found[d] = int(kept_along(label, keep, d).sum())
    return found


def mend(g: Rewriter, run: Coupling, keep: Tensor) -> None:
    """Update the sizes of every node that depends on an exchanged tensor.

    Args:
        g: rewriter of the graph.
        run: coupling analysis of the graph before the exchange.
        keep: True for atoms that are kept.

    Raises:
        PassError: if an op fails on the new sizes.
    """
    # Nodes of exchanged tensors were inserted after the analysis, so it has no labels for them.
    changed = {n for n in g.graph.nodes if n.op == "get_attr" and n not in run.labels}
    labels = dict(run.labels)
    before = {node: node.meta.get("val") for node in g.graph.nodes}
    live = live_nodes(g.graph)
    # The list is taken first, because superseding a node inserts others.
    for node in [n for n in g.graph.nodes if n in live]:
        if node.op == "call_function" and not changed.isdisjoint(node.all_input_nodes):
            try:
                fresh = _NodeUpdate(g, run, labels, keep, node, before).do()
            except Unclear as error:
                raise PassError(
                    f"{where(node)} cannot be pruned: {error}; leave the weights before it out of --target"
                ) from None
            changed |= {node, fresh}
            before[fresh] = before[node]
            if fresh is not node:
                labels[fresh] = labels.get(node, [])


class _NodeUpdate:
    """Updates one node. before: values of all nodes before pruning."""

    def __init__(
        self,
        g: Rewriter,
        run: Coupling,
        labels: Mapping[fx.Node, Labels],
        keep: Tensor,
        node: fx.Node,
        before: Mapping[fx.Node, Any],
    ) -> None:
        self.g, self.run, self.labels, self.keep, self.node, self.before = g, run, labels, keep, node, before
        self.draft = Draft.of(node)
        # Another op to use instead, with its arguments.
        self.instead: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None

    def do(self) -> fx.Node:
        """Return the node with its new sizes, or the node that replaced it."""
        node, wanted = self.node, self._wanted()
        self._sizes(packet(node.target), wanted)
        try:
            if self.instead is not None:
                op, args, kwargs = self.instead
                with self.g.after(node):
                    fresh = self.g.model_op(op, *args, **kwargs)
                self.g.supersede(node, fresh)
                node = fresh
            else:
                self.g.resize(node, tuple(self.draft.args))
        except PassError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise PassError(f"{where(self.node)} fails on the remaining sizes ({first})") from None
        # Each result is checked against the analysis: a wrong size here would only fail much later, or not at all.
        got = node.meta["val"]
        for value, sizes in zip(got if isinstance(got, (list, tuple)) else [got], wanted, strict=False):
            if isinstance(value, Tensor) and sizes is not None and [hint(s) for s in value.shape] != sizes:
                raise PassError(f"{where(self.node)} returns {tuple(value.shape)}, but {sizes} are expected")
        return node

    def _wanted(self) -> list[list[int] | None]:
        """Return the sizes of the node's results; None for a result that is not a tensor."""
        value = self.node.meta["val"]
        if isinstance(value, (list, tuple)):
            parts = self.run.parts.get(self.node) or [[] for _ in value]
            return [self._after(v, part) for v, part in zip(value, parts, strict=True)]
        return [self._after(value, self.labels.get(self.node, []))]

    def _after(self, value: Any, labels: Labels) -> list[int] | None:
        if not isinstance(value, Tensor):
            return None
        return sizes_after(labels, [hint(s) for s in value.shape], self.keep)

    def _sizes(self, name: str, wanted: list[list[int] | None]) -> None:
        """Update sizes and positions among the arguments."""
        new, draft = wanted[0], self.draft
        if name in _SIZES and new is not None:
            old = sizes_of(self.node)
            draft.args[1] = [self._size(a, o, n) for a, o, n in zip(draft.args[1], old, new, strict=True)]
        elif name == "unflatten" and new is not None:
            first, old = draft.args[1] % len(sizes_of(draft.args[0])), sizes_of(self.node)
            draft.args[2] = [
                self._size(a, old[first + i], new[first + i]) for i, a in enumerate(draft.args[2])
            ]
        elif name in _SPLITS:
            self._parts(name, wanted)
        elif name == "slice" and new is not None:
            self._slice(new)
        elif name in ("layer_norm", "rms_norm") and new is not None:
            draft.args[1] = new[len(new) - len(draft.args[1]) :]
        elif name == "group_norm" and new is not None and draft.args[1] > 1:
            draft.args[1] = new[1] * draft.args[1] // sizes_of(self.node)[1]
        elif name == "scaled_dot_product_attention":
            self._scale()
        elif name.startswith("conv") and len(draft.args) > 6:
            at = 7 if "transpose" in name else 6
            if len(draft.args) > at and draft.args[at] > 1:
                draft.args[at] = self._groups(draft.args[at], "transpose" in name)

    def _size(self, given: Any, old: int, new: int) -> Any:
        if old == new or (isinstance(given, int) and given == -1):
            return given
        if not isinstance(given, fx.Node):
            return new
        # The size is a product of a dynamic size and the number of units, so it scales by the fraction that remains.
        part = Fraction(new, old)
        with self.g.before(self.node):
            whole = self.g.call(operator.mul, given, part.numerator)
            return whole if part.denominator == 1 else self.g.call(operator.floordiv, whole, part.denominator)

    def _dim(self) -> int:
        return int(self.draft.get(2, "dim", 0))

    def _parts(self, name: str, wanted: list[list[int] | None]) -> None:
        dim = self._dim()
        new = [sizes[dim] for sizes in wanted if sizes is not None]
        old = [hint(v.shape[dim]) for v in self.node.meta["val"]]
        if new == old:
            return
        if name == "split_with_sizes" or isinstance(self.draft.args[1], (list, tuple)):
            self.draft.args[1] = new
        elif name in ("split", "unsafe_split"):
            self.draft.args[1] = new[0]
            # `split` with one size needs equal pieces, and only the last may be smaller.
            self._unless(new[:-1] == [new[0]] * (len(new) - 1) and new[-1] <= new[0], new, dim)
        else:
            self._unless(new == [new[0]] * len(new), new, dim)

    def _unless(self, even: bool, sizes: list[int], dim: int) -> None:
        if not even:
            self.instead = aten.split_with_sizes.default, (self.node.args[0], sizes, dim), {}

    def _scale(self) -> None:
        """Keep the scale of an attention whose queries became narrower.

        By default the scores are divided by the root of the queries' width; the model was trained with the old width.
        """
        query, kwargs = self.node.args[0], dict(self.node.kwargs)
        before = hint(self.before[query].shape[-1])  # type: ignore[index]
        if kwargs.get("scale") is None and before != sizes_of(query)[-1]:  # type: ignore[arg-type]
            self.instead = self.node.target, self.node.args, {**kwargs, "scale": before**-0.5}

    def _slice(self, new: list[int]) -> None:
        x, dim = self.draft.args[0], int(self.draft.get(1, "dim", 0)) % len(new)
        start, end = self.draft.get(2, "start"), self.draft.get(3, "end")
        kept = next(
            (kept_along(one, self.keep, dim) for one in self.labels.get(x, ()) if one.shape[dim] > 1),
            None,
        )
        if kept is None or bool(kept.all()):
            return
        # Bounds are mapped to the number of kept indices before them.
        size, before = len(kept), [0, *accumulate(kept.long().tolist())]
        start = 0 if start is None else min(max(start + size if start < 0 else start, 0), size)
        self.draft.args = [x, dim, before[start], before[start] + new[dim]]
        if end is None or end >= size:
            self.draft.args[3] = end if end is not None else (1 << 63) - 1

    def _groups(self, groups: int, turned: bool) -> int:
        """Return the new number of groups of a convolution: input channels divided by input channels per group."""
        x, weight = self.node.args[0], self.node.args[1]
        entering = int(x.meta["val"].shape[1])  # type: ignore[union-attr]
        if turned:
            return groups
        return entering // int(weight.meta["val"].shape[1])  # type: ignore[union-attr]
