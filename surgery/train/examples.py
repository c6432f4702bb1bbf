"""Examples of an objective, stored in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgery.train.data_context import Row


@dataclass(frozen=True)
class Examples:
    """A table of examples.

    Attributes:
        examples: datasets.Dataset of the objective's examples. Its column `row` has the row number of each.
        sizes: length of each example.
    """

    examples: Any
    sizes: list[int]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, chosen: Sequence[int]) -> list[Row]:
        return list(self.examples.__getitems__(list(chosen)))

    def digest(self) -> str:
        """Return the sha256 of all examples, in order."""
        found = hashlib.sha256()
        for start in range(0, len(self), 1000):
            found.update(repr(self[range(start, min(start + 1000, len(self)))]).encode())
        return found.hexdigest()
