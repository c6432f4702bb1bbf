"""Sums before LayerNormalization that onnxruntime does not fuse in a session, but that its optimizer tool fuses.

onnxruntime fuses an Add and a LayerNormalization into SkipLayerNormalization. On a CPU the fused op takes seven times
as long as the two ops (onnxruntime 1.32, float32: 0.25 against 0.035 ms for 106 rows of 384), and MiniLM 10 to 18%
longer as a whole. A session fuses only if the shapes of both summands have the same dimension names, so one summand
gets names of its own (`seq.skip`). `onnxruntime.transformers.optimizer`, whose result is for GPUs, infers shapes by
itself and fuses. Where no dimension is dynamic, Sum replaces Add, which nothing fuses. A broadcast summand is not
fused anyway. Half-precision files, which run on accelerators, keep their Adds.
"""

from __future__ import annotations

from typing import Any

from surgery.export.optional import require


def keep_sums_apart(model: Any) -> int:
    """Change the Adds of an onnx_ir.Model in place, and return their number."""
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
            found += _keep_apart(producer)
    return found


def _keep_apart(add: Any) -> bool:
    """Change an Add so that a session does not fuse it. Returns False, without a change, if it would not be fused."""
    ir = require("onnx_ir")
    shapes = [value.shape for value in add.inputs]
    if all(shape is not None for shape in shapes) and list(shapes[0]) != list(shapes[1]):
        return False
    own = [
        v for v in add.inputs if v.producer() is not None and len(v.uses()) == 1 and not v.is_graph_output()
    ]
    named = [dim for dim in shapes[0] or () if not isinstance(dim, int)]
    if None in shapes or not own or not named or any(dim.value is None for dim in named):
        add.op_type = "Sum"
    else:
        own[0].shape = ir.Shape([d if isinstance(d, int) else f"{d.value}.skip" for d in own[0].shape])
    return True
