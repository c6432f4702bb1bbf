"""Chooses which adapter of a program trains: the one that was applied last, or those that the user names."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.common.errors import JournalError, TrainingError, nearest
from surgery.engine.contract.base import RewritePass
from surgery.engine.journal import Entry
from surgery.engine.program import Program
from surgery.engine.replay import live_entries, pass_of


def adapters_of(program: Program) -> list[list[Entry]]:
    """Adapters that could train, in the order of the journal; a list of entries for each.

    Entries with one label are one adapter, and so are those without a label that one call of `apply` added. A new head
    is not an adapter.
    """
    found: dict[tuple[str, int], list[Entry]] = {}
    for entry in live_entries(program.journal):
        pass_ = pass_of(entry, program.base.plugins) if entry.kind == "rewrite" else None
        if not isinstance(pass_, RewritePass) or not (pass_.effect.freezes_base and pass_.effect.attaches):
            continue
        if any(program.trains(name) for name in trained_names(entry)):
            key = (entry.label, 0 if entry.label else entry.call)
            found.setdefault(key, []).append(entry)
    return list(found.values())


def trained_names(entry: Entry) -> list[str]:
    """Names of the tensors that an adapter trains: its own, and those of the base that it selects (bitfit)."""
    return list(
        dict.fromkeys([*entry.tensor_names, *(name for name, trains in entry.trains.items() if trains)])
    )


def chosen(program: Program, only: Sequence[str] = ()) -> tuple[list[Entry], list[Entry]]:
    """The adapters that train and those that keep their values.

    Args:
        program: program to train.
        only: names of adapters to train, as in `Program.undo`; by default the adapter that was applied last.

    Raises:
        TrainingError: the program has no adapter of such a name that could train.
    """
    groups = adapters_of(program)
    if not only:
        return (groups[-1] if groups else []), [entry for group in groups[:-1] for entry in group]
    listed = [entry for group in groups for entry in group]
    wanted: set[str] = set()
    for name in only:
        try:
            ids = {entry.id for entry in program.journal.find(name)} & {entry.id for entry in listed}
        except JournalError:
            ids = set()
        if not ids:
            known = [entry.id for entry in listed]
            hint = nearest(name, known) or (
                f"; it has {', '.join(map(repr, known))}"
                if known
                else "; it has none; add one with --pass lora"
            )
            raise TrainingError(
                f"--only {name}: the program has no adapter of this name that could train{hint}"
            )
        wanted |= ids
    return [e for e in listed if e.id in wanted], [e for e in listed if e.id not in wanted]


def training_only(program: Program, only: Sequence[str] = ()) -> tuple[Program, list[str]]:
    """The program with all adapters but one frozen, over the same tensors, and sentences about that for the user.

    Train the result: the tensors of `program` are the same objects. Its journal stays as it is.

    Args:
        program: program to train.
        only: names of adapters to train; by default the adapter that was applied last.

    Raises:
        TrainingError: the program has no adapter of such a name that could train.
    """
    train, rest = chosen(program, only)
    if not rest:
        return program, []
    kept = {name for entry in train for name in trained_names(entry)}
    frozen = {name: False for entry in rest for name in trained_names(entry) if name not in kept}
    taken = {entry.id for entry in program.journal}
    free = next(name for n in range(1, len(taken) + 2) if (name := f"freeze:{n}") not in taken)
    selection = Entry(free, "freeze", "select", trains=frozen, auto=True)
    view = program.derive(program.journal.add(selection), graph=program.graph)
    names, others = (", ".join(entry.id for entry in entries) for entries in (train, rest))
    keeps = "keeps its values" if len(rest) == 1 else "keep their values"
    return view, [f"trains {names}; {others} {keeps} (--only {rest[-1].id} trains that instead)"]
