"""Quantization in a graph: each an op of its own that no exporter folds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.engine.recompute import REMADE, made_from_codes
from surgery.passes.quantize.codes import decode, encode

# Of an activation's rows: the step of what was divided by its largest magnitude, and the least that that is taken for.
STEP, SMALLEST = float(torch.tensor(1 / 127)), torch.finfo(torch.float32).tiny
# Half a step in 127 levels: the step of what a first rounding leaves, over its own.
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
    """The weight, in its stored layout, of the dtype of the scales.

    codes, scale, zero: as surgery.passes.quantize.codes has them, of the weight with its axes in `order` seen as a matrix.
    shape: of the weight as stored. smooth: by column of that matrix, what it was multiplied with before it was coded.
    """
    turned = [shape[axis] for axis in order]
    columns = math.prod(turned) // codes.shape[0]

    def make() -> Tensor:
        if smooth is None:
            return _back(decode(codes, scale, zero, format, columns).reshape(turned), order)
        matrix = decode(codes, scale.float(), zero, format, columns) / smooth.float()
        return _back(matrix.to(scale.dtype).reshape(turned), order)

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
) -> Tensor:
    """What a weight's codes would give back, to the bit.

    weight: in its stored layout; with its axes in `order` it is a matrix of so many rows, whose values share a scale
    by blocks. Its gradient passes straight through to the weight (Bengio et al. 2013, arXiv:1308.3432). share: one
    number, how far each value is moved to what it is rounded to (None: 1, all the way).
    """
    turned = weight.permute(list(order))
    matrix = turned.reshape(rows, -1)
    found = encode(matrix, format, block, asymmetric)
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
    """An activation in 256 levels of its range at run time (ONNX's DynamicQuantizeLinear), given back as floats.

    One scale and zero point for the whole tensor, so that rows of a batch are rounded alike; per_token: a scale for
    each row, 255 levels about zero, so that no row depends on what else is in the batch. smooth: (features,), by which
    the features are divided before they are rounded, and multiplied after that. twice: what that leaves, at most half
    a step, is rounded to 255 levels too, and both are given back: 16 bits. The gradient passes straight through.
    """
    wide = x.float() if smooth is None else x.float() * smooth.float().reciprocal()
    rounded = _of_rows(wide, twice) if per_token else _of_all(wide, twice)
    return (rounded if smooth is None else rounded * smooth.float()).to(x.dtype)


def _of_all(wide: Tensor, twice: bool) -> Tensor:
    low, high = wide.amin().clamp(max=0), wide.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / scale).round().clamp(0, 255)
    codes = ((wide / scale).round() + zero).clamp(0, 255)
    rounded = (codes - zero) * scale
    return rounded + _left(wide - rounded, scale * FINER) if twice else rounded


def _of_rows(wide: Tensor, twice: bool) -> Tensor:
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    scaled = wide * largest.reciprocal()
    rounded = (scaled / STEP).round() * STEP
    return (rounded + _left(scaled - rounded, STEP * FINER) if twice else rounded) * largest


def _left(left: Tensor, step: Tensor | float) -> Tensor:
    return (left / step).round().clamp(-128, 127) * step


@round_activation.register_fake
def _(x: Tensor, smooth: Tensor | None = None, per_token: bool = False, twice: bool = False) -> Tensor:
    return torch.empty_like(x)


def _back(turned: Tensor, order: Sequence[int]) -> Tensor:
    return turned.permute([list(order).index(axis) for axis in range(len(order))]).contiguous()


def _straight_through(op: Any, others: int) -> None:
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (gradient, *(None for _ in range(others)))

    torch.library.register_autograd(op, backward)


_straight_through("surgery::fake_quantize", 6)
_straight_through("surgery::round_activation", 3)
