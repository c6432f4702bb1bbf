"""What a copy of a block is made of: the ops that have to run again, and the tensors that it has for itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from surgery.graph.analysis.dataflow import op_name
from surgery.graph.analysis.residuals import operands, shape_of
from surgery.graph.marks import META, is_aux, tail
from surgery.graph.ops import Call, arguments

if TYPE_CHECKING:
    from surgery.graph.analysis.blocks import Block
    from surgery.graph.sites import Measurements
    from surgery.graph.view import View

_CASTS = ("to", "_to_copy", "type_as", "alias")
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Region:
    """inputs: the graph values that stand for the stream as it enters. output: the stream as it leaves.
    nodes: the ops to copy, in graph order. calls: the weight ops among them. own: names of the parameters and
    running statistics that a copy has for itself, by their first names; it shares everything else."""

    inputs: frozenset[fx.Node]
    output: fx.Node
    nodes: tuple[fx.Node, ...]
    calls: tuple[Call, ...]
    own: tuple[str, ...]


def region_of(block: Block, view: View) -> Region:
    """The region of a block in the graph as it is now.

    Copied is what depends on the values of the stream, and what only that reads: keys and values of an encoder's
    output, transposed weights, tensors that are written in place. Masks, position tables and sizes that other
    blocks read too are shared.
    """
    output = _end(block)
    place = {node: index for index, node in enumerate(view.graph.nodes)}
    nodes = [node for node in block.nodes if place[node] <= place[output]]
    inside, reads = set(nodes), operands(view.graph)
    names = (n for node in nodes for n in reads[node] if n not in inside)
    inputs = {block.input, *(n for n in names if n.meta.get(META, {}).get("follows") == block.input.name)}
    copied = set(inputs)
    for node in nodes:
        if _is_tensor(node) and not copied.isdisjoint(reads[node]):
            copied.add(node)
    readers = _readers(reads)
    for node in reversed(nodes):
        if node not in copied and _is_tensor(node) and copied.issuperset(readers.get(node, [block.input])):
            copied.add(node)
    kept = tuple(node for node in nodes if node in copied and node not in inputs)
    calls = tuple(call for call in block.calls if call.node in copied)
    return Region(frozenset(inputs), output, kept, calls, _own(kept, calls, view))


def _end(block: Block) -> fx.Node:
    """The block's output, before a cast to the dtype that it has: that belongs to the module of the next block."""
    node = block.output
    while op_name(node.target) in _CASTS and isinstance(node.args[0], fx.Node):
        below = node.args[0]
        alike = shape_of(below) == shape_of(node) and below.meta["val"].dtype == node.meta["val"].dtype
        if not alike or below not in block.nodes:
            break
        node = below
    return node


def _readers(reads: Mapping[fx.Node, Iterable[fx.Node]]) -> dict[fx.Node, list[fx.Node]]:
    found: dict[fx.Node, list[fx.Node]] = {}
    for node, below in reads.items():
        for operand in below:
            found.setdefault(operand, []).append(node)
    return found


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value)
    )


def _own(nodes: Sequence[fx.Node], calls: Sequence[Call], view: View) -> tuple[str, ...]:
    """A weight op's tensors, and other parameters that nothing else reads."""
    inside, named = set(nodes), view.names
    weights = {str(n.target) for call in calls for n in (call.weight, call.bias) if n is not None}
    elsewhere = {
        str(n.target) for n in view.graph.nodes if n.op == "get_attr" and not inside.issuperset(n.users)
    }
    found: dict[str, None] = {}
    for node in nodes:
        statistics = {arguments(node).get(name) for name in _STATISTICS}
        for operand in node.all_input_nodes:
            if operand.op != "get_attr":
                continue
            name = str(operand.target)
            aliases = named.get(name, (name,))
            alone = name in named and elsewhere.isdisjoint(aliases)
            if alone or operand in statistics or not weights.isdisjoint(aliases):
                found[aliases[0]] = None
    return tuple(found)


def adapters_in(region: Region) -> list[str]:
    """Entries of adapters that stand in the region, under its ops or round its output."""
    found: dict[str, None] = {}
    for node in region.nodes:
        for n in (node, *node.all_input_nodes):
            mark = n.meta.get(META, {})
            if "weight_of" in mark or (n is node and is_aux(n)):
                found[str(mark["entry"])] = None
    outer = tail(region.output)
    if outer is not region.output:
        found[str(outer.meta[META]["entry"])] = None
    return list(found)


def module_of(names: Iterable[str]) -> str:
    """The module that holds all these tensors."""
    paths = [name.split(".")[:-1] for name in names]
    shared = paths[0] if paths else []
    for path in paths[1:]:
        same = 0
        while same < min(len(shared), len(path)) and shared[same] == path[same]:
            same += 1
        shared = shared[:same]
    return ".".join(shared)


def outer_values(region: Region) -> set[fx.Node]:
    """Graph values that the region reads and does not make, and its output."""
    inside = set(region.nodes)
    read = {n for node in region.nodes for n in node.all_input_nodes if n not in inside}
    return {n for n in read if n.op != "get_attr"} | {region.output}


def run(
    probe: Measurements, region: Region, outer: Mapping[fx.Node, Any], zero: Collection[str], view: View
) -> Tensor:
    """What a copy computes of the region's own output, with these tensors (by first name) at zero."""
    module = probe.program.graph_module
    known: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node not in known:
            if node.op == "get_attr":
                held, name = attrgetter(str(node.target))(module), str(node.target)
                known[node] = torch.zeros_like(held) if view.names.get(name, (name,))[0] in zero else held
            else:
                held = outer[region.output if node in region.inputs else node]
                known[node] = held.clone() if isinstance(held, Tensor) else held  # ops may write in place
        return known[node]

    with torch.no_grad():
        for node in region.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[region.output]
