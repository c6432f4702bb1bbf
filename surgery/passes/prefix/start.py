"""Where a prefix may start: at keys and values of real tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.graph.sites import Measurements
from surgery.passes.prefix.operands import Operand


def from_activations(probe: Measurements, operand: Operand, tensor: Tensor) -> None:
    """Fill (heads, tokens, width) with what the model computes for tokens of the data, spread evenly over it.

    The same tokens for keys and values, and in every layer: the prefix then is what these tokens would have left in
    a cache, side by side.
    """
    assert operand.source is not None
    rows = []
    for found in probe.values([operand.source])[operand.source.name]:
        value = found.transpose(-1, -2) if operand.turned else found
        if operand.folded:
            value = value.unflatten(0, (-1, operand.heads))
        rows.append(value.transpose(1, 2).flatten(0, 1))  # (tokens, heads, width)
    every = torch.cat(rows).to(tensor.dtype)
    chosen = torch.linspace(0, len(every) - 1, tensor.shape[1]).round().long()
    tensor.copy_(every[chosen].transpose(0, 1))
