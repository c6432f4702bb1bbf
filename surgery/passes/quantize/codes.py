"""Values to codes and back, for a weight seen as a matrix (rows × K) with scales along blocks of each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The 16 quantiles of a normal variable that QLoRA takes, scaled to [-1, 1] (Dettmers et al. 2023, arXiv:2305.14314).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Format:
    """bits: of a code. offset: the code of zero, where the codes are a line; group: values that share a scale by
    default (0: a whole row)."""

    bits: int
    offset: int
    group: int


FORMATS = {
    "int8": Format(8, 0, 0),
    "int4": Format(4, 8, 32),
    "nf4": Format(4, 0, 64),
    "ternary": Format(2, 1, 0),
    "binary": Format(1, 0, 0),
}


@dataclass(frozen=True)
class Codes:
    """codes: packed (see `pack`), rows first. scale: (rows, blocks). zero: (rows, blocks) uint8, or None. smooth: (K,),
    by which the columns of the matrix were multiplied before that, or None."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    smooth: Tensor | None = None


def packed_columns(format: str, columns: int) -> int:
    """How many bytes a row of codes takes."""
    return -(-columns * FORMATS[format].bits // 8)


def encode(matrix: Tensor, format: str, block: int, asymmetric: bool = False) -> Codes:
    """Round to nearest. matrix: (rows, K), floating; block divides K. asymmetric: int4 with zero points. See `grid`."""
    scale, zero = grid(matrix, format, block, asymmetric)
    wide = [None if t is None else t.repeat_interleave(block, 1) for t in (scale, zero)]
    assert wide[0] is not None
    return Codes(pack(to_codes(matrix.float(), wide[0], wide[1], format), format), scale, zero)


def grid(matrix: Tensor, format: str, block: int, asymmetric: bool = False) -> tuple[Tensor, Tensor | None]:
    """Scales (rows, blocks), in fp32 but rounded to the matrix's dtype, and zero points (uint8), of a matrix (rows, K).

    int8: the largest magnitude of a block is 127. int4: the value of largest magnitude is -8, so that all 16 codes are
    in use; or, asymmetric, the range with zero in it is divided by 15. nf4: the largest magnitude is 1. ternary: the
    mean magnitude of the matrix (BitNet b1.58, Ma et al. 2024, arXiv:2402.17764). binary: that of a block (XNOR-Net,
    Rastegari et al. 2016, arXiv:1603.05279).
    """
    rows, columns = matrix.shape
    blocks = matrix.float().reshape(rows, columns // block, block)

    def nonzero(scale: Tensor) -> Tensor:
        """As it is stored, in the dtype of the matrix; a block of zeros has any scale, as its codes are zero."""
        stored = scale.to(matrix.dtype).float()
        return torch.where(stored == 0, torch.ones_like(stored), stored)

    if asymmetric:
        low, high = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0)
        scale = nonzero((high - low) / 15)
        return scale, (-low / scale).round().clamp(0, 15).to(torch.uint8)
    if format == "int4":
        extreme = blocks.gather(2, blocks.abs().argmax(2, keepdim=True)).squeeze(2)
        return nonzero(extreme / -8), None
    if format == "ternary":
        return nonzero(blocks.abs().mean()).expand(rows, columns // block).contiguous(), None
    if format == "binary":  # has no code of zero, so that its scale is
        return blocks.abs().mean(2).to(matrix.dtype).float(), None
    return nonzero(blocks.abs().amax(2) / (127 if format == "int8" else 1)), None


def to_codes(values: Tensor, scale: Tensor, zero: Tensor | None, format: str) -> Tensor:
    """The nearest code of each value; scale and zero of the same shape, or one that broadcasts."""
    if format == "binary":
        return values >= 0
    on_line = values / scale
    if format == "int8":
        return on_line.round().clamp(-127, 127)
    if format == "nf4":
        table = torch.tensor(NF4, device=values.device)
        return torch.bucketize(on_line.contiguous(), (table[1:] + table[:-1]) / 2)
    if zero is not None:
        return (on_line.round() + zero).clamp(0, 15)
    if format == "int4":
        return on_line.round().clamp(-8, 7) + 8
    return on_line.round().clamp(-1, 1) + 1


def from_codes(codes: Tensor, scale: Tensor, zero: Tensor | None, format: str) -> Tensor:
    """(code - zero) × scale, as ONNX's DequantizeLinear has it, in the dtype of the scales."""
    if format == "nf4":
        return torch.tensor(NF4, dtype=scale.dtype, device=scale.device)[codes.long()] * scale
    line = codes.to(scale.dtype)
    if format == "binary":
        line = 2 * line - 1
    elif zero is not None:
        line = line - zero.to(scale.dtype)
    elif FORMATS[format].offset:
        line = line - FORMATS[format].offset
    return line * scale


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, format: str, columns: int) -> Tensor:
    """The matrix (rows, K) of packed codes, in the dtype of the scales."""
    values = unpack(codes, format, columns)
    blocks = values.reshape(values.shape[0], scale.shape[1], -1)
    wide = None if zero is None else zero[..., None]
    return from_codes(blocks, scale[..., None], wide, format).reshape(values.shape[0], columns)


def pack(values: Tensor, format: str) -> Tensor:
    """Codes (rows, K) to bytes (rows, ceil(K·bits/8)), uint8, the first in the lowest bits; int8 as it is."""
    bits = FORMATS[format].bits
    if bits == 8:
        return values.to(torch.int8)
    each = 8 // bits
    whole = torch.nn.functional.pad(values.to(torch.uint8), (0, -values.shape[1] % each))
    parts = whole.reshape(whole.shape[0], -1, each)
    packed = torch.zeros(parts.shape[:2], dtype=torch.uint8, device=values.device)
    for place in range(each):
        packed |= parts[..., place] << (bits * place)
    return packed


def unpack(codes: Tensor, format: str, columns: int) -> Tensor:
    """The codes of `pack`, int8 or uint8, (rows, K)."""
    bits = FORMATS[format].bits
    if bits == 8:
        return codes
    parts = [(codes >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.stack(parts, 2).reshape(codes.shape[0], -1)[:, :columns]
