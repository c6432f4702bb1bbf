"""The opset that a graph needs: the one torch writes by default, unless an op of it has its own ONNX op only later."""

from __future__ import annotations

import torch
from torch import fx

from surgery.export.lowerings import dequantize

aten = torch.ops.aten

# RMSNormalization. Before it, torch writes a mean of squares that onnxruntime does not fuse.
_SINCE = {aten.rms_norm.default: 23}


def opset_for(graph: fx.Graph) -> int | None:
    """None where the default does."""
    wanted = [_SINCE[node.target] for node in graph.nodes if node.target in _SINCE]
    codes = dequantize.opset_for(graph)
    return max([*wanted, *([codes] if codes else [])], default=None)
