"""Regroups a program's graph into the modules it was captured from, so that sharded training gathers one block at a
time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.utils.fuser_utils import fuse_by_partitions, validate_partition

from surgery.capture.devices import HOME, placed
from surgery.engine.module import ProgramModule, attach, get, over, register
from surgery.engine.recompute import recomputed
from surgery.graph.graphs import copy_graph

UNIT = re.compile(r"(?:[^.]+\.)*?\d+(?=\.)")
_PREFIX = "surgery_unit_"


class Unit(nn.Module):
    """An item of a module list: its parameters, and the part of the graph that belongs to it, for each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["parts"] = {}

    def forward(self, *inputs: Any) -> Any:
        return self.__dict__["parts"][self.training](*inputs)


class Unflattened(nn.Module):
    """A program's module with the same parameters and names, whose blocks are called as units.

    A unit is an item of an outermost module list (`layer.0`, `layer.1`). An item stays in the surrounding graph if
    its nodes cannot be one call, or if other nodes read its tensors. The ops are unchanged, so the outputs are
    bit-identical.

    Attributes:
        units: paths of the units.
    """

    def __init__(self, module: ProgramModule, device: torch.device = HOME) -> None:
        """Regroup a module.

        Args:
            module: the module.
            device: device that the graphs will run on.

        Raises:
            CaptureError: the model cannot be captured in train mode.
        """
        super().__init__()
        self.training = module.training
        flat = {mode: module.graph_module(mode) for mode in (False, True)}
        copies = {
            mode: fx.GraphModule(each, placed(copy_graph(each.graph), device)) for mode, each in flat.items()
        }
        persistent = set(module.state_dict(keep_vars=True))
        tensors = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }
        named = dict.fromkeys(found[0] for found in map(UNIT.match, tensors) if found)
        self.units = tuple(path for path in named if all(_is_whole(c.graph, path) for c in copies.values()))
        # Register parameters in the original order: an optimizer may depend on it. A unit is attached with
        # its first one.
        waiting = set(self.units)
        for name, tensor in tensors.items():
            found = UNIT.match(name)
            if found and found[0] in waiting:
                attach(self, found[0], Unit())
                waiting.remove(found[0])
            register(self, name, tensor, name in persistent)
        self.__dict__["_graphs"] = {
            mode: self._split(mode, each, flat[mode]) for mode, each in copies.items()
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_graphs"][self.training](*args, **kwargs)

    def _split(self, mode: bool, whole: fx.GraphModule, flat: fx.GraphModule) -> fx.GraphModule:
        """Return the graph of a mode with each unit's nodes replaced by a call of the unit."""
        parts = [dict.fromkeys(_nodes_of(whole.graph, path)) for path in self.units]
        whole = fuse_by_partitions(whole, parts, prefix=_PREFIX, always_return_tuple=True)
        targets = {f"{_PREFIX}{number}": path for number, path in enumerate(self.units)}
        for name, path in targets.items():
            part, unit = getattr(whole, name), get(self, path)
            for node in part.graph.nodes:
                if node.op == "get_attr":
                    node.target = node.target.removeprefix(f"{path}.")
            unit.__dict__["parts"][mode] = over(unit, part.graph, Unit.__name__)
        for node in whole.graph.nodes:
            if node.op == "call_module":
                node.target = targets[node.target]
        made = over(self, whole.graph, type(flat).__name__, flat)
        if "forward" in flat.__dict__:  # the flat module dequantizes weights again in the backward pass
            made.__dict__["forward"] = recomputed(made.forward)
        return made


def _is_whole(graph: fx.Graph, path: str) -> bool:
    """Return True if the nodes of a module can be one call and nothing else reads its tensors."""
    nodes = list(_nodes_of(graph, path))
    own = {n for n in graph.nodes if n.op == "get_attr" and str(n.target).startswith(f"{path}.")}
    # A call is possible only if no path leaves the nodes and returns to them (`validate_partition`).
    return len(nodes) > len(own) and own.issubset(nodes) and validate_partition(nodes)


def _nodes_of(graph: fx.Graph, path: str) -> Iterator[fx.Node]:
    """Yield the nodes that came from a module, and its tensors that only these nodes read."""
    inside = {node for node in graph.nodes if node.op == "call_function" and path in _stack(node)}
    for node in graph.nodes:
        own = (
            node.op == "get_attr"
            and str(node.target).startswith(f"{path}.")
            and inside.issuperset(node.users)
        )
        if own or node in inside:
            yield node


def _stack(node: fx.Node) -> set[str]:
    """Return the paths of the modules a node came from."""
    return {str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()}
