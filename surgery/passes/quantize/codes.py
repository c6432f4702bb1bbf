"""Conversion between values and codes, for a matrix (rows × K) with one scale for each block of a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.passes.quantize.pairs import paired_codes

# QLoRA's 16 quantiles of the normal distribution, scaled to [-1, 1] (Dettmers et al. 2023, arXiv:2305.14314).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
        bits: Bits of a code.
        offset: Code of the value zero, for formats with equally spaced levels.
        group: Default number of values that share a scale (0: a whole row).
    """

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
    """The codes of a matrix (rows × K), with what is needed to decode them.

    Attributes:
        codes: Packed codes, see `pack`.
        scale: Scales (rows, blocks).
        zero: Zero points (rows, blocks), uint8, or None.
        smooth: Factors (K,) by which the columns were multiplied before encoding, or None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    smooth: Tensor | None = None


def packed_columns(format: str, columns: int) -> int:
    """Return the number of bytes of a row of packed codes."""
    return -(-columns * FORMATS[format].bits // 8)


def encode(
    matrix: Tensor, format: str, block: int, asymmetric: bool = False, pairs: Tensor | None = None
) -> Codes:
    """Round a matrix to the nearest codes, with the scales of `grid`.

    Args:
        matrix: Floating-point matrix (rows, K).
        format: Name of a format in FORMATS.
        block: Number of columns that share a scale; it divides K.
        asymmetric: int4 only: use zero points.
        pairs: int8 with one scale for each row only: columns in the order in which an integer kernel multiplies them.
            The codes do not overflow on processors without VNNI; see `pairs.paired_codes`. None: no limit.
    """
    scale, zero = grid(matrix, format, block, asymmetric)
    if pairs is not None:
        codes, scale = paired_codes(matrix, scale, pairs.to(matrix.device))
        return Codes(pack(codes, format), scale)
    wide = [None if t is None else t.repeat_interleave(block, 1) for t in (scale, zero)]
    assert wide[0] is not None
    return Codes(pack(to_codes(matrix.float(), wide[0], wide[1], format), format), scale, zero)


def grid(matrix: Tensor, format: str, block: int, asymmetric: bool = False) -> tuple[Tensor, Tensor | None]:
    """Compute scales and zero points of a matrix.

    - int8: the largest magnitude of a block becomes the code 127.
    - int4: the value of largest magnitude becomes -8, so that all 16 codes can occur. Asymmetric: the range of the
      block, extended to include zero, is divided into 15 steps.
    - nf4: the largest magnitude of a block becomes 1.
    - ternary: the scale is the mean magnitude of the matrix (BitNet b1.58, Ma et al. 2024, arXiv:2402.17764).
    - binary: the scale is the mean magnitude of a block (XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279).

    Args:
        matrix: Floating-point matrix (rows, K).
        format: Name of a format in FORMATS.
        block: Number of columns that share a scale; it divides K.
        asymmetric: int4 only: use zero points.

    Returns:
        Scales (rows, blocks) in fp32, rounded to the dtype of the matrix; zero points (rows, blocks) in uint8, or None.
    """
    rows, columns = matrix.shape
    blocks = matrix.float().reshape(rows, columns // block, block)

    def nonzero(scale: Tensor) -> Tensor:
        """Round scales to the dtype in which they are stored, and replace 0 by 1."""
        # A block of zeros may have any scale, because its codes are zero.
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
    # Binary codes cannot represent zero, so a block of zeros needs the scale 0.
    if format == "binary":
        return blocks.abs().mean(2).to(matrix.dtype).float(), None
    return nonzero(blocks.abs().amax(2) / (127 if format == "int8" else 1)), None


def to_codes(values: Tensor, scale: Tensor, zero: Tensor | None, format: str) -> Tensor:
    """Return the nearest code of each value.

    Args:
        values: Values of any shape.
        scale: Scales, broadcastable to `values`.
        zero: Zero points, broadcastable to `values`, or None.
        format: Name of a format in FORMATS.
    """
    if format == "binary":
        return values >= 0
    on_line = values / scale
    if format == "int8":
        return on_line.round().clamp(-127, 127)
    if format == "nf4":
        # The boundaries between codes are the midpoints of neighbouring levels.
        table = torch.tensor(NF4, device=values.device)
        return torch.bucketize(on_line.contiguous(), (table[1:] + table[:-1]) / 2)
    if zero is not None:
        return (on_line.round() + zero).clamp(0, 15)
    if format == "int4":
        return on_line.round().clamp(-8, 7) + 8
    return on_line.round().clamp(-1, 1) + 1


def from_codes(codes: Tensor, scale: Tensor, zero: Tensor | None, format: str) -> Tensor:
    """Return (code - zero) × scale in the dtype of the scales, as ONNX's DequantizeLinear computes it.

    Args:
        codes: Unpacked codes of any shape.
        scale: Scales, broadcastable to `codes`.
        zero: Zero points, broadcastable to `codes`, or None.
        format: Name of a format in FORMATS.
    """
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
    """Decode packed codes to a matrix (rows, K), in the dtype of the scales.

    Args:
        codes: Packed codes, see `pack`.
        scale: Scales (rows, blocks).
        zero: Zero points (rows, blocks), or None.
        format: Name of a format in FORMATS.
        columns: K.
    """
    values = unpack(codes, format, columns)
    blocks = values.reshape(values.shape[0], scale.shape[1], -1)
    wide = None if zero is None else zero[..., None]
    return from_codes(blocks, scale[..., None], wide, format).reshape(values.shape[0], columns)


def pack(values: Tensor, format: str) -> Tensor:
    """Pack codes (rows, K) into bytes (rows, ceil(K·bits/8)), uint8, the first code in the lowest bits.

    int8 codes are only converted to that dtype.
    """
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
    """Unpack bytes of `pack`.

    Args:
        codes: Packed codes (rows, ceil(K·bits/8)).
        format: Name of a format in FORMATS.
        columns: K.

    Returns:
        Codes (rows, K), int8 or uint8.
    """
    bits = FORMATS[format].bits
    if bits == 8:
        return codes
    parts = [(codes >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.stack(parts, 2).reshape(codes.shape[0], -1)[:, :columns]
