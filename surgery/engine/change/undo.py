"""Undoing passes."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from surgery.common.errors import JournalError
from surgery.engine import replay
from surgery.engine.contract.base import RewritePass
from surgery.engine.data import check_present
from surgery.engine.journal import Entry, Journal
from surgery.engine.restore import reverted, without
from surgery.engine.state import State


def check_undoable(program: State, what: str) -> None:
    """Raise JournalError if the base has been merged in place or released from memory.

    Args:
        program: The program.
        what: The operation, for the message.
    """
    if program.base.consumed:
        raise JournalError(
            "this base was merged in place and cannot be undone; load the saved directory again"
        )
    check_present(program, what)


S = TypeVar("S", bound=State)


def undo(program: S, name: str) -> S:
    """Remove a pass from a program; see Program.undo."""
    check_undoable(program, f"undo {name}")
    base, gone = program.base, {e.id for e in program.journal.find(name)}
    _check_nothing_stands_on(program, name, gone)
    entries = [e for e in program.journal if e.id in gone]
    left = without(gone, program.journal)
    for entry in left:
        needed = replay.pass_of(entry, base.plugins).requires if entry.kind == "rewrite" else ()
        if needed and not any(e.pass_name in needed for e in left):
            raise JournalError(f"{entry.id!r} depends on {name!r}; undo {entry.id!r} first")

    def freezes(entry: Entry) -> bool:
        pass_ = replay.pass_of(entry, base.plugins) if entry.kind == "rewrite" else None
        return isinstance(pass_, RewritePass) and pass_.effect.freezes_base

    adapted = any(map(freezes, entries)) and not any(map(freezes, left))
    # The automatic freezing of the base is removed together with the last adapter.
    if adapted or not any(e.kind == "rewrite" for e in left):
        left = [e for e in left if not e.auto]
    names = {n for e in left for n in e.tensor_names}
    tensors, changed = program.copies()
    journal = Journal(tuple(left))
    for n, before in reverted(entries, journal, base.names).items():
        if before is None:
            changed.pop(n, None)
        else:
            (tensors if n in tensors else changed)[n] = nn.Parameter(tensors[before])
    if not left:
        # Buffers that moved in training belong to the passes.
        changed = {n: t for n, t in changed.items() if isinstance(t, nn.Parameter)}
    undone = program.derive(journal, {n: t for n, t in tensors.items() if n in names}, changed)
    if replay.is_regrouped(base, Journal(tuple(entries))):
        try:
            _ = undone.graph
        except JournalError as error:
            raise JournalError(
                f"later passes depend on ops that {name!r} inserted, and {error}; undo those passes first"
            ) from None
    return undone


def _check_nothing_stands_on(program: State, name: str, gone: set[str]) -> None:
    """Raise JournalError if a remaining entry needs one that is to be removed, or its tensors."""
    added = {n for g in program.journal if g.id in gone for n in g.tensor_names}
    for entry in program.journal:
        taken = [*entry.options.get("folded", ()), *entry.options.get("simplified", ())]
        stands_on = gone & set(taken) if entry.kind == "merge" else set()
        if stands_on and entry.id not in gone:
            raise JournalError(f"{sorted(stands_on)[0]!r} is folded by {entry.id!r}; undo {entry.id!r} first")
        below = added & {name for r in entry.sites for name in r.stands_on}
        if below and entry.id not in gone:
            raise JournalError(
                f"{entry.id!r} depends on {sorted(below)[0]}, which {name!r} added; undo {entry.id!r} first"
            )
