"""Static int8 quantization, calibrated by torchao's PT2E observers."""

from __future__ import annotations

from typing import Any

from surgery.api import hookimpl
from torch_surgery_torchao.op import quantize_dequantize, translation
from torch_surgery_torchao.static import Int8Static


@hookimpl
def surgery_passes() -> list[type]:
    return [Int8Static]


@hookimpl
def surgery_onnx_lowerings() -> dict[Any, Any]:
    return {quantize_dequantize._opoverload: translation()}


__all__ = ["Int8Static", "quantize_dequantize"]
