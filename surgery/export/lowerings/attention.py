"""Lowering of `aten::scaled_dot_product_attention` to standard ONNX ops of any opset.

torch.onnx removes the NaNs of fully masked rows with two passes over all attention weights, and copies keys and values
for grouped queries. This lowering finds fully masked rows from the mask, which is small and shared by all layers. It
computes grouped queries as additional rows of the product with their key head. The result equals that of torch,
including zeros for fully masked rows.
"""

from __future__ import annotations

import math
from typing import Any

from surgery.export.optional import require


def translation() -> Any:
    """Create the onnxscript function for torch.onnx's translation table.

    The function raises ValueError if the head size is dynamic or the numbers of heads do not fit. The export reports
    the error.
    """
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
                    "scaled_dot_product_attention with a dynamic head size has no ONNX form; make the head size static"
                )
            scale = 1 / math.sqrt(size)
        groups = _groups(query, key) if enable_gqa else 1

        def number(x: float) -> Any:
            return op.Constant(value=ir.tensor(x, dtype=query.dtype))

        def ints(*values: int) -> Any:
            return op.Constant(value_ints=list(values))

        def any_of(places: Any) -> Any:
            # onnxruntime's symbolic shape inference, which its tools run first, knows ReduceSum but not ReduceMax.
            count = op.ReduceSum(op.Cast(places, to=ir.DataType.FLOAT), ints(-1))
            return op.Cast(op.Greater(count, op.Constant(value_float=0.0)), to=query.dtype)

        # Half of the lowest value: adding a negative score to the lowest value itself could give -inf, and a row of
        # -inf becomes NaN in the softmax.
        low = number(float(query.dtype.min) / 2)
        # visible: boolean mask. bias: additive mask. seen: 0 for fully masked rows and 1 for others. A causal mask has
        # no fully masked rows, because every query sees the first key.
        visible = bias = seen = None
        if is_causal:
            places = [op.Squeeze(op.Shape(x, start=rank - 2, end=rank - 1)) for x in (query, key)]
            rows, columns = (op.Range(0, count, 1) for count in places)
            visible = op.GreaterOrEqual(op.Unsqueeze(rows, ints(1)), columns)
        elif attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
            visible = attn_mask
            seen = any_of(visible)
        elif attn_mask is not None:
            bias = op.Max(attn_mask, low)
            seen = any_of(op.Greater(attn_mask, number(-math.inf)))
        if visible is not None:
            bias = op.Where(visible, number(0.0), low)

        # Scale both factors by the square root, as torch does, so that products do not overflow in half precision.
        root = math.sqrt(abs(scale))
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        # Grouped queries: merge the axes of group and position, (batch, key heads, groups * positions, size), so that
        # keys need not be copied.
        asked = op.Reshape(query, ints(0, key.shape[1], -1, size)) if groups > 1 else query
        keys = op.Mul(op.Transpose(key, perm=swapped), number(root))
        scores = op.MatMul(op.Mul(asked, number(math.copysign(root, scale))), keys)
        grouped = op.Shape(scores) if groups > 1 and bias is not None else None
        # The mask has one row for each query position, so separate the groups while it is added.
        if grouped is not None:
            separate = op.Concat(op.Shape(query, end=3), op.Shape(key, start=2, end=3), axis=0)
            scores = op.Reshape(scores, separate)
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
    """Number of query heads that share one key head.

    query and key have shape (batch, heads, positions, head size).
    """
    asked, held = query.shape[-3], key.shape[-3]
    if len(query.shape) != 4 or not isinstance(asked, int) or not isinstance(held, int) or asked % held:
        raise ValueError(
            "scaled_dot_product_attention with grouped queries needs 4 axes and a static number of query heads that is "
            "a multiple of the key heads"
        )
    return asked // held
