"""Depth of each parameter: the index of its repeated block, or of its layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from surgery.graph.analysis.blocks import Block
from surgery.graph.analysis.residuals import operands, stream_values
from surgery.graph.ops import CONV, EXPERTS, LINEAR, Call


def depth_of(graph: fx.Graph, calls: Sequence[Call], rows: Sequence[Sequence[Block]]) -> dict[str, int]:
    """Map every parameter and buffer that the graph reads to its block depth.

    The depth is 0 before the first block, 1..n in the blocks and n + 1 after the last. Blocks are counted over all
    rows in graph order. A parameter outside of blocks has the depth of the next block on the way to the outputs, or
    n + 1 if none follows. A parameter that no block precedes (embeddings of a second tower) has depth 0. A
    parameter that is used more than once has the smallest of its depths. Without blocks, all depths are 0.

    Args:
        graph: graph to search.
        calls: weight ops of the graph.
        rows: result of `find_blocks` for the graph.
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
        # `leads_on` holds the nodes from which a block is still reachable.
        if node in inside or not leads_on.isdisjoint(node.users):
            leads_on.add(node)
        if node in inside:
            depth[node] = inside[node]
        elif node in values or not node.users:
            follows = before[node] + 1 if before[node] else 0
            depth[node] = follows if node in leads_on else len(blocks) + 1
        else:
            # A value computed from parameters and shapes alone is as deep as its first reader.
            depth[node] = min(depth[user] for user in node.users)
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.users:
            name = str(node.target)
            found[name] = min(depth[node], found.get(name, depth[node])) if blocks else 0
    return found


_LAYERS = (LINEAR, CONV, EXPERTS)


def layers_of(graph: fx.Graph, calls: Sequence[Call]) -> dict[str, int]:
    """Map every parameter and buffer that is read to its layer, counted from 0.

    Layer 0 holds the embeddings, or the first weight if there are none. A weight is one layer deeper than its
    input, along the longest path. A norm, a bias or any other parameter belongs to the layer of the value that it
    acts on. A parameter that is used twice belongs to the first of its layers.
    """
    weights = {call.node for call in calls if call.kind in _LAYERS}
    # Level of the nodes that depend on an input.
    level: dict[fx.Node, int] = {}
    for node in graph.nodes:
        below = [level[n] for n in node.all_input_nodes if n in level]
        if node.op == "placeholder" or below:
            level[node] = max(below, default=0) + (node in weights)
    layer: dict[fx.Node, int] = {}
    for node in reversed(graph.nodes):
        # A value computed from parameters alone is as deep as its first reader.
        readers = [layer[user] for user in node.users]
        layer[node] = level[node] if node in level else min(readers, default=0)
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.users:
            name = str(node.target)
            found[name] = min(layer[node], found.get(name, layer[node]))
    first = min(found.values(), default=0)
    return {name: deep - first for name, deep in found.items()}
