"""Region of a block copy: the ops to run again, and the tensors that each copy owns."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from surgery.graph.analysis.dataflow import op_name
from surgery.graph.analysis.residuals import operands, shape_of
from surgery.graph.marks import is_aux, mark_of, output_with_adapters
from surgery.graph.ops import Call, arguments

if TYPE_CHECKING:
    from surgery.graph.analysis.blocks import Block
    from surgery.graph.sites import Measurements
    from surgery.graph.view import View

_CASTS = ("to", "_to_copy", "type_as", "alias")
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Region:
    """The part of a block that a copy repeats.

    Attributes:
        inputs: nodes that hold the stream where it enters the block.
        output: node that holds the stream where it leaves the block.
        nodes: ops to copy, in graph order.
        calls: weight ops among them.
        own: first names of the parameters and running statistics that each copy owns; all others are shared.
    """

    inputs: frozenset[fx.Node]
    output: fx.Node
    nodes: tuple[fx.Node, ...]
    calls: tuple[Call, ...]
    own: tuple[str, ...]


def region_of(block: Block, view: View) -> Region:
    """Return the region of a block in the current graph.

    Copied are the ops that depend on the stream, and the ops that only these read: keys and values of an encoder's
    output, transposed weights, tensors that are written in place. Masks, position tables and sizes that other blocks
    read too are shared.
    """
    output = _end(block)
    place = {node: index for index, node in enumerate(view.graph.nodes)}
    nodes = [node for node in block.nodes if place[node] <= place[output]]
    inside, reads = set(nodes), operands(view.graph)
    names = (n for node in nodes for n in reads[node] if n not in inside)
    inputs = {block.input, *(n for n in names if mark_of(n).follows == block.input.name)}
    copied = set(inputs)
    # Sizes (SymInts) are not copied: the copy has the same shapes.
    for node in nodes:
        if _is_tensor(node) and not copied.isdisjoint(reads[node]):
            copied.add(node)
    readers = _readers(reads)
    # Backwards, so that chains of ops that only the copy reads are collected from their ends.
    for node in reversed(nodes):
        if node not in copied and _is_tensor(node) and copied.issuperset(readers.get(node, [block.input])):
            copied.add(node)
    kept = tuple(node for node in nodes if node in copied and node not in inputs)
    calls = tuple(call for call in block.calls if call.node in copied)
    return Region(frozenset(inputs), output, kept, calls, _own(kept, calls, view))


def _end(block: Block) -> fx.Node:
    """Return the block's output before a cast to the same dtype, which belongs to the next block's module."""
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
    """Return the names of the weight ops' tensors and of other parameters that only the region reads."""
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
            # Running statistics are updated by each norm on its own input, so a copy needs its own.
            if alone or operand in statistics or not weights.isdisjoint(aliases):
                found[aliases[0]] = None
    return tuple(found)


def adapters_in(region: Region) -> list[str]:
    """Return the entries of adapters inside the region, or around its output."""
    found: dict[str, None] = {}
    for node in region.nodes:
        for n in (node, *node.all_input_nodes):
            mark = mark_of(n)
            if mark.weight_of is not None or (n is node and is_aux(n)):
                found[mark.entry] = None
    outer = output_with_adapters(region.output)
    if outer is not region.output:
        found[mark_of(outer).entry] = None
    return list(found)


def module_of(names: Iterable[str]) -> str:
    """Return the innermost module that contains all these tensors."""
    paths = [name.split(".")[:-1] for name in names]
    shared = paths[0] if paths else []
    for path in paths[1:]:
        same = 0
        while same < min(len(shared), len(path)) and shared[same] == path[same]:
            same += 1
        shared = shared[:same]
    return ".".join(shared)


def outer_values(region: Region) -> set[fx.Node]:
    """Return the graph values that the region reads from outside, and its output."""
    inside = set(region.nodes)
    read = {n for node in region.nodes for n in node.all_input_nodes if n not in inside}
    return {n for n in read if n.op != "get_attr"} | {region.output}


def run(
    probe: Measurements, region: Region, outer: Mapping[fx.Node, Any], zero: Collection[str], view: View
) -> Tensor:
    """Run a copy on the region's own output.

    Args:
        probe: measurements of the program.
        region: the region.
        outer: values that the region reads from outside, and its output.
        zero: first names of the tensors to set to zero.
        view: the program.
    """
    module = probe.program.graph_module
    known: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node not in known:
            if node.op == "get_attr":
                held, name = attrgetter(str(node.target))(module), str(node.target)
                known[node] = torch.zeros_like(held) if view.names.get(name, (name,))[0] in zero else held
            else:
                # Values are cloned, because ops may write into them in place.
                held = outer[region.output if node in region.inputs else node]
                known[node] = held.clone() if isinstance(held, Tensor) else held
        return known[node]

    with torch.no_grad():
        for node in region.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[region.output]
