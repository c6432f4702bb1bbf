"""The graph with some atoms gone: smaller tensors in the place of the model's, and the sizes behind them mended."""

from __future__ import annotations

import operator
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from surgery.errors import PassError
from surgery.propagate.arguments import Draft
from surgery.propagate.links import packet
from surgery.propagate.sizes import hint
from surgery.pruning.coupling import Coupling, Labels, kept_along, sizes_of, where
from surgery.rewriter import Rewriter

aten = torch.ops.aten

# Where the sizes of the result stand in the arguments.
_SIZES = {"view": 1, "reshape": 1, "_unsafe_view": 1, "view_copy": 1, "expand": 1}
_SPLITS = ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split")


def sizes_after(labels: Labels, sizes: list[int], keep: Tensor) -> list[int]:
    """Sizes of a value once only these atoms are kept."""
    found = list(sizes)
    for label in labels:
        for d, size in enumerate(label.shape):
            if size > 1:
                found[d] = int(kept_along(label, keep, d).sum())
    return found


def mend(g: Rewriter, run: Coupling, keep: Tensor) -> None:
    """Give every node behind an exchanged tensor its new sizes. run: of the graph as it was."""
    changed = {n for n in g.graph.nodes if n.op == "get_attr" and n not in run.labels}
    for node in list(g.graph.nodes):
        if node.op == "call_function" and not changed.isdisjoint(node.all_input_nodes):
            changed.add(node)
            _Mend(g, run, keep, node).do()


class _Mend:
    """One node."""

    def __init__(self, g: Rewriter, run: Coupling, keep: Tensor, node: fx.Node) -> None:
        self.g, self.run, self.keep, self.node = g, run, keep, node
        self.draft = Draft.of(node)
        self.split: list[int] | None = None  # sizes of parts that only `split_with_sizes` makes

    def do(self) -> None:
        node, wanted = self.node, self._wanted()
        self._sizes(packet(node.target), wanted)
        try:
            if self.split is not None:
                x, dim = node.args[0], self._dim()
                with self.g.after(node):
                    fresh = self.g.model_op(aten.split_with_sizes.default, x, self.split, dim)
                self.g.supersede(node, fresh)
                node = fresh
            else:
                self.g.resize(node, tuple(self.draft.args))
        except PassError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise PassError(f"{where(self.node)} fails on what is left ({first})") from None
        got = node.meta["val"]
        for value, sizes in zip(got if isinstance(got, (list, tuple)) else [got], wanted, strict=False):
            if isinstance(value, Tensor) and sizes is not None and [hint(s) for s in value.shape] != sizes:
                raise PassError(f"{where(self.node)} would give {tuple(value.shape)}, where {sizes} are left")

    def _wanted(self) -> list[list[int] | None]:
        """Sizes of the node's results; None for one that is no tensor."""
        value = self.node.meta["val"]
        if isinstance(value, (list, tuple)):
            parts = self.run.parts.get(self.node) or [[] for _ in value]
            return [self._after(v, part) for v, part in zip(value, parts, strict=True)]
        return [self._after(value, self.run.labels.get(self.node, []))]

    def _after(self, value: Any, labels: Labels) -> list[int] | None:
        if not isinstance(value, Tensor):
            return None
        return sizes_after(labels, [hint(s) for s in value.shape], self.keep)

    def _sizes(self, name: str, wanted: list[list[int] | None]) -> None:
        """Mend what is a size, or a place, in the arguments."""
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
        elif name.startswith("conv") and len(draft.args) > 6:
            at = 7 if "transpose" in name else 6
            if len(draft.args) > at and draft.args[at] > 1:
                draft.args[at] = self._groups(draft.args[at], "transpose" in name)

    def _size(self, given: Any, old: int, new: int) -> Any:
        if old == new or (isinstance(given, int) and given == -1):
            return given
        if not isinstance(given, fx.Node):
            return new
        part = Fraction(new, old)  # a product of a dynamic size and a number of units
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
            even = new[:-1] == [new[0]] * (len(new) - 1) and new[-1] <= new[0]
            self.split = None if even else new
        else:
            self.split = None if new == [new[0]] * len(new) else new

    def _slice(self, new: list[int]) -> None:
        x, dim = self.draft.args[0], int(self.draft.get(1, "dim", 0)) % len(new)
        size = sizes_of(x)[dim]
        start, end = self.draft.get(2, "start"), self.draft.get(3, "end")
        kept = next(
            (kept_along(one, self.keep, dim) for one in self.run.labels.get(x, ()) if one.shape[dim] > 1),
            None,
        )
        if kept is None or bool(kept.all()):
            return
        before = [0, *accumulate(kept.long().tolist())]
        start = 0 if start is None else min(max(start + size if start < 0 else start, 0), size)
        self.draft.args = [x, dim, before[start], before[start] + new[dim]]
        if end is None or end >= size:
            self.draft.args[3] = end if end is not None else (1 << 63) - 1

    def _groups(self, groups: int, turned: bool) -> int:
        """Of a convolution: channels that enter over channels of one group."""
        x, weight = self.node.args[0], self.node.args[1]
        entering = int(x.meta["val"].shape[1])  # type: ignore[union-attr]
        if turned:
            return groups
        return entering // int(weight.meta["val"].shape[1])  # type: ignore[union-attr]
