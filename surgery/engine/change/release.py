"""Freeing base weights that a program no longer reads."""

from __future__ import annotations

import torch
from torch import nn

from surgery.common.errors import CaptureError, PassError
from surgery.engine.state import State
from surgery.graph.graphs import live_nodes


def release(program: State) -> int:
    """Free base weights that a program no longer reads; see Program.release."""
    base = program.base
    if not base.in_memory or base.consumed:
        raise PassError(
            "release: the base's weights are not in memory as they were loaded; load the saved directory again"
        )
    try:
        # The train graph is captured now, while every weight is still in memory.
        graphs = [program.graph, program.train_graph]
    except CaptureError:
        graphs = [program.graph]
    read = {str(node.target) for graph in graphs for node in live_nodes(graph) if node.op == "get_attr"}
    freed = 0
    for name, group in base.names.items():
        tensor = base.tensors[name]
        kept = program.changed.keys() | base.loaded.unsourced | base.loaded.stored | read
        if name != group[0] or name in base.released or not kept.isdisjoint(group):
            continue
        assert isinstance(tensor, nn.Parameter)
        freed += tensor.nbytes
        # An expanded scalar keeps shape and dtype in one value's memory; NaN makes a use of it visible.
        placeholder = torch.full((), torch.nan, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
        tensor.data = placeholder
        base.released.update(group)
    # Parameters of other programs over the same memory would otherwise keep it alive.
    for (name, _), shell in list(base.shells.items()):
        if name in base.released:
            shell.data = base.tensors[name].data
    return freed
