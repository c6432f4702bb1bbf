"""How deep in a model each parameter is: its place among the repeated blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import fx

from surgery.residuals import operands, stream_values
from surgery.weight_ops import Call

if TYPE_CHECKING:
    from surgery.blocks import Block


def depth_of(graph: fx.Graph, calls: Sequence[Call], rows: Sequence[Sequence[Block]]) -> dict[str, int]:
    """Depth of every parameter and buffer that the graph reads: 0 before the first block, 1..n the blocks, n + 1
    after the last.

    Blocks count over all rows in graph order. What lies outside of blocks is as deep as the next block on the
    way to the outputs, or n + 1 if none follows it; what no block comes before (a second tower's embeddings)
    is at 0. A parameter that is used more than once has the least depth. Without blocks, all are at 0.
    """
    blocks = [block for row in rows for block in row]
    inside = {node: number for number, block in enumerate(blocks, 1) for node in block.nodes}
    inputs = operands(graph)
    values = stream_values(graph, {call.node: call for call in calls}, inputs)
    before: dict[fx.Node, int] = {}
    for node in graph.nodes:
        before[node] = inside.get(node) or max((before[n] for n in inputs.get(node, ())), default=0)
    leads_on: set[fx.Node] = set()
    depth: dict[fx.Node, int] = {}
    for node in reversed(graph.nodes):
        if node in inside or not leads_on.isdisjoint(node.users):
            leads_on.add(node)
        if node in inside:
            depth[node] = inside[node]
        elif node in values or not node.users:
            follows = before[node] + 1 if before[node] else 0
            depth[node] = follows if node in leads_on else len(blocks) + 1
        else:
            # Made of parameters and shapes: as deep as where it meets the stream.
            depth[node] = min(depth[user] for user in node.users)
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.users:
            name = str(node.target)
            found[name] = min(depth[node], found.get(name, depth[node])) if blocks else 0
    return found
