"""Pass int8-matmul for torch-surgery: linear layers as one op over int8 codes, under LoRA or any other adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from surgery.api import LINEAR, OpPass, Rewriter, Site, hookimpl


@torch.library.custom_op("int8_matmul::linear", mutates_args=())
def linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x · (scales ⊙ codes)ᵀ + bias, with codes (out × in) in int8 and one scale for each output."""
    return F.linear(x, codes.to(x.dtype) * scales.unsqueeze(1), bias)


@linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _keep(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, codes, scales, bias = inputs
    ctx.save_for_backward(codes, scales)
    ctx.biased = bias is not None


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, scales = ctx.saved_tensors
    bias = gradient.flatten(0, -2).sum(0) if ctx.biased else None
    return gradient @ (codes.to(gradient.dtype) * scales.unsqueeze(1)), None, None, bias


linear.register_autograd(_backward, setup_context=_keep)


def _onnx(x, codes, scales, bias=None):
    """The op in ONNX: DequantizeLinear, which onnxruntime fuses with the product."""
    from onnxscript import opset20 as op

    product = op.MatMul(x, op.Transpose(op.DequantizeLinear(codes, scales, axis=0), perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


class Int8Matmul(OpPass):
    """int8-matmul: y = W x + b becomes one op over int8 codes of W, with a scale for each output."""

    name: ClassVar[str] = "int8-matmul"
    on: ClassVar[tuple[str, ...]] = (LINEAR,)
    lowerings: ClassVar[Mapping[Any, Any]] = {linear._opoverload: _onnx}

    def pack(self, site: Site, weight: Tensor) -> Mapping[str, Tensor]:
        matrix = weight if site.layout == "oi" else weight.t()
        scales = matrix.abs().amax(1).clamp(min=1e-8) / 127
        return {"codes": (matrix / scales.unsqueeze(1)).round().to(torch.int8), "scales": scales}

    def op(self, site: Site, g: Rewriter) -> fx.Node:
        return g.call(linear._opoverload, g.op_input, g["codes"], g["scales"], g.bias)


@hookimpl
def surgery_passes() -> list[type]:
    return [Int8Matmul]
