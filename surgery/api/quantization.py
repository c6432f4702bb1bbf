"""Passes that store quantized codes instead of a weight."""

from __future__ import annotations

from surgery.passes.quantize.codes_pass import CodesPass
from surgery.passes.quantize.matrix import Layout
from surgery.passes.quantize.quantize import Quantize

__all__ = [
    "CodesPass",
    "Layout",
    "Quantize",
]
