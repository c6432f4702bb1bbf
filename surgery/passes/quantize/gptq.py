"""GPTQ: compensates rounding errors of a weight on calibration data (Frantar et al. 2023, arXiv:2210.17323)."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.passes.quantize.codes import Codes, from_codes, grid, pack, to_codes
from surgery.passes.quantize.pairs import LARGEST, limited, paired_scale

DAMPING = 0.01  # fraction of the mean of H's diagonal, as in the paper
_STEP = 128  # columns after which all later columns are updated at once


def gptq(
    matrix: Tensor,
    products: Tensor,
    format: str,
    block: int,
    asymmetric: bool = False,
    pairs: Tensor | None = None,
) -> Codes:
    """Encode a weight W so that W x changes little on given inputs.

    Columns are rounded one by one, those with the largest inputs first. The error of each column is compensated in the
    columns that are not rounded yet, through the inverse of H = XᵀX. Scales and zero points are those of rounding to
    nearest, and are fixed before the first column.

    Args:
        matrix: The weight W (rows, K).
        products: XᵀX (K, K) of the inputs X.
        format: Name of a format in FORMATS.
        block: Number of columns that share a scale; it divides K.
        asymmetric: int4 only: use zero points.
        pairs: int8 with one scale for each row only: columns in the order in which an integer kernel multiplies
            them; see `codes.encode`. None: no limit.
    """
    scale, zero = grid(matrix, format, block, asymmetric)
    if pairs is not None:
        scale = paired_scale(matrix, scale, pairs.to(matrix.device))
    columns = matrix.shape[1]
    weight, hessian = matrix.double().clone(), products.double().clone()
    # Inputs that are always zero would make H singular, and their columns do not matter.
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    order = hessian.diagonal().argsort(descending=True)
    weight, hessian = weight[:, order], hessian[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    wide = scale.double().repeat_interleave(block, 1)[:, order]
    zeros = None if zero is None else zero.repeat_interleave(block, 1)[:, order]
    found = torch.empty(matrix.shape, device=matrix.device)
    partners = _partners(order, pairs)
    for start in range(0, columns, _STEP):
        end = min(start + _STEP, columns)
        errors = torch.zeros(matrix.shape[0], end - start, dtype=torch.float64, device=matrix.device)
        for column in range(start, end):
            own = None if zeros is None else zeros[:, column]
            code = to_codes(weight[:, column], wide[:, column], own, format)
            partner = partners[column]
            if partner is not None and partner < column:
                code = _within(code, found[:, partner])
            elif partner is not None:
                both = weight[:, [column, partner]] / wide[:, [column, partner]]
                code = limited(both)[:, 0]
            given = from_codes(code, wide[:, column], own, format)
            error = (weight[:, column] - given) / inverse[column, column]
            weight[:, column:end] -= error[:, None] * inverse[column, column:end]
            found[:, column] = code.float()
            errors[:, column - start] = error
        # Later columns are updated once for the whole block, as one matrix product.
        weight[:, end:] -= errors @ inverse[start:end, end:]
    codes = torch.empty_like(found)
    codes[:, order] = found
    return Codes(pack(codes, format), scale, zero)


def _partners(order: Tensor, pairs: Tensor | None) -> list[int | None]:
    """Return the position in `order` of each column's partner in a pair, by position; None if it has none."""
    count = len(order)
    found: list[int | None] = [None] * count
    if pairs is not None:
        places = {column: place for place, column in enumerate(order.tolist())}
        lined = [places[column] for column in pairs.tolist()]
        for first, second in zip(lined[0::2], lined[1::2], strict=False):
            found[first], found[second] = second, first
    return found


def _within(code: Tensor, partner: Tensor) -> Tensor:
    """Clamp codes so that they do not overflow with the codes of their partner, which are fixed."""
    room = LARGEST - partner.abs().to(code)
    limited_code = code.sign() * torch.minimum(code.abs(), room)
    return torch.where(code * partner > 0, limited_code, code)
