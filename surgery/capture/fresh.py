"""Random inputs that resemble the example inputs, at other sizes of the dynamic dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from surgery.capture.shapes import UNBOUNDED, list_axes, named_leaves, named_sizes
from surgery.capture.types import Captured, LoadedModel
from surgery.common.errors import CaptureError, nearest


def other_sizes(model: LoadedModel | Captured) -> dict[str, int]:
    """Choose, for every named dimension, a size within its bounds that differs from the example's.

    Raises:
        CaptureError: the bounds of a dimension allow no other size.
    """
    bounds: dict[str, tuple[int, int]] = {}
    steps: dict[str, int] = {}
    for axis in list_axes(model):
        low, high = bounds.get(axis.root, (1, UNBOUNDED))
        bounds[axis.root] = (max(low, axis.low), min(high, axis.high))
        steps[axis.root] = axis.step
    sizes = {}
    for name, size in named_sizes(model).items():
        low, high = bounds[name]
        # An odd step gives a size that shares few factors with the example's, so that a reshape with a baked-in
        # size fails instead of dividing evenly.
        options = tuple(size + steps[name] * more for more in (3, 1, -1, -3))
        chosen = next((option for option in options if max(low, 2) <= option <= high), None)
        if chosen is None:
            raise CaptureError(
                f"dimension '{name}' has no size other than the example's {size} in {low}..{high}; "
                "widen its bounds or leave it out of the dynamic dimensions"
            )
        sizes[name] = chosen
    return sizes


def fresh_inputs(
    model: LoadedModel | Captured, sizes: Mapping[str, int] | None = None, seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Draw random inputs that resemble the example inputs, at other sizes of the named dynamic dimensions.

    Integers are uniform over the range of the example. Attention masks have random right padding. Floats are
    normal with the mean and standard deviation of the example. If the first or last column of an integer input is
    constant in the example (a start or end token), it keeps that value.

    Args:
        model: the model whose example inputs are imitated.
        sizes: size by dimension name; other dimensions keep the example's size.
        seed: seed of the random inputs.

    Returns:
        The positional inputs and the inputs by name.

    Raises:
        CaptureError: a name is not a dynamic dimension, or a size is out of bounds.
    """
    wanted = named_sizes(model)
    for name in sizes or {}:
        if name not in wanted:
            raise CaptureError(f"'{name}' is not a dynamic dimension{nearest(name, wanted)}")
    wanted.update(sizes or {})
    shapes: dict[str, dict[int, int]] = {}
    for axis in list_axes(model):
        size = wanted[axis.root]
        if not axis.allows(size):
            raise CaptureError(
                f"size {size} of '{axis.root}' does not fit the model, which takes {axis.range}"
            )
        shapes.setdefault(axis.input, {})[axis.axis] = axis.scale * size + axis.offset

    generator = torch.Generator().manual_seed(seed)
    leaves = []
    for name, leaf in named_leaves(model, tensors_only=False):
        if isinstance(leaf, torch.Tensor):
            resized = shapes.get(name, {})
            shape = [resized.get(i, size) for i, size in enumerate(leaf.shape)]
            leaf = _fresh_tensor(name, leaf, shape, generator)
        leaves.append(leaf)
    _, spec = pytree.tree_flatten((model.args, dict(model.kwargs)))
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs


def _fresh_tensor(
    name: str, like: torch.Tensor, shape: list[int], generator: torch.Generator
) -> torch.Tensor:
    """Random tensor of the given shape with the dtype and value range of `like`; see `fresh_inputs`."""
    if like.numel() == 0:
        return like.new_zeros(shape)
    if like.dtype.is_floating_point or like.dtype.is_complex:
        # A constant float input is a setting rather than data; random values could be invalid for it.
        if like.numel() > 1 and bool((like == like.reshape(-1)[0]).all()):
            return torch.full(shape, like.reshape(-1)[0].item(), dtype=like.dtype, device=like.device)
        noise = torch.randn(shape, generator=generator)
        mean, std = (like.float().mean(), like.float().std()) if like.numel() > 1 else (0.0, 1.0)
        return (noise * std + mean).to(like.dtype).to(like.device)
    low, high = int(like.min()), int(like.max())
    if "mask" in name and low == 0 and high == 1 and like.ndim == 2:
        length = shape[1]
        kept = torch.randint(max(1, length // 2), length + 1, (shape[0], 1), generator=generator)
        return (torch.arange(length)[None, :] < kept).to(like.dtype).to(like.device)
    # Exclude the edge columns from the range, so that no start or end token is drawn in the middle of a sequence.
    columns = like.ndim >= 2 and like.shape[-1] > 2
    inner = like[..., 1:-1] if columns else like
    low, high = int(inner.min()), int(inner.max())
    fresh = torch.randint(low, high + 1, shape, generator=generator).to(like.dtype).to(like.device)
    if columns and shape[-1] > 2:
        for column in (0, -1):
            edge = like[..., column]
            if bool((edge == edge.reshape(-1)[0]).all()):
                fresh[..., column] = edge.reshape(-1)[0]
    return fresh
