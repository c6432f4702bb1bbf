"""The reference policy of a training: the program before training, in the same storage."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from surgery.common.errors import TrainingError
from surgery.engine.journal import Entry, Journal

if TYPE_CHECKING:
    from surgery.engine.program import Program


def reference_of(program: Program) -> Program:
    """Return the program without everything that trains: adapters, heads, and selections of trained base weights.

    Undoing a selection restores the base weights from before training. All other tensors are shared with the program.
    Run the reference, and train the program.

    Raises:
        TrainingError: a trained parameter was made by no pass and has no saved original value.
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
            f"{moving} trains, but no pass made it, so no reference policy without it exists; add an adapter "
            f"(--pass lora), select what trains (--pass full), or copy the whole program with --reference start"
        )
    return left


def copy_of(program: Program) -> Program:
    """Copy the program in its current state, including all tensors that passes inserted or changed."""
    program.own()
    return type(program)(program.base, program.journal, *program.copies())
