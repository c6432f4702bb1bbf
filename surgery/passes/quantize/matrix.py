"""The matrix form in which a site's weight is encoded, and the tensors that hold its codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surgery.engine.contract.specs import TensorSpec
from surgery.graph.ops import CONV
from surgery.graph.sites import Site
from surgery.passes.quantize.codes import FORMATS, Codes, encode, packed_columns
from surgery.passes.quantize.gptq import gptq
from surgery.passes.quantize.ops import dequantize


@dataclass(frozen=True)
class Layout:
    """The number format and the matrix form (rows × columns) of a site's codes.

    Attributes:
        format: Name of a format in `codes.FORMATS`.
        block: Number of columns that share a scale.
        asymmetric: int4 only: codes have zero points.
        shape: Shape of the weight as stored.
        order: Axes of the weight in the order of the matrix: experts and outputs first.
        rows: Number of rows of the matrix.
        smoothed: Columns are multiplied by factors before encoding (SmoothQuant).
        paired: int8 only: the codes do not overflow in integer products on processors without VNNI.
    """

    format: str
    block: int
    asymmetric: bool
    shape: tuple[int, ...]
    order: tuple[int, ...]
    rows: int
    smoothed: bool = False
    paired: bool = False

    @staticmethod
    def of(
        site: Site, format: str, group: int | None = None, asymmetric: bool = False, paired: bool = False
    ) -> Layout:
        """Make the layout of a site.

        Args:
            site: The site.
            format: Name of a format in `codes.FORMATS`.
            group: Number of values that share a scale; 0: a whole row; None: the default of the format.
            asymmetric: int4 only: use zero points.
            paired: int8 only: make codes that do not overflow in integer products. Depthwise convolutions are left out,
                because onnxruntime computes them in 32 bits.
        """
        # Experts and outputs make the rows, so that each output of each expert has scales of its own.
        first = [site.layout.index(letter) for letter in "eov" if letter in site.layout]
        order = (*first, *(axis for axis in range(len(site.shape)) if axis not in first))
        rows = math.prod(site.shape[axis] for axis in first)
        asked = FORMATS[format].group if group is None else group
        block = asked or site.parameters // rows
        depthwise = site.kind == CONV and rows == site.groups and site.shape[order[1]] == 1
        return Layout(
            format,
            block,
            asymmetric,
            tuple(site.shape),
            tuple(order),
            rows,
            paired=paired and not depthwise,
        )

    @property
    def columns(self) -> int:
        """Number of columns of the matrix."""
        return math.prod(self.shape) // self.rows

    @property
    def pairs(self) -> Tensor | None:
        """Columns in the order in which an integer kernel multiplies them, or None if `paired` is False.

        onnxruntime multiplies the inputs of a convolution position by position, with the channels of a position
        together.
        """
        if not self.paired:
            return None
        channels = self.shape[self.order[1]]
        return torch.arange(self.columns).reshape(channels, -1).t().reshape(-1)

    @property
    def misfit(self) -> str:
        """Reason why blocks do not divide a row, with a remedy, or ""."""
        if self.columns % self.block == 0:
            return ""
        return (
            f"its rows have {self.columns} values, which groups of {self.block} do not divide; give --group 0 or "
            f"a divisor"
        )

    def matrix(self, weight: Tensor) -> Tensor:
        """Reshape a weight from its stored layout to (rows, columns)."""
        return weight.permute(self.order).reshape(self.rows, -1)

    def encode(self, weight: Tensor, products: Tensor | None = None, smooth: Tensor | None = None) -> Codes:
        """Encode a weight: rounded to nearest, or by GPTQ if `products` is given.

        Args:
            weight: The weight in its stored layout.
            products: XᵀX (columns × columns) of the inputs X of the op.
            smooth: Factors (columns,) by which the columns are multiplied first.
        """
        matrix = self.matrix(weight)
        if smooth is not None:
            factors = smooth.to(matrix.device).float()
            matrix = (matrix.float() * factors).to(matrix.dtype)
            # The op's input is divided by the same factors.
            if products is not None:
                products = products / torch.outer(factors, factors).to(products)
        if products is None:
            found = encode(matrix, self.format, self.block, self.asymmetric, self.pairs)
        else:
            found = gptq(matrix, products, self.format, self.block, self.asymmetric, self.pairs)
        return replace(found, smooth=smooth)

    def decode(self, found: Codes) -> Tensor:
        """Decode codes to a weight in its stored layout."""
        return dequantize(found.codes, found.scale, found.zero, *self.arguments, found.smooth)

    @property
    def arguments(self) -> tuple[str, list[int], list[int]]:
        """Arguments of `surgery::dequantize` after the tensors."""
        return self.format, list(self.shape), list(self.order)

    def specs(self, fill: Callable[[str], Callable[[Tensor], Any]]) -> dict[str, TensorSpec]:
        """Return the specifications of the tensors that hold the codes, in the order of `names`.

        Args:
            fill: Function name -> function that fills the tensor of that name in place.
        """
        blocks = self.columns // self.block
        shapes = {
            "codes": (self.rows, packed_columns(self.format, self.columns)),
            "scale": (self.rows, blocks),
            "zero": (self.rows, blocks),
            "smooth": (self.columns,),
        }
        kinds: Mapping[str, torch.dtype | None] = {
            "codes": torch.int8 if self.format == "int8" else torch.uint8,
            "scale": None,
            "zero": torch.uint8,
            "smooth": None,
        }
        # Layers that read the same input have the same factors; see `Quantize.names`.
        return {
            n: TensorSpec(shapes[n], fill(n), trainable=False, dtype=kinds[n], shared=n == "smooth")
            for n in self.names
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that hold the codes; first the factors, which sites share and fill only once."""
        first, last = ("smooth",) if self.smoothed else (), ("zero",) if self.asymmetric else ()
        return (*first, "codes", "scale", *last)
