"""Weights of the base that a checkpoint stores whole: modules_to_save, biases, resized embeddings and single rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from surgery.common.errors import LoadError
from surgery.engine.contract.base import Pass
from surgery.engine.program import Program
from surgery.graph.sites import Site
from surgery.passes.delta import Delta
from surgery.passes.select.full import Full
from surgery.store.peft.checkpoint_data import Checkpoint

Copies = dict[str, tuple[Site, str]]


def token_rows(given: Checkpoint, base: Program, module: str, rows: Tensor) -> Tensor:
    """The embedding of a module with other values in the rows of `trainable_token_indices`.

    Args:
        given: The checkpoint.
        base: The base.
        module: Path of the embedding.
        rows: The rows, in the order of the indices.

    Raises:
        LoadError: The indices are not as many as the rows, or are none of the embedding.
    """
    wanted = given.config.get("trainable_token_indices")
    if isinstance(wanted, Mapping):
        wanted = next((v for name, v in wanted.items() if f".{module}".endswith(f".{name}")), None)
    table = base.base.tensors.get(f"{module}.weight")
    fits = (
        isinstance(wanted, list)
        and all(type(index) is int for index in wanted)
        and table is not None
        and table.dim() == 2
        and tuple(rows.shape) == (len(wanted), table.shape[1])
        and all(0 <= index < table.shape[0] for index in wanted)
    )
    if not fits or table is None or wanted is None:
        raise LoadError(
            f"{given.path}: its trainable_token_indices are none of {module}, or not as many as its rows "
            f"{tuple(rows.shape)}; load the base that it was made for"
        )
    return table.detach().index_copy(0, torch.tensor(wanted, dtype=torch.int64), rows.to(table.dtype))


def whole_weights(given: Checkpoint, base: Program, rest: Mapping[str, Tensor]) -> tuple[list[Pass], Copies]:
    """Passes that let the weights train which PEFT stored whole.

    PEFT copies a module of modules_to_save, so that a tied weight is untied there. A `delta` is such a copy; every
    other weight trains in place.

    Args:
        given: The checkpoint.
        base: The base.
        rest: The weights by the names of the base's tensors.

    Returns:
        The passes, and by name the site and slot of each copy.

    Raises:
        LoadError: The base has no such tensor, or one of another size.
    """
    if not rest:
        return [], {}
    unknown = [name for name in rest if name not in base.base.tensors]
    if unknown:
        raise LoadError(
            f"{given.path} contains {unknown[0]}, which this base does not have; load the base that it was made for"
        )
    for name, value in rest.items():
        own = base.base.tensors[name]
        if own.shape != value.shape:
            raise LoadError(
                f"{given.path} contains {name} {tuple(value.shape)}, but the base has {tuple(own.shape)}; give the "
                f"base the same sizes (--model-kwarg num_labels=…; new tokens with the pass vocab)"
            )
    copies = _copies(given, base, rest)
    passes: list[Pass] = []
    if copies:
        paths = dict.fromkeys(f"path:{site.path}" for site, _ in copies.values())
        biased = any(slot == "bias" for _, slot in copies.values())
        passes.append(Delta(target=",".join(paths), bias=biased, **{"as": given.label}))
    names = [n for n in rest if n not in copies and isinstance(base.base.tensors[n], nn.Parameter)]
    if names:
        passes.append(Full(target=",".join(f"path:{name}" for name in names)))
    return passes, copies


def _copies(given: Checkpoint, base: Program, rest: Mapping[str, Tensor]) -> Copies:
    """Tied weights that the checkpoint has a copy of for one of their modules, with the site and the slot."""
    modules = given.config.get("modules_to_save") or ()
    saved = (modules,) if isinstance(modules, str) else tuple(modules)
    if not saved or given.config.get("ensure_weight_tying"):
        return {}
    sites = {name: (site, slot) for site in base.sites for slot, name in _slots(site) if name in rest}
    copied = {}
    for name in rest:
        tied = base.base.names.get(name, (name,))
        if len(tied) < 2 or not _is_saved(name.rpartition(".")[0], saved):
            continue
        if name not in sites:
            # A module that is saved whole can hold both names, and copies them as one.
            other = next((alias for alias in tied if alias in sites), None)
            if other is not None and torch.equal(rest[name], rest[other]):
                copied[sites[other][0].key] = other
                sites[name] = sites[other]
                continue
            other = other or next(alias for alias in tied if alias != name)
            raise LoadError(
                f"{given.path} has a copy of {name}, which the base ties to {other}, and no op reads it under this "
                f"name; load the base without tied weights"
            )
        copied[sites[name][0].key] = name
    # Of a site with a copy, the other tensors are copies too.
    return {name: place for name, place in sites.items() if place[0].key in copied}


def _slots(site: Site) -> list[tuple[str, str]]:
    return [(slot, name) for slot, name in (("weight", site.weight), ("bias", site.bias)) if name is not None]


def _is_saved(owner: str, saved: tuple[str, ...]) -> bool:
    """True if a module or one around it is in modules_to_save, which PEFT compares with the ends of paths."""
    parts = owner.split(".")
    return any(".".join(parts[:count]).endswith(saved) for count in range(1, len(parts) + 1))
