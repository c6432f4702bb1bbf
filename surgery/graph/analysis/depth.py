"""How deep in a model each parameter is: its place among the repeated blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from surgery.graph.analysis.blocks import Block
from surgery.graph.analysis.residuals import operands, stream_values
from surgery.graph.ops import CONV, EXPERTS, LINEAR, Call


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


_LAYERS = (LINEAR, CONV, EXPERTS)


def layers_of(graph: fx.Graph, calls: Sequence[Call]) -> dict[str, int]:
    """Layer of every parameter and buffer that is read: 0 for embeddings, or the first weight where there are none.

    A weight is one layer deeper than what enters it, by the longest way; a norm, a bias and whatever else reads a
    parameter belong to the layer whose value they act on. A parameter that is used twice is in the first of them.
    """
    weights = {call.node for call in calls if call.kind in _LAYERS}
    level: dict[fx.Node, int] = {}  # of what rests on the inputs
    for node in graph.nodes:
        below = [level[n] for n in node.all_input_nodes if n in level]
        if node.op == "placeholder" or below:
            level[node] = max(below, default=0) + (node in weights)
    layer: dict[fx.Node, int] = {}
    for node in reversed(graph.nodes):
        # What is made of parameters alone is as deep as what first reads it.
        readers = [layer[user] for user in node.users]
        layer[node] = level[node] if node in level else min(readers, default=0)
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.users:
            name = str(node.target)
            found[name] = min(layer[node], found.get(name, layer[node]))
    first = min(found.values(), default=0)
    return {name: deep - first for name, deep in found.items()}
