"""Writes the unchanged checkpoint that a delta was imported from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from surgery.engine.journal import Entry
from surgery.engine.program import Program
from surgery.engine.replay import pass_of
from surgery.passes.delta import Delta, Source, digest, own_name
from surgery.store.peft.whole import current_values


def source_of(program: Program, entry: Entry) -> Source | None:
    """The checkpoint that an entry was imported from, or None."""
    pass_ = pass_of(entry, program.base.plugins)
    return pass_.origin if isinstance(pass_, Delta) else None


def original(program: Program, live: Sequence[Entry]) -> tuple[dict[str, Any], dict[str, Tensor]] | str:
    """Configuration and tensors of the checkpoint behind the only adapter, or the reason why it cannot be given back.

    Args:
        program: The program.
        live: Its adapters, of which at least one is a delta.
    """
    deltas = [entry for entry in live if entry.pass_name == Delta.name]
    source = source_of(program, deltas[0])
    if source is None:
        return f"{deltas[0].id} comes from no checkpoint"
    if len(live) > 1:
        other = next(entry for entry in live if entry is not deltas[0])
        return f"{other.id} acts beside {deltas[0].id}, which a checkpoint of PEFT's {kind_of(source)} cannot hold"
    entry = deltas[0]
    if entry.weight != 1:
        return f"{entry.id} has the weight {entry.weight:g}, which a checkpoint of PEFT's {kind_of(source)} cannot hold"
    values = current_values(program)
    for name, own in program.base.tensors.items():
        wanted = source.digests.get(name)
        if digest(values[name]) != (wanted or digest(own)):
            return f"{name} has been trained since {entry.id} was imported from a {kind_of(source)}"
    record = next(record for record in entry.sites if record.decided["own"])
    tensors = {
        name: program.tensors[record.tensors[own_name(number)]] for number, name in enumerate(source.tensors)
    }
    return dict(source.config), tensors


def kind_of(source: Source) -> str:
    """PEFT's type of a checkpoint."""
    return str(source.config.get("peft_type"))[:40]
