"""`surgery_torchao::quantize_dequantize`: rounds an activation to 8 bits, as one node with a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("surgery_torchao::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: float, zero: int) -> Tensor:
    """Return (clamp(round(x / scale) + zero, 0, 255) − zero) × scale, as ONNX's QuantizeLinear and DequantizeLinear do.

    Args:
        x: The activation.
        scale: Step between two codes.
        zero: Code of the value zero, 0 to 255.
    """
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: float, zero: int) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Tensor, float, int], output: Tensor) -> None:
    """Save a mask of the values that are not saturated."""
    x, scale, zero = inputs
    ctx.save_for_backward((x >= (-zero - 0.5) * scale) & (x <= (255 - zero + 0.5) * scale))


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    """Pass the gradient through rounding, but not through saturation (Bengio et al. 2013, arXiv:1308.3432)."""
    (within,) = ctx.saved_tensors
    return gradient * within, None, None


quantize_dequantize.register_autograd(_straight_through, setup_context=_keep)


def translation() -> Any:
    """Return the onnxscript function of the op, for torch.onnx's translation table."""

    def lower(x, scale, zero):
        import numpy
        import onnx_ir
        from onnxscript import opset21 as op

        step = op.Constant(value=onnx_ir.tensor(numpy.array(scale, dtype=numpy.float32)))
        middle = op.Constant(value=onnx_ir.tensor(numpy.array(zero, dtype=numpy.uint8)))
        return op.DequantizeLinear(op.QuantizeLinear(x, step, middle), step, middle)

    return lower
