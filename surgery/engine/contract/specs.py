"""What a pass adds at a site, and what else changes there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a pass adds at a site.

    shape: its size. init: fills an empty tensor in place; called when the pass is applied, never when it is
    replayed, so it may ask `site.probe`. value: the tensor itself, in place of init.
    trainable: whether it is a parameter that trains. dtype: the site's own where None.
    """

    shape: tuple[int, ...]
    init: Callable[[Tensor], Any] = torch.nn.init.zeros_
    trainable: bool = True
    dtype: torch.dtype | None = None
    value: Tensor | None = None

    def make(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor at insertion; drawn in fp32 and rounded, so that a half-precision base draws the same."""
        if self.value is not None:
            made = self.value.to(device)
        else:
            wanted = self.dtype or dtype
            work = torch.float32 if wanted.is_floating_point and wanted is not torch.float64 else wanted
            made = torch.empty(self.shape, dtype=work, device=device)
            self.init(made)
            made = made.to(self.dtype or dtype)
        return torch.nn.Parameter(made) if self.trainable else made

    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Outcome:
    """What a pass does at one site beside adding tensors; the plan shows it.

    Attributes:
        note: A remark for the person who reads the plan, or "".
        trains: Parameters of the base that start (True) or stop (False) training, by name.
        unused: Parameters that no op reads any more, by name.
        limits: New upper bounds of dynamic dimensions, by name: a prompt leaves fewer positions.
    """

    note: str = ""
    trains: Mapping[str, bool] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    limits: Mapping[str, int] = field(default_factory=dict)
