"""Base weights that nothing reads any more, given back to the system."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import nn

from surgery.errors import CaptureError, JournalError, PassError
from surgery.sites import live_nodes

if TYPE_CHECKING:
    from surgery.program import Program


def release(program: Program) -> int:
    """See Program.release."""
    base = program.base
    if not base.in_memory or base.consumed:
        raise PassError("release: the base's weights are not in memory as they were loaded")
    try:
        graphs = [program.graph, program.train_graph]  # captured now, while every weight is there
    except CaptureError:
        graphs = [program.graph]
    read = {str(node.target) for graph in graphs for node in live_nodes(graph) if node.op == "get_attr"}
    freed = 0
    for name, group in base.names.items():
        tensor = base.tensors[name]
        kept = program.changed.keys() | base.loaded.unsourced | read
        if name != group[0] or name in base.released or not kept.isdisjoint(group):
            continue
        assert isinstance(tensor, nn.Parameter)
        freed += tensor.nbytes
        nothing = torch.full((), torch.nan, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
        tensor.data = nothing
        base.released.update(group)
    for (name, _), shell in list(base.shells.items()):
        if name in base.released:
            shell.data = base.tensors[name].data
    return freed


def check_present(program: Program, what: str, read: Collection[str] | None = None) -> None:
    """Raises JournalError for a base that lacks weights which something wants back. read: those, where not all."""
    gone = program.base.released if read is None else program.base.released.intersection(read)
    if gone:
        raise JournalError(f"{what}: {min(gone)} was released from memory; load the saved directory again")
