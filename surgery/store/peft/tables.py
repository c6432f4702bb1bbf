"""PEFT's prefix table: one row for each virtual token, with the keys and values of all layers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from surgery.common.errors import ExportError

Shape = tuple[int, ...]


def _starts(count: int, twice: bool) -> list[int]:
    """Offset of each layer's keys in a row, in units of one layer's keys; its values follow the keys.

    `twice` is for encoder-decoder models. There PEFT doubles the table along the layers, splits it into groups of four
    and uses only two of each, so that two decoder layers share one part of the table.
    """
    step = 4 if twice else 2
    return [step * i % (2 * count) for i in range(count)]


def prefixes(table: Tensor, shapes: Sequence[Shape], twice: bool) -> list[dict[str, Tensor]]:
    """K and V of each layer, of shape (heads, tokens, width), from PEFT's table.

    Args:
        table: PEFT's table, of shape (tokens, layers · 2 · heads · width).
        shapes: (heads, width) of each layer; all must be equal.
        twice: True for an encoder-decoder model, see `_starts`.
    """
    heads, width = shapes[0]
    split = table.view(table.shape[0], 2 * len(shapes), heads, width)
    return [
        {"K": split[:, i].transpose(0, 1), "V": split[:, i + 1].transpose(0, 1)}
        for i in _starts(len(shapes), twice)
    ]


def table_of(layers: Sequence[Mapping[str, Tensor]], twice: bool) -> Tensor:
    """PEFT's table of the prefixes of all layers.

    Args:
        layers: K and V of each layer, of shape (heads, tokens, width).
        twice: True for an encoder-decoder model, see `_starts`.

    Raises:
        ExportError: The layers differ in shape, or layers that share a part of the table have different prefixes.
    """
    heads, tokens, width = layers[0]["K"].shape
    if any(tuple(own[name].shape) != (heads, tokens, width) for own in layers for name in ("K", "V")):
        raise ExportError(
            "PEFT needs the same number of heads and the same width in all layers, but these differ; save the "
            "program, or export it to ONNX"
        )
    split = torch.zeros(tokens, 2 * len(layers), heads, width, dtype=layers[0]["K"].dtype)
    filled: dict[int, Mapping[str, Tensor]] = {}
    for start, own in zip(_starts(len(layers), twice), layers, strict=True):
        other = filled.setdefault(start, own)
        if not all(torch.equal(other[name], own[name]) for name in ("K", "V")):
            raise ExportError(
                "PEFT uses one prefix for two decoder layers of an encoder-decoder model, but these differ; save the "
                "program, or export it to ONNX"
            )
        split[:, start], split[:, start + 1] = own["K"].transpose(0, 1), own["V"].transpose(0, 1)
    return split.reshape(tokens, -1)
