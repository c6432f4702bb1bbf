"""TODO"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgery.train.data_context import Row


@dataclass(frozen=True)
class Examples:
    """examples: a datasets.Dataset of what the objective made of rows, `row` their numbers. sizes: of each."""

    examples: Any
    sizes: list[int]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, chosen: Sequence[int]) -> list[Row]:
        return list(self.examples.__getitems__(list(chosen)))

    def digest(self) -> str:
        """sha256 of all of them, in order."""
        found = hashlib.sha256()
        for start in range(0, len(self), 1000):
            found.update(repr(self[range(start, min(start + 1000, len(self)))]).encode())
        return found.hexdigest()
