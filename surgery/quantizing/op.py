"""`surgery::dequantize`: the weight of an op from its codes, as one node that no exporter folds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.quantizing.codes import decode


@torch.library.custom_op("surgery::dequantize", mutates_args=())
def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, format: str, shape: Sequence[int], order: Sequence[int]
) -> Tensor:
    """The weight, in its stored layout, of the dtype of the scales.

    codes, scale, zero: as surgery.quantizing.codes has them, of the weight with its axes in `order` seen as a matrix.
    shape: of the weight as stored.
    """
    turned = [shape[axis] for axis in order]
    columns = math.prod(turned) // codes.shape[0]
    matrix = decode(codes, scale, zero, format, columns)
    back = [order.index(axis) for axis in range(len(order))]
    return matrix.reshape(turned).permute(back).contiguous()


@dequantize.register_fake
def _(
    codes: Tensor, scale: Tensor, zero: Tensor | None, format: str, shape: Sequence[int], order: Sequence[int]
) -> Tensor:
    return scale.new_empty(list(shape))
