"""Batches whose rows use different adapters in one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.common.errors import PassError
from surgery.engine.program import Program
from surgery.graph.ops import operand
from surgery.graph.sites import Site
from surgery.live.adapted import derived
from surgery.live.state import LiveState

Choice = str | Sequence[str] | None


def rows_of(model: nn.Module, state: LiveState, choices: Sequence[Choice]) -> dict[str, type[nn.Module]]:
    """Classes of the layers with which row i of every batch uses the adapters of choice i, by path.

    Args:
        model: The live module.
        state: Its state.
        choices: For each row the names of its adapters; None for none.

    Raises:
        PassError: An adapted layer does not have the batch as its first axis, or the adapters are merged.
        JournalError: The program has no such adapter.
    """
    program = state.program
    _check_axes(program, len(choices))
    merged = next((e.id for e in program.journal if e.kind == "merge"), None)
    if merged:
        raise PassError(
            f"the adapters are folded into the weights, which all rows share; undo that first with "
            f"surgery.remove_(model, {merged!r})"
        )
    named = [_entries(program, choice) for choice in choices]
    groups = {key: [i for i, own in enumerate(named) if own == key] for key in dict.fromkeys(named)}
    # Layers with adapters that no row uses are listed too, so that these are switched off.
    classes: dict[str, dict[tuple[str, ...], type[nn.Module]]] = {
        p: {} for p in state.classes(model, program)
    }
    for key in groups:
        for path, cls in state.classes(model, program.only(*key)).items():
            classes.setdefault(path, {})[key] = cls
    made = {}
    for path, by_choice in classes.items():
        layer = model.get_submodule(path)
        bare = getattr(type(layer), "surgery_base", type(layer))
        parts = [(rows, by_choice.get(key, bare)) for key, rows in groups.items()]
        made[path] = _by_rows(bare, parts, len(choices))
    return made


def _entries(program: Program, choice: Choice) -> tuple[str, ...]:
    """Sorted ids of the adapters of a choice."""
    names = [choice] if isinstance(choice, str) else list(choice or ())
    return tuple(sorted({e.id for name in names for e in program.journal.find(name) if e.kind == "rewrite"}))


def _by_rows(
    base: type[nn.Module], parts: Sequence[tuple[list[int], type[nn.Module]]], count: int
) -> type[nn.Module]:
    """A layer class that runs each group of rows with the forward of its own class; `count` is the number of rows."""
    order = [row for rows, _ in parts for row in rows]
    inverse = [order.index(row) for row in range(count)]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        each, left = divmod(x.shape[0], count)
        if left or not each:
            raise PassError(
                f"the batch has {x.shape[0]} rows, but adapters were chosen for {count}; give one choice for each row"
            )
        outs = []
        for rows, cls in parts:
            forward: Callable[..., Tensor] = cls.forward
            outs.append(forward(self, x.index_select(0, _rows(rows, each, x))))
        return torch.cat(outs).index_select(0, _rows(inverse, each, x))

    return derived(base, forward)


def _rows(rows: Sequence[int], each: int, like: Tensor) -> Tensor:
    """Indices of rows in a batch where each row of the model's input is repeated `each` times in succession."""
    index = torch.tensor(rows, device=like.device)
    return (index[:, None] * each + torch.arange(each, device=like.device)).flatten()


def _check_axes(program: Program, count: int) -> None:
    """Raise PassError if the first axis of an adapted layer's input is not the batch."""
    if count < 1:
        raise PassError("no row was given; name the adapters of each row of the batch")
    batches = {
        str(node.meta["val"].shape[0])
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dim()
    }
    for entry in program.journal:
        for record in entry.sites if entry.kind == "rewrite" else ():
            site = program.base.sites.by_key.get(record.key)
            if site is not None and not _rows_first(site, batches):
                raise PassError(
                    f"{entry.id} at {record.path}: the first axis of its input is not the batch, so rows cannot have "
                    f"different adapters there; run a batch for each adapter"
                )


def _rows_first(site: Site, batches: set[str]) -> bool:
    """True if the first axis of the site's input is the batch, or a multiple of it."""
    for call in site.calls:
        first = operand(call).meta["val"].shape[0]
        symbols = first.node.expr.free_symbols if isinstance(first, torch.SymInt) else ()
        if batches.isdisjoint({str(first), *map(str, symbols)}):
            return False
    return True
