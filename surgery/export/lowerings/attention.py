"""`aten::scaled_dot_product_attention` in standard ONNX, at every opset.

torch.onnx writes two passes over all weights of attention to undo the NaN of a row that is wholly masked, and copies
keys and values for grouped queries. Here such a row is told by its mask, which is small and shared by all layers, and
grouped queries are rows of their group's product. What comes out is what torch computes, wholly masked rows, which
are zeros, with it.
"""

from __future__ import annotations

import math
from typing import Any

from surgery.export.optional import require


def translation() -> Any:
    """The onnxscript function for torch.onnx's table. Raises what export reports where heads or their size vary."""
    ir = require("onnx_ir")
    op = require("onnxscript").opset18

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        rank, size = len(query.shape), query.shape[-1]
        if scale is None:
            if not isinstance(size, int):
                raise ValueError(
                    "scaled_dot_product_attention of a size of heads that varies has no ONNX form"
                )
            scale = 1 / math.sqrt(size)
        groups = _groups(query, key) if enable_gqa else 1

        def number(x: float) -> Any:
            return op.Constant(value=ir.tensor(x, dtype=query.dtype))

        def ints(*values: int) -> Any:
            return op.Constant(value_ints=list(values))

        # Half the lowest number: with a negative score the lowest of all would be -inf, and a row of it NaN.
        low = number(float(query.dtype.min) / 2)
        visible = bias = seen = None
        if is_causal:
            places = [op.Squeeze(op.Shape(x, start=rank - 2, end=rank - 1)) for x in (query, key)]
            rows, columns = (op.Range(0, count, 1) for count in places)
            visible = op.GreaterOrEqual(op.Unsqueeze(rows, ints(1)), columns)
        elif attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
            visible = attn_mask
            seen = op.ReduceMax(op.Cast(visible, to=query.dtype), ints(-1))
        elif attn_mask is not None:
            bias = op.Max(attn_mask, low)
            most = op.ReduceMax(attn_mask, ints(-1))
            seen = op.Cast(op.Greater(most, number(-math.inf)), to=query.dtype)
        if visible is not None:
            bias = op.Where(visible, number(0.0), low)

        # Both sides by the root, as torch does: half-precision products stay small.
        root = math.sqrt(abs(scale))
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        asked = op.Reshape(query, ints(0, key.shape[1], -1, size)) if groups > 1 else query
        keys = op.Mul(op.Transpose(key, perm=swapped), number(root))
        scores = op.MatMul(op.Mul(asked, number(math.copysign(root, scale))), keys)
        grouped = op.Shape(scores) if groups > 1 and bias is not None else None
        if grouped is not None:
            apart = op.Concat(op.Shape(query, end=3), op.Shape(key, start=2, end=3), axis=0)
            scores = op.Reshape(scores, apart)
        if bias is not None:
            scores = op.Add(scores, bias)
        weights = op.Softmax(scores, axis=-1)
        if dropout_p:
            weights, _ = op.Dropout(weights, dropout_p)
        if grouped is not None:
            weights = op.Reshape(weights, grouped)
        found = op.MatMul(weights, value)
        if groups > 1:
            found = op.Reshape(found, op.Concat(op.Shape(query, end=3), op.Shape(value, start=3), axis=0))
        return found if seen is None else op.Mul(found, seen)

    return attention


def _groups(query: Any, key: Any) -> int:
    """How many heads of queries share one of keys. query, key: (batch, heads, places, size)."""
    asked, held = query.shape[-3], key.shape[-3]
    if len(query.shape) != 4 or not isinstance(asked, int) or not isinstance(held, int) or asked % held:
        raise ValueError(
            "scaled_dot_product_attention of grouped queries needs 4 axes and a number of heads that divides"
        )
    return asked // held
