"""Nodes of a graph indexed by op, and how an argument is read: what patterns are looked for in."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from surgery.graph.analysis.dataflow import op_name
from surgery.graph.graphs import live_nodes
from surgery.graph.ops import arguments
from surgery.graph.patterns.expressions import Op

Where = tuple[fx.Node, tuple[Any, ...]]  # an argument: the node that reads it, and the way to it


class OpIndex:
    """The nodes of a graph by op, and their order. Made in one sweep."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._arguments: dict[fx.Node, dict[str, Any]] = {}
        self.by_op: dict[str, list[fx.Node]] = defaultdict(list)
        self.stored: dict[str, list[fx.Node]] = defaultdict(list)  # nodes of parameters and buffers, by name
        self.order: dict[fx.Node, int] = {}
        for position, node in enumerate(graph.nodes):
            self.order[node] = position
            if node.op == "call_function":
                self.by_op[op_name(node.target)].append(node)
            elif node.op == "get_attr":
                self.stored[str(node.target)].append(node)

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """A node's arguments at full arity; read once."""
        if node not in self._arguments:
            self._arguments[node] = arguments(node)
        return self._arguments[node]

    def of(self, op: Op) -> list[fx.Node]:
        """Nodes of an op, those of its first name first."""
        return [node for name in op.names for node in self.by_op.get(name, ())]

    @cached_property
    def live(self) -> set[fx.Node]:
        """Nodes on which an output depends."""
        return live_nodes(self.graph)

    def users(self, node: fx.Node, live: bool) -> list[fx.Node]:
        """What reads a node, in graph order; live: whether an output depends on it."""
        users = [user for user in node.users if (user in self.live) is live]
        return sorted(users, key=self.order.__getitem__) if len(users) > 1 else users


@dataclass(frozen=True)
class Argument:
    """A captured value, by where it is read: what stands there may change."""

    where: Where


def read(argument: Argument) -> Any:
    """What is read there now."""
    node, way = argument.where
    found: Any = arguments(node)
    for key in way:
        found = found[key]
    return found
