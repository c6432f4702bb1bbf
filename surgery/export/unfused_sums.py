"""Replacement of Add before LayerNormalization by Sum, which onnxruntime does not fuse.

onnxruntime fuses an Add and a LayerNormalization into SkipLayerNormalization. On a CPU the fused op takes seven times
as long as the two ops (onnxruntime 1.32, float32: 0.25 against 0.035 ms for 106 rows of 384). Sum is equivalent to Add
but is not fused. Half-precision files, which run on accelerators, keep their Adds.
"""

from __future__ import annotations

from typing import Any

from surgery.export.optional import require


def keep_sums_apart(model: Any) -> int:
    """Replace the Adds of an onnx_ir.Model in place, and return their number."""
    float32 = require("onnx_ir").DataType.FLOAT
    found = 0
    for node in model.graph:
        if node.op_type != "LayerNormalization" or node.domain not in ("", "ai.onnx"):
            continue
        summed = node.inputs[0]
        producer = summed.producer() if summed is not None else None
        if producer is None or producer.op_type != "Add" or producer.domain not in ("", "ai.onnx"):
            continue
        if summed.dtype == float32:
            producer.op_type = "Sum"
            found += 1
    return found
