"""What patterns are looked for in, and what looking gives: an index of a graph, matches, near misses."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from surgery.dataflow import op_name
from surgery.patterns.expressions import Op, Pattern
from surgery.sites import live_nodes
from surgery.weight_ops import arguments, module_path

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


class Match:
    """A place where a pattern is.

    nodes: of the pattern's ops, in graph order. outputs: those that others may read. anchor: where it was found.
    """

    def __init__(
        self,
        pattern: Pattern,
        nodes: tuple[fx.Node, ...],
        outputs: tuple[fx.Node, ...],
        anchor: fx.Node,
        captured: dict[str, Any],
    ) -> None:
        self.pattern, self.nodes, self.outputs, self.anchor = pattern, nodes, outputs, anchor
        self._captured = captured

    def __contains__(self, name: str) -> bool:
        return name in self._captured

    def __getitem__(self, name: str) -> Any:
        """What was captured under a name; of a value, the node that is read there now."""
        if name not in self._captured:
            raise KeyError(name)
        return self.get(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The same, or the default where the alternative that captures it was not taken."""
        found = self._captured.get(name, default)
        return read(found) if isinstance(found, Argument) else found

    @property
    def captured(self) -> tuple[str, ...]:
        return tuple(self._captured)

    @property
    def path(self) -> str:
        """Path of the module that the anchor belongs to."""
        return module_path(self.anchor)


@dataclass(frozen=True)
class NearMiss:
    """A place where the anchor is, and the pattern is not.

    node: where the comparison that got furthest ended. matched: how many ops it had found until then; at least one, as
    an anchor that is not what the pattern wants of it is none. captured: how many values.
    """

    anchor: fx.Node
    node: fx.Node
    reason: str
    matched: int
    captured: int = 0

    @property
    def path(self) -> str:
        return module_path(self.anchor)

    def __str__(self) -> str:
        ops = "1 op matches" if self.matched == 1 else f"{self.matched} ops match"
        return f"{ops}; at {self.node.name}: {self.reason}"


@dataclass(frozen=True)
class Found:
    """What looking for a pattern gave: matches that share no node, in graph order, and near misses."""

    matches: tuple[Match, ...]
    misses: tuple[NearMiss, ...]
