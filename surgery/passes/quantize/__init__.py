"""Weights in few bits: how values become codes, the ops that give them back, and their form in standard ONNX."""

from surgery.quantizing.codes import FORMATS, Codes, decode, encode
from surgery.quantizing.op import dequantize, fake_quantize, round_activation

__all__ = ["FORMATS", "Codes", "decode", "dequantize", "encode", "fake_quantize", "round_activation"]
