"""Index of a graph's nodes by op, which patterns are matched against."""

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

# An argument: the node that reads it, and the path to it in the node's arguments.
Where = tuple[fx.Node, tuple[Any, ...]]


class OpIndex:
    """Nodes of a graph by op, and their order; built in one sweep."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._arguments: dict[fx.Node, dict[str, Any]] = {}
        self.by_op: dict[str, list[fx.Node]] = defaultdict(list)
        # Nodes that read parameters and buffers, by name.
        self.stored: dict[str, list[fx.Node]] = defaultdict(list)
        self.order: dict[fx.Node, int] = {}
        for position, node in enumerate(graph.nodes):
            self.order[node] = position
            if node.op == "call_function":
                self.by_op[op_name(node.target)].append(node)
            elif node.op == "get_attr":
                self.stored[str(node.target)].append(node)

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """Return a node's arguments with defaults filled in; cached."""
        if node not in self._arguments:
            self._arguments[node] = arguments(node)
        return self._arguments[node]

    def of(self, op: Op) -> list[fx.Node]:
        """Return the nodes of an op. If it has several names, nodes of the first name come first."""
        return [node for name in op.names for node in self.by_op.get(name, ())]

    @cached_property
    def live(self) -> set[fx.Node]:
        """Nodes that an output depends on."""
        return live_nodes(self.graph)

    def users(self, node: fx.Node, live: bool) -> list[fx.Node]:
        """Return the users of a node in graph order: those that an output depends on (live), or the others."""
        users = [user for user in node.users if (user in self.live) is live]
        return sorted(users, key=self.order.__getitem__) if len(users) > 1 else users


@dataclass(frozen=True)
class Argument:
    """Captured value, stored as the argument that reads it, because an edit may change that argument."""

    where: Where


def read(argument: Argument) -> Any:
    """Return the current value of the argument."""
    node, way = argument.where
    found: Any = arguments(node)
    for key in way:
        found = found[key]
    return found
