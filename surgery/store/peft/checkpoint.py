"""Steps that all kinds of checkpoints share: plan, compare sizes, apply, copy the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.common.errors import LoadError, PassError, SurgeryError, nearest
from surgery.engine.change.plans import PassPlan
from surgery.engine.contract.base import Pass
from surgery.engine.journal import Entry
from surgery.engine.program import Program
from surgery.passes.delta import Delta
from surgery.store.peft.checkpoint_data import Checkpoint
from surgery.store.peft.files import AGAIN
from surgery.store.peft.read_rest import whole_weights


def check_paths(given: Checkpoint, base: Program, factors: Mapping[str, Any]) -> None:
    """Raise LoadError if the checkpoint adapts no module, or one that the base does not have."""
    if not factors:
        raise LoadError(f"{given.path} contains no tensors of {given.config['peft_type']}; {AGAIN}")
    known = {site.path for site in base.sites}
    missing = [path for path in factors if path not in known]
    if missing:
        raise LoadError(
            f"{given.path} is for another base: this one has no {missing[0]}{nearest(missing[0], sorted(known))}, nor "
            f"{len(missing) - 1} others of its {len(factors)}; load the base with the class (--task) and the model "
            f"({given.config.get('base_model_name_or_path') or 'unknown'}) that it was made for"
        )


def plan_of(given: Checkpoint, base: Program, pass_: Pass) -> PassPlan:
    """The plan of a pass, which has the shapes of its tensors without allocating them."""
    try:
        return base.plan(pass_, freeze_base=False).passes[-1]
    except SurgeryError as error:
        raise LoadError(f"{given.path} does not fit this base: {error}") from error


def check_sizes(given: Checkpoint, planned: PassPlan, values: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Compare the sizes of a checkpoint's tensors with those that a pass would add, before it adds them.

    Args:
        given: The checkpoint.
        planned: The plan of the pass.
        values: Path of a site -> the checkpoint's tensors there, by their names in the pass.

    Raises:
        LoadError: A tensor has another number of values.
    """
    for site in planned.accepted:
        for name, value in values.get(site.site.path, {}).items():
            spec = site.specs.get(name)
            if spec is not None and spec.numel() != value.numel():
                raise other_size(given, f"{site.site.path} {name}", value.shape, spec.shape)


def other_size(given: Checkpoint, where: str, has: Sequence[int], fits: Sequence[int]) -> LoadError:
    """The error for a tensor of the wrong size."""
    return LoadError(
        f"{given.path} is for another base: at {where} it has {tuple(has)} instead of {tuple(fits)}; load the base "
        f"that it was made for"
    )


def apply_passes(given: Checkpoint, base: Program, passes: list[Pass], rest: Mapping[str, Tensor]) -> Program:
    """Apply passes and copy the tensors that PEFT stored whole; all other parameters of the base are frozen."""
    try:
        # If an earlier checkpoint or pass has selected parameters, freezing again would stop its adapters.
        frozen = any(entry.kind == "select" for entry in base.journal)
        whole, copies = whole_weights(given, base, rest)
        program = base.apply(*passes, *whole, freeze_base=not frozen)
    except PassError as error:
        raise LoadError(f"{given.path} does not fit this base: {error}") from error
    except SurgeryError as error:
        raise LoadError(f"{given.path}: {error}") from error
    program.own()
    records = {record.key: record for entry in fresh(program, base, Delta.name) for record in entry.sites}
    for name, value in rest.items():
        if name in copies:
            site, slot = copies[name]
            put(given, program.tensors[records[site.key].tensors[slot]], value, name)
        else:
            put(given, program.changed[program.base.names.get(name, (name,))[0]], value, name)
    return program


def fresh(program: Program, base: Program, name: str) -> list[Entry]:
    """Entries that were just applied; the base may have earlier ones of the same pass."""
    return [e for e in program.journal.entries[len(base.journal) :] if e.pass_name == name]


def put(given: Checkpoint, own: Tensor, value: Tensor, where: str) -> None:
    """Copy a tensor of the checkpoint; axes of size 1 may differ. Raises LoadError if it does not fit."""
    if own.numel() != value.numel() or sorted(s for s in own.shape if s > 1) != sorted(
        s for s in value.shape if s > 1
    ):
        raise other_size(given, where, value.shape, own.shape)
    if own.is_floating_point() != value.is_floating_point():
        raise LoadError(
            f"{given.path}: at {where} it has {value.dtype}, but the base has {own.dtype}; {AGAIN}"
        )
    with torch.no_grad():
        own.copy_(value.reshape(own.shape))
