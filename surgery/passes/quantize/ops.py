"""Quantization ops of a graph. They are custom ops, so that an exporter does not fold them into constants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.engine.recompute import REMADE, made_from_codes
from surgery.passes.quantize.codes import decode, encode

# Rounding of rows: the step after division by the row's largest magnitude, and a lower bound of that magnitude.
STEP, SMALLEST = float(torch.tensor(1 / 127)), torch.finfo(torch.float32).tiny
# `twice`: the rounding error is at most half a step; 127 levels of it make the second step 1/254 of the first.
FINER = float(torch.tensor(1 / 254))


@torch.library.custom_op("surgery::dequantize", mutates_args=())
def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    format: str,
    shape: Sequence[int],
    order: Sequence[int],
    smooth: Tensor | None = None,
) -> Tensor:
    """Decode a weight to its stored layout, in the dtype of the scales.

    Args:
        codes: Packed codes of the matrix, see `codes.Codes`.
        scale: Scales (rows, blocks).
        zero: Zero points (rows, blocks), or None.
        format: Name of a format in `codes.FORMATS`.
        shape: Shape of the weight as stored.
        order: Axes of the weight in the order of the matrix.
        smooth: Factors by which the columns of the matrix were multiplied before encoding, or None.
    """
    turned = [shape[axis] for axis in order]
    columns = math.prod(turned) // codes.shape[0]

    def make() -> Tensor:
        if smooth is None:
            return _back(decode(codes, scale, zero, format, columns).reshape(turned), order)
        matrix = decode(codes, scale.float(), zero, format, columns) / smooth.float()
        return _back(matrix.to(scale.dtype).reshape(turned), order)

    # In training, the backward pass decodes again instead of keeping every weight in memory.
    weight = make()
    made_from_codes(weight, make)
    return weight


REMADE.add(dequantize._opoverload)


@dequantize.register_fake
def _(
    codes: Tensor, scale: Tensor, zero: Tensor | None, format: str, shape: Sequence[int], *_: Any
) -> Tensor:
    return scale.new_empty(list(shape))


@torch.library.custom_op("surgery::fake_quantize", mutates_args=())
def fake_quantize(
    weight: Tensor,
    format: str,
    block: int,
    asymmetric: bool,
    order: Sequence[int],
    rows: int,
    share: Tensor | None = None,
    paired: bool = False,
) -> Tensor:
    """Round a weight to codes and back; the result is bit-identical to `dequantize` of its codes.

    The gradient passes to the weight unchanged (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432).

    Args:
        weight: The weight in its stored layout.
        format: Name of a format in `codes.FORMATS`.
        block: Number of columns that share a scale.
        asymmetric: int4 only: use zero points.
        order: Axes of the weight in the order of the matrix.
        rows: Number of rows of the matrix.
        share: Scalar from 0 to 1: how far each value is moved towards its rounding; None: 1.
        paired: int8 of linear layers only: the codes do not overflow on processors without VNNI.
    """
    turned = weight.permute(list(order))
    matrix = turned.reshape(rows, -1)
    pairs = torch.arange(matrix.shape[1]) if paired else None
    found = encode(matrix, format, block, asymmetric, pairs)
    given = decode(found.codes, found.scale.to(weight.dtype), found.zero, format, matrix.shape[1])
    rounded = _back(given.reshape(turned.shape), order)
    return rounded if share is None else torch.lerp(weight, rounded, share.to(weight.dtype)).contiguous()


@fake_quantize.register_fake
def _(weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@torch.library.custom_op("surgery::round_activation", mutates_args=())
def round_activation(
    x: Tensor, smooth: Tensor | None = None, per_token: bool = False, twice: bool = False
) -> Tensor:
    """Round an activation to 256 levels of its range at run time, as ONNX's DynamicQuantizeLinear does; returns floats.

    The gradient passes through unchanged.

    Args:
        x: The activation (…, features).
        smooth: Factors (features,) by which x is divided before rounding and multiplied afterwards, or None.
        per_token: Round each row with a scale of its own, to 255 levels around zero, so that no row depends on the
            rest of the batch. Otherwise one scale and zero point serve the whole tensor.
        twice: Round the rounding error too, to 255 levels of half a step, and return the sum: about 16 bits.
    """
    wide = x.float() if smooth is None else x.float() * smooth.float().reciprocal()
    rounded = _of_rows(wide, twice) if per_token else _of_all(wide, twice)
    return (rounded if smooth is None else rounded * smooth.float()).to(x.dtype)


def _of_all(wide: Tensor, twice: bool) -> Tensor:
    """Round with one scale and zero point for the whole tensor."""
    low, high = wide.amin().clamp(max=0), wide.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / scale).round().clamp(0, 255)
    codes = ((wide / scale).round() + zero).clamp(0, 255)
    rounded = (codes - zero) * scale
    return rounded + _left(wide - rounded, scale * FINER) if twice else rounded


def _of_rows(wide: Tensor, twice: bool) -> Tensor:
    """Round symmetrically, with one scale for each row."""
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    scaled = wide * largest.reciprocal()
    rounded = (scaled / STEP).round() * STEP
    return (rounded + _left(scaled - rounded, STEP * FINER) if twice else rounded) * largest


def _left(left: Tensor, step: Tensor | float) -> Tensor:
    """Round the error of a first rounding."""
    return (left / step).round().clamp(-128, 127) * step


@round_activation.register_fake
def _(x: Tensor, smooth: Tensor | None = None, per_token: bool = False, twice: bool = False) -> Tensor:
    return torch.empty_like(x)


def _back(turned: Tensor, order: Sequence[int]) -> Tensor:
    """Undo a permutation of axes."""
    return turned.permute([list(order).index(axis) for axis in range(len(order))]).contiguous()


def _straight_through(op: Any, others: int) -> None:
    """Register a gradient that passes to the first argument unchanged; `others` counts the other arguments."""

    def backward(_: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (gradient, *(None for _ in range(others)))

    torch.library.register_autograd(op, backward)


_straight_through("surgery::fake_quantize", 7)
_straight_through("surgery::round_activation", 3)
