"""Activation functions that passes insert, by their names in options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten

ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "relu": aten.relu.default,
    "gelu": aten.gelu.default,
    "silu": aten.silu.default,
    "tanh": aten.tanh.default,
}
