"""What a program's parameters and buffers are now: the base's, its own, those that a merge makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from surgery import replay
from surgery.folding import fold
from surgery.journal import Entry, Journal

if TYPE_CHECKING:
    from surgery.program import Program


def state_of(program: Program) -> dict[str, Tensor]:
    """See Program.state."""
    shells: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    folded, held = program.folded(), held_by(program)
    for name, tensor in held.items():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(program.trains(name, program.clock.step))
    for name, tensor in program.base.tensors.items():
        if name in folded:
            shared = folded[name]
            state[name] = shells.setdefault(id(shared), nn.Parameter(shared, requires_grad=False))
            continue
        if id(tensor) not in shells:
            shells[id(tensor)] = _shell(program, name, tensor, held)
        state[name] = shells[id(tensor)]
    live = {n for e in replay.live_entries(program.journal) for n in e.tensor_names}
    for name in program.tensors:
        if name in folded:
            state[name] = nn.Parameter(folded[name], requires_grad=False)
        elif name in live:
            state[name] = held[name]
    return state


def folded_of(program: Program) -> dict[str, Tensor]:
    """See Program.folded."""
    entries = folded_entries(program.journal)
    if not entries:
        return {}
    base = program.base
    held = {n: t for name, t in held_by(program).items() for n in base.names.get(name, (name,))}
    return fold(base, entries, program.tensors, {**base.tensors, **held}, program.sites)


def folded_entries(journal: Journal) -> list[Entry]:
    """The entries that merges folded into weights."""
    ids = {name for e in journal if e.kind == "merge" for name in e.options.get("folded", ())}
    return [e for e in journal if e.id in ids]


def held_by(program: Program) -> dict[str, Tensor]:
    """Changed and inserted tensors; what only passes that are left out made train is as it was before them."""
    held = {**program.changed, **program.tensors}
    for name, before in program.put_back.items():
        if before is None:
            held.pop(name, None)
        else:
            held[name] = nn.Parameter(program.tensors[before], requires_grad=False)
    return held


def _shell(program: Program, name: str, tensor: Tensor, held: Mapping[str, Tensor]) -> Tensor:
    """The program's own tensor, or a parameter over the base's memory."""
    canonical = program.base.names.get(name, (name,))[0]
    if canonical in held:
        return held[canonical]
    if isinstance(tensor, nn.Parameter):
        shell = nn.Parameter(tensor.detach(), requires_grad=False)
        program.base.shells[canonical, id(shell)] = shell
        return shell
    return tensor
