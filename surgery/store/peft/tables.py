"""Prefixes as PEFT keeps them: one row of a table for each token, all layers' keys and values side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from surgery.common.errors import ExportError

Shape = tuple[int, ...]


def _starts(count: int, twice: bool) -> list[int]:
    """Where each layer's keys stand in a row, in units of a layer's keys; its values follow them.

    For two stacks PEFT repeats what it deals out, in fours of which it drops two.
    """
    step = 4 if twice else 2
    return [step * i % (2 * count) for i in range(count)]


def prefixes(table: Tensor, shapes: Sequence[Shape], twice: bool) -> list[dict[str, Tensor]]:
    """K and V (heads × tokens × width) of each layer, from PEFT's table (tokens × all)."""
    heads, width = shapes[0]
    split = table.view(table.shape[0], 2 * len(shapes), heads, width)
    return [
        {"K": split[:, i].transpose(0, 1), "V": split[:, i + 1].transpose(0, 1)}
        for i in _starts(len(shapes), twice)
    ]


def table_of(layers: Sequence[Mapping[str, Tensor]], twice: bool) -> Tensor:
    """PEFT's table from K and V of each layer. Raises ExportError where PEFT cannot hold them."""
    heads, tokens, width = layers[0]["K"].shape
    if any(tuple(own[name].shape) != (heads, tokens, width) for own in layers for name in ("K", "V")):
        raise ExportError(
            "PEFT's prefixes have one number of heads and one width in all layers, and these differ"
        )
    split = torch.zeros(tokens, 2 * len(layers), heads, width, dtype=layers[0]["K"].dtype)
    filled: dict[int, Mapping[str, Tensor]] = {}
    for start, own in zip(_starts(len(layers), twice), layers, strict=True):
        other = filled.setdefault(start, own)
        if not all(torch.equal(other[name], own[name]) for name in ("K", "V")):
            raise ExportError(
                "PEFT gives two decoder layers one prefix (it drops every other one of two stacks), and these differ; "
                "save the program, or export it to ONNX"
            )
        split[:, start], split[:, start + 1] = own["K"].transpose(0, 1), own["V"].transpose(0, 1)
    return split.reshape(tokens, -1)
