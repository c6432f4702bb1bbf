"""Earlier values of base parameters, restored when the pass that made them trainable is undone or left out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.engine.journal import Entry, Journal

if TYPE_CHECKING:
    pass

Names = Mapping[str, tuple[str, ...]]


def made_trainable(entry: Entry) -> list[str]:
    """Names of the parameters that an entry lets train."""
    return [name for name, trains in entry.trains.items() if trains]


def reverted(gone: Iterable[Entry], left: Journal, names: Names) -> dict[str, str | None]:
    """Parameters that only the removed entries let train, with their earlier values.

    A program without selections trains everything; that default does not count as a reason here, so such a parameter
    goes back as well. Tensors of adapters are included only if they had been frozen before.

    Args:
        gone: Entries that are removed or left out.
        left: The journal without them.
        names: Parameter name -> all names of that parameter, of the base.

    Returns:
        First name of each parameter -> name of the tensor that holds its earlier value; None for the base's value.
    """
    found: dict[str, str | None] = {}
    for entry in reversed(list(gone)):
        for name in made_trainable(entry):
            own = names.get(name, (name,))
            if left.decided(own) is not True and (name in names or name in entry.before):
                found[own[0]] = entry.before.get(name)
    return found


def without(gone: Collection[str], journal: Journal) -> list[Entry]:
    """Entries of a journal except those with the ids in `gone`.

    The earlier value that a removed entry kept of a parameter moves to the next entry that lets the parameter train:
    without the removed entry, that is its value before that next entry.
    """
    kept: list[Entry] = []
    # Parameter name -> tensor with the earlier value that the next entry has to keep.
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
