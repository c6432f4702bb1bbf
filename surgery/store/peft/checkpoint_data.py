"""A checkpoint that has been read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from surgery.common.errors import LoadError


class Unread(LoadError):
    """A checkpoint uses what no pass here computes. The weights that PEFT merges may stand for it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read, and the label for its passes.

    Attributes:
        path: Its directory, for messages.
        config: Its configuration.
        tensors: Its tensors by PEFT's names without the prefix.
        label: Label of the passes.
        raw: Its tensors by their names in the file.
    """

    path: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    label: str
    raw: Mapping[str, Tensor]

    def named(self, number: int, count: int) -> str:
        """Label of one of `count` passes; numbers start at 1."""
        return self.label if count == 1 else f"{self.label or 'peft'}_{number}"
