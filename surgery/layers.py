"""Depth in models that repeat no block, such as a plain convolutional net: every weight on the way is a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from surgery.weight_ops import CONV, EXPERTS, LINEAR

if TYPE_CHECKING:
    from surgery.view import View

_LAYERS = (LINEAR, CONV, EXPERTS)


def layers_of(view: View) -> dict[str, int]:
    """Layer of every parameter and buffer that is read: 0 for embeddings, or the first weight where there are none.

    A weight is one layer deeper than what enters it, by the longest way; a norm, a bias and whatever else reads a
    parameter belong to the layer whose value they act on. A parameter that is used twice is in the first of them.
    """
    weights = {call.node for call in view.calls if call.kind in _LAYERS}
    level: dict[fx.Node, int] = {}  # of what rests on the inputs
    for node in view.graph.nodes:
        below = [level[n] for n in node.all_input_nodes if n in level]
        if node.op == "placeholder" or below:
            level[node] = max(below, default=0) + (node in weights)
    layer: dict[fx.Node, int] = {}
    for node in reversed(view.graph.nodes):
        # What is made of parameters alone is as deep as what first reads it.
        readers = [layer[user] for user in node.users]
        layer[node] = level[node] if node in level else min(readers, default=0)
    found: dict[str, int] = {}
    for node in view.graph.nodes:
        if node.op == "get_attr" and node.users:
            name = str(node.target)
            found[name] = min(layer[node], found.get(name, layer[node]))
    first = min(found.values(), default=0)
    return {name: deep - first for name, deep in found.items()}
