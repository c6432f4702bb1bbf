"""Devices of graphs: a graph names none. It is written as if for the CPU, and compiled for the device of a module.

torch.export writes the device of the example inputs into ops that create tensors (`arange(…, device=cpu)`). `neutral`
replaces every device of a captured graph by `HOME`, so that graphs, their hashes and journals are the same wherever a
model was captured. `placed` replaces `HOME` by the device that a graph is to run on.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from surgery.common.errors import LoadError

# The device that stands in graphs for "the device of the program".
HOME = torch.device("cpu")


def find_device(text: str | torch.device) -> torch.device:
    """The device of a name such as "cuda", "cuda:1", "mps" or "cpu".

    Raises:
        LoadError: The name is no device, or this machine has no such device.
    """
    try:
        device = torch.device(text)
    except RuntimeError:
        raise LoadError(f"device {str(text)!r} is unknown; give cpu, cuda, cuda:1 or mps") from None
    if device.type in ("cpu", "meta"):
        return device
    # Every kind of device has a module in torch, which says how many there are.
    kind: Any = getattr(torch, device.type, None)
    name = device.type.upper()
    if kind is None or not hasattr(kind, "is_available") or not kind.is_available():
        raise LoadError(f"no {name} device here; give --device cpu, or run on a machine that has one")
    count = kind.device_count() if hasattr(kind, "device_count") else 1
    if device.index is not None and device.index >= count:
        raise LoadError(f"no device {device} here: there are {count} of {name}, counted from 0")
    return device


def exact(device: str | torch.device) -> torch.device:
    """The device with the number that its tensors have: "cuda" is the current one, such as "cuda:0"."""
    return torch.empty(0, device=device).device


def device_of(module: nn.Module) -> torch.device:
    """Device of a module's parameters, or of its buffers if there are none; `HOME` without tensors."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), HOME)


def on_device(values: Any, device: torch.device) -> Any:
    """Nested inputs with every tensor on a device."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), values)


def neutral(gm: fx.GraphModule) -> None:
    """Replace every device in a captured graph and its subgraphs by `HOME`, in place."""
    for each in _subgraphs(gm):
        changed = _rename(each.graph, HOME)
        for node in each.graph.nodes:
            value = node.meta.get("val")
            if any(isinstance(t, torch.Tensor) and t.device != HOME for t in pytree.tree_leaves(value)):
                node.meta["val"] = pytree.tree_map_only(torch.Tensor, _at_home, value)
        if changed:
            each.recompile()


def placed(graph: fx.Graph, device: torch.device) -> fx.Graph:
    """The graph for a device, with the same nodes under the same names.

    Args:
        graph: A graph that names no device but `HOME`; it is not changed.
        device: The device to run on.

    Returns:
        The graph itself if it needs no change.
    """
    if device == HOME or not names_device(graph):
        return graph
    fresh = fx.Graph()
    output = fresh.output(fresh.graph_copy(graph, {}))
    output.meta = dict(next(node for node in reversed(graph.nodes) if node.op == "output").meta)
    fresh._codegen = graph._codegen
    _rename(fresh, device)
    return fresh


def placed_module(gm: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A subgraph of a higher-order op (the body of a loop, say) for a device; its own tensors are moved as well.

    Args:
        gm: The subgraph, as it was captured; it is not changed.
        device: The device to run on.
    """
    fresh = fx.GraphModule(gm, placed(gm.graph, device), class_name=type(gm).__name__)
    for name, child in list(fresh.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(fresh, name, placed_module(child, device))
    return fresh.to(device)


def _subgraphs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    return [each for each in gm.modules() if isinstance(each, fx.GraphModule)]


def names_device(graph: fx.Graph) -> bool:
    """True if an argument of an op is a device: the op creates a tensor there, or moves one there."""
    leaves = (leaf for node in graph.nodes for leaf in pytree.tree_leaves((node.args, node.kwargs)))
    return any(isinstance(leaf, torch.device) for leaf in leaves)


def _rename(graph: fx.Graph, device: torch.device) -> bool:
    """Replace every device in the arguments of a graph's ops. Returns False if there was none to replace."""
    changed = False
    for node in graph.nodes:
        leaves = pytree.tree_leaves((node.args, node.kwargs))
        if any(isinstance(leaf, torch.device) and leaf != device for leaf in leaves):
            changed = True
            given = fx.node.map_aggregate(
                (node.args, node.kwargs), lambda leaf: device if isinstance(leaf, torch.device) else leaf
            )
            node.args, node.kwargs = given
    return changed


def _at_home(value: torch.Tensor) -> torch.Tensor:
    """A fake tensor as it would be on `HOME`."""
    mode = getattr(value, "fake_mode", None)
    if mode is None:
        return value
    with mode:
        made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=HOME)
    return made.requires_grad_(value.requires_grad)
