"""What parameters of the base were before passes made them train: for passes that are undone, or left out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.engine.journal import Entry, Journal

if TYPE_CHECKING:
    pass

Names = Mapping[str, tuple[str, ...]]


def made_trainable(entry: Entry) -> list[str]:
    return [name for name, trains in entry.trains.items() if trains]


def reverted(gone: Iterable[Entry], left: Journal, names: Names) -> dict[str, str | None]:
    """Parameters that train because of these entries and of no other, and what each was before: the name of the
    tensor that holds it, or None for the base's own. names: of the base, all names of a parameter by each of them.

    That everything trains in a program where nothing is said counts for no reason: what a selection let train
    goes back to what it was. Adapters' own tensors do so only where they had been frozen.
    """
    found: dict[str, str | None] = {}
    for entry in reversed(list(gone)):
        for name in made_trainable(entry):
            own = names.get(name, (name,))
            if left.decided(own) is not True and (name in names or name in entry.before):
                found[own[0]] = entry.before.get(name)
    return found


def without(gone: Collection[str], journal: Journal) -> list[Entry]:
    """The entries of a journal but those of these ids.

    What a parameter was before one that goes is handed on to the next that makes it train: that is what it was
    before that one, now.
    """
    kept: list[Entry] = []
    owed: dict[str, str | None] = {}
    for entry in journal:
        before = dict(entry.before)
        for name in made_trainable(entry):
            if entry.id in gone:
                owed.setdefault(name, entry.before.get(name))
            elif name in owed:
                tensor = owed.pop(name)
                before.pop(name, None)
                before |= {name: tensor} if tensor is not None else {}
        if entry.id not in gone:
            kept.append(replace(entry, before=before))
    return kept
