"""int8 codes whose products with uint8 activations do not overflow on processors without VNNI.

x86 processors without VNNI multiply uint8 activations with int8 weights by `vpmaddubsw`, which adds two neighbouring
products in 16 bits and saturates. For any activation, the sum stays in range if two codes of one sign add up to at most
128: 255 · 128 = 32640. Codes of different signs cannot overflow. onnxruntime pairs columns 0 and 1, 2 and 3, … of the
matrix that it multiplies, also where it packs or splits the matrix (measured on AVX2 kernels; see
tests/passes/quantize).
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 32767 // 255  # of the sum of two codes of one sign: 128
# Factors of the scale that are tried. With 2, codes have 7 bits and no pair exceeds the limit.
_WIDER = (1.25, 1.375, 1.5, 1.625, 1.75, 2.0)
_VALUES = 2**24  # values that are encoded at once, which limits the memory of the search


def paired_codes(matrix: Tensor, scale: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to int8 codes without overflowing pairs.

    Rows without such a pair keep their scale. In the others, the scale is widened by the factor with the least squared
    error, and pairs that still exceed the limit are moved to the nearest codes that do not.

    Args:
        matrix: Floating-point matrix (rows, K).
        scale: Scales (rows, 1) that use all 8 bits, in fp32.
        order: Columns in the order in which a kernel multiplies them.

    Returns:
        Codes (rows, K) as floats; scales (rows, 1), rounded to the dtype of the matrix.
    """
    rows = max(_VALUES // max(matrix.shape[1], 1), 1)
    found = [_paired(m, s, order) for m, s in zip(matrix.split(rows), scale.split(rows), strict=True)]
    return torch.cat([codes for codes, _ in found]), torch.cat([scales for _, scales in found])


def paired_scale(matrix: Tensor, scale: Tensor, order: Tensor) -> Tensor:
    """Return the scales of `paired_codes` alone."""
    return paired_codes(matrix, scale, order)[1]


def _paired(matrix: Tensor, scale: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    values = matrix.float()[:, order]
    given = (values / scale).round().clamp(-127, 127)
    codes, scales = given, scale.clone()
    over = _exceeds(given).any(1).nonzero().flatten()
    if len(over):
        part, first = values[over], scale[over]
        best = torch.full((len(over), 1), torch.inf, device=values.device)
        kept, kept_scale = torch.empty_like(part), first.clone()
        for factor in (1.0, *_WIDER):
            wider = (first * factor).to(matrix.dtype).float()
            tried = limited(part / wider)
            error = (tried * wider - part).square().sum(1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            kept, kept_scale = torch.where(better, tried, kept), torch.where(better, wider, kept_scale)
        codes[over], scales[over] = kept, kept_scale
    back = torch.empty_like(codes)
    back[:, order] = codes
    return back, scales


def limited(line: Tensor) -> Tensor:
    """Round values, in units of the scale, to the nearest codes without overflowing pairs.

    Args:
        line: Values (rows, K), columns in the order of the kernel.
    """
    codes = line.round().clamp(-127, 127)
    over = _exceeds(codes)
    if not bool(over.any()):
        return codes
    count = line.shape[1] // 2 * 2
    first, second = line[:, 0:count:2], line[:, 1:count:2]
    sign = first.sign()
    # The nearest point of a + b = 128; clamped because both codes have to be within 127.
    half = ((sign * (first - second) + LARGEST) / 2).round().clamp(1, LARGEST - 1)
    codes[:, 0:count:2] = torch.where(over, sign * half, codes[:, 0:count:2])
    codes[:, 1:count:2] = torch.where(over, sign * (LARGEST - half), codes[:, 1:count:2])
    return codes


def _exceeds(codes: Tensor) -> Tensor:
    """True for each pair of columns (rows, K // 2) whose sum exceeds the limit. An odd last column is alone."""
    count = codes.shape[1] // 2 * 2
    return (codes[:, 0:count:2] + codes[:, 1:count:2]).abs() > LARGEST


def overflowing(codes: Tensor) -> Tensor:
    """Count the overflowing pairs of each row of int8 codes (rows, K), columns in the order of the kernel."""
    return _exceeds(codes.to(torch.int16)).sum(1)
