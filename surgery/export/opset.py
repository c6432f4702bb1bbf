"""Choice of the ONNX opset: torch's default, or a later one that an op of the graph needs."""

from __future__ import annotations

import torch
from torch import fx

from surgery.export.lowerings import dequantize

aten = torch.ops.aten

# Opset 23 adds RMSNormalization. For earlier opsets torch writes elementwise ops, which onnxruntime does not fuse.
_SINCE = {aten.rms_norm.default: 23}


def opset_for(graph: fx.Graph) -> int | None:
    """The opset that a graph needs; None if torch's default is sufficient."""
    wanted = [_SINCE[node.target] for node in graph.nodes if node.target in _SINCE]
    codes = dequantize.opset_for(graph)
    return max([*wanted, *([codes] if codes else [])], default=None)
