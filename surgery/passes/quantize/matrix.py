"""A site's weight as the matrix that is coded, and the tensors that hold its codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surgery.engine.contract.specs import TensorSpec
from surgery.graph.sites import Site
from surgery.passes.quantize.codes import FORMATS, Codes, encode, packed_columns
from surgery.passes.quantize.gptq import gptq
from surgery.passes.quantize.ops import dequantize


@dataclass(frozen=True)
class Layout:
    """shape: of the weight as stored. order: its axes, outputs (and experts) first. rows, columns: of the matrix.
    block: columns that share a scale. smoothed: columns were multiplied with factors before they were coded."""

    format: str
    block: int
    asymmetric: bool
    shape: tuple[int, ...]
    order: tuple[int, ...]
    rows: int
    smoothed: bool = False

    @staticmethod
    def of(site: Site, format: str, group: int | None = None, asymmetric: bool = False) -> Layout:
        """group: values that share a scale; 0 for a whole row, None for what the format has by default."""
        first = [site.layout.index(letter) for letter in "eov" if letter in site.layout]
        order = (*first, *(axis for axis in range(len(site.shape)) if axis not in first))
        rows = math.prod(site.shape[axis] for axis in first)
        asked = FORMATS[format].group if group is None else group
        block = asked or site.parameters // rows
        return Layout(format, block, asymmetric, tuple(site.shape), tuple(order), rows)

    @property
    def columns(self) -> int:
        return math.prod(self.shape) // self.rows

    @property
    def misfit(self) -> str:
        """Why blocks do not fit, or empty."""
        if self.columns % self.block == 0:
            return ""
        return (
            f"its rows have {self.columns} values, which no groups of {self.block} divide; give --group 0 or "
            f"a divisor"
        )

    def matrix(self, weight: Tensor) -> Tensor:
        """(rows, columns) of a weight as stored."""
        return weight.permute(self.order).reshape(self.rows, -1)

    def encode(self, weight: Tensor, products: Tensor | None = None, smooth: Tensor | None = None) -> Codes:
        """To nearest; with the XᵀX of what enters (columns × columns), by GPTQ. smooth: (columns,)."""
        matrix = self.matrix(weight)
        if smooth is not None:
            factors = smooth.to(matrix.device).float()
            matrix = (matrix.float() * factors).to(matrix.dtype)
            if products is not None:  # of what enters divided by these
                products = products / torch.outer(factors, factors).to(products)
        if products is None:
            found = encode(matrix, self.format, self.block, self.asymmetric)
        else:
            found = gptq(matrix, products, self.format, self.block, self.asymmetric)
        return replace(found, smooth=smooth)

    def decode(self, found: Codes) -> Tensor:
        """The weight that codes give, in its stored layout."""
        return dequantize(found.codes, found.scale, found.zero, *self.arguments, found.smooth)

    @property
    def arguments(self) -> tuple[str, list[int], list[int]]:
        """What `surgery::dequantize` takes after the tensors."""
        return self.format, list(self.shape), list(self.order)

    def specs(self, fill: Callable[[str], Callable[[Tensor], Any]]) -> dict[str, TensorSpec]:
        """The tensors that hold the codes, in the order of `names`; fill(name) gives how one is filled."""
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
        return {n: TensorSpec(shapes[n], fill(n), trainable=False, dtype=kinds[n]) for n in self.names}

    @property
    def names(self) -> tuple[str, ...]:
        given = {"zero": self.asymmetric, "smooth": self.smoothed}
        return ("codes", "scale", *(name for name, there in given.items() if there))
