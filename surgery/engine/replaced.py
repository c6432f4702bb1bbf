"""Weights that passes have replaced: how many values and bytes they had, and how many are left."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from surgery.common.quantities import count, in_bytes
from surgery.engine.journal import Entry
from surgery.engine.state import State, unread


@dataclass(frozen=True)
class Replaced:
    """The weights that one entry of the journal replaced, before and after.

    Attributes:
        entry: Id of the entry.
        weights: Number of weights that it replaced.
        before: Number of values in them.
        after: Number of values in the tensors that replace them.
        bytes_before: Their size in memory.
        bytes_after: Size in memory of the tensors that replace them.
        packed: True if codes replace the values, so that `after` does not count values.
    """

    entry: str
    weights: int
    before: int
    after: int
    bytes_before: int
    bytes_after: int
    packed: bool

    def __str__(self) -> str:
        if self.packed:
            sizes = f"{in_bytes(self.bytes_before)} → {in_bytes(self.bytes_after)}"
            return f"{self.weights} weights with {count(self.before)} values are codes: {sizes}"
        return f"{count(self.after)} of {count(self.before)} left in {self.weights} weights"


def replaced_weights(program: State) -> list[Replaced]:
    """Weights that each entry of the journal replaced; entries that replaced none are left out."""
    tensors = {**program.base.tensors, **program.tensors}
    gone = unread(program)
    found = (_replaced(entry, tensors, gone) for entry in program.journal if entry.kind == "rewrite")
    return [each for each in found if each is not None]


def _replaced(entry: Entry, tensors: dict[str, Tensor], gone: set[str]) -> Replaced | None:
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    for record in entry.sites:
        # A structural pass names the tensors that it replaces; another one replaces the weight of its site.
        old = [name for name in record.tensors if name in tensors] or [record.key.owner]
        old = [name for name in old if name in gone and name in tensors]
        if old:
            before.update((name, tensors[name]) for name in old)
            after.update((name, tensors[name]) for name in record.tensors.values() if name in tensors)
    if not before:
        return None
    return Replaced(
        entry.id,
        len(before),
        sum(t.numel() for t in before.values()),
        sum(t.numel() for t in after.values()),
        sum(t.numel() * t.element_size() for t in before.values()),
        sum(t.numel() * t.element_size() for t in after.values()),
        any(not t.is_floating_point() for t in after.values()),
    )
