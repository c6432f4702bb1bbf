"""Initialization of a prefix from the keys and values of real tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.graph.sites import Measurements
from surgery.passes.prefix.operands import Operand


def from_activations(probe: Measurements, operand: Operand, tensor: Tensor) -> None:
    """Fill a prefix with keys (or values) that the model computes for tokens of the data, spread evenly over it.

    The tokens are the same for keys and values, and in every layer. So the prefix is what these tokens would leave in
    a key-value cache.

    Args:
        probe: measurements of the program.
        operand: keys or values of an attention.
        tensor: prefix to fill, (heads, tokens, width).
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
