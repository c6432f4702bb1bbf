"""`aten::conv3d` in standard ONNX: torch.onnx gives one without a bias a bias of two axes, which nothing runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surgery.export.optional import require
from surgery.graph.ops import per_axis


def translation() -> Any:
    """The onnxscript function for torch.onnx's table."""
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
        unbatched = len(x.shape) == 4
        x = op.Unsqueeze(x, op.Constant(value_ints=[0])) if unbatched else x
        given = (x, weight) if bias is None else (x, weight, bias)
        found = op.Conv(*given, strides=strides, pads=[*pads, *pads], dilations=dilations, group=groups)
        return op.Squeeze(found, op.Constant(value_ints=[0])) if unbatched else found

    return conv3d
