"""Modules of the base as PEFT names and matches them."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from surgery.common.errors import ExportError
from surgery.engine.journal import Entry
from surgery.engine.program import Program
from surgery.graph.sites import Site

# Classes that PEFT adapts as modules. Conv1D is that of transformers, by name.
_ADAPTED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# PEFT (0.21.2) merges the update of an nn.MultiheadAttention's output projection twice: once itself, and once through
# the layer within. What it computes is what counts, in both directions.
TIMES_OF_OUT_PROJ = 2


def adapts_module(root: nn.Module, path: str) -> bool:
    """True if PEFT adapts a module of the base by its class, and not its parameters one by one."""
    module = root.get_submodule(path)
    return isinstance(module, _ADAPTED) or type(module).__name__ == "Conv1D"


def site_of(program: Program, entry: Entry, record: Any) -> Site:
    """Site of a record in the base. Raises ExportError if it is not a weight of the base."""
    site = program.base.sites.by_key.get(record.key)
    if site is None or record.path != record.key.owner.removesuffix(".weight"):
        raise ExportError(
            f"{entry.id} at {record.path}: PEFT adapts only weights of the base; merge the adapter, or save the "
            f"program"
        )
    return site.deciding(record.decided)


def targets(paths: Collection[str], module: nn.Module) -> list[str] | str:
    """Value of `target_modules` with which PEFT matches these modules and no others.

    PEFT matches the end of a path: `lin` in a list also stands for `block.lin`. A pattern matches whole paths.

    Args:
        paths: Paths of the modules.
        module: The base.
    """
    wanted = set(paths)
    # IA³ compares the ends of its feedforward modules without a dot.
    others = (name for name, _ in module.named_modules() if name not in wanted)
    if wanted and any(name.endswith(tuple(wanted)) for name in others):
        return "|".join(re.escape(path) for path in sorted(wanted))
    return sorted(wanted)
