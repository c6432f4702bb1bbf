"""The reference policy of a program that trains: what it was before, in the same storage."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from surgery.common.errors import TrainingError
from surgery.engine.journal import Entry, Journal

if TYPE_CHECKING:
    from surgery.engine.program import Program


def reference_of(program: Program) -> Program:
    """The program with everything left out that trains: adapters, heads, and selections of the base's own weights,
    which are as they were before them. It shares all other tensors with the program; run it, and train the program.

    Raises TrainingError where something trains that nothing holds as it was, so that there is no such policy.
    """
    program.own()
    held = {**program.changed, **program.tensors}
    trained = {id(t) for name, t in held.items() if isinstance(t, nn.Parameter) and program.trains(name)}

    def trains(entry: Entry) -> bool:
        chosen = [name for name, said in entry.trains.items() if said]
        return any(program.trains(name) for name in (*entry.tensor_names, *chosen))

    entries = tuple(replace(e, weight=0.0) if trains(e) else e for e in program.journal)
    left = type(program)(program.base, Journal(entries), program.tensors, program.changed)
    moving = next((name for name, tensor in left.state().items() if id(tensor) in trained), None)
    if moving is not None:
        raise TrainingError(
            f"{moving} trains, and no pass that could be left out of the reference policy makes it; put on an adapter "
            f"(--pass lora), select what trains (--pass full), or keep a copy of it all with --reference start"
        )
    return left


def copy_of(program: Program) -> Program:
    """The program as it is now, with copies of what it inserted and changed."""
    program.own()
    return type(program)(program.base, program.journal, *program.copies())
