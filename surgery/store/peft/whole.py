"""Weights of the base that a checkpoint holds whole: trained ones, those of a delta, and new heads.

PEFT has two places for them. Modules in `modules_to_save` are copied, so that a tied weight is untied, and their
tensors have the names of the base. A layer that PEFT adapts cannot be such a module. Its own weights are stored under
`base_layer`, as PEFT does with biases and resized embeddings, and are loaded into the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.common.errors import ExportError
from surgery.engine.program import Program
from surgery.engine.replay import live_entries
from surgery.passes.delta import Delta

# Ends of module paths that PEFT saves whole for a task, whether they are named or not.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",),
}  # fmt: skip


@dataclass(frozen=True)
class Whole:
    """Tensors that a checkpoint holds whole.

    Attributes:
        task: PEFT's task type, or None.
        modules: Value of `modules_to_save`.
        tensors: The tensors by their names in the checkpoint, without the prefix.
        biases: True if biases of adapted layers are among them.
    """

    task: str | None
    modules: list[str]
    tensors: dict[str, Tensor]
    biases: bool


def current_values(program: Program) -> dict[str, Tensor]:
    """Current value of every tensor of the base, by each of its names; those of a delta under the name of its site."""
    state = program.state()
    values = {name: state[name].detach() for name in program.base.tensors}
    for entry in live_entries(program.journal):
        if entry.pass_name != Delta.name:
            continue
        for record in entry.sites:
            site = program.base.sites.by_key.get(record.key)
            if site is None:
                raise ExportError(
                    f"{entry.id} at {record.path}: its weight is none of the base; merge it first"
                )
            for slot, name in (("weight", site.weight), ("bias", site.bias)):
                if name is not None and slot in record.decided["shapes"]:
                    value = program.tensors[record.tensors[slot]].detach()
                    moved = value if entry.weight == 1 else entry.weight * (value - state[name].detach())
                    values[name] = moved if entry.weight == 1 else values[name] + moved
    return values


def stored_whole(program: Program, adapted: Mapping[str, str], task: str | None) -> Whole:
    """Tensors that PEFT has to store besides the adapters.

    Args:
        program: The program.
        adapted: Path of each module that PEFT adapts -> path of its own weights in the checkpoint.
        task: PEFT's task type of the model.

    Raises:
        ExportError: PEFT cannot hold a weight that was trained.
    """
    module, values = program.base.loaded.module, current_values(program)
    paths = [path for path, _ in module.named_modules(remove_duplicate=False) if path]
    heads = [path for path in paths if path.endswith(_HEADS.get(task or "", ()))] if task in _HEADS else []
    if any(_inside(path, head) for path in adapted for head in heads):
        # PEFT would save the head whole and adapt nothing in it; without the task it adapts what it is told to.
        task, heads = None, []
    saved, tensors, biases = set(heads), {}, False
    for name in _moved(program, values):
        owner, _, leaf = name.rpartition(".")
        if not owner:
            raise ExportError(
                f"PEFT stores whole modules, but {name}, which was trained, is in none; save the program instead"
            )
        if owner in adapted:
            _check_tied(program, name, values)
            tensors[f"{adapted[owner]}.{leaf}"] = values[name]
            biases |= leaf == "bias"
        else:
            saved.add(owner)
    outer = sorted(path for path in saved if not any(_inside(path, other) for other in saved - {path}))
    # PEFT compares the ends of paths, so that further modules may be saved.
    matched = [path for path in paths if path.endswith(tuple(outer))] if outer else []
    for path in matched:
        within = next((own for own in adapted if _inside(own, path)), None)
        if within is not None:
            raise ExportError(
                f"PEFT would store {path} whole for a weight in it that was trained, and adapt nothing in it, but "
                f"{within} is adapted; leave one of them out, or save the program"
            )
        own = module.get_submodule(path).state_dict(keep_vars=True)
        tensors.update(
            {f"{path}.{leaf}": values[f"{path}.{leaf}"] for leaf in own if f"{path}.{leaf}" in values}
        )
    return Whole(task, outer, tensors, biases)


def _inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _moved(program: Program, values: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors whose values PEFT's user would not get from the base: trained ones, and those of new heads."""
    base = program.base
    kept = set(base.loaded.module.state_dict(keep_vars=True))
    # A model without files, given in Python, is its user's own, with the values that it has.
    fresh = base.loaded.unsourced if base.loaded.files else frozenset()
    found = []
    for name, own in base.tensors.items():
        if name in kept and (name in fresh or not torch.equal(values[name], own)):
            found.append(name)
    return found


def _check_tied(program: Program, name: str, values: Mapping[str, Tensor]) -> None:
    """Raise ExportError if a weight under an adapter is tied to another value, since PEFT loads it in place."""
    for other in program.base.names.get(name, ()):
        if not torch.equal(values[other], values[name]):
            raise ExportError(
                f"{name} was trained apart from {other}, to which the base ties it, and is adapted too; PEFT cannot "
                f"untie a layer that it adapts; merge the adapter, or save the program"
            )
