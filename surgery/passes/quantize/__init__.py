"""Quantization: conversion of weights to codes and back, and the graph ops that do it at run time."""

from surgery.passes.quantize.codes import FORMATS, Codes, decode, encode
from surgery.passes.quantize.ops import dequantize, fake_quantize, round_activation

__all__ = ["FORMATS", "Codes", "decode", "dequantize", "encode", "fake_quantize", "round_activation"]
