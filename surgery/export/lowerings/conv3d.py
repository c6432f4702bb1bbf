"""Lowering of `aten::conv3d` to standard ONNX.

For a convolution without a bias, torch.onnx adds a bias with two axes, which no runtime accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surgery.export.optional import require
from surgery.graph.ops import per_axis


def translation() -> Any:
    """Create the onnxscript function for torch.onnx's translation table."""
    op = require("onnxscript").opset18

    def conv3d(
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Sequence[int] = (1,),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        groups: int = 1,
    ) -> Any:
        strides, pads, dilations = (per_axis(value, 3) for value in (stride, padding, dilation))
        # PyTorch also accepts input without a batch axis; ONNX Conv requires one.
        unbatched = len(x.shape) == 4
        x = op.Unsqueeze(x, op.Constant(value_ints=[0])) if unbatched else x
        given = (x, weight) if bias is None else (x, weight, bias)
        found = op.Conv(*given, strides=strides, pads=[*pads, *pads], dilations=dilations, group=groups)
        return op.Squeeze(found, op.Constant(value_ints=[0])) if unbatched else found

    return conv3d
