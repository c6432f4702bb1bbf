"""`surgery diff A B`: nodes that were added, removed or rewired, and weights that differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.capture.dimensions import Dimensions
from surgery.engine.program import Program
from surgery.graph.marks import mark_of
from surgery.graph.ops import module_path


@dataclass(frozen=True)
class NodeChange:
    """A node that differs between programs A and B.

    Attributes:
        change: "+" (only in B), "-" (only in A) or "~" (in both, with different inputs).
        node: Name of the node.
        op: Its op.
        module: Path of the module it belongs to, or the name of the tensor it reads.
        shape: Shape of its value with named dimensions, or "".
        by: Id of the journal entry that inserted it, or "".
        was: Its inputs in A, for "~".
        now: Its inputs in B, for "~".
    """

    change: str
    node: str
    op: str
    module: str
    shape: str
    by: str
    was: str = ""
    now: str = ""


@dataclass(frozen=True)
class Difference:
    """Differences of two programs.

    Attributes:
        nodes: Nodes that differ, in graph order.
        weights: Names of the tensors whose bits differ.
        total: Number of nodes in each program.
    """

    nodes: tuple[NodeChange, ...]
    weights: tuple[str, ...]
    total: tuple[int, int]


def diff(a: Program, b: Program) -> Difference:
    """Compare two programs. Nodes are paired by (module path, op, ordinal)."""
    left, right = keyed_nodes(a.graph), keyed_nodes(b.graph)
    left_key = {node: key for key, node in left.items()}
    right_key = {node: key for key, node in right.items()}
    names_a, names_b = Dimensions(a.captured), Dimensions(b.captured)
    changes: list[NodeChange] = []
    for key, node in right.items():
        if key not in left:
            changes.append(_change("+", node, names_b))
        else:
            was = [left_key.get(n) for n in left[key].all_input_nodes]
            now = [right_key.get(n) for n in node.all_input_nodes]
            if was != now:
                old, new = left[key].all_input_nodes, node.all_input_nodes
                changes.append(
                    _change(
                        "~", node, names_b, ", ".join(n.name for n in old), ", ".join(n.name for n in new)
                    )
                )
    changes += [_change("-", node, names_a) for key, node in left.items() if key not in right]
    return Difference(tuple(changes), tuple(_weights(a, b)), (len(a.graph.nodes), len(b.graph.nodes)))


def keyed_nodes(graph: fx.Graph) -> dict[Any, fx.Node]:
    """Nodes by (op, module path, target, journal entry, ordinal). Nodes of two graphs with one key are a pair."""
    found: dict[Any, fx.Node] = {}
    seen: Counter[Any] = Counter()
    for node in graph.nodes:
        if node.op == "get_attr" and not node.users:
            continue
        name = node.target if node.op in ("get_attr", "placeholder") else module_path(node)
        key = (node.op, name, str(node.target), mark_of(node).entry)
        seen[key] += 1
        found[*key, seen[key]] = node
    return found


def _change(kind: str, node: fx.Node, named: Dimensions, was: str = "", now: str = "") -> NodeChange:
    value = node.meta.get("val")
    shape = named.shape(value.shape) if isinstance(value, torch.Tensor) else ""
    op = str(node.target).removesuffix(".default") if node.op == "call_function" else node.op
    where = str(node.target) if node.op == "get_attr" else module_path(node)
    return NodeChange(kind, node.name, op, where, shape, mark_of(node).entry, was, now)


def _weights(a: Program, b: Program) -> Iterator[str]:
    if not (a.base.in_memory and b.base.in_memory):
        return
    left, right = a.state(), b.state()
    for name, tensor in left.items():
        other = right.get(name)
        if other is not None and (tensor.shape != other.shape or not torch.equal(tensor, other)):
            yield name
