"""Reads checkpoints of every other type: PEFT merges them, and the pass `delta` records the weights that result.

PEFT's model runs once before and once after the merge on the example inputs. A type whose merge gives other outputs
than its adapter is refused, as is one that PEFT cannot merge.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.capture.trace import to_plain
from surgery.common.errors import LoadError
from surgery.common.readers import first_line
from surgery.engine.contract.base import Pass
from surgery.engine.contract.observe import observe
from surgery.engine.program import Program
from surgery.passes.delta import Delta, Slot, digest, own_name
from surgery.store.peft.checkpoint import apply_passes, fresh, plan_of
from surgery.store.peft.checkpoint_data import Checkpoint
from surgery.store.peft.library import model_of, unwrap_saved, within_limits


def read_merged(given: Checkpoint, base: Program) -> Program:
    """Apply a checkpoint by the weights that PEFT merges from it.

    Raises:
        LoadError: PEFT is not installed, does not load the checkpoint on this base, or cannot merge it; or its merged
            weights give other outputs than its adapter.
    """
    kind = given.config["peft_type"]
    if not base.base.in_memory:
        raise LoadError(
            f"{given.path}: the weights are not in memory, and PEFT has to merge them; load them first"
        )
    with within_limits(base.base, given.raw, given.path):
        changed, expected, merged = _merged(given, base)
    seen = observe(expected, merged)
    if not seen.difference <= base.merge_tolerance:
        raise LoadError(
            f"{given.path}: the weights that PEFT merges from this {kind} give other outputs than its adapter ({seen} "
            f"of their scale), so they cannot stand for it; use it with PEFT"
        )
    if not changed:
        raise LoadError(f"{given.path} changes no weight of this base; load the base that it was made for")
    return recorded(given, base, changed)


def _merged(given: Checkpoint, base: Program) -> tuple[dict[str, Tensor], Any, Any]:
    """Tensors of the base that PEFT's merge changes, and the outputs of PEFT's model before and after it."""
    loaded, kind = base.base.loaded, given.config["peft_type"]
    model: Any = model_of(given.config, given.raw, base.base, given.path)

    def run(module: Any) -> Any:
        with loaded.patches():
            return to_plain(module(*loaded.args, **loaded.kwargs))

    try:
        expected = run(model)
        unwrap_saved(model)
        whole: nn.Module = model.merge_and_unload(safe_merge=True).eval()
        merged = run(whole)
    except LoadError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise LoadError(
            f"{given.path}: PEFT cannot merge this {kind} ({said}), so there is no form for it here"
        ) from error
    found: dict[str, Tensor] = dict(whole.named_parameters(remove_duplicate=False))
    found.update(whole.named_buffers(remove_duplicate=False))
    changed = {}
    for name, own in base.base.tensors.items():
        value = found.pop(name, None)
        if value is None or value.shape != own.shape or value.dtype != own.dtype:
            has = "no such tensor" if value is None else f"{value.dtype} {tuple(value.shape)}"
            raise LoadError(
                f"{given.path}: the base has {name} {own.dtype} {tuple(own.shape)}, and what PEFT merges from this "
                f"{kind} has {has}; use it with PEFT"
            )
        if not torch.equal(value, own):
            changed[name] = value.detach().clone()
    if found:
        raise LoadError(
            f"{given.path}: what PEFT merges from this {kind} has {next(iter(found))}, which the base lacks; use it "
            f"with PEFT"
        )
    return changed, expected, merged


def recorded(given: Checkpoint, base: Program, changed: Mapping[str, Tensor]) -> Program:
    """The program with other values of some tensors of the base, as one delta with the checkpoint as its source.

    Args:
        given: The checkpoint.
        base: The base.
        changed: New values by the names of the base's tensors. Those that no site can hold are trained values of the
            base itself.
    """
    slots: dict[str, tuple[Slot, ...]] = {}
    held: dict[str, tuple[str, Slot]] = {}
    for site in base.sites:
        pairs: tuple[tuple[Slot, str | None], ...] = (("weight", site.weight), ("bias", site.bias))
        for slot, name in pairs:
            if (
                name is not None
                and name in changed
                and name not in held
                and not site.packed
                and site.dtype.is_floating_point
            ):
                slots[site.path] = (*slots.get(site.path, ()), slot)
                held[name] = site.path, slot
    rest = _unheld(given, base, changed, held)
    at = min(slots) if slots else base.sites.sites[0].path
    source = {
        "config": dict(given.config),
        "tensors": {
            name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in given.raw.items()
        },
        "slots": slots or {at: ()},
        "at": at,
        "digests": {name: digest(changed[name]) for name in (*held, *rest)},
    }
    target = ",".join(f"path:{path}" for path in slots or [at])
    passes: list[Pass] = [Delta(target=target, source=json.dumps(source), **{"as": given.label})]
    refused = plan_of(given, base, passes[0]).refused
    if refused:
        raise LoadError(f"{given.path} does not fit this base: {refused[0].site.path}: {refused[0].refusal}")
    # What trains in place is no copy any more, whatever module it came from.
    plain = replace(given, config={**given.config, "modules_to_save": None})
    program = apply_passes(plain, base, passes, rest)
    (entry,) = fresh(program, base, "delta")
    names = {path_slot: name for name, path_slot in held.items()}
    with torch.no_grad():
        for record in entry.sites:
            for slot in record.decided["shapes"]:
                program.tensors[record.tensors[slot]].copy_(changed[names[record.path, slot]])
            if record.decided["own"]:
                for number, tensor in enumerate(given.raw.values()):
                    program.tensors[record.tensors[own_name(number)]].copy_(tensor)
    return program


def _unheld(
    given: Checkpoint, base: Program, changed: Mapping[str, Tensor], held: Container[str]
) -> dict[str, Tensor]:
    """Changed tensors that no site holds, and that have to be changed in the base itself.

    Raises:
        LoadError: One is tied to a tensor that does not change with it.
    """
    rest: dict[str, Tensor] = {}
    for name, value in changed.items():
        if name in held:
            continue
        tied = [other for other in base.base.names.get(name, ()) if other != name]
        # A module that is saved whole holds both names of a tensor, and an op reads it under the other one.
        if any(other in held and torch.equal(changed[other], value) for other in tied):
            continue
        apart = next(
            (other for other in tied if not torch.equal(changed.get(other, base.base.tensors[other]), value)),
            None,
        )
        if apart is not None:
            raise LoadError(
                f"{given.path} changes {name} and not {apart}, to which the base ties it; load the base without tied "
                f"weights"
            )
        rest[name] = value
    return rest
