"""Multiply-adds and parameters of a graph, before and after removing some atoms."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any

from torch import Tensor, fx

from surgery.graph.graphs import live_nodes
from surgery.graph.ops import arguments
from surgery.graph.propagate.links import packet
from surgery.graph.propagate.sizes import Unclear, hint
from surgery.passes.prune.coupling import Coupling
from surgery.passes.prune.labels import sizes_of
from surgery.passes.prune.mend import sizes_after


class Costs:
    """Costs of one graph on its example inputs; ops whose size depends on data are not counted.

    Args:
        run: the coupling of the graph.
        names: parameter name -> all names of that tensor.
    """

    def __init__(self, run: Coupling, names: Mapping[str, tuple[str, ...]]) -> None:
        self._run = run
        live = live_nodes(run.graph)
        plain = {node: self._known(node) for node in run.graph.nodes if node in live}
        self._macs = {node: count for node, count in plain.items() if count}
        # The groups that each node depends on. For a selection, only the nodes of its groups are counted again.
        self._touched = {
            node: frozenset().union(*(self._groups(n) for n in (node, *node.all_input_nodes)))
            for node in self._macs
        }
        self._shapes = {
            names[node.target][0]: tuple(hint(s) for s in node.meta["val"].shape)
            for node in run.graph.nodes
            if node.op == "get_attr" and node in live and node.target in names
        }

    @staticmethod
    def _known(node: fx.Node) -> int:
        """Multiply-adds of an op; 0 if its size depends on the values of the inputs, which no example decides."""
        try:
            return _macs(node, sizes_of)
        except Unclear:
            return 0

    def _groups(self, node: fx.Node) -> frozenset[int]:
        found: set[int] = set()
        for label in self._run.labels.get(node, ()):
            found |= set(self._run.group_of[label.reshape(-1)].unique().tolist())
        return frozenset(found - {-1})

    @property
    def macs(self) -> int:
        """Multiply-adds of linear maps, convolutions and attention."""
        return sum(self._macs.values())

    @property
    def parameters(self) -> int:
        """Number of parameters that the graph reads."""
        return sum(map(prod, self._shapes.values()))

    def saved(self, keep: Tensor, groups: Collection[int]) -> tuple[int, int]:
        """Return the parameters and multiply-adds saved by keeping only some atoms.

        Args:
            keep: True for atoms that are kept.
            groups: numbers of the groups that the removed atoms belong to.
        """
        run = self._run

        def size(node: Any) -> list[int]:
            return sizes_after(run.labels.get(node, []), sizes_of(node), keep)

        macs = sum(
            count - _macs(node, size)
            for node, count in self._macs.items()
            if not self._touched[node].isdisjoint(groups)
        )
        # Only tensors on the axes of these groups can change.
        tensors = {axis.tensor for number in groups for axis in run.groups[number].axes}
        parameters = sum(
            prod(self._shapes[name]) - prod(self.shape(name, keep))
            for name in tensors
            if name in self._shapes
        )
        return parameters, macs

    def shape(self, name: str, keep: Tensor) -> list[int]:
        """Return the shape of a parameter after keeping only some atoms."""
        axes = self._run.axes[name]
        return [
            size if axis is None else int(keep[axis.atoms].sum())
            for axis, size in zip(axes, self._shapes[name], strict=True)
        ]


def _macs(node: fx.Node, size: Any) -> int:
    """Count the multiply-adds of a node. size: function that returns the sizes of a value."""
    if node.op != "call_function":
        return 0
    name, given = packet(node.target), arguments(node)
    if name == "linear":
        return prod(size(node)) * size(given["input"])[-1]
    if name.startswith("conv") and "weight" in given:
        # A transposed convolution applies the kernel at each input position, an ordinary one at each output position.
        made = given["input"] if "transpose" in name else node
        return prod(size(made)) * prod(size(given["weight"])[1:])
    if name in ("matmul", "mm", "bmm"):
        return prod(size(node)) * size(given["self"])[-1]
    if name in ("addmm", "baddbmm"):
        return prod(size(node)) * size(given["mat1" if name == "addmm" else "batch1"])[-1]
    if name == "scaled_dot_product_attention":
        q, k, v = (size(given[n]) for n in ("query", "key", "value"))
        return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    return 0
