"""GPTQ: codes that make up for each other's rounding on calibration data (Frantar et al. 2023, arXiv:2210.17323)."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.passes.quantize.codes import Codes, from_codes, grid, pack, to_codes

DAMPING = 0.01  # of the mean of H's diagonal, as in the paper
_STEP = 128  # columns after which the rest is updated at once


def gptq(matrix: Tensor, products: Tensor, format: str, block: int, asymmetric: bool = False) -> Codes:
    """Codes of W (rows, K) that keep W x, for the inputs whose XᵀX (K, K) is `products`.

    Columns are rounded one by one, those of the largest inputs first, and the error of each goes into those that are
    still to come, by the inverse of H = XᵀX. Scales and zero points are those of rounding to nearest, set beforehand.
    """
    scale, zero = grid(matrix, format, block, asymmetric)
    columns = matrix.shape[1]
    weight, hessian = matrix.double().clone(), products.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    order = hessian.diagonal().argsort(descending=True)
    weight, hessian = weight[:, order], hessian[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    wide = scale.double().repeat_interleave(block, 1)[:, order]
    zeros = None if zero is None else zero.repeat_interleave(block, 1)[:, order]
    found = torch.empty(matrix.shape, device=matrix.device)
    for start in range(0, columns, _STEP):
        end = min(start + _STEP, columns)
        errors = torch.zeros(matrix.shape[0], end - start, dtype=torch.float64, device=matrix.device)
        for column in range(start, end):
            own = None if zeros is None else zeros[:, column]
            code = to_codes(weight[:, column], wide[:, column], own, format)
            given = from_codes(code, wide[:, column], own, format)
            error = (weight[:, column] - given) / inverse[column, column]
            weight[:, column:end] -= error[:, None] * inverse[column, column:end]
            found[:, column] = code.float()
            errors[:, column - start] = error
        weight[:, end:] -= errors @ inverse[start:end, end:]
    codes = torch.empty_like(found)
    codes[:, order] = found
    return Codes(pack(codes, format), scale, zero)
