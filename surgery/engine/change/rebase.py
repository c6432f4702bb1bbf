"""Going on after a merge: the merged weights become the weights of a new base."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn

from surgery.common.errors import PassError
from surgery.engine.base import Base
from surgery.engine.change.undo import check_undoable
from surgery.engine.contract.observe import observe
from surgery.engine.journal import Entry, Journal
from surgery.engine.module import get
from surgery.engine.state import State

S = TypeVar("S", bound=State)


def rebase(program: S) -> S:
    """A program whose base has the merged weights, so that further passes start from them.

    It computes the same. The merges, and the adapters that they folded, are no longer in its journal and cannot be
    undone. Adapters that stayed beside the weights are kept, in the form that the merges left them in. The original
    base and its programs do not change.

    Args:
        program: A merged program; it is not changed.

    Raises:
        PassError: A merge made a weight longer than the model's own code expects, or the outputs would differ.
        JournalError: The base was merged in place, or released from memory.
    """
    check_undoable(program, "a pass after a merge")
    base, journal = program.base, program.journal
    folded = program.folded()
    for name, tensor in folded.items():
        old = base.tensors.get(name)
        if old is not None and old.shape != tensor.shape:
            raise PassError(
                f"the merge made {name} longer than the model's code expects, so no pass can follow it; write the "
                "program with --format hf and apply to that, or undo the merge and apply the pass before it"
            )
    own = {name: tensor for name, tensor in folded.items() if name in base.tensors}
    # All names of a tied tensor are stored if merging has untied it: each has a value of its own now.
    stored = {alias for name in own for alias in base.names.get(name, (name,))}
    loaded = replace(
        base.loaded, module=_with_values(base, own), stored=base.loaded.stored | frozenset(stored)
    )
    fresh = Base(
        loaded,
        base.captured,
        base.plugins,
        base.ref,
        base.options,
        hindrance=base.hindrance,
        heads=base.heads,
    )
    tensors, changed = program.copies()
    ids = {name for e in journal if e.kind == "merge" for name in e.options.get("folded", ())}
    entries = [
        journal.standing(e) if e.kind == "rewrite" else e
        for e in journal
        if e.kind != "merge" and e.id not in ids
    ]
    # A rewrite whose sites are all gone has been merged into quantized codes.
    entries = [e for e in entries if e.kind != "rewrite" or e.sites]
    names = {name for e in entries for name in e.tensor_names}
    tensors.update({n: nn.Parameter(t) for n, t in folded.items() if n in tensors})
    made = type(program)(
        fresh,
        Journal(tuple(_without(e, own) for e in entries)),
        {n: t for n, t in tensors.items() if n in names},
        {n: t for n, t in changed.items() if n not in own},
    )
    made.labels = dict(program.labels)
    seen = observe(program.run(), made.run())
    if not seen.equal:
        raise PassError(
            f"the merged weights cannot become a base (the outputs differ by {seen.difference:.1e}); undo the "
            "merge, and apply the pass before it"
        )
    return made


def _without(entry: Entry, own: Mapping[str, Tensor]) -> Entry:
    """The entry without earlier values of weights that have a merged value now."""
    return replace(entry, before={n: kept for n, kept in entry.before.items() if n not in own})


def _with_values(base: Base, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the base's module with other values of some parameters; it shares all other tensors."""
    module = base.loaded.module
    shared = [*module.parameters(), *module.buffers()]
    fresh = copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
    made: dict[int, nn.Parameter] = {}
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        parameter = made.get(id(value))
        if parameter is None:
            trains = base.tensors[name].requires_grad
            parameter = made[id(value)] = nn.Parameter(value.detach(), requires_grad=trains)
        (get(fresh, owner) if owner else fresh)._parameters[leaf] = parameter
    return fresh
