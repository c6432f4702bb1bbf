"""Tensors that a pass adds at a site, and its other consequences there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a pass adds at a site.

    Attributes:
        shape: Shape of the tensor.
        init: Function that fills an empty CPU tensor in place. It is called when the pass is applied and never in
            a replay, so it may use `site.probe`.
        trainable: True for a parameter that trains, False for a buffer.
        dtype: Dtype; None for the site's own.
        value: The tensor itself, used instead of `init`.
        below: Upper bound of the values of an index: they are from 0 to one less. A stored tensor is held to it.
        shared: All sites of an application that declare a tensor of this name, shape and dtype have one in common. It
            is drawn once, at the first of them, and is stored once; see `shared_names`.
    """

    shape: tuple[int, ...]
    init: Callable[[Tensor], Any] = torch.nn.init.zeros_
    trainable: bool = True
    dtype: torch.dtype | None = None
    value: Tensor | None = None
    below: int | None = None
    shared: bool = False

    def make(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor at insertion.

        Random values are drawn on the CPU in fp32 and then rounded, so that a base on a GPU or in half precision gets
        the same values.

        Args:
            dtype: Dtype if the spec has none.
            device: Device of the tensor.
        """
        if self.value is not None:
            made = self.value.to(device)
        else:
            wanted = self.dtype or dtype
            work = torch.float32 if wanted.is_floating_point and wanted is not torch.float64 else wanted
            made = torch.empty(self.shape, dtype=work)
            self.init(made)
            made = made.to(device, self.dtype or dtype)
        return torch.nn.Parameter(made) if self.trainable else made

    def numel(self) -> int:
        """Number of values."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Outcome:
    """Consequences of a pass at one site besides added tensors; the plan shows them.

    Attributes:
        note: Remark for the reader of the plan, or "".
        trains: Parameters of the base that start (True) or stop (False) training, by name.
        unused: Names of parameters that no op reads any more.
        limits: New upper bounds of dynamic dimensions, by name. A prompt, for example, leaves fewer positions.
    """

    note: str = ""
    trains: Mapping[str, bool] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    limits: Mapping[str, int] = field(default_factory=dict)
