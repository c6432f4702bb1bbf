"""Weights in few bits: how values become codes, the ops that give them back, and their form in standard ONNX."""

from surgery.passes.quantize.codes import FORMATS, Codes, decode, encode
from surgery.passes.quantize.ops import dequantize, fake_quantize, round_activation

__all__ = ["FORMATS", "Codes", "decode", "dequantize", "encode", "fake_quantize", "round_activation"]
