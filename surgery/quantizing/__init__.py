"""Weights in few bits: how values become codes, the op that gives them back, and its form in standard ONNX."""

from surgery.quantizing.codes import FORMATS, Codes, decode, encode
from surgery.quantizing.op import dequantize

__all__ = ["FORMATS", "Codes", "decode", "dequantize", "encode"]
