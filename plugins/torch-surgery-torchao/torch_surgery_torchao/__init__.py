"""Static int8 quantization, calibrated by torchao's PT2E observers."""

from __future__ import annotations

import logging
from typing import Any

from surgery.api import hookimpl
from torch_surgery_torchao.op import quantize_dequantize, translation
from torch_surgery_torchao.static import Int8Static

# If torchao is installed, transformers imports it too, and torchao then logs a warning for each of its optional
# libraries that this machine lacks.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(
    lambda said: "is an Enum subclass" not in said.getMessage()
)


@hookimpl
def surgery_passes() -> list[type]:
    """Return the pass of this plugin."""
    return [Int8Static]


@hookimpl
def surgery_onnx_lowerings() -> dict[Any, Any]:
    """Return the ONNX form of the op of this plugin."""
    return {quantize_dequantize._opoverload: translation()}


__all__ = ["Int8Static", "quantize_dequantize"]
