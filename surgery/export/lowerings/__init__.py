"""ONNX lowerings of surgery's custom ops, and of ATen ops that torch.onnx translates incorrectly or inefficiently."""

from __future__ import annotations

from typing import Any

import torch

from surgery.capture.recurrences import operators
from surgery.common.hooks import hookimpl
from surgery.export.lowerings import (
    attention,
    conv3d,
    dequantize,
    linear_attention,
    recurrent,
    round_activation,
)
from surgery.passes.quantize import ops


@hookimpl
def surgery_onnx_lowerings() -> dict[Any, Any]:
    """Map each torch op to its onnxscript function."""
    return {
        ops.dequantize._opoverload: dequantize.translation(),
        ops.round_activation._opoverload: round_activation.translation(),
        operators.linear_attention._opoverload: linear_attention.translation(),
        torch.ops.aten.conv3d.default: conv3d.translation(),
        torch.ops.aten.scaled_dot_product_attention.default: attention.translation(),
        torch.ops.aten.rnn_tanh.input: recurrent.translation("Tanh"),
        torch.ops.aten.rnn_relu.input: recurrent.translation("Relu"),
    }
