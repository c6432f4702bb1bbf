"""Choice of the ONNX opset: torch's default, or a later one that an op of the graph needs."""

from __future__ import annotations

import torch
from torch import fx

from surgery.common.errors import ExportError
from surgery.export.lowerings import dequantize, linear_attention

aten = torch.ops.aten

# Opset 23 adds RMSNormalization. For earlier opsets torch writes elementwise ops, which onnxruntime does not fuse.
_SINCE = {aten.rms_norm.default: 23}


def check_opset(graph: fx.Graph, opset: int) -> None:
    """Check that an opset has what the graph's quantized weights need, and that files of it can be written.

    Raises:
        ExportError: the opset is too early or too late.
    """
    if opset > linear_attention.OPSET:
        raise ExportError(
            f"--opset {opset} is too late: files are written up to opset {linear_attention.OPSET}; leave out --opset"
        )
    if opset >= dequantize.OPSET:
        return
    for node in graph.nodes:
        if node.target is not dequantize.dequantize._opoverload:
            continue
        format, blocks = node.args[3], node.args[1].meta["val"].shape[1] if "val" in node.args[1].meta else 1
        if format != "int8" or blocks > 1:
            kind = f"{format} weights" if format != "int8" else "int8 weights with --group"
            raise ExportError(
                f"--opset {opset} is too early: {kind} need opset {dequantize.OPSET}, the first with 4-bit tensors and "
                f"block-wise scales; leave out --opset, or quantize to int8 without --group"
            )


def opset_for(graph: fx.Graph) -> int | None:
    """The opset that a graph needs; None if torch's default is sufficient."""
    wanted = [_SINCE[node.target] for node in graph.nodes if node.target in _SINCE]
    found = [dequantize.opset_for(graph), linear_attention.opset_for(graph)]
    return max([*wanted, *(opset for opset in found if opset)], default=None)
